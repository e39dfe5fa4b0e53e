"""Data sets as they are shipped. Every layout is one small function that returns a `Listing`.

A `Listing` says which image belongs to which label and how the label files are read: ids are mapped in memory, nothing
is converted on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml  # comes with jsonargparse

from gta2cs.samples import (
    IGNORE,
    ClassSet,
    LabelFormat,
    Labelled,
    Reader,
    Size,
    Unlabelled,
    image_files,
    label_files,
    rainbow,
    read_index_png,
)
from udakit.labels import CITYSCAPES_CLASSES, CITYSCAPES_IDS, GTA5_IDS, SYNTHIA_16_CLASSES, SYNTHIA_IDS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
TRAIN_IDS = {i: i for i in range(len(CITYSCAPES_CLASSES))}


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
                f"Expected all {len(self.items)} images of {self.where} to have labels, but {len(absent)} do not: "
                f"{_some([item.name for item in absent])} (looked for {absent[0].label})."
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
            where, names = str(names), read_list(Path(names))
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
    """Cityscapes: `leftImg8bit/<split>/<city>/` with `gtFine/`: `_labelTrainIds` if made, else `_labelIds`."""
    root, ending = Path(root), "_leftImg8bit.png"
    items = []
    for path in _find(root / "leftImg8bit" / split, f"*/*{ending}"):
        name = path.name.removesuffix(ending)
        items.append(Item(name, path, root / "gtFine" / split / path.parent.name / f"{name}_gtFine_labelTrainIds.png"))
    return _train_ids_or_ids(items, str(root / "leftImg8bit" / split), keep)


def acdc(root: str | Path, split: str, *, condition: str = "*", keep: Sequence[int] | None = None) -> Listing:
    """ACDC: `rgb_anon/<condition>/<split>/<sequence>/`, or flattened to `rgb_anon/<split>/`, with `gt/`."""
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
        names = [_without_suffix(name) for name in read_list(listed)]
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
    """Read `classes.yaml`: `names`; optional `palette` (RGB), `ids` {raw id: class id or 255}, `scores` {name: ids}."""
    content = yaml.safe_load(Path(path).read_text())
    known = {"names", "palette", "ids", "scores"}
    if not isinstance(content, dict) or not content.get("names") or set(content) - known:
        raise ValueError(f"Expected {path} to be a mapping with `names` and only {sorted(known)}, but got {content!r}.")
    names = tuple(str(name) for name in content["names"])
    colours = content.get("palette")
    palette = rainbow(len(names)) if colours is None else np.array(colours, dtype=np.uint8)
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
    if any(item.label.is_file() for item in items):
        return Listing(items, _mapped(TRAIN_IDS, read_index_png, TRAIN_IDS, keep), where)
    shipped = [item._replace(label=item.label.with_name(item.label.name.replace("TrainIds", "Ids"))) for item in items]
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
    try:
        from torchvision.io import ImageReadMode, decode_png
    except ImportError as error:
        raise RuntimeError(f"{path} needs a torchvision that decodes 16-bit PNGs (0.21 or newer): {error}.") from error
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pixels = decode_png(
                torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED
            ).numpy()
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"Cannot read the label {path}: {error}") from error
    if content[24] == 16 and pixels.dtype == np.uint8:  # the bit depth in the file's header
        raise RuntimeError(f"{path} has 16 bits, but this torchvision decodes 8: version 0.21 or newer is needed.")
    return pixels  # type: ignore[no-any-return]


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


def read_list(path: Path) -> list[str]:
    """Lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a list of image names {path}, but it does not exist.")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
