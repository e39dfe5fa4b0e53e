"""The classes of a pair, and the file `classes.yaml` that names them for your own data."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml  # comes with jsonargparse

from gta2cs.lists import read_text
from gta2cs.palettes import far_apart
from gta2cs.reading import IGNORE, Colour

NEUTRAL = re.compile(r"back[ _-]?ground|bg|void|other|others|nothing|none|unlabell?ed|clutter", re.IGNORECASE)
GREY = np.array([64, 64, 64], np.uint8)  # darker than what stands on it, and not the black of ignored pixels
Ids = Mapping[int, int] | Mapping[Colour, int] | None  # raw label id, or colour (r, g, b) -> class id


@dataclass(frozen=True, eq=False)
class ClassSet:
    """The classes of a pair.

    `scores` names the means that a table reports, each over a subset of the classes; the first is the headline:
    `{"mIoU16": (0, ..., 15), "mIoU13": (0, 1, 2, 6, ...)}`.
    """

    names: tuple[str, ...]
    palette: np.ndarray  # (K, 3) uint8
    scores: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.names)
        if self.palette.shape != (count, 3) or self.palette.dtype != np.uint8:
            raise ValueError(
                f"Expected `palette` to be uint8 ({count}, 3), one colour a class, "
                f"but got {self.palette.dtype} {self.palette.shape}."
            )
        if not self.scores:
            object.__setattr__(self, "scores", {"mIoU": tuple(range(count))})
        for name, ids in self.scores.items():
            if not ids or not all(0 <= i < count for i in ids):
                raise ValueError(f"Expected score {name!r} to list class ids in [0, {count}), but got {ids}.")

    def __len__(self) -> int:
        return len(self.names)


def rainbow(names: Sequence[str]) -> np.ndarray:
    """Colours (K, 3) uint8 for classes without a palette: the background is dark grey, the others are far apart."""
    place = next((i for i, name in enumerate(names) if NEUTRAL.fullmatch(name.strip())), None)
    if place is None:
        return far_apart(len(names))
    return np.insert(far_apart(len(names) - 1, background=GREY), place, GREY, axis=0)


class ClassesFile(NamedTuple):
    """A `classes.yaml`."""

    known: ClassSet
    ids: Ids


def load_classes(path: str | Path) -> ClassesFile:
    """Read a `classes.yaml`; every fault is a ValueError that names the file.

    Its keys are `names`, a list, and optionally `palette` (the colour of each class in pictures), `scores` ({mean:
    class ids}), and how label files are read: `ids` ({raw id: class id or 255}) or `colors` ({name: colour, or a list
    of them}, with `ignore` for colours to ignore; `colors: palette` for those of the palette).
    """
    path = Path(path)
    try:
        return _read(path)
    except _Fault as fault:
        raise ValueError(f"Expected {fault.what} in {path}, but got {fault.got}.") from None


_short = reprlib.Repr()  # aliases can make a value endless
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 4, 12, 8, 80


class _Fault(Exception):
    def __init__(self, what: str, got: object) -> None:
        self.what = what
        self.got = got if isinstance(got, _Words) else _short.repr(got)


class _Words(str):
    """A fault in words, not a value."""


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, Hashable) and keys.count(key) > 1:
                raise _Fault("each key once", _Words(f"{key!r} twice, line {node.start_mark.line + 1}"))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> ClassesFile:
    try:
        content = yaml.load(read_text(path), Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"Expected {path} to be YAML, but it cannot be read: {error}") from error
    except OSError as error:
        if error.strerror is None:  # of ours: it names the file
            raise
        raise OSError(f"Cannot read {path}: {error.strerror or error}.") from error
    known = {"names", "palette", "ids", "colors", "scores"}
    if not isinstance(content, dict) or content.get("names") is None or set(content) - known:
        raise ValueError(
            f"Expected {path} to be a mapping with `names` and only {sorted(known)}, but got {_short.repr(content)}."
        )
    names = _names(content["names"])
    palette = rainbow(names) if content.get("palette") is None else _palette(content["palette"], len(names))
    if content.get("ids") is not None and content.get("colors") is not None:
        raise _Fault("`ids` or `colors`", _Words("both"))
    ids: Ids = None
    if content.get("ids") is not None:
        ids = _ids(content["ids"], len(names))
    elif content.get("colors") is not None:
        ids = _colors(content["colors"], names, content.get("palette") and palette)
    return ClassesFile(ClassSet(names, palette, _scores(content.get("scores") or {}, len(names))), ids)


def _names(given: Any) -> tuple[str, ...]:
    if isinstance(given, dict):
        if list(given) != list(range(len(given))):
            raise _Fault("`names` to be a list, or a mapping of the ids 0, 1, 2, ... to names", given)
        given = list(given.values())
    if not isinstance(given, list) or len(given) < 2:
        raise _Fault("`names` to list at least two classes (the background is one)", given)
    if wrong := [name for name in given if not isinstance(name, str) or not name.strip()]:
        raise _Fault("`names` to be text (YAML takes a bare no, 12 or ~ for something else: quote it)", wrong)
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise _Fault("`names` to differ", _Words(f"{', '.join(twice)} more than once"))
    if len(given) > IGNORE:
        raise _Fault(f"at most {IGNORE} `names`, since {IGNORE} is the id of what is ignored", _Words(str(len(given))))
    return tuple(given)


def _is_whole(value: Any, stop: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < stop


def _colour(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 3 and all(_is_whole(value, 256) for value in given)


def _palette(given: Any, count: int) -> np.ndarray:
    if not isinstance(given, list) or len(given) != count or not all(map(_colour, given)):
        raise _Fault(f"`palette` to list {count} colours [r, g, b] of whole numbers in 0..255, one a class", given)
    return np.array(given, dtype=np.uint8)


def _ids(given: Any, count: int) -> dict[int, int]:
    what = f"`ids` to map 0..255 to 0..{count - 1} or {IGNORE}"
    if not isinstance(given, dict) or not given:
        raise _Fault(what, given)
    wrong = {
        raw: train
        for raw, train in given.items()
        if not _is_whole(raw, 256) or not (_is_whole(train, count) or (_is_whole(train, 256) and train == IGNORE))
    }
    if wrong:
        raise _Fault(what, wrong)
    return dict(given)


def _colors(given: Any, names: tuple[str, ...], palette: np.ndarray | None) -> dict[Colour, int]:
    if given == "palette":
        if palette is None:
            raise _Fault("a `palette` for `colors: palette`", _Words("none"))
        given = {name: colour for name, colour in zip(names, palette.tolist(), strict=True)}  # noqa: C416
    classes = {"ignore": IGNORE, **{name: i for i, name in enumerate(names)}}
    if not isinstance(given, dict) or not given:
        raise _Fault('`colors` to map names to colours [r, g, b], or to be "palette"', given)
    ids: dict[Colour, int] = {}
    for name, colours in given.items():
        if name not in classes:
            raise _Fault("`colors` to be of classes in `names`, or of `ignore`", name)
        colours = [colours] if _colour(colours) else colours
        if not isinstance(colours, list) or not colours or not all(map(_colour, colours)):
            raise _Fault(f"`colors` of {name!r} to be [r, g, b] of whole numbers in 0..255, or a list of such", colours)
        for r, g, b in colours:
            if ids.setdefault((r, g, b), classes[name]) != classes[name]:
                raise _Fault("`colors` to give a colour to one class", _Words(f"{[r, g, b]} for two"))
    return ids


def _scores(given: Any, count: int) -> dict[str, tuple[int, ...]]:
    if not isinstance(given, dict):
        raise _Fault("`scores` to map names to lists of class ids", given)
    for name, ids in given.items():
        if not isinstance(ids, list) or not ids or not all(_is_whole(i, count) for i in ids):
            raise _Fault(f"`scores` {str(name)!r} to list class ids in [0, {count})", ids)
        if len(set(ids)) < len(ids):
            raise _Fault(f"`scores` {str(name)!r} to list each class once", ids)
    return {str(name): tuple(ids) for name, ids in given.items()}
