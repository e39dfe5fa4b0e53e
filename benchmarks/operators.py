"""Time and memory of every public operation, against its textbook version, its peers and the memory traffic.

    python benchmarks/operators.py                       # whatever is not in the JSON yet, then the tables
    python benchmarks/operators.py --again               # every row anew; stopped, it goes on without --again
    python benchmarks/operators.py --ops kd_loss --again
    python benchmarks/operators.py --quick --results /tmp/quick.json --no-table
    python benchmarks/operators.py --table               # measures nothing, rewrites docs/performance/operators.md

All of it takes about 20 minutes on an idle core. The rules are on docs/performance/rules.md. The operations are those
of the registry that the contract checks (`tests/contract`), the textbook versions those of `tests/textbook.py`, which a
test holds to the operations in value and gradient.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import (
    PAGES,
    Results,
    markdown_table,
    parser_for,
    peak_extra_bytes,
    settle_memory,
    time_together,
    write_section,
)
from benchmarks.workloads import (
    CLASSES,
    DTYPES,
    ELSEWHERE,
    NO_TEXTBOOK,
    SIZES,
    NotThere,
    Workload,
    build_case,
    workloads,
)

MODES = ("forward", "forward+backward")
MEASURED = ("small", "medium", "large")
# Compiling takes seconds each: the losses and prototypes by default, all others by `--compile all`.
COMPILED = (
    *("cross_entropy", "kd_loss", "symmetric_kd_loss", "inconsistency_loss", "feature_distance_loss", "entropy_loss"),
    *("max_square_loss", "symmetric_cross_entropy", "pixel_contrast_loss", "pixel_prototype_contrast_loss"),
    *("class_means", "ClassPrototypes.distances"),
)
# What two CPU cores should reach at medium size in float32, as time divided by the textbook's.
WANTED = (
    ("symmetric_kd_loss", "eager", 0.85),
    ("symmetric_kd_loss", "compiled", 0.6),
    ("pixel_contrast_loss", "eager", 0.35),
    ("class_means", "eager", 0.25),
    ("ClassPrototypes.distances", "eager", 0.2),
    ("ClassMix", "eager", 0.8),
)
TIMING = {"min_run_time": 0.15, "min_runs": 5, "max_time": 0.6}
NOISE = 1.05  # a ratio up to here is a tie
NOTICED = 1e-4  # seconds a call: what checking arguments may cost is less


def row_key(name: str, size: str, dtype: str, mode: str, compiled: bool) -> str:
    return "/".join((name, size, dtype, mode, "compiled" if compiled else "eager"))


def measure(
    workload: Workload, size: str, dtype: str, mode: str, *, compiled: bool = False, **timing: Any
) -> dict[str, Any]:
    """One row: the contestants' times and memory on the same inputs. Raises `NotThere` where there is no such row."""
    if compiled:
        torch.compiler.reset()
    case = build_case(workload, size, DTYPES[dtype], backward=mode == MODES[1], compiled=compiled)
    times = time_together(case.contestants, **timing)
    found = {name: {**times[name], "peak_bytes": peak_extra_bytes(f)} for name, f in case.contestants.items()}
    return {
        "operation": workload.name,
        "family": workload.family,
        "size": size,
        "shape": workload.shape(size) if workload.kind != "constant" else "the same at every size",
        "dtype": dtype,
        "mode": mode,
        "compiled": compiled,
        "contestants": found,
        "skipped": case.skipped,
        "moved_bytes": case.bytes,
    }


def plan(options: argparse.Namespace) -> Iterator[tuple[Workload, str, str, str, bool]]:
    """Rows in order. An operation whose size is constant has one size, a compiled row is medium float32."""
    for workload in workloads():
        if options.ops and workload.name not in options.ops:
            continue
        for size in options.sizes:
            if workload.kind == "constant" and size != options.sizes[0]:
                continue
            for dtype in options.dtypes or (DTYPES if size != "large" else ["float32"]):
                for mode in MODES:
                    yield workload, size, dtype, mode, False
        wanted = options.compile == "all" or (options.compile == "some" and workload.name in COMPILED)
        if wanted and "medium" in options.sizes:
            # One graph a row: with the backward pass where there is one.
            yield workload, "medium", "float32", MODES[bool(workload.grad)], True


def run(options: argparse.Namespace) -> None:
    results = Results(options.results)
    began = time.perf_counter()
    timing = {"min_run_time": 0.01, "min_runs": 2, "max_time": 0.1} if options.quick else TIMING
    by_key = {row_key(w.name, *what): (w, *what) for w, *what in plan(options)}
    for key in results.waiting(by_key, again=options.again):
        workload, size, dtype, mode, compiled = by_key[key]
        try:
            row = measure(workload, size, dtype, mode, compiled=compiled, **timing)
        except NotThere:
            continue
        results.add(key, row)
        against = ratio(row)
        text = "no textbook" if against is None else f"{against:.2f} of the textbook"
        print(f"{time.perf_counter() - began:6.0f} s  {key}: {text}", flush=True)


# --- tables ---------------------------------------------------------------------------------------


def ratio(row: dict[str, Any] | None, against: str = "textbook", what: str = "median") -> float | None:
    """Ours divided by the other's; below 1 is quicker, or smaller. None where the other was not measured."""
    if row is None or against not in row["contestants"]:
        return None
    other = row["contestants"][against][what]
    return row["contestants"]["udakit"][what] / other if other else None


def wanted_and_got(results: Results) -> list[tuple[str, float, float | None, bool]]:
    """(what, wanted, got, reached); got is None where nothing was measured, and the slower of the two modes else."""
    lines = []
    for name, how, limit in WANTED:
        rows = [results.rows.get(row_key(name, "medium", "float32", mode, how == "compiled")) for mode in MODES]
        against = "textbook, eager" if how == "compiled" else "textbook"
        got = max((r for r in (ratio(row, against) for row in rows) if r is not None), default=None)
        lines.append((f"{name}, {how}", limit, got, got is not None and got <= limit))
    return lines


def slower(results: Results) -> list[dict[str, Any]]:
    """Rows in which the textbook is quicker by more than the noise, worst first."""
    found = [r for r in results.rows.values() if (ratio(r) or 0) > NOISE and not r["compiled"]]
    return sorted(found, key=lambda r: -(ratio(r) or 0))


def lost(row: dict[str, Any]) -> float:
    """Seconds a call that ours takes longer than the textbook."""
    return float(row["contestants"]["udakit"]["median"] - row["contestants"]["textbook"]["median"])


def noticed(row: dict[str, Any]) -> bool:
    """Whether that is more than checking arguments costs, and more than half the interquartile ranges of both."""
    spread = sum(row["contestants"][name]["iqr"] for name in ("udakit", "textbook")) / 2
    return lost(row) > max(NOTICED, spread)


def number(value: float | None, form: str = ".2f", *, bold_above: float | None = None) -> str:
    if value is None:
        return "–"
    text = format(value, form)
    return f"**{text}**" if bold_above is not None and value > bold_above else text


def summarize(results: Results) -> str:
    """Everything measured, as Markdown."""
    parts = [environments(results), size_table(), wanted_table(results)]
    families = list(dict.fromkeys(r["family"] for r in results.rows.values()))
    for family in families:
        parts += [f"### {family.replace('_', '-').capitalize()}, medium size, float32", family_table(results, family)]
    parts += ["### Time relative to the textbook at every size", ratio_table(results)]
    parts += ["### Slower than the textbook", slower_list(results), "### Not measured, and why", left_out(results)]
    return "\n\n".join(parts)


def environments(results: Results) -> str:
    lines = []
    for number_, e in enumerate(results.environments):
        rows = sum(r["environment"] == number_ for r in results.rows.values())
        if rows:
            lines.append(
                f"{rows} rows were measured with torch {e['torch']} on {e['cpu']} with {e['capability']}: "
                f"{'one thread' if e['threads'] == 1 else str(e['threads']) + ' threads'}, seed {e['seed']}, freed "
                f"memory kept {e.get('freed_memory_kept', 'by chance')}. "
                f"A large copy moved {e['copy_bandwidth'] / 1e9:.1f} GB/s."
            )
    return "\n".join(lines)


def size_table() -> str:
    by_kind = {w.kind: w for w in workloads()}
    rows = [[size, *(by_kind[k].shape(size) for k in ("pixels", "features", "contrast"))] for size in MEASURED]
    head = ["size", f"logits of {CLASSES} classes", "features, stride 4", "pixel contrast"]
    return markdown_table(head, rows)


def wanted_table(results: Results) -> str:
    rows = [
        [what, f"≤ {limit:.2f}", number(got), "–" if got is None else "yes" if reached else "**no**"]
        for what, limit, got, reached in wanted_and_got(results)
    ]
    found, total = slower(results), sum(ratio(r) is not None and not r["compiled"] for r in results.rows.values())
    got_ = f"{len(found)} of {total}, {sum(map(noticed, found))} by more than {1e3 * NOTICED:g} ms and the spread"
    rows.append(["rows slower than the textbook", "0", got_, "**no**" if found else "yes"])
    return markdown_table(["time / textbook, medium size, float32", "wanted", "got", "reached"], rows)


def family_table(results: Results, family: str) -> str:
    rows = []
    for row in results.rows.values():
        constant = row["shape"].startswith("the same")
        medium = (row["size"] == "medium" or constant) and row["dtype"] == "float32" and not row["compiled"]
        if row["family"] != family or not medium:
            continue
        ours = row["contestants"]["udakit"]
        peers = {k: ratio(row, k) for k in row["contestants"] if k not in ("udakit", "textbook", "F.cross_entropy")}
        bound = row["moved_bytes"] / results.bandwidth(row)
        rows.append(
            [
                f"`{row['operation']}`" + ("" if row["mode"] == MODES[0] else ", with backward"),
                f"{1e3 * ours['median']:.3g} ± {1e3 * ours['iqr'] / 2:.2g}",
                number(ratio(row), bold_above=NOISE),
                number(ratio(row, what="peak_bytes"), bold_above=NOISE),
                f"{ours['peak_bytes'] / 2**20:.3g}",
                number(ours["median"] / bound, ".1f"),
                number(ratio(row, "F.cross_entropy")),
                "; ".join(f"{number(r, bold_above=NOISE)} of {k}" for k, r in peers.items()) or "–",
            ]
        )
    head = ["operation", "ms", "time / textbook", "memory / textbook", "peak MiB", "time / memory traffic"]
    return markdown_table([*head, "time / `F.cross_entropy`", "time / peer"], rows)


def ratio_table(results: Results) -> str:
    columns = [(size, dtype) for dtype in DTYPES for size in MEASURED]
    pairs = list(dict.fromkeys((r["operation"], r["mode"]) for r in results.rows.values()))
    rows = []
    for name, mode in pairs:
        found = [ratio(results.rows.get(row_key(name, size, dtype, mode, False))) for size, dtype in columns]
        compiled = results.rows.get(row_key(name, "medium", "float32", mode, True))
        found += [ratio(compiled), ratio(compiled, "textbook, eager")]
        if any(r is not None for r in found):
            label = f"`{name}`" + ("" if mode == MODES[0] else ", with backward")
            rows.append([label, *(number(r, bold_above=NOISE) for r in found)])
    head = [f"{size} {dtype}" for size, dtype in columns]
    return markdown_table(["operation", *head, "both compiled", "compiled / eager textbook"], rows)


def slower_list(results: Results) -> str:
    rows = [
        [
            *(f"`{r['operation']}`", r["size"], r["dtype"], r["mode"], number(ratio(r)), number(1e3 * lost(r), ".3g")),
            number(ratio(r, what="peak_bytes")),
        ]
        for r in slower(results)
    ]
    head = ["operation", "size", "dtype", "mode", "time / textbook", "ms longer", "memory / textbook"]
    return markdown_table(head, rows) if rows else "None."


def left_out(results: Results) -> str:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows.values():
        for rival, why in row["skipped"].items():
            where = f"{row['size']} {row['dtype']}" + (" compiled" if row["compiled"] else "")
            if rival == "textbook" and row["operation"] in NO_TEXTBOOK:
                where, why = "", NO_TEXTBOOK[row["operation"]]
            reasons.setdefault((row["operation"], rival, why), []).append(where)
    lines = []
    for (name, rival, why), where in reasons.items():
        sizes = ", ".join(place for place in dict.fromkeys(where) if place)
        lines.append(f"- `{name}` against {rival}{f' ({sizes})' if sizes else ''}: {why}.")
    lines += [f"- `{name}`: {why}." for name, why in ELSEWHERE.items()]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, "operators.json", page=PAGES / "operators.md")
    names = [w.name for w in workloads()]
    parser.add_argument("--ops", nargs="+", metavar="NAME", choices=names, help="only these")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(MEASURED))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="by default all; at large size float32 alone")
    parser.add_argument("--compile", choices=("some", "all", "none"), default="some", help="rows of torch.compile")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--quick", action="store_true", help="tiny size, two runs each: does everything run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.compile = ["tiny"], "none"
        if options.results == parser.get_default("results"):
            parser.error("--quick measures nothing worth keeping: give it --results of its own")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settle_memory()
    if not options.table:
        run(options)
    results = Results(options.results)
    if not options.no_table:
        write_section("operators", summarize(results), options.page)
    for what, limit, got, reached in wanted_and_got(results):
        print(f"{what}: wanted {limit:.2f}, got {number(got)}{'' if got is None or reached else '  <-- missed'}")
    print(f"{len(slower(results))} rows slower than the textbook")


if __name__ == "__main__":
    main()
