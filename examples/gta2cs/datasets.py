"""Source and target domains: `build_pair("gta2cs", data_root="data")` opens all data that the training script needs.

The layouts of the data sets are in `layouts`, the kinds of sets in `samples`, and the check for problems in `checking`.
Their public names can be imported from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gta2cs.checking import CheckReport, check_data
from gta2cs.classes import ClassesFile, ClassSet, Ids, load_classes
from gta2cs.layouts import (
    Listing,
    acdc,
    cityscapes,
    dark_zurich,
    folder,
    gta5,
    list_of,
    read_synthia_ids,
    synthia,
)
from gta2cs.lists import read_list
from gta2cs.reading import IGNORE, ImageFormat
from gta2cs.samples import LabelFormat, Labelled, Remembered, Size, Unlabelled, rainbow
from gta2cs.toy_scenes import labelled_scenes, unlabelled_scenes
from udakit.labels import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, SYNTHIA_13_CLASSES, SYNTHIA_16_CLASSES

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

NUCLEI = ClassSet(("background", "nucleus"), np.array([[30, 30, 60], [240, 200, 60]], dtype=np.uint8))

# (height, width) of source and of target images in the published settings; the other pairs are read as they are.
PUBLISHED_SIZES: dict[str, tuple[Size, Size]] = {
    "gta2cs": ((720, 1280), (512, 1024)),
    "synthia2cs": ((760, 1280), (512, 1024)),
    "cs2acdc": ((512, 1024), (540, 960)),
    "cs2darkzurich": ((512, 1024), (540, 960)),
}
SMALL = {
    "camvid": CAMVID,
    "carla2camvid": CARLA_CAMVID,
    "carla2dusk": CARLA_CAMVID,
    "nuclei": NUCLEI,
    "nuclei_backwards": NUCLEI,
    "folder": None,
}
SYNTHETIC = {"gta2cs": CITYSCAPES_19, "synthia2cs": CITYSCAPES_16}
FOLDERS = {  # of source and target under `data_root`, with the names in use
    "camvid": (("camvid/source",), ("camvid/target",)),
    "carla2camvid": (("carla",), ("camvid/source",)),
    "carla2dusk": (("carla",), ("camvid/target",)),
    "nuclei": (("nuclei/source",), ("nuclei/target",)),
    "nuclei_backwards": (("nuclei/target",), ("nuclei/source",)),
    "gta2cs": (("gta", "gta5", "GTA5"), ("cityscapes", "Cityscapes")),
    "synthia2cs": (("synthia", "RAND_CITYSCAPES"), ("cityscapes", "Cityscapes")),
    "cs2acdc": (("cityscapes", "Cityscapes"), ("acdc", "ACDC")),
    "cs2darkzurich": (("cityscapes", "Cityscapes"), ("dark_zurich", "Dark_Zurich", "darkzurich")),
    "folder": (("source",), ("target",)),
}
RENDERED = {"toy": ("game", "camera"), "toy_backwards": ("camera", "game")}  # source and target of `gta2cs.toy`
PAIRS = (*RENDERED, *FOLDERS)


@dataclass(frozen=True)
class Pair:
    """A source and a target domain. `target_train` cannot return labels; the oracle must ask for them explicitly.

    `target_val` is None if no target image has a label, which is the normal case outside of benchmarks.
    """

    name: str
    source_train: Labelled
    target_train: Unlabelled
    target_val: Labelled | None
    classes: ClassSet
    target_train_labelled: Callable[[], Labelled] | None = None
    source_val: Labelled | None = None
    channels: int = 3
    problems: tuple[str, ...] = ()  # of the pair itself, kept for check_data; then `classes` are only stand-ins

    def preload(self) -> None:
        """Fill the caches now, with progress bars; sets without a cache are skipped."""
        for title, data in self.sets().items():
            if isinstance(data.images, Remembered) and data.images.kept is not None:
                data.preload(f"Loading {title}")

    def sets(self) -> dict[str, Labelled | Unlabelled]:
        """The sets by name."""
        sets: dict[str, Labelled | Unlabelled] = {
            "source train": self.source_train,
            "target train": self.target_train,
        }
        validation = {"target val": self.target_val, "source val": self.source_val}
        return {**sets, **{name: data for name, data in validation.items() if data is not None}}


def build_pair(
    name: str = "toy",
    *,
    data_root: str | Path | None = None,
    source_root: str | Path | None = None,
    target_root: str | Path | None = None,
    source_list: str | Path | Sequence[str] | None = None,
    source_size: Size | str | None = None,
    target_size: Size | str | None = None,
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    source_range: tuple[float, float] | None = None,
    target_range: tuple[float, float] | None = None,
    cache: bool | None = None,
    classes: ClassSet | None = None,
    ids: Ids = None,
    strict: bool = True,
    toy_counts: tuple[int, int, int] = (400, 400, 60),
    toy_size: Size = (128, 192),
) -> Pair:
    """Open a pair of domains.

    Args:
        name: one of `PAIRS`.
        data_root: folder that holds the data sets; without it the environment variable UDAKIT_DATA.
        source_root: folder of the source data, if it is not in `data_root`.
        target_root: the same for the target.
        source_list: names of the source images to use (a list, or a text file), for published subsets.
        source_size: (height, width) that source images and labels are resized to on load, "native" for none; without
            it the published setting (`PUBLISHED_SIZES`).
        target_size: the same for target images. Validation labels always keep their own size.
        channels: number of channels for the net; a grey image can be used with three.
        mean: mean of each channel for normalisation; by default that of ImageNet, for one or three channels.
        std: standard deviation of each channel, likewise.
        source_range: values (low, high) that mean black and white in source files with more than 8 bits.
        target_range: the same for target files.
        cache: whether to keep decoded images in memory; by default only for small pairs.
        classes: for "folder": the classes, if there is no classes.yaml.
        ids: for "folder": raw label id, or colour (r, g, b), -> class id, of both domains; without it those of the
            classes.yaml beside each.
        strict: whether to raise if files are missing; otherwise `check_data` reports them.
        toy_counts: scenes of the toy pair (source train, target train, target val).
        toy_size: (height, width) of the toy scenes.

    Raises:
        ValueError: the pair or an option is unknown.
        FileNotFoundError: a folder, list, image or label does not exist; the message names it.
    """
    if name not in PAIRS:
        raise ValueError(f"Expected `name` to be one of {PAIRS}, but got {name!r}.")
    if name in RENDERED:
        unused: dict[str, object] = {"source_root": source_root, "target_root": target_root, "source_list": source_list}
        unused |= {"source_size": source_size, "target_size": target_size}
        return _toy_pair(name, toy_counts, toy_size, channels=channels, **unused)
    published = PUBLISHED_SIZES.get(name, (None, None))
    source_hw = _size("source_size", source_size, published[0])
    target_hw = _size("target_size", target_size, published[1])
    data_root = root_of(data_root)
    source_folder, target_folder = (
        _first_there(name, places) for places in places_of(name, data_root, source_root, target_root)
    )
    own_ids: tuple[Ids, Ids] = (ids, ids)
    problems: tuple[str, ...] = ()
    if name == "folder" and classes is None:
        try:
            classes, own_ids = _folder_classes(source_folder, target_folder, data_root, ids)
        except (OSError, ValueError) as error:
            if strict:
                raise
            classes, problems = _stand_ins(), (str(error),)
    find = _find_folders if name in SMALL else _find_synthetic if name in SYNTHETIC else _find_adverse
    found = find(name, source_folder, target_folder, classes=classes, ids=own_ids, strict=strict)
    of_source = {"size": source_hw, "image_format": ImageFormat(channels, source_range, mean, std)}
    of_target = {"size": target_hw, "image_format": ImageFormat(channels, target_range, mean, std)}
    kept = name in SMALL if cache is None else cache
    labelled: dict[str, Any] = {"cache": kept, "strict": strict}
    return Pair(
        name,
        found.source.restrict(source_list, root=source_folder, strict=strict).labelled(**of_source, **labelled),
        found.target.unlabelled(**of_target, cache=kept),
        _validation(found.target_val, **of_target, **labelled),
        found.classes,
        partial(found.target.labelled, **of_target, **labelled) if found.target_labels else None,
        _validation(found.source_val, **of_source, **labelled),
        channels,
        problems,
    )


def _validation(listing: Listing | None, **options: Any) -> Labelled | None:
    """Labels of their own size; None where there is not one, unless its list is at fault, which is to be reported."""
    if listing is None or not (listing.problems or any(item.label.is_file() for item in listing.items)):
        return None
    return listing.labelled(native_labels=True, **options)


class _Found(NamedTuple):
    """The files of a pair."""

    source: Listing
    target: Listing
    target_val: Listing | None
    classes: ClassSet
    source_val: Listing | None = None
    target_labels: bool = True


def _find_folders(
    name: str, source: Path, target: Path, *, classes: ClassSet | None, ids: tuple[Ids, Ids], strict: bool
) -> _Found:
    known = classes or SMALL[name]
    assert known is not None  # for "folder" given or read from classes.yaml

    def split(root: Path, part: str) -> Listing:
        return folder(root, part, known, ids=ids[root == target], strict=strict)

    def validation(root: Path) -> Listing | None:
        listed = list_of(root, "val")
        try:
            wanted = listed is not None and bool(read_list(listed))
        except (OSError, ValueError):
            wanted = True  # whoever opens the split says what is wrong with its list
        return split(root, "val") if wanted else None

    target_train = split(target, "train")
    return _Found(
        split(source, "train"),
        target_train,
        validation(target),
        known,
        source_val=validation(source),
        target_labels=any(item.label.is_file() for item in target_train.items),
    )


def _find_synthetic(name: str, source: Path, target: Path, **_: object) -> _Found:
    keep = None if name == "gta2cs" else SYNTHIA_16_CLASSES
    return _Found(
        gta5(source) if name == "gta2cs" else synthia(source),
        cityscapes(target, "train", keep=keep),
        cityscapes(target, "val", keep=keep),
        SYNTHETIC[name],
    )


def _find_adverse(name: str, source: Path, target: Path, **_: object) -> _Found:
    layout = acdc if name == "cs2acdc" else dark_zurich
    return _Found(
        cityscapes(source, "train"),
        layout(target, "train"),
        layout(target, "val"),
        CITYSCAPES_19,
        source_val=cityscapes(source, "val"),
        target_labels=name == "cs2acdc",  # Dark Zurich's training images have none
    )


def _toy_pair(name: str, counts: tuple[int, int, int], size: Size, *, channels: int, **unused: object) -> Pair:
    from gta2cs.toy import CLASSES, PALETTE

    for option, given in unused.items():
        if given is not None:
            raise ValueError(
                f"Expected no `{option}` for the rendered pair {name!r}, but got {str(given)!r}. The pair 'folder' "
                "reads your own data."
            )
    if channels != 3:
        raise ValueError(f"Expected `channels` 3 for the rendered pair {name!r}, but got {channels}.")
    first, second = RENDERED[name]
    target = labelled_scenes(second, 0, counts[1], size)
    return Pair(
        name,
        labelled_scenes(first, 0, counts[0], size),
        unlabelled_scenes(second, 0, counts[1], size),
        labelled_scenes(second, 1_000_000, counts[2], size),
        ClassSet(tuple(CLASSES), np.asarray(PALETTE, np.uint8)),
        lambda: target,
    )


def root_of(data_root: str | Path | None) -> Path | None:
    """The folder that holds the data sets: the given one, otherwise the environment variable UDAKIT_DATA."""
    root = data_root or os.environ.get("UDAKIT_DATA")
    return Path(root) if root else None


def places_of(
    pair: str, data_root: Path | None, source_root: str | Path | None, target_root: str | Path | None
) -> tuple[list[Path], list[Path]]:
    """Where source and target of a pair may lie: in the folder that is given, or under `data_root` by a name in use."""

    def places(given: str | Path | None, names: Sequence[str]) -> list[Path]:
        if given is not None:
            return [Path(given)]
        if data_root is None:
            raise ValueError(
                "Expected `data_root` (or the environment variable UDAKIT_DATA) to be the folder that holds "
                f"{names[0]}/ for the pair {pair!r}, but got None. The pair 'toy' needs no data."
            )
        return [data_root / name for name in names]

    of_source, of_target = FOLDERS[pair]
    return places(source_root, of_source), places(target_root, of_target)


def _first_there(pair: str, places: Sequence[Path]) -> Path:
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"Expected a folder {' or '.join(map(str, places))} for {pair!r}, but found none. "
        "Set `data_root`, `source_root` or `target_root` to the folder of the data."
    )


def _folder_classes(
    source: Path, target: Path, data_root: str | Path | None, ids: Ids
) -> tuple[ClassSet, tuple[Ids, Ids]]:
    """The classes, and the ids of source and of target: by the classes.yaml beside them, else by the one there is."""
    roots = [Path(root) for root in (data_root, source, target) if root]
    found = {root: load_classes(path) for root in roots if os.path.lexists(path := root / "classes.yaml")}
    if not found:
        where = ", ".join(map(str, roots))
        raise FileNotFoundError(
            f"Expected `classes`, or a classes.yaml with `names`, in one of {where}, but found none. It lists the "
            "classes in the order of their ids, for example `names: [background, road]`."
        )
    if len(names := {file.known.names for file in found.values()}) > 1:
        where = ", ".join(map(str, found))
        raise ValueError(f"Expected the classes.yaml of {where} to have the same `names`, but got {sorted(names)}.")
    shared: ClassesFile = next(iter(found.values()))
    stored = found.get(source, shared).ids, found.get(target, shared).ids
    return shared.known, stored if ids is None else (ids, ids)


def _stand_ins() -> ClassSet:
    """A class for each id, where nothing says which classes there are."""
    numbers = tuple(map(str, range(IGNORE)))
    return ClassSet(numbers, rainbow(numbers))


def _size(name: str, given: Size | str | None, published: Size | None) -> Size | None:
    if given is None:
        return published
    if given == "native":
        return None
    if isinstance(given, str) or len(given) != 2 or not all(isinstance(n, int) and n > 0 for n in given):
        raise ValueError(f'Expected `{name}` to be (height, width) or "native", but got {given!r}.')
    return (given[0], given[1])
