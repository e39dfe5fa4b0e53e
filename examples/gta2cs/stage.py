"""The state of a stage while it trains, which observers read and checkpoints store."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.config import Config, Stage, check_same_run, plain
from gta2cs.datasets import Pair
from gta2cs.interrupts import NOTHING_DONE, postponed
from gta2cs.label_free import complete
from gta2cs.nets import param_groups
from gta2cs.recipes import RECIPES, Recipe
from gta2cs.run_folder import stage_folder, step_file


@dataclass
class Run:
    """What all stages share: the configuration, the two domains, the device and the console."""

    config: Config
    pair: Pair
    accelerator: Accelerator
    console: Console
    source_only: Any = None  # label-free scores of the net that the first adapting stage starts from
    choice: Any = None  # which net is deployed so far (`choosing.Choice`)
    trained: bool = False  # whether the net of the first stage predicts already
    finished: int = 0  # stages
    source_factor: float | None = None  # by which source images are enlarged to match target; None: not looked for

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return bool(self.accelerator.is_main_process)

    def where(self) -> str:
        """Say how far the run is between its stages and how to continue it, for whoever stops it here."""
        stages = self.config.stages
        if self.finished == len(stages):
            return f"Stopped before the report was whole; all {len(stages)} stages are done, --resume writes it."
        if self.finished:
            done = f"stage {self.finished} of {len(stages)} ({stages[self.finished - 1].recipe})"
            return f"Stopped after {done}; its last checkpoint is written, --resume goes on from there."
        return NOTHING_DONE + (" --resume goes on as before." if self.config.resume else "")


@dataclass
class StageState:
    """A recipe, its optimiser, how many steps are done, and the history of losses and scores.

    The history is all that observers leave behind: it is saved with every checkpoint and becomes the report.
    """

    run: Run
    index: int
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    base_lrs: list[float]  # of the optimiser's groups, before any schedule
    done: int = 0
    saved: int = 0  # the step of the last checkpoint
    history: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def build(cls, run: Run, index: int, student: nn.Module, previous: Recipe | None) -> StageState:
        """Make recipe and optimiser from the student, and whatever the recipe takes over, of the stage before."""
        config, stage, classes = run.config, run.config.stages[index], run.pair.classes

        def make_net(**changes: Any) -> nn.Module:
            return config.net.build(len(classes.names), config.data.channels, **changes)

        recipe = RECIPES[stage.recipe].build(student, len(classes.names), stage.options, make_net, previous)
        for part in recipe.modules():
            if isinstance(part, Recipe):  # the recipe itself, and those that it is made of
                part.normalised_with(*run.pair.target_train.image_format.statistics)
        recipe = recipe.to(run.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        groups = [
            *param_groups(recipe.student, lr=stage.lr, head_multiplier=config.head_multiplier),
            *recipe.extra_param_groups(stage.lr, config.head_multiplier),
        ]
        if config.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        state = cls(run, index, recipe, optimizer, [group["lr"] for group in optimizer.param_groups])
        recipe.trains_for(state.steps)
        state.history = {"name": stage.recipe, "steps": state.steps, "losses": [], "scores": [], "seconds": 0.0}
        state.history["classes"] = {"names": list(classes.names), "palette": classes.palette.tolist()}
        state.history["step_seconds"] = 0.0  # of the steps alone: no evaluation, no saving
        return state

    @property
    def stage(self) -> Stage:
        """The configuration of this stage."""
        return self.run.config.stages[self.index]

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return min(self.stage.steps, 2) if self.run.config.dry_run else self.stage.steps

    @property
    def trained(self) -> bool:
        """Whether this stage starts from a trained net: of a stage before, or loaded with its head."""
        return self.index > 0 or self.run.trained

    @property
    def seed(self) -> int:
        """Seed of data and draws, different in each stage."""
        return self.run.config.seed + 1_000_003 * self.index

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints of this stage."""
        return self.run.config.out / stage_folder(self.index, self.stage.recipe)

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps and at the end (0: only at the end) is due now."""
        return self.done == self.steps or (every > 0 and self.done % every == 0)

    def resume(self) -> bool:
        """Continue from `last.pt` if it exists and belongs to this run. The step alone decides which data come next."""
        checkpoint, accelerator = self.folder / "last.pt", self.run.accelerator
        if not (self.run.config.resume and checkpoint.is_file()):
            return False
        needs = ("config", "history", "step", "world_size", "optimizer")
        saved = load_checkpoint(checkpoint, self.run.device, needs)
        check_same_run(json.loads(saved["config"]), self.run.config, self.index, checkpoint)
        history, classes = complete(json.loads(saved["history"])), self.run.pair.classes
        if (before := history.get("classes", {}).get("names", [*classes.names])) != [*classes.names]:
            raise ValueError(
                f"Expected the classes of {checkpoint}, {before}, but the data has {[*classes.names]}. Take the change "
                "back to go on with this run, or start another one in another `out`."
            )
        if (world := saved["world_size"]) != accelerator.num_processes:
            raise ValueError(f"Expected the {world} processes of {checkpoint}, but got {accelerator.num_processes}.")
        try:
            self.recipe.load_state_dict(saved["recipe"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(saved["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            begins = " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__
            raise ValueError(
                f"Expected {checkpoint} to be a checkpoint of this run, but it does not fit: {begins}"
            ) from error
        self.done = self.saved = saved["step"]
        self.history = {**self.history, **history}
        self.began = time.perf_counter() - self.history["seconds"]
        self.run.source_factor = self.history.get("source_factor")
        return True

    def save(self) -> None:
        """Write `last.pt`, and a `step_000100.pt` without optimiser state where checkpoints are kept."""
        config, accelerator = self.run.config, self.run.accelerator
        if not is_finite(self.recipe.student):  # between two entries of the log; such a file would replace a good one
            raise FloatingPointError(
                f"Expected finite weights, but after step {self.done} the student holds NaN or infinity, so it is not "
                "saved. A smaller `lr` usually helps."
            )
        self.history["seconds"] = time.perf_counter() - self.began
        agree = parameters_agree(self.recipe.student, accelerator)
        if not self.run.is_main:
            self.saved = self.done
            return
        saved = {
            "recipe": self.recipe.state_dict(),
            "step": self.done,
            "world_size": accelerator.num_processes,
            "parameters_agree": agree,
            "history": json.dumps(self.history),
            "config": json.dumps(plain(config)),
        }
        with postponed():  # both files, and the note that they are there
            if config.keep_checkpoints:
                save_checkpoint(self.folder / step_file(self.done), saved)
            if accelerator.scaler is not None:
                saved["scaler"] = accelerator.scaler.state_dict()
            save_checkpoint(self.folder / "last.pt", {**saved, "optimizer": self.optimizer.state_dict()})
            self.saved = self.done

    def where(self) -> str:
        """Say how far the run is and how to continue it, for whoever stops it here."""
        stage = f"stage {self.index + 1} of {len(self.run.config.stages)} ({self.stage.recipe})"
        if self.saved:
            kept = f"the last checkpoint is of step {self.saved}"
        elif self.index:
            kept = "the last checkpoint is of the stage before"
        else:
            return f"Stopped in {stage} after step {self.done} of {self.steps}; no checkpoint was due yet."
        return f"Stopped in {stage} after step {self.done} of {self.steps}; {kept}, --resume goes on from there."


def is_finite(net: nn.Module) -> bool:
    """Whether all weights and statistics of a net are numbers."""
    return all(bool(value.isfinite().all()) for value in net.state_dict().values() if value.is_floating_point())


def parameters_agree(net: nn.Module, accelerator: Accelerator) -> bool:
    """Whether all processes have the same weights, a cheap check that no rank has diverged."""
    total = torch.stack([p.detach().float().sum() for p in net.parameters()]).sum()
    totals = accelerator.gather(total[None])
    return bool((totals == totals[0]).all())
