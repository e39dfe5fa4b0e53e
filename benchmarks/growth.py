"""How time and memory of the main operations grow with pixels, classes, batch and feature width.

    python benchmarks/growth.py            # whatever is not in the JSON yet, then pictures and table
    python benchmarks/growth.py --table    # measures nothing, draws and writes what is there

One axis moves, the others stay at `BASE`. A slope is fitted to the logarithms of the last four points of an axis: 1 is
linear growth, 2 quadratic.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import (
    PAGES,
    PICTURES,
    SEED,
    Results,
    markdown_table,
    parser_for,
    peak_extra_bytes,
    settle_memory,
    time_together,
    write_section,
)
from benchmarks.workloads import BenchmarkSample, Workload, build_case, workloads

BASE = {"pixels": 64 * 64, "classes": 19, "batch": 2, "width": 64}
AXES: dict[str, tuple[int, ...]] = {
    "pixels": (32**2, 48**2, 64**2, 96**2, 128**2, 192**2),  # of one image
    "classes": (2, 5, 10, 19, 60, 150),
    "batch": (1, 2, 4, 8, 12, 16),
    "width": (16, 32, 64, 128, 256, 512),
}
LOSS = ("pixels", "classes", "batch")
MAIN: dict[str, tuple[str, ...]] = {
    "symmetric_kd_loss": LOSS,
    "cross_entropy": LOSS,
    "kd_loss": LOSS,
    "inconsistency_loss": LOSS,
    "pixel_contrast_loss": ("pixels", "batch", "width"),
    "class_means": ("pixels", "classes", "batch", "width"),
    "ClassPrototypes.distances": ("pixels", "classes", "batch", "width"),
    "ClassMix": LOSS,
    "boundary_band": ("pixels", "batch"),
}
# The time of pixel contrast is quadratic in the pixels, and small maps are what it is for.
SIDE_DIVISOR = {"pixel_contrast_loss": 2}
WANTED_MEMORY = ("pixel_contrast_loss", "pixels", 1.1)  # slope of the memory: linear
FITTED = 4  # points


def point(workload: Workload, axis: str, value: int, **timing: Any) -> dict[str, Any]:
    """Time and memory of one call, with its backward pass where there is one."""
    at = {**BASE, axis: value}
    side = math.isqrt(at["pixels"]) // SIDE_DIVISOR.get(workload.name, 1)
    sample = BenchmarkSample(SEED, n=at["batch"], c=at["classes"], d=at["width"], h=side, w=side)
    case = build_case(workload, "small", backward=bool(workload.grad), sample=sample, rivals=False)
    step = case.contestants["udakit"]
    found = time_together({"udakit": step}, **timing)["udakit"]
    x = side * side if axis == "pixels" else value
    return {"operation": workload.name, "axis": axis, "x": x, **found, "peak_bytes": peak_extra_bytes(step)}


def run(options: argparse.Namespace) -> None:
    results = Results(options.results)
    timing: dict[str, Any] = {"min_run_time": 0.2, "min_runs": 5, "max_time": 1.0}
    if options.quick:
        timing = {"min_run_time": 0.005, "min_runs": 2, "max_time": 0.05}
    began = time.perf_counter()
    plan = {
        f"{workload.name}/{axis}/{value}": (workload, axis, value)
        for workload in workloads()
        if workload.name in (options.ops or MAIN)
        for axis in MAIN[workload.name]
        for value in (AXES[axis][:3] if options.quick else AXES[axis])
    }
    for key in results.waiting(plan, again=options.again):
        results.add(key, point(*plan[key], **timing))
        print(f"{time.perf_counter() - began:6.0f} s  {key}", flush=True)
    for name, by_axis in slopes(results).items():
        for axis, fitted in by_axis.items():
            results.add(f"{name}/{axis}/slope", {"operation": name, "axis": axis, **fitted})


def curve(results: Results, name: str, axis: str, what: str) -> tuple[list[float], list[float]]:
    rows = [r for r in results.rows.values() if (r["operation"], r["axis"]) == (name, axis) and "x" in r]
    rows.sort(key=lambda r: r["x"])
    return [r["x"] for r in rows], [r[what] for r in rows]


def fit_slope(x: list[float], y: list[float]) -> float | None:
    """Exponent of y ~ x^slope over the last points, by least squares of the logarithms."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b > 0][-FITTED:]
    if len(pairs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    spread = sum((a - mean_x) ** 2 for a, _ in pairs)
    return sum((a - mean_x) * (b - mean_y) for a, b in pairs) / spread if spread else None


def slopes(results: Results) -> dict[str, dict[str, dict[str, float | None]]]:
    """operation -> axis -> {"time_slope", "memory_slope"}, of what was measured."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, axes in MAIN.items():
        for axis in axes:
            x, seconds = curve(results, name, axis, "median")
            if x:
                memory = curve(results, name, axis, "peak_bytes")[1]
                fitted = {"time_slope": fit_slope(x, seconds), "memory_slope": fit_slope(x, memory)}
                found.setdefault(name, {})[axis] = fitted
    return found


def draw(results: Results, folder: Path) -> list[Path]:
    """One picture of the times and one of the memory: a panel an axis, a line an operation, and a guide of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    made = []
    units = {"time": ("median", 1e-3, "ms"), "memory": ("peak_bytes", 2**20, "peak MiB beyond the inputs")}
    for title, (what, unit, label) in units.items():
        figure, panels = plt.subplots(1, len(AXES), figsize=(14, 4.4), layout="constrained")
        for panel, axis in zip(panels, AXES, strict=True):
            lows: list[float] = []
            for k, name in enumerate(MAIN):
                x, y = curve(results, name, axis, what)
                if not x or max(y) <= 0:
                    continue
                shown = [v / unit if v else math.nan for v in y]
                lows.append(min(v for v in shown if v == v))
                panel.plot(x, shown, marker="o", markersize=3, color=f"C{k}", label=name)
            if lows:
                start, end = min(AXES[axis]), max(AXES[axis])
                guide = [min(lows), min(lows) * end / start]
                panel.plot([start, end], guide, color="0.6", linestyle="--", label="slope 1")
            panel.set(xscale="log", yscale="log", xlabel={"pixels": "pixels of an image"}.get(axis, axis))
            panel.xaxis.set_minor_formatter(NullFormatter())  # a short axis would crowd its minor labels
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(label)
        entries: dict[str, Any] = {}
        for panel in panels:
            entries |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, frameon=False)
        path = folder / f"performance_growth_{title}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90)
        plt.close(figure)
        made.append(path)
    return made


def summarize(results: Results, pictures: list[Path]) -> str:
    def cell(fitted: dict[str, float | None] | None) -> str:
        if fitted is None:
            return "–"
        values = (fitted["time_slope"], fitted["memory_slope"])
        return " / ".join("–" if v is None else f"{v:.2f}" for v in values)

    fitted = slopes(results)
    rows = [[f"`{name}`", *(cell(fitted[name].get(axis)) for axis in AXES)] for name in fitted]
    name, axis, limit = WANTED_MEMORY
    got = fitted.get(name, {}).get(axis, {}).get("memory_slope")
    wanted = (
        f"The memory of `{name}` should grow linearly with the {axis}, with a slope of at most {limit}. "
        f"Measured: {'–' if got is None else f'{got:.2f}'}."
    )
    parts = [f"![{p.stem.replace('_', ' ')}](../pictures/{p.name})" for p in pictures]
    base = "{pixels} pixels, {classes} classes, a batch of {batch} and width {width}".format(**BASE)
    parts.append(
        f"Each column varies one quantity and keeps the others at {base}. It has the exponents of time and memory, "
        f"fitted to the last {FITTED} points: 1 is linear, 2 is quadratic, and below 1 a fixed cost still shows."
    )
    return "\n\n".join([*parts, markdown_table(["operation, time / memory", *AXES], rows), wanted])


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "growth.json", page=PAGES / "growth.md")
    parser.add_argument("--ops", nargs="+", metavar="NAME", choices=list(MAIN), help="only these")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--quick", action="store_true", help="three points an axis, two runs each")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args(arguments)
    if options.quick and options.results == parser.get_default("results"):
        parser.error("--quick measures nothing worth keeping: give it --results of its own")
    if options.threads:
        torch.set_num_threads(options.threads)
    settle_memory()
    if not options.table:
        run(options)
    results = Results(options.results)
    if not options.no_table:
        write_section("growth", summarize(results, draw(results, options.pictures)), options.page)
    for name, by_axis in slopes(results).items():
        print(name, {axis: {k: v and round(v, 2) for k, v in fitted.items()} for axis, fitted in by_axis.items()})


if __name__ == "__main__":
    main()
