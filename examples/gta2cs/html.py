"""The report of a run as a single HTML file with its pictures inside, without scripts.

It supports only the Markdown that our reports use: headings, paragraphs, tables, lists, code, bold, links, pictures,
and parts that are folded away.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np

from gta2cs.datasets import ClassSet
from gta2cs.files import write_text

CELL = re.compile(r"\|((?:\\.|[^\\|])*)")  # what follows a bar that is not escaped
ESCAPED = re.compile(r"\\([\\|`*\[\]<>$])")
_HIDDEN = 0xE000  # first of the characters that mean nothing
DETAILS = re.compile(r"<details><summary>(.*)</summary>")  # its own block, as the end is
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
STYLE = """
:root { color-scheme: light dark; --ink: #1c1b22; --page: #fff; --line: #ddd; --best: #e8e0f7; --quiet: #666 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e4ec; --page: #17161b; --line: #3a3842; --best: #43325f; --quiet: #a09da8 }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: 1rem 0 }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { vertical-align: bottom; font-weight: 600 }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
                                 white-space: normal; min-width: 7rem; max-width: 40vw }
th.words, td.words { text-align: left }
td.best { background: var(--best) }
.swatch { display: block; height: .35rem; border-radius: .2rem; margin-bottom: .2rem }
figure { margin: 1.5rem 0 }
figure a { display: block }
img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem }
figcaption, footer { color: var(--quiet); font-size: .85rem }
code { font-size: .9em }
"""


def write_html(report: Path, classes: ClassSet | None = None) -> Path:
    """Write `report.html` next to `report.md`; class columns of its tables have the colours of the classes."""
    text = report.read_text(encoding="utf-8")
    path = report.with_suffix(".html")
    write_text(path, render(text, report.parent, classes))
    return path


def render(text: str, folder: Path, classes: ClassSet | None = None) -> str:
    """Return the page of a Markdown text whose pictures are PNGs in `folder`."""
    body = "\n".join(_blocks(text, folder, classes))
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "Report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_plain(title))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        "<footer>Where rows are nets or runs, the best value of a column is marked, unless it is 0 or all are equal."
        "</footer>\n"
        "</body>\n</html>\n"
    )


def _blocks(text: str, folder: Path, classes: ClassSet | None) -> Iterator[str]:
    for blank, group in groupby(text.splitlines(), key=lambda line: not line.strip()):
        lines = list(group)
        if blank:
            continue
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            yield f"<h{level}>{_inline(lines[0].lstrip('# '))}</h{level}>"
            lines = lines[1:]
        if not lines:
            continue
        if (opened := DETAILS.fullmatch(lines[0])) or lines == ["</details>"]:
            yield f"<details><summary>{_inline(opened[1])}</summary>" if opened else "</details>"
        elif lines[0].startswith("|"):
            yield _table(lines, classes)
        elif lines[0].startswith("- "):
            items = " \n".join(lines)[2:].split("\n- ")
            yield "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        elif all(PICTURE.fullmatch(line.strip()) for line in lines):
            for line in lines:
                alt, name = PICTURE.fullmatch(line.strip()).groups()  # type: ignore[union-attr]
                yield f"<figure>{_picture(folder / name, alt)}<figcaption>{escape(alt)}</figcaption></figure>"
        else:
            yield f"<p>{_inline(' '.join(lines))}</p>"


def _table(lines: list[str], classes: ClassSet | None) -> str:
    """A table whose second line is the rule between head and body."""
    head, _, *rows = ([cell.strip() for cell in CELL.findall(line.strip())[:-1]] for line in lines)
    colors = {} if classes is None else dict(zip(classes.names, classes.palette.tolist(), strict=True))
    values = np.array([[_number(cell) for cell in row] for row in rows]).reshape(len(rows), len(head))
    values[:, ["(lower is better)" in cell for cell in head]] *= -1
    best = np.where(np.isnan(values), -np.inf, values).max(0, initial=-np.inf)
    best[(values == best).all(0)] = 0  # nothing stands out
    if head[0].startswith(("class", "score")):  # a column holds different things
        best[:] = 0
    words = [' class="words"' if column and np.isnan(values[:, column]).all() else "" for column in range(len(head))]
    parts = ["<tr>"]
    for cell, kind in zip(head, words, strict=True):
        parts.append(f'<th scope="col"{kind}>{_swatch(cell, colors)}{_inline(cell)}</th>')
    parts.append("</tr>")
    for row, numbers in zip(rows, values, strict=True):
        parts.append("<tr>")
        for column, (cell, number, most, kind) in enumerate(zip(row, numbers, best, words, strict=True)):
            mark = ' class="best"' if len(rows) > 1 and number == most != 0 else kind
            swatch = _swatch(cell, colors) if column == 0 and head[0].startswith("class") else ""
            parts.append(f"<td{mark}>{swatch}{_inline(cell)}</td>")
        parts.append("</tr>")
    return '<div class="scroll"><table>' + "".join(parts) + "</table></div>"


def _swatch(cell: str, colors: dict[str, list[int]]) -> str:
    """The colour of the class that a cell names, if it names one."""
    if (color := colors.get(_plain(cell))) is None:
        return ""
    return f'<span class="swatch" style="background:rgb({",".join(map(str, color))})"></span>'


def _picture(path: Path, alt: str) -> str:
    """A PNG as part of the page."""
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG"):
        raise ValueError(f"Expected the picture {path} of the report to be a PNG, but it is not.")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def _inline(text: str) -> str:
    """Bold, code and links inside a line; everything else as it is written."""
    text = ESCAPED.sub(lambda found: chr(_HIDDEN + ord(found[1])), text)  # no Markdown, until the end
    text = escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((https?://[^)\s\"]+)\)", r'<a href="\2">\1</a>', text)
    return re.sub(f"[{chr(_HIDDEN)}-{chr(_HIDDEN + 127)}]", lambda found: escape(chr(ord(found[0]) - _HIDDEN)), text)


def _plain(text: str) -> str:
    """The plain text, for the names of classes."""
    parts = ESCAPED.split(text)  # between escaped characters
    return "".join(part if i % 2 else part.replace("**", "").replace("`", "") for i, part in enumerate(parts)).strip()


def _number(cell: str) -> float:
    found = re.match(r"-?\d+(\.\d+)?", _plain(cell))
    return float(found.group()) if found else float("nan")
