"""Detect masks saved as 0 and 255 if no table says what 255 means, because their foreground would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gta2cs.reading import IGNORE
from gta2cs.samples import LabelFormat

LIMIT = 256  # label files that are looked at before a run; --check-data looks at all


@dataclass
class Masks:
    """What label files hold: 255 is the foreground of masks where no file holds it beside another class.

    With two classes one file says nothing: 0 and 255 may be a mask, or an image without foreground of which a part is
    ignored. In a set where some files hold 0 and 255, the others 1, and none 1 and 255, two encodings were mixed. Of
    more than two classes nobody makes masks, so that one file with another id is enough.
    """

    classes: int
    files: int = 0
    masks: list[Path] = field(default_factory=list)  # of 0 and 255 alone
    blank: int = 0  # 255 alone: the foreground everywhere, or an image that nobody labelled
    plain: int = 0  # another id, and no 255
    beside: int = 0  # 255 beside another id than 0

    @classmethod
    def of(cls, format: LabelFormat) -> Masks:
        """For files of a format."""
        known = [raw for raw in format.expected if format.table[raw] != IGNORE]
        return cls(len({int(format.table[raw]) for raw in known}))

    def add(self, path: Path, ids: set[int]) -> None:
        """Add the raw ids of a file."""
        others = bool(ids - {0, IGNORE})
        self.files += 1
        if ids == {0, IGNORE}:
            self.masks.append(path)
        self.blank += ids == {IGNORE}
        self.plain += others and IGNORE not in ids
        self.beside += others and IGNORE in ids

    @property
    def settled(self) -> bool:
        """Whether the result is final, whatever further files contain."""
        return bool(self.beside or (self.plain and self.classes != 2))

    def fault(self, where: str) -> str | None:
        """What is wrong, and the table to read such files; None if 255 has its usual meaning."""
        if self.settled or not (self.masks or (self.blank and not self.plain)):
            return None
        if not self.plain:
            return (
                f"Expected the labels of {where} to hold class ids, but they hold only 0 and 255, and 255 is ignored: "
                "masks? `ids: {0: 0, 255: 1}` in classes.yaml makes 255 the second class; `ids: {0: 0, 255: 255}` says "
                "that it is meant to be ignored."
            )
        return (
            f"Expected the labels of {where} to agree on what 255 means, but {len(self.masks)} of {self.files} hold "
            f"only 0 and 255, for example {self.masks[0]}, and the others never hold 255: masks? In classes.yaml "
            "`ids: {0: 0, 1: 1, 255: 1}` makes 255 the second class; `ids: {0: 0, 1: 1, 255: 255}` says that it is "
            "meant to be ignored."
        )

    def note(self) -> str | None:
        """A remark that is not an error."""
        if self.classes != 2 or not (self.masks and self.beside):
            return None
        return (
            f"{len(self.masks)} labels hold only 0 and 255, for example {self.masks[0]}; in {self.beside} others 255 "
            "stands beside 1 and is ignored. Is it meant to be ignored there, too?"
        )


def refuse_masks(labels: Sequence[Path], format: LabelFormat, where: str) -> None:
    """Refuse a set if its foreground would be ignored. In a large set, only some files are read."""
    found = Masks.of(format)
    for path in labels[:: -(-len(labels) // LIMIT) or 1]:
        try:
            found.add(path, ids_of(format.read_ids(path)))
        except (OSError, RuntimeError, ValueError):
            continue  # whoever reads the file next says what is wrong with it
        if found.settled:
            return
    if fault := found.fault(where):
        raise ValueError(fault)


def ids_of(raw: np.ndarray) -> set[int]:
    """The ids that occur in a file."""
    if raw.dtype == np.uint8:
        return set(np.flatnonzero(np.bincount(raw.ravel(), minlength=256)).tolist())
    return set(np.unique(raw).tolist())
