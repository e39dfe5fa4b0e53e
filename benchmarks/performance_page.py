"""Write the short page docs/performance.md from the JSON of `operators.py` and `step_overhead.py`: figures, a picture.

python benchmarks/performance_page.py    # measures nothing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import PAGE, PICTURES, RESULTS, Results, write_section
from benchmarks.operators import MODES, NOISE, NOTICED, noticed, ratio, row_key, slower
from benchmarks.step_overhead import outside

PICTURE = "performance_ratios.png"
STEP = "dacs"


def medium(results: Results) -> dict[str, dict[str, Any]]:
    """The rows of medium float32 by operation, with the backward pass where there is one, quickest first."""
    found: dict[str, dict[str, Any]] = {}
    for mode in MODES:  # the later wins
        rows = (r for r in results.rows.values() if r["mode"] == mode and not r["compiled"])
        found |= {r["operation"]: r for r in rows if (r["size"], r["dtype"]) == ("medium", "float32")}
    compared = {name: row for name, row in found.items() if ratio(row) is not None}
    return dict(sorted(compared.items(), key=lambda item: ratio(item[1]) or 0))


def figures(operators: Results, steps: Results) -> str:
    """Three figures with a sentence each."""
    contrast = operators.rows[row_key("pixel_contrast_loss", "medium", "float32", MODES[1], False)]
    share = 100 * outside(steps.rows[STEP])
    total = sum(ratio(r) is not None and not r["compiled"] for r in operators.rows.values())
    found = slower(operators)
    return "\n".join(
        [
            f"- **{ratio(contrast):.1f} × the time, {ratio(contrast, what='peak_bytes'):.2f} × the memory**: pixel "
            "contrast with its backward pass on a CPU, against the usual matrix of all pairs. Value and gradient are "
            "the same.",
            f"- **{share:.0f} % of a DACS step** is spent outside the nets and the optimiser.",
            f"- **{total - len(found)} of {total} rows** are at most {100 * (NOISE - 1):.0f} % slower than a careful "
            f"vectorised version, over all sizes, dtypes and passes. Of the others {sum(map(noticed, found))} lose "
            f"more than {1e3 * NOTICED:g} ms and the spread.",
        ]
    )


def draw(operators: Results, path: Path) -> None:
    """A bar an operation: its time as a multiple of its textbook version's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = medium(operators)
    values = [ratio(row) or 0 for row in rows.values()]
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    axes.bar(range(len(rows)), values, color=["C1" if v > NOISE else "C0" for v in values])
    axes.axhline(1, color="0.3", linewidth=1)
    axes.set(yscale="log", ylabel="time / textbook's", xlim=(-0.7, len(rows) - 0.3))
    axes.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    axes.set_xticks(range(len(rows)), list(rows), rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def summarize(operators: Results, steps: Results) -> str:
    """Figures, the picture and its sentence."""
    rows = medium(operators)
    behind = [f"`{name}`" for name, row in rows.items() if (ratio(row) or 0) > NOISE]
    caption = f"*Time of {len(rows)} operations against a careful vectorised version, medium size, one CPU thread."
    if behind:
        caption += f" Slower: {', '.join(behind)}."
    picture = f"![time of each operation as a multiple of its textbook version's](pictures/{PICTURE})"
    return "\n\n".join([figures(operators, steps), picture, f"{caption}*"])


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--operators", type=Path, default=RESULTS / "operators.json")
    parser.add_argument("--steps", type=Path, default=RESULTS / "step_overhead.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args(arguments)
    operators = Results(options.operators)
    draw(operators, options.pictures / PICTURE)
    write_section("short", summarize(operators, Results(options.steps)), options.page)


if __name__ == "__main__":
    main()
