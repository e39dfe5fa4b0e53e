"""Lists of file names, read as UTF-8 whatever the locale, and compared as paths."""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gta2cs.reading import IMAGE_SUFFIXES

_SUFFIX = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_TWO_COLUMNS = re.compile(rf"(\S+\.(?:{_SUFFIX}))\s+\S+\.(?:{_SUFFIX})", re.IGNORECASE)  # image, then label


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark; another encoding is refused by file name."""
    if not Path(path).is_file():  # nor is a pipe read, which may wait for ever
        what = "a folder" if Path(path).is_dir() else "a link that leads nowhere" if path.is_symlink() else "no file"
        raise FileNotFoundError(f"Expected {path} to be a text file, but it is {what}.")
    content = Path(path).read_bytes()
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is UTF-16")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes, as UTF-16 does")
        return text
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        why = f"line {line} holds the byte 0x{content[error.start]:02x}, as Latin-1 does"
    except ValueError as error:
        why = str(error)
    raise ValueError(f"Expected {path} to be UTF-8 text, but {why}. Save it as UTF-8.")


def read_list(path: Path) -> list[str]:
    """The lines that are not empty. If they have two columns, image and label, only the image."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"Expected a list of image names {path}, but it does not exist.")
    return lines_of(read_text(path).split("\n"))


def lines_of(lines: Iterable[str]) -> list[str]:
    """The names among `lines`."""
    names = []
    for line in lines:
        line = line.split("\t")[0].strip()
        if both := _TWO_COLUMNS.fullmatch(line):
            line = both[1]
        if line:
            names.append(line)
    return names


class Found(NamedTuple):
    """The result of looking up a list of names."""

    positions: list[int]  # of the named files, in the list's order, each once
    absent: list[str]
    ambiguous: list[str]  # "0001 (seq1/0001, seq2/0001)"
    repeated: list[str]


class Known(NamedTuple):
    """The names that a list may use for a file."""

    names: tuple[str, ...]  # its own, which nothing else may be
    paths: tuple[str, ...]  # below the root of its data set


def find_names(names: Sequence[str], files: Sequence[Known]) -> Found:
    r"""Find the file that each name means.

    A name means the file with that name. Otherwise it means the file whose path agrees with it from the end, as far as
    both go, so that `00003`, `images/00003.png` and `C:\data\gta\images\00003.png` mean one file, and `seq1/0001` never
    means `seq2/0001`. An ending counts only where it tells two files apart.
    """
    exact: dict[tuple[str, ...], set[int]] = {}
    ends: dict[str, set[tuple[tuple[str, ...], int]]] = {}
    for position, known in enumerate(files):
        for path in map(parts_of, known.names):
            exact.setdefault(path, set()).add(position)
        for path in map(parts_of, known.paths):
            ends.setdefault(path[-1], set()).add((path, position))

    def meant(parts: tuple[str, ...]) -> set[int]:
        if not parts or parts in exact:
            return exact.get(parts, set())
        agree = [(path, at) for path, at in ends.get(parts[-1], ()) if _same_end(path, parts)]
        return {at for _, at in agree}

    found: dict[int, None] = {}
    absent, ambiguous, repeated = [], [], []
    for name in names:
        hits = meant(parts_of(name)) or meant(parts_of(name, suffix=False))
        if not hits:
            absent.append(name)
        elif len(hits) > 1:
            ambiguous.append(f"{name} ({', '.join(sorted(files[i].paths[0] for i in hits)[:3])})")
        elif (position := next(iter(hits))) in found:
            repeated.append(name)
        else:
            found[position] = None
    return Found(list(found), absent, ambiguous, repeated)


def _same_end(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    common = min(len(first), len(second))
    return first[-common:] == second[-common:]


def parts_of(name: str, *, suffix: bool = True) -> tuple[str, ...]:
    """The components of a path of any system, in composed Unicode and without the ending of an image file."""
    path = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    if not suffix and path.suffix.lower() in IMAGE_SUFFIXES:
        path = path.with_suffix("")
    return tuple(part for part in path.parts if part not in (".", "/"))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
