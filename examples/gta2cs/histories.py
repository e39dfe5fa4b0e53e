"""Read the scores of a run's nets from its folder: without labels and, if there are target labels, the true mIoU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gta2cs.checkpoints import load_checkpoint
from gta2cs.config import Config
from gta2cs.evaluation import headline
from gta2cs.label_free import can_be_deployed, completed
from gta2cs.run_folder import stage_folder, stage_title, step_file

# What it raises to read a file that the loop did not write so.
MISREAD = (AttributeError, IndexError, KeyError, StopIteration, TypeError, ZeroDivisionError)


class StageSaved(NamedTuple):
    """Where the checkpoints of a stage are."""

    folder: str
    before: int  # steps of the stages before it
    saved: int  # the step of its last.pt, within the stage


@dataclass
class RunNets:
    """The source-only net and the nets of every evaluation of the stages that adapt.

    A net's `step` counts over all stages of the run, its `stage_step` within its stage, as the report and the names of
    checkpoints do.
    """

    folder: Path
    pair: str
    recipe: str
    seed: int
    start: dict[str, Any] | None
    checkpoints: list[dict[str, Any]]
    choice: dict[str, Any] | None = None
    finished: bool = True
    adapts: bool = True  # whether a stage that adapts has begun, or none was asked for
    stages: tuple[StageSaved, ...] = ()
    select: str = ""
    images: str = ""  # on which its nets are scored
    by_chance: bool = False  # whether nothing had trained the last layer of the source-only net

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.last["shares"])

    @property
    def name(self) -> str:
        """Name of its folder, and whether it was stopped."""
        stopped = "not finished" if self.adapts else "stopped before it adapted"
        return self.folder.name if self.finished else f"{self.folder.name} ({stopped})"

    @property
    def truth(self) -> float | None:
        """True mIoU of the last student; None for a target without labels."""
        return self.last["truth_miou"]  # type: ignore[no-any-return]

    @property
    def last(self) -> dict[str, Any]:
        """The first of the nets of the last evaluation."""
        step = max(net["step"] for net in self.checkpoints)
        return next(net for net in self.checkpoints if net["step"] == step)

    @property
    def nets(self) -> list[dict[str, Any]]:
        """Source-only net and checkpoints."""
        return [*([self.start] if self.start else []), *self.checkpoints]

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The net of `best.pt`; None where the history does not tell of it."""
        choice = self.choice or {}
        share = choice.get("target_statistics", 0.0)
        for net in self.nets:
            if net["net"].partition(",")[0] != choice.get("net") or net.get("target_statistics", 0.0) != share:
                continue
            if choice["net"] == "source_only" or self.place_of(net) == (choice["stage"], choice["step"]):
                return net
        return None

    def place_of(self, net: dict[str, Any]) -> tuple[int, int]:
        """Index of the stage of a net of an evaluation, and its step within it."""
        before = net["step"] - net["stage_step"]
        return next(i for i, stage in enumerate(self.stages) if stage.before == before), net["stage_step"]

    def deployed(self, net: dict[str, Any]) -> dict[str, Any]:
        """A net as `best.pt` holds it: with statistics of target, if the run chose the net and gave it such."""
        for other in self.checkpoints:
            if other.get("target_statistics") and same_weights(other, net):
                return other
        return net

    def as_trained(self, net: dict[str, Any]) -> dict[str, Any]:
        """A net with the BatchNorm statistics of its training, with which nets are compared."""
        if not net.get("target_statistics"):
            return net
        return next((n for n in self.nets if not n.get("target_statistics") and same_weights(n, net)), net)

    def file_of(self, net: dict[str, Any]) -> Path | None:
        """The checkpoint that holds a net; None where it was not kept."""
        if net.get("target_statistics"):
            files = []
        elif net is self.start:
            files = [f"{stage.folder}/last.pt" for stage in self.stages if stage.before + stage.saved == net["step"]]
        else:
            index, step = self.place_of(net)
            folder = self.stages[index].folder
            files = [f"{folder}/last.pt"] * (step == self.stages[index].saved) + [f"{folder}/{step_file(step)}"]
        held = (self.folder / file for file in ["best.pt"] * (net == self.chosen) + files)
        return next((file for file in held if file.is_file()), None)

    def to_json(self) -> dict[str, Any]:
        """An entry of the runs that `benchmarks/selection.py` reads."""
        return {
            "pair": self.pair,
            "recipe": self.recipe,
            "seed": self.seed,
            "start": self.start,
            "checkpoints": self.checkpoints,
        }


def read_run(folder: Path) -> RunNets:
    """Read `history.json` of a finished run, or the checkpoints of one that was stopped.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the run was stopped before there were label-free scores, or is older than they are; or the file is
            not what the loop wrote.
    """
    path = folder / "history.json"
    with as_written(path if path.is_file() else folder):
        return _read_run(folder, path)


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Context in which what is read of a run is as the loop wrote it; otherwise an error names the file."""
    try:
        yield
    except (*MISREAD, json.JSONDecodeError, UnicodeDecodeError) as error:
        why = "not JSON" if isinstance(error, ValueError) else f"not so inside ({type(error).__name__}: {error})"
        raise ValueError(f"Expected {path} to be as train_gta2cs.py wrote it, but it is {why}.") from None


def _read_run(folder: Path, path: Path) -> RunNets:
    config, stages, done, choice, begun = _saved(folder, path)
    names = [stage["name"] for stage in stages]
    first_of = next((i for i, name in enumerate(names) if name != "source_only"), len(names) - 1)
    adapting = range(first_of, len(names))  # with stages on source alone that come after one that adapts
    begins = [sum(stage["steps"] for stage in stages[:i]) for i in range(len(stages))]
    checkpoints = [net for i in adapting for net in _evaluated(stage_title(names, i), stages[i], begins[i])]
    if not checkpoints:
        raise ValueError(
            f"Expected {folder} to have label-free scores, but it was stopped before the first evaluation of "
            f"{names[adapting[0]]}, or is from an earlier version. With its own command and --resume it goes on."
        )
    tried = stages[-1].get("target_statistics", {"choice": {}})
    if share := (of := tried["choice"]).get("target_statistics"):
        share = _number(share)
        place = {"stage": stage_title(names, of["stage"]), "stage_step": of["step"], "target_statistics": share}
        name = f"{of['net']}, target statistics"
        checkpoints.append(_net(begins[of["stage"]] + of["step"], name, tried, tried.get("truth")) | place)
    first, place = stages[adapting[0]], adapting[0]
    if "source_only" not in first and choice is not None and choice["net"] == "source_only":
        first, place = begun, place + 1  # stopped in the stage that adapts, before its first checkpoint
    start = _start((*begins, sum(done))[place], first, stages[place - 1] if place else {})
    recipe = " → ".join(stages[i]["name"] for i in adapting)
    pair, data = config["data"]["pair"], config["data"]
    if pair == "folder" and (root := data.get("target_root") or data.get("data_root")):
        pair = f"folder {root}"  # scores of two people's folders do not compare
    whole = path.is_file()
    adapts = whole or recipe != "source_only" or all(s["recipe"] == "source_only" for s in config["stages"])
    places = zip(map(stage_folder, range(len(stages)), names), begins, done, strict=True)
    where = tuple(StageSaved(*place) for place in places)
    if choice is not None and not ({"stage", "step", "net"} <= {*choice} and isinstance(choice["net"], str)):
        raise KeyError("choice")
    size, images = data.get("target_size"), 2 if config.get("dry_run") else config.get("score_images", 24)
    return RunNets(
        folder,
        pair,
        recipe,
        config["seed"],
        start,
        checkpoints,
        choice,
        whole,
        adapts,
        where,
        select=str(config.get("select", "")),
        images=f"(`score_images` {images}, `data.target_size` {size})",
        by_chance=any(stage.get("by_chance", False) for stage in (*stages, begun)),
    )


def _saved(folder: Path, path: Path) -> tuple[Any, ...]:
    """Configuration, stages and their steps, choice, and the stage that was begun when it was made."""
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        return saved["config"], saved["stages"], [stage["steps"] for stage in saved["stages"]], saved["choice"], {}
    files = sorted(folder.glob("stage*/last.pt"), key=lambda p: int(p.parent.name.split("_")[0][5:]))
    if not files:
        raise FileNotFoundError(f"Expected {folder} to be the folder of a run, but it has no history and no stage.")
    opened = [load_checkpoint(file) for file in files]
    config, best, choice, begun = json.loads(opened[-1]["config"]), folder / "best.pt", None, {}
    stages = [json.loads(value["history"]) for value in opened]
    if best.is_file():
        held = load_checkpoint(best, needs=("choice", "history"))
        choice, begun = json.loads(held["choice"]), json.loads(held["history"])
        if (tried := begun.get("target_statistics")) is not None:  # the report was to come
            stages[-1]["target_statistics"] = tried
    return config, stages, [value.get("step", 0) for value in opened], choice, begun


def _evaluated(title: str, stage: dict[str, Any], begins: int) -> list[dict[str, Any]]:
    """The nets of all evaluations of a stage."""
    truth, nets = {entry["step"]: entry["nets"] for entry in stage["scores"]}, []
    for entry in stage.get("label_free", []):
        for net, found in entry["nets"].items():
            if can_be_deployed(net):
                known = truth.get(entry["step"], {}).get(net)
                place = {"stage": title, "stage_step": entry["step"]}
                nets.append(_net(begins + entry["step"], net, found, known) | place)
    return nets


def _start(step: int, stage: dict[str, Any], before: dict[str, Any]) -> dict[str, Any] | None:
    """The source-only net, of the first stage that adapts and the one before it; None in a run that never adapts."""
    if "source_only" not in stage:
        return None
    known = stage.get("source_only_truth")
    if known is None and before.get("scores"):
        known = next(iter(before["scores"][-1]["nets"].values()))
    return _net(step, "source_only", stage["source_only"], known)


def same_weights(net: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two nets of a run differ in their BatchNorm statistics at most."""
    names = [n["net"].partition(",")[0] for n in (net, other)]
    return names[0] == names[1] and net["step"] == other["step"]


def histories_of(config: Config) -> list[dict[str, Any]]:
    """What each stage of a run logged, from its checkpoints."""
    files = [config.out / stage_folder(i, stage.recipe) / "last.pt" for i, stage in enumerate(config.stages)]
    return [json.loads(load_checkpoint(file)["history"]) for file in files]


def all_scores(found: dict[str, Any]) -> dict[str, float | None]:
    """The stored scores, and the consistency over only the classes that are present."""
    scores = completed(found)
    for view, iou in found.get("class_iou", {}).items():
        present = [value for value in iou if value is not None]
        if present:  # a class that is gone does not count here, as it does in "consistency"
            scores[f"{view}_present"] = sum(present) / len(present)
    return scores


def _net(step: int, name: str, found: dict[str, Any], truth: dict[str, Any] | None) -> dict[str, Any]:
    miou = None if truth is None else truth["means"][headline(truth["means"])]  # None, too, where no label has a class
    miou = None if miou is None else _number(miou)
    scores = {score: None if value is None else _number(value) for score, value in all_scores(found).items()}
    shares = [_number(share) for share in found["shares"]]
    return {"step": _number(step), "net": name, "truth_miou": miou, "scores": scores, "shares": shares}


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
