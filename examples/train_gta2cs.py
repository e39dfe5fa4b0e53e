"""Train a segmentation net on a labelled source domain and adapt it to an unlabelled target domain.

    python examples/train_gta2cs.py                                    # the built-in toy pair: two CPU cores, minutes
    python examples/train_gta2cs.py --data.pair folder --data.data_root /data/mine   # your own folders (docs/data.md)
    python examples/train_gta2cs.py --config examples/configs/dacs_gta2cs.yaml --data.data_root /data
    python examples/train_gta2cs.py --config ... --check-data     # what is missing or wrong in the folders?
    torchrun --nproc_per_node 4 examples/train_gta2cs.py --config ...  # several processes; batch_size is per process
    OMP_NUM_THREADS=1 python examples/train_gta2cs.py             # compute threads; by default one per free core

A run is a list of stages. Each stage is a recipe with a number of steps, and starts from the student (the net that is
trained and deployed) of the stage before it. Read `main` and `train` for the run, `train_stage` and `TrainingStep` for
the loop, `gta2cs/recipes/` for the methods (the forward of a recipe Module returns the training loss) and
`gta2cs/observers.py` for everything that only observes. All of step k is a function of (seed, k, global sample index),
and dropout is a function of (seed, k, process), so `--resume` continues exactly.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gta2cs.interrupts import NOTHING_DONE, end_with, leave_at_once, said_where, stop_if_asked

if __name__ == "__main__":
    leave_at_once(NOTHING_DONE)  # as early as possible

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gta2cs import report
from gta2cs.checking import CheckReport, nothing_opened
from gta2cs.choosing import (
    CHOSEN,
    Choosing,
    check_select,
    chosen_net,
    first_adapting,
    resume_choice,
    score_without_labels,
)
from gta2cs.config import Config, DataConfig, NetConfig, Stage, check_numbers, parse, plain
from gta2cs.datasets import Pair, build_pair, check_data
from gta2cs.evaluation import Score
from gta2cs.files import WriteError
from gta2cs.label_free import BY_CLASS, NoScoreError
from gta2cs.loading import Batch, StepData, sample_generator, step_loader
from gta2cs.matching import match_scale
from gta2cs.observers import (
    LossLog,
    Observer,
    ProgressLine,
    Saving,
    Scoring,
    note_decisions,
    note_scores,
    score_on_target,
)
from gta2cs.options import FAULTS, in_a_line
from gta2cs.pretrained import WeightsError, load_init
from gta2cs.reading import ImageFormat
from gta2cs.recipes import RECIPES, Draws, Losses, Preparation, Recipe
from gta2cs.recipes.duda import check_large_nets, no_large_nets
from gta2cs.recipes.self_training import LEARNED
from gta2cs.run_folder import clear_folder, clear_report, own_folder, stage_title
from gta2cs.stage import Run, StageState
from gta2cs.summary import write_report
from gta2cs.target_statistics import has_statistics, note_truth, try_target_statistics
from gta2cs.tracking import Tracking, check_tracker, send_pictures, start_tracking
from udakit import adapt_batch_norm, copy_net

__all__ = ["RECIPES", "Config", "DataConfig", "NetConfig", "Stage", "main", "parse", "plain"]

console = Console(soft_wrap=True)


# --------------------------------------------------------------------------------------------------------------------
# The loop


def train_stage(
    run: Run, index: int, student: torch.nn.Module, previous: Recipe | None, sampler: Any
) -> tuple[Recipe, dict[str, Any]]:
    """Run one stage, from the student and the recipe of the one before. `sampler` draws source images, None: evenly.

    Returns its recipe and its history of losses and scores.
    """
    config = run.config
    state = StageState.build(run, index, student, previous)
    if run.is_main and index == 0 and not config.resume:
        clear_folder(config.out)  # not earlier: the net may come from a file in it, and a refused run changes nothing
    if not state.resume():
        with explained(state):
            prepare(state)
    if run.is_main and state.done < state.steps:  # not earlier: where resuming is refused, the old file stays
        report.write_text(config.out / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
        clear_report(config.out)

    step = TrainingStep(state)
    loader = step_loader(stage_data(state, sampler), start=state.done, stop=state.steps, workers=config.data.workers)
    with ProgressLine(state) as progress, said_where(state.where), explained(state):
        choosing = Choosing(state)
        observers: list[Observer] = [LossLog(run), note_decisions, Scoring(), choosing]
        observers += [progress, Tracking(), Saving()]
        for batch in loader:
            stop_if_asked()
            losses = step(batch)
            for observer in observers:
                observer(state, losses)
    return state.recipe, state.history


@contextmanager
def explained(state: StageState) -> Iterator[None]:
    """Add to an error of the user how far the stage is and, for an unreadable file, what lists all of them."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError) as error:
        said = str(error) if isinstance(error, (WriteError, FloatingPointError, NoScoreError)) else words_of(error)
        if not said:
            raise
        others = " --check-data lists all such files." if said.startswith("Cannot read") else ""
        raise type(error)(f"{said}{others} {state.where()}") from None


class TrainingStep:
    """One optimiser step. Everything random in it is a function of (seed, step, sample)."""

    def __init__(self, state: StageState) -> None:
        self.state, run = state, state.run
        self.wrapped, self.optimizer = run.accelerator.prepare(state.recipe, state.optimizer)
        batch_size, self.rank = run.config.batch_size, run.accelerator.process_index
        self.samples = range(self.rank * batch_size, (self.rank + 1) * batch_size)

    def __call__(self, batch: Batch) -> Losses:
        """Forward, backward, optimiser, teachers."""
        state, device = self.state, self.state.run.device
        began, step = time.perf_counter(), state.done
        # Dropout and similar layers draw from the global generator, so it is seeded by the step, too.
        torch.manual_seed(sample_generator(state.seed, step, self.rank, "net").initial_seed())
        for group, base in zip(self.optimizer.param_groups, state.base_lrs, strict=True):
            group["lr"] = base * lr_factor(step, state.steps, state.stage)

        losses: Losses = self.wrapped(
            Batch(*(x.to(device, non_blocking=True) for x in batch)), Draws(state.seed, step, self.samples, device)
        )
        self.optimizer.zero_grad(set_to_none=True)
        state.run.accelerator.backward(losses.total)
        self.optimizer.step()
        state.recipe.after_step()
        state.done += 1
        state.history["step_seconds"] += time.perf_counter() - began
        return losses


def lr_factor(step: int, steps: int, stage: Stage) -> float:
    """Linear warm-up, then polynomial decay to 0."""
    warm = min(1.0, (step + 1) / stage.lr_warmup) if stage.lr_warmup else 1.0
    return warm * (1 - step / steps) ** stage.lr_power


def prepare(state: StageState) -> None:
    """Let the recipe see images of both domains once, before its first step."""
    run = state.run
    match_source_scale(state)
    note_decisions(state)
    state.recipe.prepare(
        Preparation(
            plain_batches(run),
            seed=run.config.seed,
            folder=run.config.out if run.is_main else None,
            resume=run.config.resume,
            console=run.console if run.is_main else None,
            trained=state.trained,
        )
    )
    note_decisions(state)


def match_source_scale(state: StageState) -> None:
    """Find the scale of the target domain before adaptation starts, with a net that was trained on source."""
    run, data = state.run, state.run.config.data
    wanted = state.recipe.MATCH_SCALE if data.match_scale is None else data.match_scale
    if wanted and state.trained and state.index == first_adapting(run.config):
        score = partial(score_without_labels, run, whose=f"the net that {state.stage.recipe} starts from")
        scale, found = match_scale(score, state.recipe.student)
        run.source_factor = 1 / scale
        state.history["scale_scores"] = {f"{tried:.2f}": round(score, 4) for tried, score in found.items()}
        listed = ", ".join(f"{tried:.2g}: {100 * score:.1f}" for tried, score in found.items())
        factor = run.source_factor
        enlarged = "source images keep their size" if factor == 1 else f"source images are enlarged {factor:.2g} times"
        state.recipe.decisions.append(
            f"scale of target images by {BY_CLASS.replace('_', ' ')}, %: {listed}; "
            f"{enlarged}, times a draw of data.target_scale"
        )
    state.history["source_factor"] = run.source_factor


# --------------------------------------------------------------------------------------------------------------------
# Data


def stage_data(state: StageState, sampler: Any) -> StepData:
    """Return the crops of both domains as a map from step to batch."""
    run, data = state.run, state.run.config.data
    scale = data.source_scale
    if run.source_factor is not None:
        scale = (data.target_scale[0] * run.source_factor, data.target_scale[1] * run.source_factor)
    return StepData(
        run.pair.source_train,
        run.pair.target_train,
        batch_size=run.config.batch_size,
        crop=data.crop,
        seed=state.seed,
        source_scale=scale,
        target_scale=data.target_scale,
        sampler=sampler,
        rare_class_pixels=data.rare_class_pixels,
        rank=run.accelerator.process_index,
    )


def plain_batches(run: Run) -> Callable[[int, int], Iterator[Batch]]:
    """Return a function of (start, stop) that yields crops of these steps, not scaled and equal on all ranks."""
    config, pair = run.config, run.pair
    data = StepData(
        pair.source_train, pair.target_train, batch_size=config.batch_size, crop=config.data.crop, seed=config.seed
    )

    def batches(start: int, stop: int) -> Iterator[Batch]:
        for batch in step_loader(data, start=start, stop=min(stop, 2) if config.dry_run else stop):
            yield Batch(*(x.to(run.device) for x in batch))

    return batches


def target_crops(run: Run) -> Iterator[Tensor]:
    """Yield the batches of target images from which BatchNorm statistics come, the same whatever ran before."""
    return (batch.target_images for batch in plain_batches(run)(0, 50))


def rare_class_sampler(run: Run) -> Any:
    """Build the sampler of source images, or None for uniform draws."""
    data = run.config.data
    if data.rare_class_temperature is None:
        return None
    from udakit import RareClassSampler, count_classes

    labels = run.pair.source_train.labels
    indices = track(
        range(len(labels)), "counting classes", console=run.console, transient=True, disable=not run.is_main
    )
    counts = count_classes((labels[i] for i in indices), num_classes=len(run.pair.classes.names))
    return RareClassSampler(counts, temperature=data.rare_class_temperature, min_pixels=data.rare_class_image_pixels)


def open_pair(config: Config) -> Pair:
    """Open the two domains. With `data.oracle`, labelled target images replace the source."""
    data = config.data
    pair = build_pair(
        data.pair,
        data_root=data.data_root,
        source_root=data.source_root,
        target_root=data.target_root,
        source_list=data.source_list,
        source_size=data.source_size,
        target_size=data.target_size,
        channels=data.channels,
        mean=data.mean,
        std=data.std,
        source_range=data.source_range,
        target_range=data.target_range,
        cache=data.cache,
        strict=not config.check_data,
    )
    if not data.oracle:
        return pair
    if pair.target_train_labelled is None:
        raise ValueError(
            f"Expected `data.pair` to have target training labels for `data.oracle`, but {data.pair!r} has none."
        )
    return dataclasses.replace(pair, source_train=pair.target_train_labelled())


# --------------------------------------------------------------------------------------------------------------------
# The run


def main(config: Config) -> dict[str, Score]:
    """Train every stage, then write the report. Returns the rows of its table."""
    if config.check_data:
        found = checked(config)
        console.print(found)
        sys.exit(0 if found.ok else 1)
    check_stages(config)
    check_large_nets(config)
    accelerator = make_accelerator(config)
    replaced = config.overwrite or config.dry_run
    with (
        own_folder(config.out, resume=config.resume, overwrite=replaced)
        if accelerator.is_main_process
        else nullcontext()
    ):
        said = console if accelerator.is_main_process else Console(quiet=True)
        run = Run(config, open_pair(config), accelerator, said)
        with said_where(run.where):
            return train(run)


def checked(config: Config) -> CheckReport:
    """Report all problems of the data and of the options, instead of stopping at the first one."""
    try:
        found = check_data(open_pair(config))
    except (OSError, ValueError) as error:  # no folder: still a report
        found = nothing_opened(error)
    try:
        check_stages(config)
    except ValueError as error:
        if not any(str(error) in line for line in found.lines()):
            found.add("refused", str(error))
    return found


def train(run: Run) -> dict[str, Score]:
    """Train every stage, with the folder of the run locked, then write the report."""
    config, pair = run.config, run.pair
    torch.manual_seed(config.seed)
    student = config.net.build(len(pair.classes.names), config.data.channels)
    if config.init is not None:
        load_init(student, config.init, take=config.net.take)
    run.trained = student.head_loaded
    resume_choice(run)
    start_tracking(run.accelerator, config)  # not earlier, so that a refused run leaves no trace there

    rows: dict[str, Score] = {}
    nets: dict[str, torch.nn.Module] = {}
    histories = []
    recipe = None
    sampler = rare_class_sampler(run)
    for index, stage in enumerate(config.stages):
        recipe, history = train_stage(run, index, student, recipe, sampler)
        run.finished = index + 1
        histories.append(history)
        student = recipe.student
        title = stage_title([stage.recipe for stage in config.stages], index)
        if config.init is not None and pair.target_val is not None and "source_only_truth" in history:
            rows["source_only (init)"] = Score.from_json(history["source_only_truth"])  # what adaptation starts from
        labelled = pair.target_val is not None  # without labels there is no score against the truth
        if labelled and not any(entry["step"] == history["steps"] for entry in history["scores"]):
            note_scores(run, recipe.nets(), history, history["steps"])  # they came later than the stage was trained
        for name, net in recipe.nets().items():
            row = title if len(recipe.nets()) == 1 else f"{title}, {name}"
            if labelled:
                rows[row] = Score.from_json(history["scores"][-1]["nets"][name])
            nets[row] = copy_net(net)  # because the next stage trains it further
        if stage.recipe == "source_only" and labelled and has_statistics(student):
            adapted = adapt_batch_norm(student, target_crops(run))
            rows[f"{title} + BatchNorm statistics of target"] = score_on_target(run, adapted)

    run.accelerator.wait_for_everyone()  # the first process has written best.pt
    nets[CHOSEN] = try_target_statistics(run, chosen_net(run, student), target_crops(run), histories[-1])
    if pair.target_val is not None:
        rows[CHOSEN] = score_on_target(run, nets[CHOSEN])
        note_truth(histories[-1], rows[CHOSEN])
    if run.is_main:
        write_report(run, rows, nets, histories)
        send_pictures(run.accelerator, config.out, step=sum(stage.steps for stage in config.stages))
    run.accelerator.end_training()
    return rows


def check_stages(config: Config) -> None:
    """Refuse an unknown recipe or option, and numbers that no run can have, before any data is read."""
    data = config.data
    check_numbers(config)
    _ = ImageFormat(data.channels, None, data.mean, data.std).statistics  # refuses what it cannot normalise
    if not config.stages and not config.check_data:
        raise ValueError("Expected `stages` to name at least one recipe, but got an empty list.")
    before = ""
    for stage in config.stages:
        if stage.recipe not in RECIPES:
            raise ValueError(f"Expected `recipe` to be one of {sorted(RECIPES)}, but got {stage.recipe!r}.")
        options = RECIPES[stage.recipe].parse(stage.options)
        for style in (LEARNED, "color"):
            if config.data.channels != 3 and asks_for(options, "translate", style):
                raise ValueError(
                    f"Expected `translate` of {stage.recipe} to be fourier, histogram or none for `data.channels` "
                    f"{config.data.channels}, but got {style!r}, which needs images with three channels."
                )
        if stage.recipe == "duda" and not options.large_from and before != "duda_pre":
            raise no_large_nets(before or "no stage")
        before = stage.recipe
    check_select(config)


def asks_for(options: Any, key: str, value: object) -> bool:
    """Whether the options, or nested options, have this value for the key."""
    if dataclasses.is_dataclass(options):
        options = vars(options)
    if not isinstance(options, dict):
        return False
    return options.get(key) == value or any(asks_for(inner, key, value) for inner in options.values())


def make_accelerator(config: Config) -> Accelerator:
    """Find the device and the other processes."""
    # Under torchrun without a GPU, accelerate starts independent single processes unless told that the CPU is meant.
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    tracker = None if config.log_with == "none" else config.log_with
    idle = any(RECIPES[stage.recipe].IDLE_PARAMETERS for stage in config.stages)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=on_cpu,
        log_with=tracker,
        project_dir=config.out if tracker else None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=idle)],
    )
    if accelerator.num_processes != (world := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"Expected {world} processes to work together, but accelerate found {accelerator.num_processes}."
        )
    check_tracker(accelerator, config)
    return accelerator


def words_of(error: Exception) -> str:
    """The message of an error. For an error in a data-loading process, the text below the trace of that process."""
    below = re.match(r"Caught .*\n\w+: ((?:Expected|Cannot) .*)\Z", str(error), re.DOTALL)
    said = below[1].rstrip() if below else str(error)
    if said.startswith("Expected more than 1 value per channel"):  # torch's
        return (
            "Expected batches large enough for the net's normalisation layers, but one of them got a single value for "
            "each channel. Use batch_size 2 or more, a larger crop or, where a net is scored, larger images."
        )
    return said if said.startswith(("Expected", "Cannot")) else ""


def command() -> int:
    """Run from the command line; only one process prints."""

    def run() -> None:
        main(parse())

    faults = (*FAULTS, FloatingPointError, ModuleNotFoundError, WeightsError)
    quiet = int(os.environ.get("RANK", "0")) != 0
    return in_a_line(run, NOTHING_DONE, faults=faults, words=words_of, quiet=quiet)


if __name__ == "__main__":
    end_with(command())
