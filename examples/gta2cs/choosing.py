"""Choose the net of a run to deploy, without target labels: `best.pt` and the alarm.

Candidates are the source-only net (the net that the first adapting stage starts from) and, at every evaluation, the
student and the teacher. `select` says how one is chosen: `last`, `source_or_last`, or the score to be highest.
Except for `last`, a net in which a class of the source-only net has collapsed is never chosen.
`gta2cs.target_statistics` then looks at the BatchNorm statistics of the net of the whole run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import nn

from gta2cs.checkpoints import load_checkpoint, load_net, save_checkpoint
from gta2cs.config import Config, check_same_run, plain
from gta2cs.label_free import (
    DEFAULT,
    DIRECTIONS,
    FACTOR,
    PRESENT,
    VIEWS,
    LabelFree,
    NoScoreError,
    can_be_deployed,
    collapsed,
    complete,
    direction_of,
    measure,
    only_class,
    views_of,
    with_statistics,
)
from gta2cs.observers import score_on_target
from gta2cs.recipes import Losses
from gta2cs.run_folder import stage_folder, stage_title
from gta2cs.stage import Run, StageState
from udakit import copy_net

SOURCE_ONLY = "source_only"
CHOSEN = "chosen without labels"  # the row of `best.pt`
STATISTICS = "target_statistics"  # the entry of a history
ONE_CLASS = (
    "Such a net cannot contradict itself, so its scores say nothing. If target shows other classes, train longer on "
    "source before you adapt, and look at what --check-data says of the labels."
)
BY_CHANCE = (
    "nothing has trained the last layer of the net, so what is called the source-only net labels by chance. Name a "
    "trained net by `init`, or put a stage of source_only before."
)
LABELLED_BY_CHANCE = (  # the same, of a run that is finished
    "**Nothing had trained the last layer of the net that adaptation started from.** What is called the source-only "
    "net labels by chance, so neither its scores nor a comparison with it say anything."
)
LOST = (
    "best.pt is missing, and with it what this run had chosen. The source-only net and the nets of the evaluations to "
    "come are compared."
)
GUARD = DEFAULT  # what `source_or_last` compares by


def score_of(select: str) -> str:
    """The score that `select` compares nets by; with "last", which compares none, the one that is shown."""
    name = select.removeprefix("-")
    return name if name in DIRECTIONS else GUARD


@dataclass
class Choice:
    """The deployed net: where it comes from, and the score for which it was chosen."""

    recipe: str  # the title of its stage
    stage: int
    step: int
    net: str
    score: str = "last"
    value: float | None = None
    target_statistics: float = 0.0  # share of BatchNorm's statistics that are not those of its training
    trained: float | None = None  # the value with those of its training, where `value` is another

    @property
    def as_trained(self) -> float | None:
        """The value by which nets are compared: that with the statistics of its training."""
        return self.value if self.trained is None else self.trained

    @property
    def title(self) -> str:
        """Name of the net in a row of a table."""
        starts = self.recipe == SOURCE_ONLY and self.net == SOURCE_ONLY
        title = "source-only net" if starts else f"{self.net} of {self.recipe}, step {self.step}"
        return title + with_statistics(self.target_statistics)


def check_select(config: Config) -> None:
    """Refuse an unknown score before any data is read."""
    allowed = ["last", "source_or_last", *DIRECTIONS]
    if config.select not in allowed and config.select.removeprefix("-") not in DIRECTIONS:
        raise ValueError(
            f"Expected `select` to be one of {allowed}, the scores also with a minus before them, but got "
            f"{config.select!r}."
        )
    unknown = [view for view in config.score_views if view not in VIEWS]
    if unknown:
        raise ValueError(f"Expected `score_views` to be among {[*VIEWS]}, but got {unknown}.")
    if config.score_images < 1:
        raise ValueError(f"Expected `score_images` to be at least 1, but got {config.score_images}.")


def first_adapting(config: Config) -> int | None:
    """Index of the first stage that uses target images; None if there is none."""
    return next((i for i, stage in enumerate(config.stages) if stage.recipe != SOURCE_ONLY), None)


class Choosing:
    """At every evaluation, compute label-free scores, check the alarm, and write `best.pt` for the best net so far."""

    def __init__(self, state: StageState) -> None:
        self.state, run = state, state.run
        self.first = first_adapting(run.config)  # a stage; the nets of those before it are not offered
        state.history.setdefault("label_free", [])
        if state.done == 0 and state.index == (self.first or 0):
            drop_choice(run)  # of a run that was stopped before its first checkpoint: these steps come again
        if state.index == self.first and state.done == 0:
            found = score_without_labels(
                run,
                state.recipe.student,
                whose=f"the net that {state.stage.recipe} starts from",
                views=run.config.score_views,
            )
            state.history["source_only"] = found.to_json()
            if state.index == 0 and run.pair.target_val is not None:  # otherwise the stage before has scored it
                state.history["source_only_truth"] = score_on_target(run, state.recipe.student).to_json()
            self._offer(SOURCE_ONLY, SOURCE_ONLY, state.recipe.student, found, step=0)
            if state.index == 0 and run.is_main:  # no stage before it keeps the net
                save_choice(run, state.recipe.student, 0, state.history, source_only_file(run))
            if (only := only_class(found.shares)) is not None:
                name = run.pair.classes.names[only]
                run.console.print(
                    f"[yellow]The net that {state.stage.recipe} starts from predicts only '{escape(name)}' on target. "
                    f"{ONE_CLASS}[/]"
                )
            if not state.trained:
                state.history["by_chance"] = True
                run.console.print(f"[yellow]{state.stage.recipe}: {BY_CHANCE}[/]")
        if "source_only" in state.history:
            run.source_only = LabelFree.from_json(state.history["source_only"])
        self.alarm = ShareAlarm(run.pair.classes.names, run.source_only.shares if run.source_only else None)
        for entry in state.history["label_free"]:  # what it has said before the run was resumed
            for name in filter(can_be_deployed, entry["nets"]):
                self.alarm(name, entry["nets"][name]["shares"])
        self._resume()
        if state.done == state.steps and not state.history["label_free"]:  # finished by a version without such scores
            self(state)

    def __call__(self, state: StageState, losses: Losses | None = None) -> None:
        """Score where it is due."""
        run = state.run
        if not state.due(run.config.eval_every):
            return
        nets = state.recipe.nets()
        found = {
            name: score_without_labels(
                run,
                net,
                whose=f"the {name} of {state.stage.recipe}, step {state.done}",
                views=run.config.score_views,
            )
            for name, net in nets.items()
        }
        state.history["label_free"].append(
            {"step": state.done, "nets": {name: scores.to_json() for name, scores in found.items()}}
        )
        for name, net in nets.items():
            if can_be_deployed(name):
                self._offer(state.stage.recipe, name, net, found[name], step=state.done)
                for warning in self.alarm(name, found[name].shares):
                    state.history.setdefault("alarms", []).append(f"{state.stage.recipe}, step {state.done}: {warning}")
                    run.console.print(f"[yellow]step {state.done}: {escape(warning)}[/]")
        if run.is_main:
            shown = score_of(run.config.select)
            place = "" if state.history["scores"] else f"{state.stage.recipe}, step {state.done} of {state.steps}:"
            values = [f"{name} {100 * scores.scores[shown]:z.1f}" for name, scores in found.items()]
            if run.source_only is not None:
                values.append(f"source-only net {100 * run.source_only.scores[shown]:z.1f}")
            named = shown.replace("_", " ")
            run.console.print(f"{place or ' '} without labels, {named}, %: {', '.join(values)}", markup=False)

    def _resume(self) -> None:
        """Bring the choice of a resumed run in line with its stages."""
        state, run = self.state, self.state.run
        ends = state.index == len(run.config.stages) - 1
        if state.done < state.steps and run.choice is None and run.source_only is not None:
            if run.config.select not in ("last", "source_or_last"):
                run.console.print(f"[yellow]{LOST}[/]")
            if run.config.select != "last":
                self._return_to_source_only()
        if run.config.select == "source_or_last" and ends and state.done == state.steps and state.history["label_free"]:
            name, net = next(iter(state.recipe.nets().items()))  # stages may have come or gone since it was chosen
            found = LabelFree.from_json(state.history["label_free"][-1]["nets"][name])
            self._offer(state.stage.recipe, name, net, found, step=state.done)

    def _return_to_source_only(self) -> None:
        """Make the source-only net the one to deploy; where no file holds it, what was chosen stays."""
        run, file = self.state.run, source_only_file(self.state.run)
        kept = run.choice is not None and run.choice.net == SOURCE_ONLY
        if file.is_file() and not kept:
            net = copy_net(self.state.recipe.student)
            load_net(net, file)
            self._take(SOURCE_ONLY, SOURCE_ONLY, net, run.source_only, step=0)

    def _offer(self, recipe: str, name: str, net: nn.Module, found: LabelFree, *, step: int) -> None:
        """Make a net the one to deploy, if `select` says so."""
        run, select, index = self.state.run, self.state.run.config.select, self.state.index
        starts = name == SOURCE_ONLY
        if not starts and self.first is not None and index < self.first:
            return  # the net of a source-only stage is offered where the next stage starts from it
        ends = index == len(run.config.stages) - 1 and step == self.state.steps
        last = ends and name == next(iter(self.state.recipe.nets()))
        if select == "last":
            taken = last
        elif starts:
            taken = True
        elif select == "source_or_last":
            taken = last and self._is_better(found, run.source_only)
            if last and not taken:
                self._return_to_source_only()
        else:
            taken = self._is_better(found, run.choice or run.source_only)
        if taken:
            self._take(recipe, name, net, found, step=step)

    def _is_better(self, found: LabelFree, than: LabelFree | Choice | None) -> bool:
        """Whether a net has a better score than the source-only or the chosen net, and no class that has collapsed."""
        run, select = self.state.run, self.state.run.config.select
        score, sign = score_of(select), direction_of(select)
        known = than.as_trained if isinstance(than, Choice) else than and than.scores.get(score)
        if known is not None and not sign * found.scores[score] > sign * known:
            return False
        return run.source_only is None or not collapsed(run.source_only.shares, found.shares)

    def _take(self, recipe: str, name: str, net: nn.Module, found: LabelFree, *, step: int) -> None:
        """Make a net the one to deploy."""
        run, starts = self.state.run, name == SOURCE_ONLY
        title = recipe if starts else stage_title([stage.recipe for stage in run.config.stages], self.state.index)
        place = (self.first or 0, 0) if starts else (self.state.index, step)
        select, score = run.config.select, score_of(run.config.select)
        run.choice = Choice(title, *place, name, select if select == "last" else score, found.scores[score])
        if run.is_main:
            history = self.state.history | ({"source_only": found.to_json()} if starts else {})
            save_choice(run, net, 0 if starts else self.state.done, history)


def score_without_labels(
    run: Run, net: nn.Module, known: Sequence[float] | None = None, *, whose: str, views: Sequence[str] = ()
) -> LabelFree:
    """Score a net on the target training images that are used for every net of the run.

    Rounded as the history keeps it: before and after a run is resumed, two nets compare the same. `known` are the class
    shares that it is compared with, by default those of the source-only net.
    """
    config = run.config
    try:
        found = measure(
            net,
            run.pair.target_train,
            run.pair.classes,
            count=2 if config.dry_run else config.score_images,
            views=views_of(config.select, [*views, "mirror"]),
            known=known or (run.source_only.shares if run.source_only else None),
            device=run.device,
        )
        return LabelFree.from_json(found.to_json())
    except ValueError as error:
        raise NoScoreError(f"Expected a label-free score of {whose}, but got none. {error}") from error


class ShareAlarm:
    """Warn once about a class if its predicted share shrinks or grows much compared with the source-only net's.

    The source-only net may be wrong itself, so a warning says what is known, and what either net may have done.
    """

    def __init__(self, names: Sequence[str], reference: Sequence[float] | None, factor: float = FACTOR) -> None:
        self.names, self.reference, self.factor = names, reference, factor
        self.warned: set[tuple[str, str, bool]] = set()

    def __call__(self, net: str, shares: Sequence[float]) -> list[str]:
        """Compare one net's shares; a class that neither net predicts at 0.1 % of the pixels says nothing."""
        warnings = []
        for name, before, now in zip(self.names, self.reference or (), shares, strict=False):
            grown = now > self.factor * max(before, PRESENT)
            gone = before >= PRESENT and now < before / self.factor
            if (grown or gone) and (net, name, grown) not in self.warned:
                self.warned.add((net, name, grown))
                doubt = "taken for it too often now, or missed before" if grown else "being lost, or too much before"
                warnings.append(
                    f"class '{name}' {'grows' if grown else 'shrinks'}: the {net} predicts it at {100 * now:.2g} % of "
                    f"the pixels, the source-only net at {100 * before:.2g} % ({doubt}?)"
                )
        return warnings


# --------------------------------------------------------------------------------------------------------------------
# best.pt


def best_path(run: Run) -> Path:
    """Path of the chosen net."""
    return run.config.out / "best.pt"


def source_only_file(run: Run) -> Path:
    """Where the net lies that the first adapting stage starts from: in the stage before, or in a file of its own."""
    index = first_adapting(run.config) or 0
    if index == 0:
        return run.config.out / "source_only.pt"
    return run.config.out / stage_folder(index - 1, run.config.stages[index - 1].recipe) / "last.pt"


def save_choice(run: Run, net: nn.Module, step: int, history: dict[str, Any], path: Path | None = None) -> None:
    """Write the chosen net as the student of a checkpoint (`best.pt`), so that it can be read like the others."""
    saved = {
        "recipe": {f"student.{k}": v for k, v in net.state_dict().items()},
        "step": step,
        "choice": json.dumps(asdict(run.choice) if run.choice else None),
        "history": json.dumps(history),
        "config": json.dumps(plain(run.config)),
    }
    save_checkpoint(path or best_path(run), saved)


def resume_choice(run: Run) -> None:
    """Start a new choice, or continue the choice of a resumed run.

    Raises:
        ValueError: `best.pt` holds a net that this configuration does not train. It is written at every evaluation, so
            it can be ahead of the checkpoints, which are checked as well.
    """
    path = best_path(run)
    if run.config.resume and path.is_file():
        if not begun(run.config):
            return  # `Choosing` drops it, once the stages before are known to be of this run
        opened, score = load_checkpoint(path, needs=("choice", "history", "config")), score_of(run.config.select)
        saved = json.loads(opened["choice"])
        run.choice = None if saved is None else Choice(**saved)
        if run.choice is not None:
            trained = run.choice.stage - (run.choice.net == SOURCE_ONLY)  # that net is of the stages before
            check_same_run(json.loads(opened["config"]), run.config, trained, path)
        if run.choice is not None and run.choice.score not in ("last", score):  # `source_or_last` had another one
            history = complete(json.loads(opened["history"]))
            if run.choice.target_statistics:
                found = history[STATISTICS]
                run.choice.trained = found["trained"]["scores"].get(score) if "trained" in found else None
            elif run.choice.net == SOURCE_ONLY:
                found = history["source_only"]
            else:
                found = history["label_free"][-1]["nets"][run.choice.net]
            run.choice.score, run.choice.value = score, found["scores"].get(score)


def begun(config: Config) -> bool:
    """Whether the first stage whose nets can be chosen has a checkpoint."""
    index = first_adapting(config) or 0
    return (config.out / stage_folder(index, config.stages[index].recipe) / "last.pt").is_file()


def drop_choice(run: Run) -> None:
    """Forget what was chosen so far."""
    run.choice = None
    if run.is_main:
        best_path(run).unlink(missing_ok=True)


def chosen_net(run: Run, like: nn.Module) -> nn.Module:
    """The net of `best.pt`, in eval mode: a copy of one that is built the same."""
    path, net = best_path(run), copy_net(like)
    if not path.is_file():  # of a resumed run: weights of earlier steps are nowhere else
        raise FileNotFoundError(
            f"Expected the net that was chosen without labels in {path}, but there is no such file. "
            f"`compare_runs.py {run.config.out}` ranks the nets that the run still has."
        )
    load_net(net, path)
    return net.eval()
