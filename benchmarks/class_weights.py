"""What a run logs for each class over its steps, and what weighting by it brings: a table and a plot of DUDA's runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUANTITIES = ("inconsistency", "weight in the distillation")
POINTS = 10  # kept of a run
WORST = 5  # classes of the table
BESIDE = ("small_dacs", "duda_pre", "duda_plain", "duda")  # rows whose IoU the table compares


def thin(history: dict[str, Any]) -> list[dict[str, Any]]:
    """At most `POINTS` of the logged entries, the first and the last among them, rounded."""
    entries = [e for e in history["losses"] if e.get("per_class")]
    count = min(POINTS, len(entries))
    picked = sorted({round(i * (len(entries) - 1) / max(count - 1, 1)) for i in range(count)})
    return [{"step": entries[i]["step"], **rounded(entries[i]["per_class"])} for i in picked]


def rounded(per_class: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {k: {name: round(x, 3) for name, x in values.items()} for k, values in per_class.items()}


def markdown(results: dict[str, Any], pair: str, pictures: Path) -> str:
    """Table of the classes that the weighted row is most inconsistent on, and its weights over time; "" without it."""
    runs = [r for r in results.values() if (r["pair"], r["recipe"]) == (pair, "duda") and r.get("per_class")]
    if not runs:
        return ""
    curves = averaged([r["per_class"] for r in runs])
    picture = pictures / f"duda_weights_{pair}.png"
    plot(curves, picture)
    first, last = (point["inconsistency"] for point in (curves[0], curves[-1]))
    weight = curves[-1]["weight in the distillation"]
    worst = sorted(last, key=lambda name: -last[name])[:WORST]
    scores = {row: mean_iou(results, pair, row) for row in BESIDE}
    scores = {row: iou for row, iou in scores.items() if iou}
    gain = "duda_plain" in scores and "duda" in scores
    head = ["class", f"inconsistency, step {curves[0]['step']}", f"step {curves[-1]['step']}", "weight", *scores]
    lines = ["| " + " | ".join(head + ["weighted − plain"] * gain) + " |", "|---|" + "---:|" * (len(head) - 1 + gain)]
    for name in worst:
        cells = [name, f"{first[name]:.2f}", f"{last[name]:.2f}", f"{weight[name]:.2f}"]
        cells += [number(iou.get(name)) for iou in scores.values()]
        if gain:
            cells.append(difference(scores["duda"].get(name), scores["duda_plain"].get(name)))
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "\n".join(lines)
        + f"\n\nMean over {len(runs)} seeds; IoU of the student.\n\n"
        + f"![inconsistency and weight of each class over the steps](pictures/{picture.name})"
    )


def averaged(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean over runs at the steps that all of them have."""
    common = [step for step in (e["step"] for e in runs[0]) if all(step in [e["step"] for e in r] for r in runs)]
    by_step = [{e["step"]: e for e in run} for run in runs]
    return [
        {
            "step": step,
            **{
                q: {name: statistics.mean(run[step][q][name] for run in by_step) for name in by_step[0][step][q]}
                for q in QUANTITIES
            },
        }
        for step in common
    ]


def mean_iou(results: dict[str, Any], pair: str, row: str) -> dict[str, float | None]:
    """IoU of each class of the row's student, averaged over its runs; {} without any."""
    runs = [r for r in results.values() if (r["pair"], r["recipe"]) == (pair, row)]
    scores = [r["rows"][name]["iou"] for r in runs for name in r["rows"] if is_student(r, name)]
    means = {}
    for name in scores[0] if scores else []:
        known = [s[name] for s in scores if s[name] is not None]
        means[name] = statistics.mean(known) if known else None
    return means


def is_student(result: dict[str, Any], name: str) -> bool:
    return bool(name == f"{result['stages'][-1]['recipe']}, student")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def difference(a: float | None, b: float | None) -> str:
    return "–" if a is None or b is None else f"{a - b:+.1f}"


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    """Each class over the steps of fine-tuning."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    colors = plt.get_cmap("tab20").colors
    steps = [point["step"] for point in curves]
    for axis, quantity in zip(axes, QUANTITIES, strict=True):
        for i, name in enumerate(curves[0][quantity]):
            values = [point[quantity][name] for point in curves]
            axis.plot(steps, values, lw=1.2, color=colors[i % len(colors)], label=name)
        axis.set(title=quantity, xlabel="step of fine-tuning")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
