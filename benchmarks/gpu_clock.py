"""Read the clock on a card: whole steps, then every operation beside its textbook version and its roofline.

    python benchmarks/gpu_clock.py                  # what is missing in the JSON, then the table
    python benchmarks/gpu_clock.py --limit 110      # stop after so many seconds; the same line goes on
    python benchmarks/gpu_clock.py --table          # measures nothing, writes what is there
    python benchmarks/gpu_clock.py --device cpu --size small --limit 60 --results /tmp/clock.json --no-table

The rows are those of `gpu_cost.py`, the steps those of `step_overhead.py` with random weights. A time is the median of
up to 20 calls between CUDA events. The host does not wait between calls, so that a call is as long as the card or the
launches take, whichever is longer. `busy` is the same work replayed from a CUDA graph, without gaps between launches.
A step outside the nets is the whole step less `net-only`, the same passes of the nets by themselves.

A row keeps the roofline of the day it was measured. Whoever changes an operation without a card at hand writes why into
`changed_since` of its rows in the JSON: the page says so until they are measured again.
"""

from __future__ import annotations

import gc
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_cost import MARK, MODES, Card, Counts, rows, sample_of
from benchmarks.gpu_step import COUNTED
from benchmarks.harness import (
    PAGES,
    RESULTS,
    SEED,
    Results,
    device_name,
    markdown_table,
    parser_for,
    peak_extra_bytes,
    write_section,
)
from benchmarks.step_overhead import ROWS, Clock, Step
from benchmarks.workloads import SIZES, Workload, build_case
from contract.devices import captured

CARD = "card"  # key of the row that describes it
STEP, COMPILED = "step/", "/compiled"
REPEATS, BUDGET = 20, 0.3  # calls, and seconds a contestant
ROW_LIMIT = 30  # seconds: a row that compiles, or a textbook version with a loop
SIDES = {"small": 64, "tiny": 64}  # of the images of a step, where they are not those of `step_overhead.py`
STEP_BUDGET = 1.0  # seconds for a whole step, and for the nets alone
WORST = 10
LOSS = 0.1  # ms


# --- the clock ------------------------------------------------------------------------------------


def milliseconds(
    call: Callable[[], Any], device: str, *, repeats: int = REPEATS, budget: float = BUDGET
) -> list[float]:
    """Times of a call that has run before: as many as fit the budget, three at least."""
    first = _times(call, device, 1)[0]
    return _times(call, device, max(3, min(repeats, int(1e3 * budget / max(first, 1e-6)))))


def _times(call: Callable[[], Any], device: str, count: int) -> list[float]:
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most that a call holds beyond what was held before, its result included."""
    if device == "cpu":
        return peak_extra_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def busy_milliseconds(call: Callable[[], Any], device: str) -> tuple[float | None, str]:
    """The median time of a replayed graph of the call; or None, and why there is no graph."""
    if device == "cpu":
        return None, "no card"
    try:
        graph, _ = captured(call)
        graph.replay()
        return statistics.median(milliseconds(graph.replay, device)), ""
    except Exception as error:
        return None, reason(error)


def reason(error: BaseException) -> str:
    """An error in short."""
    text = str(error).strip().splitlines()
    if "synchronizing CUDA operation" in str(error):
        return "waits for the device"
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def describe(device: str, size: str) -> dict[str, Any]:
    """The card as the roofline needs it, measured: a large copy, a large product without TF32, a chain of launches."""
    large = device != "cpu" and size == "large"
    source = torch.ones(2**28 if large else 2**20, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 256
    factor = torch.randn(side, side, device=device)
    one = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(1000):
            one.add_(1)

    found = []
    for call in (lambda: target.copy_(source), lambda: factor @ factor, chain):
        call()
        found.append(1e-3 * statistics.median(milliseconds(call, device)))
    return {
        "name": device_name(device),
        "size": size,
        "bandwidth": 2 * source.numel() * source.element_size() / found[0],
        "flops": 2 * side**3 / found[1],
        "launch": found[2] / 1000,
        "memory": torch.cuda.get_device_properties(0).total_memory if device != "cpu" else None,
        "cuda": torch.version.cuda,
    }


# --- what is measured -----------------------------------------------------------------------------


def order(found: list[Workload]) -> list[str]:
    """Keys: whole steps, calls with default options, operations with backward, compiled ones, the other forwards."""
    steps = [STEP + name for name in COUNTED]
    defaults = [f"{w.name}/{MODES[0]}" for w in found if w.name.endswith(MARK)]
    rest = [w for w in found if not w.name.endswith(MARK)]
    last = [f"{w.name}/{MODES[bool(w.grad)]}" for w in rest]
    forward = [f"{w.name}/{MODES[0]}" for w in rest if w.grad]
    return [*steps, *defaults, *last, *(key + COMPILED for key in defaults), *forward]


def measure_step(name: str, device: str, size: str) -> dict[str, Any]:
    """A whole training step, and the nets alone."""
    row = ROWS[name]
    row = replace(row, size=SIDES.get(size, row.size), net={**row.net, "weights": "random"})
    step = Step(row, device=device)

    def take() -> None:
        step.take(Clock())

    for _ in range(3):
        take()
    whole = milliseconds(take, device, budget=STEP_BUDGET)
    peak = peak_bytes(take, device)
    passes = step.passes()
    nets = step.nets_alone(passes)
    for _ in range(2):
        nets()
    return {
        "recipe": name,
        "image_side": row.size,
        "passes": len(passes),
        "ms": statistics.median(whole),
        "all_ms": whole,
        "net_only_ms": statistics.median(milliseconds(nets, device, budget=STEP_BUDGET)),
        "peak_bytes": peak,
        "net_only_peak_bytes": peak_bytes(nets, device),
    }


def measure_row(workload: Workload, mode: str, device: str, size: str, *, compiled: bool) -> dict[str, Any]:
    """An operation and its textbook version on the same inputs."""
    sample = sample_of(workload, size)
    sample.generator = torch.Generator(device).manual_seed(SEED)
    if compiled:
        torch._dynamo.reset()
    alone = replace(workload, peers={})
    case = build_case(
        alone, size, backward=mode == MODES[1], compiled=compiled, sample=sample, rivals=not compiled, device=device
    )
    contestants = {}
    for name, call in case.contestants.items():
        call()
        times = milliseconds(call, device)
        peak = peak_bytes(call, device)
        busy, why = busy_milliseconds(call, device)
        contestants[name] = {
            "ms": statistics.median(times), "all_ms": times, "busy_ms": busy, "no_graph": why, "peak_bytes": peak
        }  # fmt: skip
    return {
        "operation": workload.name,
        "mode": mode,
        "compiled": compiled,
        "contestants": contestants,
        "skipped": case.skipped,
    }


def measure(key: str, found: dict[str, Workload], device: str, size: str) -> dict[str, Any]:
    """One row; what fails or takes too long is a row that says so."""
    name, _, mode = key.removesuffix(COMPILED).rpartition("/")
    try:
        with time_limit(ROW_LIMIT):
            if key.startswith(STEP):
                return measure_step(key.removeprefix(STEP), device, size)
            return measure_row(found[name], mode, device, size, compiled=key.endswith(COMPILED))
    except Exception as error:
        failed = {"recipe": mode} if key.startswith(STEP) else {"operation": name, "mode": mode, "contestants": {}}
        return {**failed, "compiled": key.endswith(COMPILED), "skipped": {"udakit": reason(error)}}


def run(device: str, size: str, results: Results, *, limit: float, again: bool) -> None:
    """Measure what is missing, until the time is over."""
    began = time.perf_counter()
    known = results.rows.get(CARD)
    if known and again:
        results.rows.clear()
    elif known and (known["name"], known["size"]) != (device_name(device), size):
        raise SystemExit(
            f"{results.path} was measured on {known['name']} at size {known['size']}; here it is {device_name(device)} "
            f"at size {size}. Give --again, or another --results."
        )
    if CARD not in results:
        results.add(CARD, describe(device, size))
    found = {w.name: w for w in rows()}
    about, counts = results.rows[CARD], Counts(RESULTS / "gpu_cost.json")
    card = Card(about["name"], about["bandwidth"], about["flops"], about["launch"])
    keys = list(results.waiting(order(list(found.values()))))
    for done, key in enumerate(keys):
        if time.perf_counter() - began > limit:
            print(f"{limit:g} s are over; {len(keys) - done} rows are left", flush=True)
            return
        row = measure(key, found, device, size)
        if size == "large" and "operation" in row:
            row["roofline_ms"] = estimate(key, counts, card)
        results.add(key, row)
        print(f"{time.perf_counter() - began:5.0f} s  {key}: {said(row)}", flush=True)
        if key.startswith(STEP):
            gc.collect()
        if device != "cpu":
            torch.cuda.synchronize()  # a card that is broken by now stops the run here; the row is kept


def said(row: dict[str, Any]) -> str:
    """A row in a line."""
    if row.get("skipped", {}).get("udakit"):
        return str(row["skipped"]["udakit"])
    if "recipe" in row:
        return f"{row['ms']:.1f} ms, nets alone {row['net_only_ms']:.1f}"
    return ", ".join(
        f"{name} {c['ms']:.3g} ms" + ("" if c["busy_ms"] is None else f" (busy {c['busy_ms']:.3g})")
        for name, c in row["contestants"].items()
    )


# --- the page -------------------------------------------------------------------------------------


def table(results: Results, counts: Counts) -> str:
    """Everything on the clock, as Markdown."""
    if CARD not in results:
        return "Not measured yet."
    about = results.rows[CARD]
    card = Card(about["name"], about["bandwidth"], about["flops"], about["launch"])
    measured = {k: r for k, r in results.rows.items() if "udakit" in r.get("contestants", {})}
    environment = results.environments[about["environment"]]
    parts = [
        f"Measured on one {card.name} with torch {environment['torch']}, size {about['size']}. A large copy moves "
        f"{card.bandwidth / 1e9:.0f} GB/s, a large float32 product makes {card.flops / 1e12:.1f} TFLOP/s without TF32, "
        f"and a chain of tiny kernels takes {1e6 * card.launch:.1f} µs a launch. The rooflines below are those of "
        "these three numbers.",
        steps_table(results),
        *(predictions(measured, counts, card) if about["size"] == "large" else []),
        *rivals(measured),
        *slower(measured),
        operations_table(measured, counts, card),
        *not_measured(results),
        *changed(measured),
    ]
    return "\n\n".join(part for part in parts if part)


def steps_table(results: Results) -> str:
    """Whole steps."""
    found = [results.rows[STEP + name] for name in COUNTED if "ms" in results.rows.get(STEP + name, {})]
    if not found:
        return ""
    lines = [
        [
            f"{row['recipe']}, {row['image_side']} × {row['image_side']}",
            str(row["passes"]),
            f"{row['ms']:.1f}",
            f"{row['net_only_ms']:.1f}",
            f"{1 - row['net_only_ms'] / row['ms']:.0%}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['net_only_peak_bytes'] / 2**30:.2f}",
        ]
        for row in found
    ]
    head = ["step", "net passes", "ms", "net-only ms", "outside the nets", "peak GiB", "net-only peak GiB"]
    return (
        "### Whole steps, measured\n\nBatches of 2 + 2 images, eager, with the optimiser, float32 as torch computes "
        "it by default (convolutions in TF32). Peaks are beyond the nets and the optimiser's state.\n\n"
        + markdown_table(head, lines)
    )


def estimate(key: str, counts: Counts, card: Card) -> float | None:
    """Milliseconds by the roofline, from the counts; None where nothing was counted."""
    how = "compiled" if key.endswith(COMPILED) else "eager"
    row = counts.rows.get(key.removesuffix(COMPILED), {"contestants": {}})
    counted = row["contestants"].get(f"udakit, {how}")
    return 1e3 * card.seconds(counted["each"]) or None if counted else None


def roofline(key: str, row: dict[str, Any], counts: Counts, card: Card) -> float | None:
    """The estimate that was made with the row, else one from the counts of today."""
    return float(row["roofline_ms"]) if row.get("roofline_ms") else estimate(key, counts, card)


def predictions(measured: dict[str, dict[str, Any]], counts: Counts, card: Card) -> list[str]:
    """How the clock compares to the roofline."""
    compared = []
    for key, row in measured.items():
        expected, clock = roofline(key, row, counts, card), row["contestants"]["udakit"]
        if expected is not None:
            compared.append((clock["ms"] / expected, key, expected, clock))
    if not compared:
        return []
    compared.sort(key=lambda found: -found[0])
    text = [f"A call takes {spread([c[0] for c in compared])} times its roofline."]
    replayed = [c["busy_ms"] / expected for _, _, expected, c in compared if c["busy_ms"] is not None]
    if replayed:
        waiting = [c["ms"] / c["busy_ms"] for _, _, _, c in compared if c["busy_ms"] is not None]
        text.append(
            f"Replayed from a CUDA graph it takes {spread(replayed)} times. {sum(w > 1.5 for w in waiting)} of "
            f"{len(waiting)} calls take more than 1.5 times as long as their graph: there the host is too slow."
        )
    lines = [
        [called(key), f"{expected:.3g}", f"{clock['ms']:.3g}", ms(clock["busy_ms"]), f"{ratio:.2f}"]
        for ratio, key, expected, clock in compared[:WORST]
    ]
    head = ["furthest above", "roofline ms", "ms", "graph ms", "clock / roofline"]
    return ["### How well the roofline predicts", " ".join(text), markdown_table(head, lines)]


def spread(ratios: list[float]) -> str:
    """The median and the middle half."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} (median of {len(ratios)} rows, middle half {low:.2f} to {high:.2f})"


def rivals(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Ours against the textbook versions."""
    lines = []
    for what, field in (("time", "ms"), ("time of a replayed graph", "busy_ms"), ("peak memory", "peak_bytes")):
        pairs = [
            (row["contestants"]["udakit"][field], row["contestants"]["textbook"][field])
            for row in measured.values()
            if "textbook" in row["contestants"]
        ]
        ratios = [a / b for a, b in pairs if a is not None and b]
        if ratios:
            shares = [sum(low < r <= high for r in ratios) for low, high in ((-1, 0.9), (0.9, 1.1), (1.1, 1e99))]
            lines.append([what, f"{statistics.median(ratios):.2f}", *map(str, shares)])
    if not lines:
        return []
    head = ["ours / textbook's", "median", "rows at most 0.9", "about the same", "rows above 1.1"]
    return ["### Against the textbook versions", markdown_table(head, lines)]


def slower(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Rows where ours takes at least `LOSS` longer, by the call or by its graph."""
    lines = []
    for key, row in measured.items():
        pair = [row["contestants"].get(name) for name in ("udakit", "textbook")]
        if pair[1] is None:
            continue
        lost = {
            f: pair[0][f] - pair[1][f] for f in ("ms", "busy_ms") if pair[0][f] is not None and pair[1][f] is not None
        }
        if max(lost.values()) >= LOSS:
            cells = [" / ".join(ms(c[f]) for c in pair) for f in ("ms", "busy_ms")]
            lines.append((-max(lost.values()), [called(key) + " †" * ("changed_since" in row), *cells]))
    if not lines:
        return []
    head = ["ours / textbook's", "ms", "graph ms"]
    return [f"### Slower by {LOSS} ms or more", markdown_table(head, [line for _, line in sorted(lines)])]


def operations_table(measured: dict[str, dict[str, Any]], counts: Counts, card: Card) -> str:
    """Every row."""
    if not measured:
        return ""
    lines = []
    for key in sorted(measured):
        pair = [measured[key]["contestants"].get(name, {}) for name in ("udakit", "textbook")]
        name = called(key) + " †" * ("changed_since" in measured[key])
        cells = [" / ".join(ms(c.get(field)) for c in pair) for field in ("ms", "busy_ms")]
        peak = " / ".join(f"{c['peak_bytes'] / 2**20:.3g}" if c else "–" for c in pair)
        lines.append([name, *cells, ms(roofline(key, measured[key], counts, card)), peak])
    head = ["ours / textbook's", "ms", "graph ms", "roofline ms", "peak MiB"]
    return "### Every operation, measured\n\n" + markdown_table(head, lines)


def not_measured(results: Results) -> list[str]:
    """Rows that failed, by reason."""
    failed: dict[str, list[str]] = {}
    for key, row in results.rows.items():
        if why := row.get("skipped", {}).get("udakit"):
            failed.setdefault(why, []).append(called(key))
    lines = [f"- {', '.join(names)}: {why}." for why, names in failed.items()]
    return ["### Failed, or too slow", "\n".join(lines)] if lines else []


def changed(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Operations that are no longer what was measured, by what was changed."""
    found: dict[str, set[str]] = {}
    for row in measured.values():
        if why := row.get("changed_since"):
            found.setdefault(why, set()).add(f"`{row['operation'].removesuffix(MARK)}`")
    lines = [f"- {', '.join(sorted(names))}: {why}." for why, names in found.items()]
    return ["### Changed since it was measured (†)", "\n".join(lines)] if lines else []


def called(key: str) -> str:
    """A key as the reader knows it."""
    name, _, mode = key.removesuffix(COMPILED).rpartition("/")
    bare = name.removesuffix(MARK)
    notes = ["defaults"] * (bare != name) + ["with backward"] * (mode == MODES[1])
    return ", ".join([f"`{bare or mode}`", *notes, *["compiled"] * key.endswith(COMPILED)])


def ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write the page."""
    parser = parser_for(__doc__, "gpu_clock.json", page=PAGES / "gpu.md")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="the CPU only tries the script")
    parser.add_argument("--size", default="large", choices=list(SIZES))
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="of all")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if not options.table:
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no card here; --device cpu tries the script")
        if options.device == "cpu" and options.results == RESULTS / "gpu_clock.json":
            parser.error("the JSON is of a card: give --results with --device cpu")
        run(options.device, options.size, results, limit=options.limit, again=options.again)
    if not options.no_table:
        write_section("gpu clock", table(results, Counts(RESULTS / "gpu_cost.json")), options.page)


if __name__ == "__main__":
    main()
