"""Observers of a stage. Each is called after every step and decides itself what is due.

An observer is a function of (state, losses). It writes what it finds into `state.history`, and prints through
`state.run.console`; the order of the list in `train_stage` is the order in which they see a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.markup import escape
from rich.progress import Progress, TaskID
from torch import nn

from gta2cs.evaluation import Score, evaluate
from gta2cs.recipes import Losses
from gta2cs.report import progress_bar
from gta2cs.stage import Run, StageState

Observer = Callable[[StageState, Losses], None]


class LossLog:
    """Log the terms of the loss, the kept fraction and other quantities of each class, every `log_every` steps."""

    def __init__(self, run: Run) -> None:
        self.alarm = ClassAlarm(run.pair.classes.names)

    def __call__(self, state: StageState, losses: Losses) -> None:
        """Read the losses from the device. This is the only place where a step waits for it."""
        run = state.run
        if not state.due(run.config.log_every):
            return
        entry: dict[str, Any] = {"step": state.done, "terms": {k: v.item() for k, v in losses.terms.items()}}
        if not all(map(math.isfinite, entry["terms"].values())):
            raise FloatingPointError(
                f"Expected finite losses, but at step {state.done} got {entry['terms']}. A smaller `lr` usually helps."
            )
        if losses.selection is not None:
            entry["kept"] = self.alarm.shares(losses.selection)
            for warning in self.alarm.check():
                run.console.print(f"[yellow]step {state.done}: {escape(warning)}[/]")
        if losses.per_class:
            names = run.pair.classes.names
            entry["per_class"] = {k: dict(zip(names, v.tolist(), strict=True)) for k, v in losses.per_class.items()}
        state.history["losses"].append(entry)


def note_decisions(state: StageState, losses: Losses | None = None) -> None:
    """Print what the recipe has decided without labels, and keep it for the report."""
    state.history.setdefault("decisions", []).extend(state.recipe.decisions)
    for line in state.recipe.decisions:
        state.run.console.print(line, markup=False)
    state.recipe.decisions.clear()


class ClassAlarm:
    """Warn once if the teacher nearly stops predicting a class that it predicted before.

    This is the usual way in which a run fails. It is also what happens where the first net saw too much of the class.
    """

    def __init__(self, names: tuple[str, ...], patience: int = 5, floor: float = 0.05) -> None:
        self.names, self.patience, self.floor = names, patience, floor
        self.predicted: list[list[float]] = []
        self.warned: set[int] = set()

    def shares(self, selection: Any) -> dict[str, float]:
        """Add one step. Returns the kept fraction of each class that was predicted."""
        predicted, kept = selection.predicted.tolist(), selection.kept.tolist()
        self.predicted.append(predicted)
        return {n: k / p for n, p, k in zip(self.names, predicted, kept, strict=True) if p > 0}

    def check(self) -> list[str]:
        """Compare the last steps noted with the first ones."""
        if len(self.predicted) < 2 * self.patience:
            return []
        first = [sum(x) for x in zip(*self.predicted[: self.patience], strict=True)]
        last = [sum(x) for x in zip(*self.predicted[-self.patience :], strict=True)]
        dead = [
            c for c, (a, b) in enumerate(zip(first, last, strict=True)) if b < self.floor * a and c not in self.warned
        ]
        self.warned.update(dead)
        return [
            f"class '{self.names[c]}' is nearly gone from the pseudo-labels: {last[c]:.0f} pixels in the last "
            f"{self.patience} entries of the log, {first[c]:.0f} in the first (being lost, or too much before?)"
            for c in dead
        ]


class Scoring:
    """Every `eval_every` steps, score each net of the recipe on labelled target images not used for training."""

    def __call__(self, state: StageState, losses: Losses) -> None:
        """Score, if it is due."""
        run, history = state.run, state.history
        if not state.due(run.config.eval_every) or run.pair.target_val is None:
            return
        scores = note_scores(run, state.recipe.nets(), history, state.done)
        if not run.is_main:
            return
        found = ", ".join(f"{name} {score.miou:.1f}" for name, score in scores.items())
        run.console.print(f"{state.stage.recipe}, step {state.done} of {state.steps}: mIoU on target {found}")
        if kept := (history["losses"] or [{}])[-1].get("kept"):
            shares = ", ".join(f"{name} {100 * share:.0f}" for name, share in kept.items())
            run.console.print(f"  [dim]% of each predicted class that is sure enough: {escape(shares)}[/]")


def note_scores(run: Run, nets: dict[str, nn.Module], history: dict[str, Any], step: int) -> dict[str, Score]:
    """Score the nets of a stage, and keep that in its history."""
    scores = {name: score_on_target(run, net) for name, net in nets.items()}
    first = next(iter(scores.values()))
    history["scores"].append({"step": step, "miou": first.miou, "nets": {n: s.to_json() for n, s in scores.items()}})
    return scores


def score_on_target(run: Run, net: nn.Module) -> Score:
    """Score a net on labelled target images that are not used for training; on two images in a dry run.

    Rounded as the history keeps it, so that a net has the same last digit wherever it is shown.
    """
    config, pair = run.config, run.pair
    assert pair.target_val is not None
    limit = 2 if config.dry_run else None
    found = evaluate(net, pair.target_val, pair.classes, device=run.device, limit=limit, trimap=config.eval_trimap)
    return Score.from_json(found.to_json())


class Saving:
    """Save a checkpoint every `save_every` steps. It comes last, so that the saved history is complete."""

    def __call__(self, state: StageState, losses: Losses) -> None:
        """Save, if it is due."""
        if state.due(state.run.config.save_every):
            state.save()


class ProgressLine:
    """Show a progress bar, or a plain line every `log_every` steps if the output is not a terminal."""

    def __init__(self, state: StageState) -> None:
        console = state.run.console
        self.plain = not console.is_terminal
        self.bar: Progress = progress_bar(console, disable=self.plain or not state.run.is_main)
        self.task: TaskID = self.bar.add_task(state.stage.recipe, total=state.steps, completed=state.done, status="")

    def __enter__(self) -> ProgressLine:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def __call__(self, state: StageState, losses: Losses) -> None:
        """Show the terms that `LossLog` has just read, and the latest score."""
        run, history = state.run, state.history
        if not (run.is_main and state.due(run.config.log_every)):
            return
        status = "  ".join(f"{name} {value:.3f}" for name, value in history["losses"][-1]["terms"].items())
        if history["scores"] and run.pair.target_val is not None:
            status += f"  mIoU {history['scores'][-1]['miou']:.1f}"
        if self.plain:
            run.console.print(f"{state.stage.recipe}, step {state.done} of {state.steps}: {status}", markup=False)
        else:
            self.bar.update(self.task, completed=state.done, status=escape(status))
