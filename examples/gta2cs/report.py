"""Results of a run to look at: a Markdown table, curves, and panels of predictions."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import LogFormatter, MaxNLocator

matplotlib.rcParams["text.parse_math"] = False  # a class may be called "a$b"
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gta2cs.datasets import ClassSet
from gta2cs.evaluation import Score, headline
from gta2cs.files import replacing
from gta2cs.files import write_json as write_json
from gta2cs.files import write_text as write_text
from gta2cs.label_free import DEFAULT
from gta2cs.palettes import on_white
from gta2cs.run_folder import stage_title


def markdown_table(rows: dict[str, Score], classes: ClassSet) -> str:
    """One line for each net: the named means, then the IoU of each class, in percent."""
    means = list(classes.scores)
    head = ["net", *(f"**{cell(m)}**" for m in means), *(cell(c) for c in classes.names)]
    lines = []
    for name, score in rows.items():
        values = [f"**{score.means[m]:.1f}**" for m in means]
        values += ["–" if np.isnan(score.iou[c]) else f"{score.iou[c]:.1f}" for c in classes.names]
        lines.append([cell(name), *values])
    return table_of(head, lines)


def table_of(head: Sequence[str], lines: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table, whose first columns hold so many words and the others numbers."""
    ruler = "|" + "---|" * words + "---:|" * (len(head) - words)
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (head, *lines))
    return "\n".join([first, ruler, *others]) + "\n"


def cell(name: str) -> str:
    """Escape a name for a cell of a Markdown table or a title."""
    return re.sub(r"([\\|`*\[\]<>$])", r"\\\1", " ".join(name.split()))


def gain_sentence(rows: dict[str, Score]) -> str:
    """The gain of the last row over source-only and the classes with most of it; empty if either has no score."""
    first, last = start_of(list(rows)), list(rows)[-1]
    before, after = rows[first], rows[last]
    gain = after.miou - before.miou
    if len(rows) < 2 or not first.startswith("source_only") or np.isnan(gain):
        return ""
    mean = headline(after.means)
    if abs(gain) < 0.05:  # the chosen net may be the source-only one
        return f"**{last} is level with {first}** ({mean} {after.miou:.1f})."
    verb, points = ("gains" if gain > 0 else "loses"), f"{abs(gain):.1f}"
    against = "over" if gain > 0 else "against"
    text = f"**{last} {verb} {points} points of {mean} {against} {first}** ({before.miou:.1f} → {after.miou:.1f})"
    changes = {c: after.iou[c] - before.iou[c] for c in after.iou if not np.isnan(after.iou[c] - before.iou[c])}
    ordered = sorted(changes, key=lambda c: -changes[c])
    up = [f"{c} {changes[c]:+.1f}" for c in ordered[:3] if changes[c] >= 0.05]
    down = [f"{c} {changes[c]:+.1f}" for c in ordered[::-1][:3] if changes[c] <= -0.05]
    text += f". It gains most in {', '.join(up)}" if up else ""
    return (text + (f". It loses most in {', '.join(down)}." if down else ".")).replace(" -", " −")


def start_of(names: Sequence[str]) -> str:
    """The row that adaptation starts from: of the first stages that train on source alone, the last."""
    found = names[0]
    for name in names:
        if not name.startswith("source_only"):
            break
        found = found if " + " in name else name
    return found


def rich_table(rows: dict[str, Score], classes: ClassSet) -> Table:
    """The same table for the terminal, with one column for each net."""
    table = Table(title="IoU in percent on target, last checkpoint", title_justify="left")
    table.add_column("class")
    for name in rows:
        table.add_column(escape(name), justify="right")
    for c in classes.names:
        table.add_row(escape(c), *("–" if np.isnan(s.iou[c]) else f"{s.iou[c]:.1f}" for s in rows.values()))
    table.add_section()
    for mean in classes.scores:
        table.add_row(escape(mean), *(f"{s.means[mean]:.1f}" for s in rows.values()), style="bold")
    return table


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Turn class ids into colours; ids that are not a class become black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def save_panels(path: Path, rows: list[dict[str, np.ndarray]], classes: ClassSet) -> None:
    """Draw one line per image with named columns; 2-D uint8 arrays are label maps, 2-D float arrays confidences."""
    names = list(rows[0])
    height, width = rows[0][names[0]].shape[:2]
    ratio = min(max(height / width, 0.2), 3)  # a strip gets margins: as it is, 2000 x 1 pixels would fill gigabytes
    figure, axes = plt.subplots(
        len(rows), len(names), figsize=(2.6 * len(names), 2.6 * ratio * len(rows) + 0.7), squeeze=False
    )
    for k, (line, row) in enumerate(zip(axes, rows, strict=True)):
        for axis, name in zip(line, names, strict=True):
            panel = row[name]
            if panel.ndim == 2 and panel.dtype == np.uint8:
                axis.imshow(colorize(panel, classes.palette), interpolation="nearest")
            else:
                shown = axis.imshow(panel, vmin=0, vmax=1, cmap="magma")
                if panel.ndim == 2 and k == len(rows) - 1:  # a scale below the column
                    bar = figure.colorbar(shown, cax=axis.inset_axes((0, -0.11, 1, 0.05)), orientation="horizontal")
                    bar.set_ticks([0, 0.5, 1])
                    bar.ax.tick_params(labelsize=7, length=2, pad=1)
            axis.set_axis_off()
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(textwrap.fill(name, 36), fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color / 255) for color in np.asarray(classes.palette, dtype=float)]
    lines = -(-len(handles) // 10)
    figure.legend(handles, classes.names, loc="lower center", ncol=-(-len(handles) // lines), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight() * lines, 1, 1))
    _save(figure, path)


def save_curves(
    path: Path, stages: list[dict[str, Any]], classes: ClassSet | None = None, *, score: str = DEFAULT
) -> None:
    """Losses, mIoU, a score without labels, the kept share of each predicted class, and what else is logged for each.

    What is logged at single batches is a running mean; losses are also there as they are, pale. A thin line is where a
    stage begins. With `classes`, a class has the same colour as in the panels, darkened if it would not show on white.
    `score` is the one that the deployed net is chosen by.
    """
    logged = [entry.get("per_class", {}) for stage in stages for entry in stage["losses"]]
    quantities = list(dict.fromkeys(quantity for entry in logged for quantity in entry))
    figure, (left, middle, free, right, *more) = plt.subplots(1, 4 + len(quantities))
    per_class = ClassLines(classes)
    start, total = 0, sum(stage["steps"] for stage in stages)
    for i, stage in enumerate(stages):
        name = stage_title([stage["name"] for stage in stages], i)
        _plot_losses(left, stage, start)
        _plot_nets(middle, name, stage.get("scores"), start, lambda net: net["means"][headline(net["means"])])
        _plot_nets(free, name, stage.get("label_free"), start, lambda net: 100 * net["scores"][score])
        if "source_only" in stage:
            value = 100 * stage["source_only"]["scores"][score]
            free.axhline(value, color="0.5", ls="--", lw=1, label="source-only net")
        kept = ((e["step"], e["kept"]) for e in stage["losses"] if e.get("kept"))
        per_class.plot(right, [(start + step, {name: 100 * k for name, k in values.items()}) for step, values in kept])
        for quantity, axis in zip(quantities, more, strict=True):
            noted = ((e["step"], e.get("per_class", {}).get(quantity)) for e in stage["losses"])
            per_class.plot(axis, [(start + step, values) for step, values in noted if values])
        start += stage["steps"]
        for axis in (left, middle, free, right, *more) if start < total else ():
            axis.axvline(start, color="0.6", lw=1, zorder=0)
    titles = [
        "loss",
        "mIoU on target, %",
        f"{score.replace('_', ' ')} on target, %, no labels",
        "% of each predicted class that is sure enough",
        *quantities,
    ]
    for axis, title in zip((left, middle, free, right, *more), titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axis.grid(alpha=0.3)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")  # the default one writes formulas, and they are off: see above
    left.yaxis.set_minor_formatter(_PlainLog())
    _lay_out(figure, below=(right, *more))
    _save(figure, path)


class _PlainLog(LogFormatter):
    """Labels at the same places, as 0.06 instead of 6e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


class ClassLines:
    """Lines of classes, each with the same colour and dashes on all axes."""

    def __init__(self, classes: ClassSet | None) -> None:
        self.styles: dict[str, tuple[Any, str]] = {}
        if classes is not None:
            self.styles = {n: (on_white(c) / 255, "-") for n, c in zip(classes.names, classes.palette, strict=True)}

    def plot(self, axis: Any, entries: list[tuple[int, dict[str, float]]]) -> None:
        """Draw a line for each class of the (step, value of each class); a class may come only now and then."""
        for name in dict.fromkeys(name for _, values in entries for name in values):
            count = len(self.styles)
            color, dashes = self.styles.setdefault(name, (f"C{count % 10}", ("-", "--", ":")[count // 10 % 3]))
            x, y = [step for step, _ in entries], [values.get(name, np.nan) for _, values in entries]
            seen = name in axis.get_legend_handles_labels()[1]
            _line(axis, x, smooth(y), color=color, linestyle=dashes, label=None if seen else name)


def _plot_losses(axis: Any, stage: dict[str, Any], start: int) -> None:
    """A line for each term, in the colour that it had in the stage before."""
    seen = {line.get_label(): line.get_color() for line in axis.lines}
    for term in stage["losses"][0]["terms"] if stage["losses"] else []:
        x = [start + entry["step"] for entry in stage["losses"]]
        y = [entry["terms"].get(term, np.nan) for entry in stage["losses"]]
        mean = smooth(y)
        drawn = _line(axis, x, mean, color=seen.get(term), label=None if term in seen else term)
        if mean is not y:
            _line(axis, x, y, color=drawn.get_color(), alpha=0.25)


def _plot_nets(
    axis: Any,
    stage: str,
    evaluated: list[dict[str, Any]] | None,
    start: int,
    value: Callable[[dict[str, Any]], float],
) -> None:
    """A line for each net of a stage over its evaluations, if there are any."""
    for net in evaluated[0]["nets"] if evaluated else []:
        x, y = [start + entry["step"] for entry in evaluated], [value(entry["nets"][net]) for entry in evaluated]
        axis.plot(x, y, marker="o", ms=3, label=f"{stage}, {net}")


def smooth(values: list[float], *, shown: int = 40) -> list[float]:
    """A running mean over so many values that about `shown` of the means share none; NaN where there is no value."""
    half = len(values) // shown // 2
    if half == 0:
        return values
    windows = (np.array(values[max(0, i - half) : i + half + 1]) for i in range(len(values)))
    means = (np.nanmean(w) if not np.isnan(v) else np.nan for v, w in zip(values, windows, strict=True))
    return [float(mean) for mean in means]


def _line(axis: Any, x: list[int], y: list[float], **style: Any) -> Any:
    """A thin line, with a marker at points without a neighbour, which a line would not show."""
    gap = np.isnan([np.nan, *y, np.nan])
    alone = np.flatnonzero(~gap[1:-1] & gap[:-2] & gap[2:]).tolist()
    markers: dict[str, Any] = {"marker": "o", "ms": 3, "markevery": alone} if alone else {}
    return axis.plot(x, y, lw=1, **markers, **style)[0]


def _lay_out(figure: Any, below: Sequence[Any]) -> None:
    """Take out axes that show nothing, close the gaps, and put legends in: those of the axes `below` under them."""
    for axis in list(figure.axes):
        if not axis.get_legend_handles_labels()[0]:  # no pseudo-labels, or a target without any label
            figure.delaxes(axis)
        elif axis in below:  # a line a class: where it covers none of them
            axis.legend(fontsize=7, frameon=False, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        else:
            axis.legend(fontsize=7, frameon=False)
    figure.set_size_inches(14 * len(figure.axes) / 3, 3.8)
    for place, axis in zip(GridSpec(1, len(figure.axes), figure), figure.axes, strict=True):
        axis.set_subplotspec(place)
    figure.tight_layout()


def _save(figure: Any, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    finally:
        plt.close(figure)


def progress_bar(console: Console, *, disable: bool = False) -> Progress:
    """A progress bar with the number of steps done, the remaining time and the field `status`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=disable,
    )
