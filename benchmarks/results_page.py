"""The summary of docs/results.md, over all pairs and rows that the JSON has: what each method gains on each pair.

    python benchmarks/results_page.py      # the summary and the bar chart; real_pairs.py --table does it, too

A gain is the mIoU of the adapted student minus that of the source-only net of the same seed, net and number of steps.
The gap closed is the mean gain as a share of the mean distance from source-only to the oracle.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from benchmarks.harness import pair_name, write_section
from benchmarks.rows import PAIRS, row_of

RESULTS = ROOT / "benchmarks" / "results" / "real_pairs.json"
DOCS = ROOT / "docs"
# Rows of the summary, in this order, where the JSON has them; rows that it does not name are shown on the sub-pages.
METHODS = {
    "dacs": "DACS",
    "diga": "DiGA",
    "ehtdi": "EHTDI",
    "combined": "combined",
    "small_dacs": "DACS, small net",
    "duda_pre": "DUDA, small net",
}
# Tables of one row against others, on the sub-pages: marker -> pairs of rows.
AGAINST = {
    "diga_against": (("diga", "dacs"),),
    "ehtdi_against": (("ehtdi", "source_only"), ("ehtdi", "dacs"), ("ehtdi", "diga")),
    "duda_against": (
        ("duda_pre", "small_source_only"),
        ("duda_pre", "small_dacs"),
        ("duda_pre", "small_kd"),
        ("duda", "duda_pre"),
        ("duda", "duda_plain"),
    ),
}
# What the verdict compares a method with, beside source-only, and what no row says of it.
RIVALS = {"diga": "dacs", "ehtdi": "dacs", "combined": "dacs", "duda_pre": "small_dacs"}
REMARKS = {
    "dacs": "It is the simplest one: start with it.",
    "duda_pre": "It trains a small net beside a large one, and the small one is used.",
}
STATISTICS = "source_only + BatchNorm statistics of target"
COLORS = ("#4c3a8c", "#e0a030", "#2f9e8f", "#c2453d", "#9aa3b5", "#5a6478")


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a method brings on a pair."""

    by_seed: tuple[float, ...]
    closed: float | None  # share of the distance to the oracle

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed)

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.1f}"
        closed = "" if self.closed is None else f" ({100 * self.closed:.0f} %)"
        return f"{self.mean:+.1f}{spread}{closed}".replace("-", "−")


def scores_of(results: dict[str, Any], pair: str, recipe: str) -> dict[int, float]:
    """Seed -> mIoU of the student (or the only net) of a row's last stage."""
    found: dict[int, float] = {}
    for run in results.values():
        if (run["pair"], run["recipe"]) != (pair, recipe):
            continue
        last = (run.get("stages") or [run["stage"]])[-1]["recipe"]
        score = run["rows"].get(f"{last}, student") or run["rows"].get(last)
        if score is not None and score.get("means"):
            found[run["seed"]] = next(iter(score["means"].values()))
    return found


def baseline_of(pair: str, recipe: str) -> str:
    """The source-only row of the same net."""
    try:
        net = row_of(pair, recipe).get("net", "standard")
    except KeyError:  # a row of an older file
        net = "standard"
    return "source_only" if net == "standard" else f"{net}_source_only"


def gain_of(results: dict[str, Any], pair: str, recipe: str) -> Gain | None:
    """Gain over source-only, seed by seed; None where there is nothing to compare."""
    baseline = baseline_of(pair, recipe)
    before, after = scores_of(results, pair, baseline), scores_of(results, pair, recipe)
    seeds = sorted(before.keys() & after.keys())
    if not seeds:
        return None
    gains = tuple(after[seed] - before[seed] for seed in seeds)
    oracle = scores_of(results, pair, "oracle") if baseline == "source_only" else {}
    distance = statistics.mean(oracle.values()) - statistics.mean(before.values()) if oracle else 0.0
    return Gain(gains, statistics.mean(gains) / distance if distance > 0 else None)


def pairs_of(results: dict[str, Any]) -> list[str]:
    """Pairs with a source-only row, in the order of the sub-pages."""
    present = dict.fromkeys(run["pair"] for run in results.values())
    return [
        pair
        for pair in dict.fromkeys([*PAIRS, *present])
        if pair in present and scores_of(results, pair, "source_only")
    ]


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a method, a column a pair."""
    pairs = pairs_of(results)
    if not pairs:
        return "Not measured yet.\n"
    lines = [f"| | {' | '.join(pair_name(pair) for pair in pairs)} |", "|---|" + "---:|" * len(pairs)]
    lines.append(f"| source-only, mIoU | {' | '.join(level(scores_of(results, p, 'source_only')) for p in pairs)} |")
    for recipe, title in METHODS.items():
        cells = [gain_of(results, pair, recipe) for pair in pairs]
        if any(cell is not None for cell in cells):
            lines.append(f"| {title} | {' | '.join('–' if c is None else bold(c) for c in cells)} |")
    lines.append(f"| oracle, mIoU | {' | '.join(level(scores_of(results, pair, 'oracle')) for pair in pairs)} |")
    counts = sorted({len(scores_of(results, pair, "source_only")) for pair in pairs})
    seeds = " to ".join(str(n) for n in ({counts[0], counts[-1]} if len(counts) > 1 else counts))
    note = f"Mean ± standard deviation over {seeds} seeds. Bold: more than twice the deviation."
    return "\n".join(lines) + f"\n\n{note}\n"


def against(results: dict[str, Any], rows: tuple[tuple[str, str], ...]) -> str:
    """Markdown: difference of each row to another one, seed by seed, on every pair that has both."""
    lines = ["| pair | row | against | difference | ahead |", "|---|---|---|---:|---:|"]
    for pair in pairs_of(results):
        for row, other in rows:
            if found := differences(results, pair, row, other):
                ahead = f"{sum(d > 0 for d in found)} of {len(found)} seeds"
                difference = bold(Gain(tuple(found), None))
                lines.append(f"| {pair_name(pair)} | `{row}` | `{other}` | {difference} | {ahead} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "Not measured yet.\n"


def verdict(results: dict[str, Any]) -> str:
    """Markdown: a sentence or two a method, as the rows have it."""
    pairs, lines = pairs_of(results), []
    for method in METHODS:
        name = METHODS[method]
        found = {pair_name(p): gain.by_seed for p in pairs if (gain := gain_of(results, p, method)) is not None}
        if not found or method == "small_dacs":  # what DUDA is compared with
            continue
        words = [f"- **{name}** {judged(found, 'gains', 'loses', 'changes little')}."]
        if method in RIVALS and (rival := RIVALS[method]) in METHODS:
            against_rival = {pair_name(p): d for p in pairs if (d := differences(results, p, method, rival))}
            if against_rival:
                words.append(f"Against {METHODS[rival]}: {judged(against_rival, 'ahead', 'behind', 'level')}.")
        lines.append(" ".join([*words, REMARKS.get(method, "")]).strip())
    found = {}
    for run in results.values():
        if run["recipe"] == "source_only" and STATISTICS in run["rows"]:
            before, after = (next(iter(run["rows"][row]["means"].values())) for row in ("source_only", STATISTICS))
            found.setdefault(pair_name(run["pair"]), []).append(after - before)
    if found:
        lines.append(
            "- **BatchNorm statistics of target**, which cost no training: source-only with them "
            f"{judged(found, 'gains', 'loses', 'changes little')}. The rows are [per class](results/per_class.md)."
        )
    rule = "A mean difference over seeds counts when it exceeds its standard deviation; one seed settles nothing."
    return "\n".join([*lines, "", rule]) + "\n"


def headline(results: dict[str, Any]) -> str:
    """Markdown: the reason on the home page, how much of the distance to the oracle DACS closes on real data."""
    real = {"camvid": "between day and dusk", "carla2camvid": "from CARLA to real streets"}
    closed = {where: gain_of(results, pair, "dacs") for pair, where in real.items()}
    said = " and ".join(f"{100 * g.closed:.0f} % {where}" for where, g in closed.items() if g and g.closed is not None)
    return (
        f"- **It gains on real data.** DACS closes part of the distance to training on target labels: {said}. "
        "The [results](results.md) also show where a method does not help.\n"
    )


def differences(results: dict[str, Any], pair: str, row: str, other: str) -> list[float]:
    """MIoU of one row minus that of another, for each seed that both have."""
    ours, theirs = scores_of(results, pair, row), scores_of(results, pair, other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def judged(found: dict[str, Sequence[float]], up: str, down: str, level: str) -> str:
    """On which pairs differences are clear, and which way: "gains on A and B, changes little on C"."""
    parts: dict[str, list[str]] = {up: [], down: [], level: []}
    for pair, values in found.items():
        clear = len(values) > 1 and abs(statistics.mean(values)) > statistics.stdev(values)
        parts[level if not clear else up if statistics.mean(values) > 0 else down].append(pair)
    said = {word: names for word, names in parts.items() if names}
    if len(said) == 1 and len(found) > 1:
        return f"{next(iter(said))} on every pair"
    return ", ".join(f"{word} on {' and '.join(names)}" for word, names in said.items())


def level(scores: dict[int, float]) -> str:
    values = list(scores.values())
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def bold(gain: Gain) -> str:
    """A gain that is larger than twice its spread stands out."""
    clear = gain.spread is not None and abs(gain.mean) > 2 * gain.spread
    return f"**{gain}**" if clear else str(gain)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars: gain of each method on each pair, a dot a seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    pairs = pairs_of(results)
    methods = [m for m in METHODS if any(gain_of(results, pair, m) for pair in pairs)]
    figure, axis = plt.subplots(figsize=(6.0, 3.2), layout="constrained")  # small: the letters show on a phone
    width = 0.8 / max(len(methods), 1)
    for k, method in enumerate(methods):
        for x, pair in enumerate(pairs):
            gain = gain_of(results, pair, method)
            if gain is None:
                continue
            at = x + (k - (len(methods) - 1) / 2) * width
            axis.bar(at, gain.mean, 0.92 * width, color=COLORS[k % len(COLORS)], zorder=2)
            axis.scatter([at] * len(gain.by_seed), gain.by_seed, s=9, color="black", alpha=0.65, linewidth=0, zorder=3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[k % len(COLORS)]) for k in range(len(methods))]
    figure.legend(handles, [METHODS[m] for m in methods], loc="outside upper left", ncols=3, frameon=False)
    axis.set_xticks(range(len(pairs)), [pair_name(pair) for pair in pairs])
    axis.set_ylabel("gain over source-only, mIoU")
    axis.axhline(0, color="black", lw=0.8)
    axis.grid(axis="y", alpha=0.3, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def pages_of(page: Path) -> list[Path]:
    """The page of results and its sub-pages."""
    return [page, *sorted((page.parent / page.stem).glob("*.md"))]


def write(name: str, text: str, page: Path) -> None:
    """Put a text between its markers, on whichever of the pages has them."""
    target = next((p for p in pages_of(page) if f"<!-- {name}: begin -->" in p.read_text(encoding="utf-8")), page)
    if target != page:
        text = text.replace("](pictures/", "](../pictures/")
    write_section(name, text, target)


def sections(results: dict[str, Any]) -> dict[str, str]:
    """The text of each marker."""
    summary = {"results_summary": table(results), "results_verdict": verdict(results)}
    return summary | {name: against(results, rows) for name, rows in AGAINST.items()}


def folded(title: str, text: str) -> str:
    """A block that opens on a click, on the site and on GitHub."""
    return f"<details markdown>\n<summary>{title}</summary>\n\n{text.strip()}\n\n</details>"


def write_summary(results: dict[str, Any], page: Path = DOCS / "results.md") -> None:
    """Write the bar chart and the tables."""
    plot(results, page.parent / "pictures" / "results_gain.png")
    for name, text in sections(results).items():
        write(name, text, page)
    for home, folder in ((page.parent / "index.md", ""), (page.parents[1] / "README.md", "docs/")):
        if home.is_file():
            write_section("results_headline", headline(results).replace("](", f"]({folder}"), home)


if __name__ == "__main__":
    write_summary(json.loads(RESULTS.read_text(encoding="utf-8")))
