"""Label formats, and the two kinds of data set, with and without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from rich import get_console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from gta2cs.classes import ClassSet as ClassSet
from gta2cs.classes import Ids
from gta2cs.classes import rainbow as rainbow
from gta2cs.reading import IGNORE, ColourTable, ImageFormat, read_ids
from gta2cs.reading import read_image as read_image

Reader = Callable[[Path], np.ndarray]
Size = tuple[int, int]  # (height, width), as in tensors; folders and papers say width x height


@dataclass(frozen=True, eq=False)
class LabelFormat:
    """How label files are turned into train ids: read the raw ids, then look them up.

    `table` is uint8 (256,) and maps a raw id to a train id or 255. `expected` are the raw ids that a file may contain.
    With `strict`, another id is an error; otherwise it is read as 255 and only `check_data` reports it. `doubt_masks`
    says that the meaning of 255 was not given, so files with only 0 and 255 may be masks in which 255 is the
    foreground.
    """

    table: np.ndarray
    expected: frozenset[int]
    read_ids: Reader
    strict: bool = False
    doubt_masks: bool = False

    @classmethod
    def of_table(
        cls, ids: Mapping[int, int], read_ids: Reader, *, also: Iterable[int] = (), strict: bool = False
    ) -> LabelFormat:
        """Build from `{raw id: train id}`; `also` are raw ids that are expected and ignored. 255 always is."""
        table = np.full(256, IGNORE, np.uint8)
        for raw, train in ids.items():
            table[raw] = train
        return cls(table, frozenset((*ids, *also, IGNORE)), read_ids, strict)

    @classmethod
    def of_folder(cls, ids: Ids, count: int) -> LabelFormat:
        """Build the format of your own data with `count` classes: ids as stored, mapped ids, or colours."""
        plain = {i: i for i in range(count)}
        if ids is None:
            return replace(cls.of_table(plain, read_ids, strict=True), doubt_masks=True)
        if not all(isinstance(raw, int) for raw in ids):
            return cls.of_table(plain, ColourTable(ids))  # type: ignore[arg-type]
        return replace(cls.of_table(ids, read_ids, strict=True), doubt_masks=IGNORE not in ids)  # type: ignore[arg-type]

    def read(self, path: Path) -> np.ndarray:
        """Train ids (H, W) uint8 of a label file."""
        return self.train_ids(self.read_ids(path), path)

    def train_ids(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """Look up the raw ids of a file."""
        if int(raw.max(initial=0)) > 255 or int(raw.min(initial=0)) < 0:
            raise ValueError(f"Expected label ids in [0, 255], but {path} holds {raw.min()} to {raw.max()}.")
        if self.strict and (extra := self.unexpected(raw)):
            known = sorted(self.expected - {IGNORE})
            raise ValueError(
                f"Expected label ids {ranges(known)} or 255, but {path} also holds {ranges(extra)}. "
                f"{self.way_out(extra)}"
            )
        return self.table[raw]

    @staticmethod
    def way_out(ids: Sequence[int], limit: int = 4) -> str:
        """What to do about ids that no class has."""
        entries = [f"{raw}: {IGNORE}" for raw in ids[:limit]] + ["..."] * (len(ids) > limit)
        return f"Map them with `ids` in classes.yaml (`ids: {{{', '.join(entries)}}}` ignores them)."

    def unexpected(self, raw: np.ndarray) -> list[int]:
        """Raw ids that such a file should not contain."""
        return sorted({int(i) for i in np.unique(raw)} - self.expected)


class Store(Protocol):
    """Anything indexable by sample: images or labels, in files, in memory or drawn."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class Remembered:
    """`make(i)` for i in range(count), each made on first use and, if asked, kept."""

    def __init__(self, count: int, make: Callable[[int], Tensor], *, cache: bool = False) -> None:
        self.make = make
        self.count = count
        self.kept: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.kept is None:
            return self.make(index)
        if index not in self.kept:
            self.kept[index] = self.make(index)
        return self.kept[index]


class Unlabelled(Dataset[Tensor]):
    """Images only: `[i]` returns (K, H, W), see `ImageFormat`. It has neither labels nor paths of labels."""

    def __init__(
        self,
        names: Sequence[str],
        images: Store,
        *,
        paths: Sequence[Path] = (),
        image_format: ImageFormat | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.images = images
        self.paths = tuple(paths)
        self.image_format = image_format or ImageFormat()
        self.missing = tuple(missing)  # what was listed and not found; kept for check_data, never part of the set

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def preload(self, title: str = "Loading images") -> None:
        """Read everything now (a progress bar shows when that takes more than a second)."""
        _preload([self.images], title)


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Images with train ids: `[i]` -> (image (K, H, W), see `ImageFormat`, label uint8 (H, W), 255 = ignore).

    With `native_labels`, the label keeps the size of its file while the image is resized, for evaluation at full size.
    """

    def __init__(
        self,
        names: Sequence[str],
        images: Store,
        labels: Store,
        *,
        native_labels: bool = False,
        paths: Sequence[tuple[Path, Path]] = (),
        format: LabelFormat | None = None,
        image_format: ImageFormat | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.images = images
        self.labels = labels
        self.native_labels = native_labels
        self.paths = tuple(paths)
        self.format = format
        self.image_format = image_format or ImageFormat()
        self.missing = tuple(missing)  # images without a label; kept for check_data, never part of the set

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[index], self.labels[index]
        if not self.native_labels and image.shape[-2:] != label.shape:
            raise ValueError(
                f"Expected image and label {self.names[index]!r} to have one size, but got {tuple(image.shape[-2:])} "
                f"and {tuple(label.shape)} (height, width). --check-data lists all such files."
            )
        return image, label

    def preload(self, title: str = "Loading images and labels") -> None:
        """Read everything now (a progress bar shows when that takes more than a second)."""
        _preload([self.images, self.labels], title)

    def without_labels(self) -> Unlabelled:
        """Return only the images; the result has no access to the labels."""
        paths = [image for image, _ in self.paths]
        return Unlabelled(self.names, self.images, paths=paths, image_format=self.image_format)


def image_files(
    paths: Sequence[Path], format: ImageFormat | None = None, *, size: Size | None = None, cache: bool = False
) -> Remembered:
    """Images of `paths` as (K, H, W), see `ImageFormat`, resized to `size` (bilinear, antialiased)."""
    return Remembered(len(paths), partial(_image_at, tuple(paths), format or ImageFormat(), size), cache=cache)


def label_files(
    paths: Sequence[Path], format: LabelFormat, *, size: Size | None = None, cache: bool = False
) -> Remembered:
    """Labels of `paths` as uint8 train ids (H, W), resized to `size` (nearest)."""
    return Remembered(len(paths), partial(_label_at, tuple(paths), format, size), cache=cache)


def resize_image(image: Tensor, size: Size | None) -> Tensor:
    """Bilinear with antialias, in the type of the image."""
    if size is None or image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def resize_label(label: Tensor, size: Size | None) -> Tensor:
    """Nearest neighbour by pixel centres, as an index, so that no id passes through float."""
    if size is None or label.shape == size:
        return label
    rows, columns = (nearest_index(old, new) for old, new in zip(label.shape, size, strict=True))
    return label[rows[:, None], columns[None, :]]


def nearest_index(old: int, new: int) -> Tensor:
    """Source index of each of `new` samples over `old`, in integer arithmetic: floor((i + 1/2) old / new)."""
    return (2 * torch.arange(new) + 1) * old // (2 * new)


def _image_at(paths: tuple[Path, ...], format: ImageFormat, size: Size | None, index: int) -> Tensor:
    # Contiguous last: resizing is quickest with the channels innermost, and what is left to copy is smaller.
    return resize_image(format.read(paths[index]), size).contiguous()


def _label_at(paths: tuple[Path, ...], format: LabelFormat, size: Size | None, index: int) -> Tensor:
    return resize_label(torch.from_numpy(format.read(paths[index])), size)


def _preload(stores: Sequence[Store], title: str) -> None:
    for index in progress(range(len(stores[0])), title):
        for store in stores:
            store[index]


def progress(items: Sized, title: str) -> Iterable[int]:
    """Iterate with a progress bar, which appears only if the work takes more than a second."""
    return track(items, title, transient=True, disable=len(items) < 50 or not get_console().is_terminal)  # type: ignore[arg-type]


def ranges(ids: Sequence[int]) -> str:
    """Shorten [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
