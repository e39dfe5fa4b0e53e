"""Data sets as they are shipped, joined to (source, target) pairs: ids are mapped in memory, nothing is converted on disk.

`build_pair("gta2cs", data_root="data")` is all that the training script needs. Every layout is one small function that
returns a `Listing`: which image belongs to which label, and how its label files are read. `check_data` goes through the
files of a pair and names what is missing or wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from gta2cs.samples import (
    IGNORE,
    ClassSet,
    LabelFormat,
    Labelled,
    Remembered,
    Size,
    Unlabelled,
    image_files,
    label_files,
    progress,
    read_image,
    read_index_png,
)
from udakit.labels import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_IDS,
    CITYSCAPES_PALETTE,
    GTA5_IDS,
    SYNTHIA_13_CLASSES,
    SYNTHIA_16_CLASSES,
    SYNTHIA_IDS,
)

__all__ = [
    "PAIRS",
    "CheckReport",
    "ClassSet",
    "LabelFormat",
    "Labelled",
    "Listing",
    "Pair",
    "Unlabelled",
    "acdc",
    "build_pair",
    "check_data",
    "cityscapes",
    "dark_zurich",
    "folder",
    "gta5",
    "load_classes",
    "read_synthia_ids",
    "synthia",
]

PAIRS = ("toy", "camvid", "carla2camvid", "gta2cs", "synthia2cs", "cs2acdc", "cs2darkzurich", "folder")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
TRAIN_IDS = {i: i for i in range(len(CITYSCAPES_CLASSES))}

CITYSCAPES_19 = ClassSet(CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, {"mIoU": tuple(range(19))})
# SYNTHIA has no terrain, truck and train: a 16-way head, re-indexed; the 13-class mean is read off the same net.
CITYSCAPES_16 = ClassSet(
    tuple(CITYSCAPES_CLASSES[i] for i in SYNTHIA_16_CLASSES),
    CITYSCAPES_PALETTE[list(SYNTHIA_16_CLASSES)],
    {"mIoU16": tuple(range(16)), "mIoU13": tuple(SYNTHIA_16_CLASSES.index(i) for i in SYNTHIA_13_CLASSES)},
)
CAMVID = ClassSet(
    ("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"),
    np.array(
        [
            *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0]),
            *([192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]),
        ],
        dtype=np.uint8,
    ),
    {"mIoU": tuple(range(11))},
)
# CARLA's frames have no bicyclist: the mean over the ten shared classes is the one that adaptation can move.
CARLA_CAMVID = ClassSet(CAMVID.names, CAMVID.palette, {"mIoU11": tuple(range(11)), "mIoU10": tuple(range(10))})


class Item(NamedTuple):
    """One image, and where its label is or would be."""

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
        self, *, size: Size | None = None, native_labels: bool = False, cache: bool = False, strict: bool = True
    ) -> Labelled:
        """Images with labels. `strict=False` leaves out what has none and keeps their names for `check_data`."""
        absent = [item for item in self.items if not item.label.is_file()]
        if strict and absent:
            raise FileNotFoundError(
                f"Expected a label for each of the {len(self.items)} images of {self.where}, but {len(absent)} have none"
                f": {_some([item.name for item in absent])} (looked for {absent[0].label})."
            )
        missing = set(absent)
        items = [item for item in self.items if item not in missing]
        return Labelled(
            [item.name for item in items],
            image_files([item.image for item in items], size=size, cache=cache),
            label_files([item.label for item in items], self.format, size=None if native_labels else size, cache=cache),
            native_labels=native_labels and size is not None,
            paths=[(item.image, item.label) for item in items],
            format=self.format,
            missing=[*self.problems, *(f"{item.image}: no label {item.label}" for item in absent)],
        )

    def unlabelled(self, *, size: Size | None = None, cache: bool = False) -> Unlabelled:
        """Images alone."""
        paths = [item.image for item in self.items]
        return Unlabelled([item.name for item in self.items], image_files(paths, size=size, cache=cache), paths=paths)

    def restrict(self, names: str | Path | Sequence[str] | None) -> Listing:
        """Keep the named images only: a list, or a text file with one name or path a line (as published lists have)."""
        if names is None:
            return self
        if isinstance(names, str | Path):
            where, names = str(names), _read_list(Path(names))
        else:
            where = "the given names"
        wanted = {Path(name).stem for name in names}
        items = [item for item in self.items if Path(item.name).stem in wanted]
        if len(items) < len(wanted):
            found = {Path(item.name).stem for item in items}
            raise FileNotFoundError(
                f"Expected {self.where} to hold all {len(wanted)} images of {where}, "
                f"but {len(wanted - found)} are missing: {_some(sorted(wanted - found))}."
            )
        return Listing(items, self.format, self.where, self.problems)


# ---------------------------------------------------------------------------------------------------------- layouts


def gta5(root: str | Path, *, keep: Sequence[int] | None = None) -> Listing:
    """GTA5: `images/*.png` and `labels/*.png` of the same name, palette PNGs whose indices are Cityscapes ids.

    All pairs that are there are used (the full set has 24,966; some copies have 24,941). Files that a converter left
    behind (`*_labelTrainIds.png`) are not read.
    """
    root = Path(root)
    images = _find(root / "images", "*.png")
    items = [Item(path.stem, path, root / "labels" / path.name) for path in images]
    return Listing(items, _mapped(GTA5_IDS, read_index_png, range(35), keep), str(root))


def synthia(root: str | Path, *, keep: Sequence[int] | None = SYNTHIA_16_CLASSES) -> Listing:
    """SYNTHIA-RAND-CITYSCAPES: `RGB/*.png` and `GT/LABELS/*.png`, 16 bit, three channels, the class id in the first."""
    root = Path(root)
    items = [Item(path.stem, path, root / "GT" / "LABELS" / path.name) for path in _find(root / "RGB", "*.png")]
    return Listing(items, _mapped(SYNTHIA_IDS, read_synthia_ids, range(23), keep), str(root))


def cityscapes(root: str | Path, split: str, *, keep: Sequence[int] | None = None) -> Listing:
    """Cityscapes: `leftImg8bit/<split>/<city>/` and `gtFine/<split>/<city>/`, `_labelTrainIds` if made, else `_labelIds`."""
    root, ending = Path(root), "_leftImg8bit.png"
    items = []
    for path in _find(root / "leftImg8bit" / split, f"*/*{ending}"):
        name = path.name.removesuffix(ending)
        items.append(Item(name, path, root / "gtFine" / split / path.parent.name / f"{name}_gtFine_labelTrainIds.png"))
    return _train_ids_or_ids(items, str(root / "leftImg8bit" / split), keep)


def acdc(root: str | Path, split: str, *, condition: str = "*", keep: Sequence[int] | None = None) -> Listing:
    """ACDC: `rgb_anon/<condition>/<split>/<sequence>/`, or flattened to `rgb_anon/<split>/`; labels beside it in `gt/`."""
    patterns = (f"{condition}/{split}/**/*_rgb_anon.png", f"{split}/**/*_rgb_anon.png")
    return _rgb_anon(Path(root), patterns, f"{root} ({split})", keep)


def dark_zurich(root: str | Path, split: str, *, time: str = "night", keep: Sequence[int] | None = None) -> Listing:
    """Dark Zurich: `rgb_anon/train/<time>/<sequence>/` (no labels exist), `rgb_anon/val/` with `gt/val/`."""
    patterns = (f"{split}/{time}/**/*_rgb_anon.png", f"{split}/**/*_rgb_anon.png")
    return _rgb_anon(Path(root), patterns, f"{root} ({split})", keep)


def folder(
    root: str | Path, split: str, classes: ClassSet, *, ids: Mapping[int, int] | None = None, strict: bool = True
) -> Listing:
    """`images/`, `labels/` and `<split>.txt`, one name a line with or without its ending; labels are one-channel PNGs.

    Without any list, "train" is all images. `ids` maps raw ids to class ids; without it labels hold class ids or 255.
    `strict=False` turns a listed image that does not exist into an entry of `problems`.
    """
    root = Path(root)
    images, labels = _by_stem(root / "images", IMAGE_SUFFIXES), _by_stem(root / "labels", LABEL_SUFFIXES, empty=True)
    if not images:
        raise FileNotFoundError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {root / 'images'}, but found none.")
    listed, problems = root / f"{split}.txt", []
    if listed.is_file():
        names = [_without_suffix(name) for name in _read_list(listed)]
        if not names:
            raise ValueError(f"Expected {listed} to name one image a line, but it is empty.")
        absent = [name for name in names if name not in images]
        if absent and strict:
            raise FileNotFoundError(
                f"Expected every name in {listed} to be an image in {root / 'images'}, "
                f"but {len(absent)} are not: {_some(absent)}."
            )
        problems += [f"{root / 'images' / name}: no such image, but {listed.name} names it" for name in absent]
        names = [name for name in names if name in images]
    elif split == "train" and not list(root.glob("*.txt")):
        names = sorted(images)
        problems += [f"{labels[name]}: no image of that name" for name in sorted(set(labels) - set(images))]
    else:
        raise FileNotFoundError(f"Expected the list {listed}, one image name a line, but it does not exist.")
    items = [Item(name, images[name], labels.get(name, root / "labels" / f"{name}.png")) for name in names]
    table = dict(ids) if ids is not None else {i: i for i in range(len(classes))}
    format = LabelFormat.of_table(table, read_index_png, strict=ids is None)
    return Listing(items, format, str(root), problems)


def load_classes(path: str | Path) -> tuple[ClassSet, dict[int, int] | None]:
    """Read `classes.yaml`: `names` and, if wanted, `palette` (RGB), `ids` {raw id: class id or 255}, `scores` {name: ids}."""
    import yaml  # comes with jsonargparse

    content = yaml.safe_load(Path(path).read_text())
    known = {"names", "palette", "ids", "scores"}
    if not isinstance(content, dict) or not content.get("names") or set(content) - known:
        raise ValueError(f"Expected {path} to be a mapping with `names` and only {sorted(known)}, but got {content!r}.")
    names = tuple(str(name) for name in content["names"])
    colours = content.get("palette")
    palette = _rainbow(len(names)) if colours is None else np.array(colours, dtype=np.uint8)
    scores = {str(name): tuple(ids) for name, ids in (content.get("scores") or {}).items()}
    ids = content.get("ids")
    if ids is not None:
        ids = {int(raw): int(train) for raw, train in ids.items()}
        if wrong := {r: t for r, t in ids.items() if not (0 <= r < 256 and (t == IGNORE or 0 <= t < len(names)))}:
            raise ValueError(f"Expected `ids` in {path} to map 0..255 to 0..{len(names) - 1} or 255, but got {wrong}.")
    return ClassSet(names, palette, scores), ids


def read_synthia_ids(path: Path) -> np.ndarray:
    """First channel of SYNTHIA's 16-bit, three-channel PNG.

    Pillow keeps the high byte of such a file, which is 0 for every class id; a net then trains on nothing. A file that
    has been saved again with 8 bits has lost its ids for good and is refused.
    """
    pixels = _decode_png(path)
    if pixels.dtype == np.uint8 and pixels.max(initial=0) <= 3:
        raise ValueError(
            f"Expected {path} to hold SYNTHIA class ids in 16 bits, but it has 8 bits and no value above 3: the ids were "
            "cut off when the file was saved again (the high byte of 0..22 is 0). Unpack the original archive."
        )
    return pixels[0].astype(np.int32)


# ------------------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pair:
    """A source and a target domain. `target_train` cannot return labels; the oracle has to ask for them by name."""

    name: str
    source_train: Labelled
    target_train: Unlabelled
    target_val: Labelled
    classes: ClassSet
    target_train_labelled: Callable[[], Labelled] | None = None
    source_val: Labelled | None = None

    def preload(self) -> None:
        """Fill the caches now, with progress bars (a set without a cache is left alone)."""
        for title, data in self.sets().items():
            if isinstance(data.images, Remembered) and data.images.kept is not None:
                data.preload(f"Loading {title}")

    def sets(self) -> dict[str, Labelled | Unlabelled]:
        """The sets by name."""
        sets = {"source train": self.source_train, "target train": self.target_train, "target val": self.target_val}
        return sets if self.source_val is None else {**sets, "source val": self.source_val}


def build_pair(
    name: str = "toy",
    *,
    data_root: str | Path | None = None,
    source_root: str | Path | None = None,
    target_root: str | Path | None = None,
    source_list: str | Path | Sequence[str] | None = None,
    source_size: Size | str | None = None,
    target_size: Size | str | None = None,
    cache: bool | None = None,
    classes: ClassSet | None = None,
    ids: Mapping[int, int] | None = None,
    strict: bool = True,
    toy_counts: tuple[int, int, int] = (400, 400, 60),
    toy_size: Size = (128, 192),
) -> Pair:
    """Open a pair of domains.

    Args:
        name: one of `PAIRS`.
        data_root: folder that holds the data sets; without it the environment variable UDAKIT_DATA.
        source_root: folder of the source set itself, where it is not under `data_root`.
        target_root: the same for the target.
        source_list: names of the source images to use (a list, or a text file), for the published subsets.
        source_size: (height, width) that source images and labels are resized to on load, "native" for none; without
            it the published setting (GTA5 720 x 1280, Cityscapes 512 x 1024, ACDC and Dark Zurich 540 x 960).
        target_size: the same for target images. Validation labels always keep their own size.
        cache: keep decoded images in memory; without it only for the small pairs.
        classes: for "folder": the classes, where there is no classes.yaml.
        ids: for "folder": raw label id -> class id.
        strict: raise when files are missing. False leaves that to `check_data`.
        toy_counts: scenes of the toy pair (source train, target train, target val).
        toy_size: (height, width) of the toy scenes.

    Raises:
        ValueError: an unknown pair or option.
        FileNotFoundError: a folder, list, image or label that is not there, by name.
    """
    if name not in PAIRS:
        raise ValueError(f"Expected `name` to be one of {PAIRS}, but got {name!r}.")
    if name == "toy":
        return _toy_pair(toy_counts, toy_size)
    data_root = data_root or os.environ.get("UDAKIT_DATA")

    def root(given: str | Path | None, *folders: str) -> Path:
        return _root(name, given, data_root, folders)

    classes_of = {"gta2cs": CITYSCAPES_19, "synthia2cs": CITYSCAPES_16, "carla2camvid": CARLA_CAMVID}
    small = name in ("camvid", "carla2camvid", "folder")
    source_val, target_labels = None, True
    if small:
        if name == "camvid":
            roots = root(source_root, "camvid/source"), root(target_root, "camvid/target")
            chosen = CAMVID
        elif name == "carla2camvid":
            roots = root(source_root, "carla"), root(target_root, "camvid/source")
            chosen = CARLA_CAMVID
        else:
            roots = root(source_root, "source"), root(target_root, "target")
            chosen, ids = _folder_classes(classes, ids, [r for r in (*roots, data_root) if r])
        source, target = (folder(r, "train", chosen, ids=ids, strict=strict) for r in roots)
        val = folder(roots[1], "val", chosen, ids=ids, strict=strict)
        if (roots[0] / "val.txt").is_file():
            source_val = folder(roots[0], "val", chosen, ids=ids, strict=strict)
        target_labels = any(item.label.is_file() for item in target.items)
        sizes: tuple[Size | None, Size | None] = (None, None)
    elif name in ("gta2cs", "synthia2cs"):
        chosen = classes_of[name]
        keep = None if name == "gta2cs" else SYNTHIA_16_CLASSES
        if name == "gta2cs":
            source, sizes = gta5(root(source_root, "gta", "gta5", "GTA5")), ((720, 1280), (512, 1024))
        else:
            source, sizes = synthia(root(source_root, "synthia", "RAND_CITYSCAPES")), ((760, 1280), (512, 1024))
        target_folder = root(target_root, "cityscapes", "Cityscapes")
        target, val = cityscapes(target_folder, "train", keep=keep), cityscapes(target_folder, "val", keep=keep)
    else:
        chosen = CITYSCAPES_19
        source_folder = root(source_root, "cityscapes", "Cityscapes")
        source, sizes = cityscapes(source_folder, "train"), ((512, 1024), (540, 960))
        source_val = cityscapes(source_folder, "val")
        if name == "cs2acdc":
            target_folder = root(target_root, "acdc", "ACDC")
            target, val = acdc(target_folder, "train"), acdc(target_folder, "val")
        else:
            target_folder = root(target_root, "dark_zurich", "Dark_Zurich", "darkzurich")
            target, val, target_labels = dark_zurich(target_folder, "train"), dark_zurich(target_folder, "val"), False
    cache = small if cache is None else cache
    source_hw = _size("source_size", source_size, sizes[0])
    target_hw = _size("target_size", target_size, sizes[1])
    options: dict[str, Any] = {"cache": cache, "strict": strict}
    return Pair(
        name,
        source.restrict(source_list).labelled(size=source_hw, **options),
        target.unlabelled(size=target_hw, cache=cache),
        val.labelled(size=target_hw, native_labels=True, **options),
        chosen,
        partial(target.labelled, size=target_hw, **options) if target_labels else None,
        None if source_val is None else source_val.labelled(size=source_hw, native_labels=True, **options),
    )


def _toy_pair(counts: tuple[int, int, int], size: Size) -> Pair:
    from gta2cs.toy import CLASSES, PALETTE

    def labelled(domain: str, first: int, count: int) -> Labelled:
        scenes = _Scenes(domain, first, size)
        names = [f"{domain}_{first + i:06d}" for i in range(count)]
        images = Remembered(count, partial(_scene_image, scenes), cache=True)
        return Labelled(names, images, Remembered(count, partial(_scene_label, scenes), cache=True))

    source, target = labelled("game", 0, counts[0]), labelled("camera", 0, counts[1])
    return Pair(
        "toy",
        source,
        # Drawn on its own: an unlabelled set shares nothing with labels, not even a cache.
        Unlabelled(target.names, Remembered(counts[1], partial(_scene_image, _Scenes("camera", 0, size)), cache=True)),
        labelled("camera", 1_000_000, counts[2]),
        ClassSet(tuple(CLASSES), np.asarray(PALETTE, np.uint8)),
        lambda: target,
    )


class _Scenes:
    """Draws toy scenes; the label of the last scene drawn is at hand when its image has just been asked for."""

    def __init__(self, domain: str, first: int, size: Size) -> None:
        self.domain, self.first, self.size = domain, first, size
        self.last: tuple[int, np.ndarray, np.ndarray] | None = None

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        from gta2cs.toy import render

        if self.last is None or self.last[0] != index:
            self.last = (index, *render(self.domain, self.first + index, self.size))  # type: ignore[arg-type]
        return self.last[1], self.last[2]


def _scene_image(scenes: _Scenes, index: int) -> Tensor:
    return torch.from_numpy(scenes.draw(index)[0]).permute(2, 0, 1).contiguous()


def _scene_label(scenes: _Scenes, index: int) -> Tensor:
    return torch.from_numpy(scenes.draw(index)[1])


# --------------------------------------------------------------------------------------------------------- checking


@dataclass
class CheckReport:
    """What `check_data` found: a row a set, and problems by kind, each naming its file."""

    rows: list[tuple[str, int, int, list[str]]] = field(default_factory=list)  # set, images, labelled, absent classes
    problems: dict[str, list[str]] = field(default_factory=dict)

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


def check_data(data: Pair | Labelled | Unlabelled, classes: ClassSet | None = None) -> CheckReport:
    """Read every file once: missing pairs, unreadable files, sizes that differ, unexpected ids, each by file name.

    Open the pair with `build_pair(..., strict=False)`, so that missing files reach the report instead of raising.
    """
    report = CheckReport()
    if isinstance(data, Pair):
        for name, part in data.sets().items():
            _check_set(report, name, part, data.classes)
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


# ---------------------------------------------------------------------------------------------------------- details


def _mapped(
    ids: Mapping[int, int], read_ids: Callable[[Path], np.ndarray], expected: Iterable[int], keep: Sequence[int] | None
) -> LabelFormat:
    """Format of `ids`, re-indexed to the train ids in `keep`."""
    place = {
        train: train if keep is None else list(keep).index(train) for train in (ids.values() if keep is None else keep)
    }
    table = {raw: place[train] for raw, train in ids.items() if train in place}
    return LabelFormat.of_table(table, read_ids, also=expected)


def _train_ids_or_ids(items: list[Item], where: str, keep: Sequence[int] | None) -> Listing:
    """`items` name `_labelTrainIds.png`; where the first is not there, all are read from `_labelIds.png`."""
    if items[0].label.is_file():
        return Listing(items, _mapped(TRAIN_IDS, read_index_png, (), keep), where)
    shipped = [item._replace(label=item.label.with_name(item.label.name.replace("TrainIds", "Ids"))) for item in items]
    if not any(item.label.is_file() for item in shipped) and any(item.label.is_file() for item in items):
        shipped = items
    return Listing(shipped, _mapped(CITYSCAPES_IDS, read_index_png, range(34), keep), where)


def _rgb_anon(root: Path, patterns: Sequence[str], where: str, keep: Sequence[int] | None) -> Listing:
    images = next((found for p in patterns if (found := sorted((root / "rgb_anon").glob(p)))), [])
    if not images:
        wanted = " or ".join(str(root / "rgb_anon" / pattern) for pattern in patterns)
        raise FileNotFoundError(f"Expected images like {wanted}, but found none.")
    items = []
    for path in images:
        name = path.name.removesuffix("_rgb_anon.png")
        labels = root / "gt" / path.parent.relative_to(root / "rgb_anon")
        items.append(Item(name, path, labels / f"{name}_gt_labelTrainIds.png"))
    return _train_ids_or_ids(items, where, keep)


def _decode_png(path: Path) -> np.ndarray:
    """(channels, H, W) at the file's own bit depth, which Pillow does not give for 16-bit colour."""
    import warnings

    from torchvision.io import ImageReadMode, decode_png

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            return decode_png(data, ImageReadMode.UNCHANGED).numpy()
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"Cannot read the label {path}: {error}") from error


def _find(directory: Path, pattern: str) -> list[Path]:
    if not directory.is_dir():
        raise FileNotFoundError(f"Expected a folder {directory} with files {pattern}, but it does not exist.")
    found = sorted(directory.glob(pattern))
    if not found:
        raise FileNotFoundError(f"Expected files {pattern} in {directory}, but found none.")
    return found


def _by_stem(directory: Path, suffixes: Sequence[str], *, empty: bool = False) -> dict[str, Path]:
    """{path below `directory` without ending: path}."""
    if not directory.is_dir():
        if empty:
            return {}
        raise FileNotFoundError(
            f"Expected a folder {directory} with files {', '.join(suffixes)}, but it does not exist."
        )
    paths = (path for path in sorted(directory.rglob("*")) if path.suffix.lower() in suffixes)
    return {path.relative_to(directory).with_suffix("").as_posix(): path for path in paths}


def _without_suffix(name: str) -> str:
    return Path(name).with_suffix("").as_posix() if Path(name).suffix.lower() in IMAGE_SUFFIXES else name


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a list of image names {path}, but it does not exist.")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _root(pair: str, given: str | Path | None, data_root: str | Path | None, folders: Sequence[str]) -> Path:
    if given is not None:
        candidates = [Path(given)]
    elif data_root is None:
        raise ValueError(
            f"Expected `data_root` (or the environment variable UDAKIT_DATA) to be the folder that holds {folders[0]}/ "
            f"for the pair {pair!r}, but got None."
        )
    else:
        candidates = [Path(data_root) / name for name in folders]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"Expected a folder {' or '.join(map(str, candidates))} for {pair!r}, but found none.")


def _folder_classes(
    classes: ClassSet | None, ids: Mapping[int, int] | None, roots: Sequence[str | Path]
) -> tuple[ClassSet, Mapping[int, int] | None]:
    if classes is not None:
        return classes, ids
    for root in roots:
        if (Path(root) / "classes.yaml").is_file():
            found, stored = load_classes(Path(root) / "classes.yaml")
            return found, stored if ids is None else ids
    raise FileNotFoundError(
        f"Expected `classes`, or a classes.yaml with `names`, in one of {', '.join(map(str, roots))}, but found none."
    )


def _size(name: str, given: Size | str | None, published: Size | None) -> Size | None:
    if given is None:
        return published
    if given == "native":
        return None
    if isinstance(given, str) or len(given) != 2 or not all(isinstance(n, int) and n > 0 for n in given):
        raise ValueError(f'Expected `{name}` to be (height, width) or "native", but got {given!r}.')
    return (given[0], given[1])


def _rainbow(count: int) -> np.ndarray:
    """Colours for classes without a palette: hues a golden angle apart."""
    import colorsys

    colours = [colorsys.hsv_to_rgb(i * 0.618 % 1, 0.65, 0.55 + 0.4 * (i % 2)) for i in range(count)]
    return np.array(colours).reshape(-1, 3).__mul__(255).astype(np.uint8)


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
