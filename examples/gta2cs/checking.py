"""What is missing or wrong in the files of a pair, by file name, before a run finds out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from gta2cs.samples import IGNORE, ClassSet, Labelled, Unlabelled, progress, read_image

if TYPE_CHECKING:
    from gta2cs.datasets import Pair


@dataclass
class CheckReport:
    """What `check_data` found: a row a set, and problems by kind, each naming its file."""

    rows: list[tuple[str, int, int, list[str]]] = field(default_factory=list)  # set, images, labelled, absent classes
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is no fault, but good to know

    @property
    def ok(self) -> bool:
        """True when nothing is missing or wrong (a class that never occurs is only mentioned)."""
        return not any(self.problems.values())

    def add(self, kind: str, what: str) -> None:
        """Record one problem."""
        self.problems.setdefault(kind, []).append(what)

    def table(self) -> Table:
        """One row a set, with its number of problems."""
        table = Table("set", "images", "with label", "problems", "classes that never occur")
        for name, images, labels, absent in self.rows:
            count = sum(what.startswith(f"{name}: ") for found in self.problems.values() for what in found)
            table.add_row(name, str(images), str(labels), str(count) if count else "none", ", ".join(absent) or "none")
        return table

    def lines(self, limit: int = 10) -> list[str]:
        """Problems as text, at most `limit` of each kind by name and the rest as a number."""
        lines = []
        for kind, found in self.problems.items():
            lines += [f"{kind}: {what}" for what in found[:limit]]
            if len(found) > limit:
                lines.append(f"{kind}: and {len(found) - limit} more")
        return lines

    def __rich__(self) -> Group:
        """Print the table, then the problems."""
        return Group(self.table(), *(escape(line) for line in (*self.notes, *self.lines())))


def check_data(data: Pair | Labelled | Unlabelled, classes: ClassSet | None = None) -> CheckReport:
    """Read every file once: missing pairs, unreadable files, sizes that differ, unexpected ids, each by file name.

    Open the pair with `build_pair(..., strict=False)`, so that missing files reach the report instead of raising.
    """
    report = CheckReport()
    if not isinstance(data, Labelled | Unlabelled):
        for name, part in data.sets().items():
            _check_set(report, name, part, data.classes)
        if data.target_val is None:
            report.notes.append("target val: no target image has a label, so the run reports no IoU on target.")
    else:
        _check_set(report, "data", data, classes)
    return report


def _check_set(report: CheckReport, name: str, data: Labelled | Unlabelled, classes: ClassSet | None) -> None:
    pixels = np.zeros(256, np.int64)
    labelled = isinstance(data, Labelled)
    for what in data.missing if isinstance(data, Labelled) else ():
        report.add("missing", f"{name}: {what}")
    for index in progress(range(len(data)), f"Checking {name}"):
        if isinstance(data, Labelled):
            pixels += _check_labelled(report, name, data, index)
        else:
            _try(
                report, name, partial(read_image, data.paths[index]) if data.paths else partial(data.__getitem__, index)
            )
    absent = [c for i, c in enumerate(classes.names) if not pixels[i]] if classes is not None and labelled else []
    report.rows.append((name, len(data), len(data) if labelled else 0, absent))
    if not len(data):
        report.add("empty", f"{name}: no image with a label" if labelled else f"{name}: no image")


def _check_labelled(report: CheckReport, name: str, data: Labelled, index: int) -> np.ndarray:
    if not data.paths or data.format is None:  # drawn or given in memory: nothing on disk to doubt
        return np.bincount(data.labels[index].numpy().ravel(), minlength=256)
    image_path, label_path = data.paths[index]
    image = _try(report, name, partial(read_image, image_path))
    raw = _try(report, name, partial(data.format.read_ids, label_path))
    if image is not None and raw is not None and tuple(image.shape[-2:]) != raw.shape:
        sizes = f"{image.shape[-1]}x{image.shape[-2]}, {label_path} is {raw.shape[1]}x{raw.shape[0]}"
        report.add("size differs", f"{name}: {image_path} is {sizes}")
    if raw is None:
        return np.zeros(256, np.int64)
    if extra := data.format.unexpected(raw):
        report.add("unexpected ids", f"{name}: {label_path} holds {extra}")
    known = np.where((raw >= 0) & (raw < 256), raw, IGNORE)
    return np.bincount(data.format.table[known].ravel(), minlength=256)


def _try(report: CheckReport, name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError) as error:
        report.add("unreadable", f"{name}: {error}")
        return None
