"""Data sets as they are shipped. Every layout is one small function that returns a `Listing`.

A `Listing` says which image belongs to which label, and how label files are read. Ids are mapped in memory; nothing is
converted on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gta2cs.classes import ClassSet, Ids
from gta2cs.classes import load_classes as load_classes
from gta2cs.lists import Found, Known, find_names, lines_of, read_list, some
from gta2cs.masks import refuse_masks
from gta2cs.reading import IMAGE_SUFFIXES, LABEL_SUFFIXES, ImageFormat, decode_png, read_ids
from gta2cs.samples import LabelFormat, Labelled, Reader, Size, Unlabelled, image_files, label_files
from udakit.labels import CITYSCAPES_CLASSES, CITYSCAPES_IDS, GTA5_IDS, SYNTHIA_16_CLASSES, SYNTHIA_IDS

TRAIN_IDS = {i: i for i in range(len(CITYSCAPES_CLASSES))}


class Item(NamedTuple):
    """An image, and the path where its label is or would be."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Listing:
    """The files of one split of a data set, before it is decided whether the labels may be seen."""

    items: list[Item]
    format: LabelFormat
    where: str
    problems: list[str] = field(default_factory=list)

    def labelled(
        self,
        *,
        size: Size | None = None,
        native_labels: bool = False,
        cache: bool = False,
        strict: bool = True,
        image_format: ImageFormat | None = None,
    ) -> Labelled:
        """Images with labels. `strict=False` leaves out what has none and keeps their names for `check_data`."""
        absent = [item for item in self.items if not item.label.is_file()]
        if strict and absent and len(absent) == len(self.items):
            raise FileNotFoundError(
                f"Expected the images of {self.where} to have labels, but none of {len(absent)} has one (looked for "
                f"{absent[0].label}). Only target images may be without."
            )
        if strict and absent:
            raise FileNotFoundError(
                f"Expected all {len(self.items)} images of {self.where} to have labels, but {len(absent)} do not: "
                f"{some([item.name for item in absent])} (looked for {absent[0].label}). "
                "Let the list name the labelled ones alone (train.txt or val.txt, or `data.source_list`)."
            )
        missing = set(absent)
        items = [item for item in self.items if item not in missing]
        labels = [item.label for item in items]
        if strict and self.format.doubt_masks:
            refuse_masks(labels, self.format, self.where)
        return Labelled(
            [item.name for item in items],
            image_files([item.image for item in items], image_format, size=size, cache=cache),
            label_files(labels, self.format, size=None if native_labels else size, cache=cache),
            native_labels=native_labels and size is not None,
            paths=[(item.image, item.label) for item in items],
            format=self.format,
            image_format=image_format,
            missing=[*self.problems, *(f"{item.image}: no label {item.label}" for item in absent)],
        )

    def unlabelled(
        self, *, size: Size | None = None, cache: bool = False, image_format: ImageFormat | None = None
    ) -> Unlabelled:
        """Images alone."""
        paths = [item.image for item in self.items]
        return Unlabelled(
            [item.name for item in self.items],
            image_files(paths, image_format, size=size, cache=cache),
            paths=paths,
            image_format=image_format,
            missing=self.problems,
        )

    def restrict(
        self, names: str | Path | Sequence[str] | None, *, root: str | Path | None = None, strict: bool = True
    ) -> Listing:
        """Keep the named images only: a list, or a text file with one name or path a line (as published lists have).

        How a name is understood says `find_names`; paths are below `root`, without it below `where`.
        """
        if names is None:
            return self
        if isinstance(names, str | Path):
            where, names = str(names), read_list(Path(names))
        else:
            where, names = "the given names", lines_of(names)
        if not names:
            raise ValueError(f"Expected {where} to name one image a line, but it is empty.")
        top = Path(root or self.where)
        known = [Known((item.name,), _calls(item.image, top, item.name)) for item in self.items]
        found = find_names(names, known)
        problems = _faults(found, len(names), where, self.where, strict=strict)
        items = [self.items[i] for i in sorted(found.positions)]
        return replace(self, items=items, problems=[*self.problems, *problems])


def gta5(root: str | Path, *, keep: Sequence[int] | None = None) -> Listing:
    """GTA5: `images/*.png` and `labels/*.png` of the same name, palette PNGs whose indices are Cityscapes ids.

    All existing pairs are used (the full set has 24,966; some copies have 24,941). Files of converters
    (`*_labelTrainIds.png`) are not read.
    """
    root, labels = Path(root), _Names()
    images = _find(root / "images", "*", ".png")
    items = [Item(path.stem, path, labels.find(root / "labels" / path.name)) for path in images]
    return Listing(items, _mapped(GTA5_IDS, read_ids, range(35), keep), str(root))


def synthia(root: str | Path, *, keep: Sequence[int] | None = SYNTHIA_16_CLASSES) -> Listing:
    """SYNTHIA-RAND-CITYSCAPES: `RGB/*.png` and `GT/LABELS/*.png`, 16 bit, three channels, the class id in the first."""
    root, labels = Path(root), _Names()
    images = _find(root / "RGB", "*", ".png")
    items = [Item(path.stem, path, labels.find(root / "GT" / "LABELS" / path.name)) for path in images]
    return Listing(items, _mapped(SYNTHIA_IDS, read_synthia_ids, range(23), keep), str(root))


def cityscapes(root: str | Path, split: str, *, keep: Sequence[int] | None = None) -> Listing:
    """Cityscapes: `leftImg8bit/<split>/<city>/` with `gtFine/`: `_labelTrainIds` if made, else `_labelIds`."""
    root, ending = Path(root), "_leftImg8bit.png"
    items = []
    for path in _find(root / "leftImg8bit" / split, "*/*", ending):
        name = path.name[: -len(ending)]
        items.append(Item(name, path, root / "gtFine" / split / path.parent.name / f"{name}_gtFine_labelTrainIds.png"))
    return _train_ids_or_ids(items, str(root / "leftImg8bit" / split), keep)


def acdc(root: str | Path, split: str, *, condition: str = "*", keep: Sequence[int] | None = None) -> Listing:
    """ACDC: `rgb_anon/<condition>/<split>/<sequence>/`, or flattened to `rgb_anon/<split>/`, with `gt/`."""
    return _rgb_anon(Path(root), (f"{condition}/{split}", split), f"{root} ({split})", keep)


def dark_zurich(root: str | Path, split: str, *, time: str = "night", keep: Sequence[int] | None = None) -> Listing:
    """Dark Zurich: `rgb_anon/train/<time>/<sequence>/` (no labels exist), `rgb_anon/val/` with `gt/val/`.

    Images in `rgb_anon/<split>/` without a folder for the time of day count as `time`. Images in the folder of another
    time are not used.
    """
    below = Path(root) / "rgb_anon" / split
    sorted_by_time = any((below / other).is_dir() for other in ("day", "twilight", "night"))
    folders = (f"{split}/{time}",) if sorted_by_time else (f"{split}/{time}", split)
    return _rgb_anon(Path(root), folders, f"{root} ({split})", keep)


def folder(root: str | Path, split: str, classes: ClassSet, *, ids: Ids = None, strict: bool = True) -> Listing:
    """`images/`, `labels/` and `<split>.txt` with one name per line, ending optional; labels are one-channel PNGs.

    Without any list, "train" is all images. `ids` maps raw ids, or colours (r, g, b), to class ids; without it labels
    hold class ids or 255. `strict=False` turns faults of the list and of the names into entries of `problems`.
    """
    root = Path(root)
    top = root / "images"
    paths = _files(top, IMAGE_SUFFIXES, empty=not strict)
    if not paths and strict:
        raise FileNotFoundError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {top}, but found none.")
    labels: dict[str, list[Path]] = {}
    for path in _files(root / "labels", LABEL_SUFFIXES, empty=True):
        labels.setdefault(_name(path, root / "labels"), []).append(path)
    listed, problems = root / f"{split}.txt", [] if paths else [f"{top}: no images"]
    if (given := list_of(root, split)) is not None:
        listed = given
        try:
            names = read_list(listed)
            if not names:
                raise ValueError(f"Expected {listed} to name one image a line, but it is empty.")
        except (OSError, ValueError) as error:
            if strict:
                raise
            names, problems = [], [*problems, str(error)]
        known = [Known((_name(p, top), p.relative_to(top).as_posix()), _calls(p, root)) for p in paths]
        found = find_names(names, known)
        problems = [*problems, *_faults(found, len(names), str(listed), str(top), strict=strict)]
        paths = [paths[i] for i in found.positions] if names else paths  # without a list all are looked at
    elif split == "train" and list_of(root, "val") is None:
        images = {_name(path, top) for path in paths}
        problems += [
            f"{label}: no image of that name" for name in sorted(set(labels) - images) for label in labels[name]
        ]
    else:
        raise FileNotFoundError(f"Expected the list {listed}, one image name a line, but it does not exist.")
    items = [
        Item(_name(p, top), p, labels.get(_name(p, top), [root / "labels" / f"{_name(p, top)}.png"])[0]) for p in paths
    ]
    shared: dict[str, list[Path]] = {}
    for item in items:
        shared.setdefault(item.name, []).append(item.image)
    several = [found for name in shared for found in (shared[name], labels.get(name, [])) if len(found) > 1]
    doubts = [f"{' and '.join(map(str, found))}: which one is {found[0].stem!r}?" for found in several]
    if doubts and strict:
        raise ValueError(
            f"Expected one file for each name, but found {some(doubts)} Move one away, or list names with endings."
        )
    return Listing(items, LabelFormat.of_folder(ids, len(classes)), str(root), [*problems, *doubts])


def list_of(root: Path, split: str) -> Path | None:
    """What lies at `<split>.txt`, in any case and of any kind: a folder or a broken link does not pass for no list."""
    path = _Names().find(root / f"{split}.txt")
    return path if os.path.lexists(path) else None


def read_synthia_ids(path: Path) -> np.ndarray:
    """First channel of SYNTHIA's 16-bit, three-channel PNG.

    Pillow keeps the high byte of such a file, which is 0 for every class id, so a net would learn nothing. A file that
    was saved again with 8 bits has lost its ids and is refused.
    """
    pixels = decode_png(path)
    if pixels.dtype == np.uint8 and pixels.max(initial=0) <= 3:
        raise ValueError(
            f"Expected {path} to hold SYNTHIA class ids in 16 bits, but it has 8 bits and no value above 3: the ids "
            "were cut off when the file was saved again (the high byte of 0..22 is 0). Unpack the original archive."
        )
    ids: np.ndarray = pixels[0].astype(np.int32)
    return ids


def _mapped(
    ids: Mapping[int, int], read_ids: Reader, expected: Iterable[int], keep: Sequence[int] | None
) -> LabelFormat:
    """Format of `ids`, re-indexed to the train ids in `keep`."""
    if keep is not None:
        ids = {raw: list(keep).index(train) for raw, train in ids.items() if train in keep}
    return LabelFormat.of_table(ids, read_ids, also=expected)


def _train_ids_or_ids(items: list[Item], where: str, keep: Sequence[int] | None) -> Listing:
    """`items` name `_labelTrainIds.png`; where none was made, all are read from `_labelIds.png`."""
    labels = _Names()
    made = [item._replace(label=labels.find(item.label)) for item in items]
    if any(item.label.is_file() for item in made):
        return Listing(made, _mapped(TRAIN_IDS, read_ids, TRAIN_IDS, keep), where)
    shipped = [labels.find(item.label.with_name(item.label.name.replace("TrainIds", "Ids"))) for item in items]
    items = [item._replace(label=label) for item, label in zip(items, shipped, strict=True)]
    return Listing(items, _mapped(CITYSCAPES_IDS, read_ids, range(34), keep), where)


def _rgb_anon(root: Path, folders: Sequence[str], where: str, keep: Sequence[int] | None) -> Listing:
    ending = "_rgb_anon.png"
    found = ([p for d in sorted((root / "rgb_anon").glob(f)) for p in _ending(d, "**/*", ending)] for f in folders)
    images = next(filter(None, found), [])
    if not images:
        wanted = " or ".join(str(root / "rgb_anon" / below / "**" / f"*{ending}") for below in folders)
        raise FileNotFoundError(f"Expected images like {wanted}, but found none.")
    items = []
    for path in sorted(images):
        name = path.name[: -len(ending)]
        labels = root / "gt" / path.parent.relative_to(root / "rgb_anon")
        items.append(Item(name, path, labels / f"{name}_gt_labelTrainIds.png"))
    return _train_ids_or_ids(items, where, keep)


class _Names:
    """Finds files whatever the case of their names: `.PNG` is `.png` on the systems that many sets come from."""

    def __init__(self) -> None:
        self.seen: dict[Path, dict[str, str]] = {}

    def find(self, path: Path) -> Path:
        """The file that is meant, or `path` itself where there is none."""
        if path.parent not in self.seen:
            names = sorted(os.listdir(path.parent), reverse=True) if path.parent.is_dir() else []
            self.seen[path.parent] = {**{name.lower(): name for name in names}, **{name: name for name in names}}
        names_here = self.seen[path.parent]
        return path.with_name(names_here.get(path.name, names_here.get(path.name.lower(), path.name)))


def _find(directory: Path, below: str, ending: str) -> list[Path]:
    if not directory.is_dir():
        raise FileNotFoundError(f"Expected a folder {directory} with files {below}{ending}, but it does not exist.")
    found = sorted(_ending(directory, below, ending))
    if not found:
        raise FileNotFoundError(f"Expected files {below}{ending} in {directory}, but found none.")
    return found


def _ending(directory: Path, below: str, ending: str) -> Iterable[Path]:
    """Files of an ending in any case, but for hidden ones (macOS leaves `._name` beside files)."""
    paths = (path for path in directory.glob(below) if path.name.lower().endswith(ending.lower()))
    return (path for path in paths if not path.name.startswith("."))


def _files(directory: Path, suffixes: Sequence[str], *, empty: bool = False) -> list[Path]:
    """Sorted files of these endings below a folder, but for hidden ones."""
    if not directory.is_dir():
        if empty:
            return []
        raise FileNotFoundError(
            f"Expected a folder {directory} with files {', '.join(suffixes)}, but it does not exist."
        )
    found = (path for path in directory.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not path.name.startswith("."))


def _name(path: Path, directory: Path) -> str:
    return path.relative_to(directory).with_suffix("").as_posix()


def _calls(path: Path, root: Path, name: str | None = None) -> tuple[str, ...]:
    """The paths by which lists name an image: with and without its ending, and with that of its data set."""
    below = path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[-2:])
    short = [below.with_name(name)] if name is not None else []
    return tuple(dict.fromkeys(p.as_posix() for p in (below, below.with_suffix(""), *short)))


def _faults(found: Found, count: int, where: str, root: str, *, strict: bool) -> list[str]:
    """Raise for what is wrong with a list, or return it."""
    if strict and found.absent:
        raise FileNotFoundError(
            f"Expected every name in {where} to be an image in {root}, but {len(found.absent)} of {count} are missing: "
            f"{some(found.absent)}."
        )
    if strict and found.ambiguous:
        raise ValueError(
            f"Expected every name in {where} to mean one image in {root}, but {len(found.ambiguous)} mean several: "
            f"{some(found.ambiguous)}."
        )
    if strict and found.repeated:
        raise ValueError(
            f"Expected {where} to name each image once, but {len(found.repeated)} are repeated: {some(found.repeated)}."
        )
    listed = Path(where).name
    return [
        *(f"{Path(root) / name}: no such image, but {listed} names it" for name in found.absent),
        *(f"{where}: {name} means several images" for name in found.ambiguous),
        *(f"{where}: {name} is named more than once" for name in found.repeated),
    ]
