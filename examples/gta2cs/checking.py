"""Find what is missing or wrong in the files of a pair, by file name, before a run does.

No file stops this command: every error while reading a file becomes a row of the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from gta2cs.masks import Masks, ids_of
from gta2cs.reading import IGNORE, Decoded, decode
from gta2cs.samples import ClassSet, Labelled, Unlabelled, progress

if TYPE_CHECKING:
    from gta2cs.datasets import Pair


PLACE = re.compile(r"\S*[/\\]\S+")  # a path in a problem
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class Seen:
    """Properties of the images and labels of a set."""

    depths: Counter[str] = field(default_factory=Counter)
    bands: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    turned: int = 0  # by an EXIF orientation
    low: float = np.inf
    high: float = -np.inf
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by train id
    masks: Masks | None = None  # of labels whose 255 nobody explained
    mean: list[np.ndarray] = field(default_factory=list)  # of each image's channels, in 0..1 as the net takes them
    square: list[np.ndarray] = field(default_factory=list)

    better_turned: Counter[str] = field(default_factory=Counter)  # pairs whose label fits better, by how it is turned
    compared: int = 0

    def add(self, found: Decoded) -> None:
        """Add an image as it is stored."""
        self.depths[found.depth] += 1
        self.bands[found.pixels.shape[2]] += 1
        self.sizes[found.size] += 1
        self.turned += found.orientation != 1
        finite = found.pixels[np.isfinite(found.pixels)] if found.pixels.dtype.kind == "f" else found.pixels
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def statistics(self) -> tuple[str, str]:
        """Mean and standard deviation of each channel, for `data.mean` and `data.std`."""
        return _statistics(self.mean, self.square)


@dataclass
class CheckReport:
    """The result of `check_data`: one row for each set, and the problems by kind, each with its file."""

    rows: list[tuple[str, int, int, list[str]]] = field(default_factory=list)  # set, images, labelled, absent classes
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is no fault, but good to know
    seen: dict[str, Seen] = field(default_factory=dict)  # by set
    names: tuple[str, ...] = ()  # of the classes

    @property
    def ok(self) -> bool:
        """True when nothing is missing or wrong (a class that never occurs is only mentioned)."""
        return not any(self.problems.values())

    def add(self, kind: str, what: str) -> None:
        """Record one problem."""
        self.problems.setdefault(kind, []).append(what)

    def table(self) -> Table:
        """One row for each set, with its number of problems."""
        table = Table("set", "images", "with label", "problems", "classes that never occur")
        for name, images, labels, absent in self.rows:
            count = sum(what.startswith(f"{name}: ") for found in self.problems.values() for what in found)
            never = escape(", ".join(absent)) or ("none" if labels else "–")
            table.add_row(name, str(images), str(labels), str(count) if count else "none", never)
        return table

    def values(self) -> Table:
        """One row for each set: how its image files are stored, and what the net gets."""
        table = Table("set", "width x height")
        table.add_column("channels", min_width=len("channels"))
        for title in ("depth", "values", "turned by EXIF", "mean", "std"):
            table.add_column(title)
        for name, seen in self.seen.items():
            if seen.sizes:
                low, high = min(seen.sizes), max(seen.sizes)
                sizes = f"{low[1]} x {low[0]}" + (f" to {high[1]} x {high[0]}" if low != high else "")
                depths, bands = (", ".join(str(x) for x, _ in c.most_common()) for c in (seen.depths, seen.bands))
                values = f"{seen.low:g} to {seen.high:g}" if seen.high >= seen.low else "none"
                table.add_row(name, sizes, bands, depths, values, str(seen.turned), *seen.statistics())
        return table

    def histogram(self) -> Table:
        """One row for each class: its share of the labelled pixels of each set, in percent."""
        sets = [name for name, seen in self.seen.items() if seen.pixels.any()]
        table = Table("class, % of labelled pixels", *sets)
        counts = [self.seen[name].pixels for name in sets]
        for i, name in enumerate(self.names):
            table.add_row(escape(name), *(f"{100 * n[i] / max(1, n[:IGNORE].sum()):.2f}" for n in counts))
        table.add_section()
        table.add_row("ignored, % of all pixels", *(f"{100 * n[IGNORE] / n.sum():.2f}" for n in counts))
        return table

    def lines(self, limit: int = 10) -> list[str]:
        """Problems as text: those that differ by the file alone are told once, with the names of up to `limit` more."""
        lines = []
        for kind, found in self.problems.items():
            alike: dict[str, list[str]] = {}
            for what in found:
                words = PLACE.sub("", what)
                alike.setdefault(NUMBER.sub("", words) if kind == "refused" else words, []).append(what)
            for group in list(alike.values())[:limit]:
                first = max(group, key=lambda what: [float(n) for n in NUMBER.findall(PLACE.sub("", what))])
                others = [what for what in group if what is not first]
                lines.append(f"{kind}: {first}")
                exact = len({PLACE.sub("", what) for what in group}) == 1
                same = "the same" if exact else "the same, with other numbers,"
                names = [
                    Path(place[0].replace("\\", "/")).name.rstrip(":,")
                    for x in others[:limit]
                    if (place := PLACE.search(x))
                ]
                if others:
                    rest = f" and {len(others) - limit} more" if len(others) > limit else ""
                    lines.append(f"{kind}: {same} of {', '.join(names)}{rest}")
            if len(alike) > limit:
                lines.append(f"{kind}: and {sum(map(len, list(alike.values())[limit:]))} more")
        return lines

    def normalisation(self) -> list[str]:
        """The options to write where the number of channels has no known mean and deviation."""
        parts = self.seen.values()
        mean, std = _statistics([x for part in parts for x in part.mean], [x for part in parts for x in part.square])
        asked = any("`data.mean` and `data.std`" in what for found in self.problems.values() for what in found)
        return [f'Those of all images: --data.mean "{mean}" --data.std "{std}"'] if asked and mean else []

    def __rich__(self) -> Group:
        """Print the tables, then hints, then the problems."""
        tables = [self.table()]
        tables += [self.values()] if any(seen.sizes for seen in self.seen.values()) else []
        tables += [self.histogram()] if self.names and any(seen.pixels.any() for seen in self.seen.values()) else []
        return Group(*tables, *(escape(line) for line in (*self.notes, *self.lines(), *self.normalisation())))


def nothing_opened(error: Exception) -> CheckReport:
    """The report on a pair if its folders do not exist."""
    return CheckReport(problems={"refused": [str(error)]})


class Mismatch(NamedTuple):
    """An image whose label has another size."""

    image: Path
    size: tuple[int, int]
    label: tuple[int, ...]


def check_data(data: Pair | Labelled | Unlabelled, classes: ClassSet | None = None) -> CheckReport:
    """Read every file once and report missing pairs, unreadable files, different sizes and unexpected ids by file name.

    Open the pair with `build_pair(..., strict=False)`, so that missing files are reported instead of raising an error.
    """
    report = CheckReport()
    if not isinstance(data, Labelled | Unlabelled):
        for what in data.problems:
            report.add("refused", what)
        known = None if data.problems else data.classes  # without classes any id may be one
        report.names = () if known is None else known.names
        for name, part in data.sets().items():
            _check_set(report, name, part, known)
        if data.target_val is None:
            report.notes.append("target val: no target image has a label, so the run reports no IoU on target.")
    else:
        report.names = classes.names if classes is not None else ()
        _check_set(report, "data", data, classes)
    return report


def _check_set(report: CheckReport, name: str, data: Labelled | Unlabelled, classes: ClassSet | None) -> None:
    labelled = isinstance(data, Labelled)
    seen = report.seen.setdefault(name, Seen())
    wrong: list[Mismatch] = []
    for what in data.missing:
        report.add("missing" if "no " in what else "list", f"{name}: {what}")
    for index in progress(range(len(data)), f"Checking {name}"):
        if not data.paths:  # drawn or given in memory: nothing on disk to doubt
            item = _try(report, name, partial(data.__getitem__, index))
            if labelled and item is not None:
                seen.pixels += np.bincount(item[1].numpy().ravel(), minlength=256)
            continue
        path = data.paths[index][0] if isinstance(data, Labelled) else data.paths[index]
        image = _try(report, name, partial(_check_image, data, path, seen))
        if isinstance(data, Labelled) and data.format is not None:
            _try(report, name, partial(_check_label, report, name, data, index, image, wrong))
    if wrong:
        _explain_sizes(report, name, wrong, seen)
    if seen.masks is not None:
        if fault := seen.masks.fault("this set"):
            report.add("masks", f"{name}: {fault}")
        if note := seen.masks.note():
            report.notes.append(f"{name}: {note}")
    absent = [c for i, c in enumerate(classes.names) if not seen.pixels[i]] if classes is not None and labelled else []
    report.rows.append((name, len(data), len(data) if labelled else 0, absent))
    if seen.depths and seen.depths.keys() == {"8 bit"} and 0 < seen.high < 32:
        report.notes.append(
            f"{name}: no value of any image is above {seen.high:g} of 255: very dark, or more bits were cut off."
        )
    for how, count in seen.better_turned.items():
        if how and count >= 5 and count > 0.7 * seen.compared:
            report.notes.append(
                f"{name}: {count} of {seen.compared} labels would fit their images better {how}: are they stored so?"
            )
    if not len(data):
        report.add("empty", f"{name}: no image with a label" if labelled else f"{name}: no image")


def _check_image(data: Labelled | Unlabelled, path: Path, seen: Seen) -> Decoded:
    found = decode(path)
    seen.add(found)
    image = data.image_format.of(found, path).float() / 255
    seen.mean.append(image.mean((1, 2)).double().numpy())
    seen.square.append(image.square().mean((1, 2)).double().numpy())
    return found


def _check_label(
    report: CheckReport,
    name: str,
    data: Labelled,
    index: int,
    image: Decoded | None,
    wrong: list[Mismatch],
) -> None:
    path, format, seen = data.paths[index][1], data.format, report.seen[name]
    assert format is not None
    raw = format.read_ids(path)
    if image is not None and image.size != raw.shape:
        wrong.append(Mismatch(data.paths[index][0], image.size, raw.shape))
        both = f"{image.size[1]}x{image.size[0]}, {path} is {raw.shape[1]}x{raw.shape[0]}"
        report.add("size differs", f"{name}: {data.paths[index][0]} is {both}{_orientation_hint(image, raw.shape)}")
    if format.doubt_masks:
        seen.masks = seen.masks or Masks.of(format)
        seen.masks.add(path, ids_of(raw))
    if extra := format.unexpected(raw):
        way_out = f". {format.way_out(extra)}" if format.strict else ""
        report.add("unexpected ids", f"{name}: {path} holds {_some_ids(extra)}{way_out}")
    inside = (raw >= 0) & (raw < 256)
    train = np.where(inside, format.table[np.where(inside, raw, 0)], IGNORE)
    seen.pixels += np.bincount(train.ravel(), minlength=256)
    if image is not None and image.size == train.shape and (how := _better_turned(image.pixels, train)) is not None:
        seen.compared += 1
        seen.better_turned[how] += 1


def _better_turned(pixels: np.ndarray, label: np.ndarray) -> str | None:
    """How to turn the label so that its boundaries match the edges of the image; "" if it is right as it is.

    It compares the mean edge strength at the boundaries. The result is None if there is no boundary or no edge.
    """
    step = max(1, max(label.shape) // 256)
    grey, small = pixels[::step, ::step].mean(2, dtype=np.float64), label[::step, ::step]
    edges = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    turned = {"": small, "mirrored": small[:, ::-1], "upside down": small[::-1], "by half a turn": small[::-1, ::-1]}
    fits = {}
    for how, ids in turned.items():
        here, below, right = ids[:-1, :-1], ids[1:, :-1], ids[:-1, 1:]
        boundary = ((here != below) | (here != right)) & (np.maximum(np.maximum(below, right), here) != IGNORE)
        if boundary.sum() < 20 or not edges.any():
            return None
        fits[how] = float(edges[boundary].mean())
    best = max(fits, key=fits.__getitem__)
    return best if fits[best] > 1.1 * fits[""] else ""


def _orientation_hint(image: Decoded, label: tuple[int, ...]) -> str:
    if label != image.size[::-1]:
        return ""
    if image.orientation >= 5:
        return " (as the image is stored, before its EXIF orientation turns it: turn the label, too)"
    return " (rows and columns exchanged: one of the two is turned)"


def _explain_sizes(report: CheckReport, name: str, wrong: list[Mismatch], seen: Seen) -> None:
    """Find labels with the size of other images of the set, which may be paired with the wrong images."""
    others = [path for path, size, label in wrong if seen.sizes[label] and label != size[::-1]]
    if others:
        report.notes.append(
            f"{name}: {len(others)} labels have the size of other images of the set, for example that of {others[0]}: "
            "are images and labels paired by the right names?"
        )


def _try(report: CheckReport, name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        report.add("unreadable", f"{name}: {error}")
    except ValueError as error:
        report.add("refused", f"{name}: {error}")
    except Exception as error:  # no file may end the search: the others are still to be looked at
        report.add("unreadable", f"{name}: {type(error).__name__}: {error}")
    return None


def _statistics(mean: list[np.ndarray], square: list[np.ndarray]) -> tuple[str, str]:
    """Mean and standard deviation of each channel as text; empty without images."""
    if not mean:
        return "", ""
    centre = np.mean(mean, 0)
    return _numbers(centre), _numbers(np.sqrt(np.maximum(np.mean(square, 0) - centre**2, 0)))


def _numbers(values: Iterable[float]) -> str:
    return f"[{', '.join(f'{value:.3f}' for value in values)}]"


def _some_ids(ids: list[int], limit: int = 10) -> str:
    more = len(ids) - limit
    return str(ids) if more <= 0 else f"{str(ids[:limit])[:-1]}, ... and {more} more]"
