"""What a GPU has to do for every public operation, counted on fake tensors: no card is needed and no clock is read.

    python benchmarks/gpu_cost.py                        # what is missing in the JSON, then the table
    python benchmarks/gpu_cost.py --again                # every operation; stopped, it goes on without --again
    python benchmarks/gpu_cost.py --ops kd_loss --show   # one, with the kernels by name, written nowhere
    python benchmarks/gpu_cost.py --table --card "H100, 3350 GB/s, 67 TFLOP/s, 5 us"

The rows are those of `operators.py` at its large size, and a few calls with default options (`DEFAULTS`). The rules of
the count are in `kernels.py`. After a wanted change of an operation: --ops NAME --again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import udakit
from benchmarks.harness import PAGES, SEED, markdown_table, parser_for, write_section
from benchmarks.kernels import Cost, count, fake_card, on_card
from benchmarks.workloads import (
    CLASSES,
    ELSEWHERE,
    SIZES,
    STRIDE,
    WIDTH,
    BenchmarkSample,
    Workload,
    public_call,
    workloads,
)
from contract.registry import Call, Sample, all_operations
from gta2cs.files import write_json
from textbook import TEXTBOOK

SIZE = "large"
MODES = ("forward", "forward+backward")
HOWS = ("eager", "compiled")
GROWTH = 1.1  # a count that grows by more fails the test
CARD = "A100, 1555 GB/s, 19.5 TFLOP/s, 5 us"
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def _two_batches(s: Sample) -> Call:
    return Call(tuple(udakit.SegBatch(s.images(), s.labels()) for _ in range(2)))


def _bank() -> Callable[..., Any]:
    return udakit.ClassPrototypes(CLASSES, WIDTH).distances


# name: (the call, what is called, (kernels, traffic) before, wanted); the call has no mask, weight or option
DEFAULTS: dict[str, tuple[Callable[[Sample], Call], Callable[[], Any], tuple[float, float], tuple[float, float]]] = {
    "cross_entropy": (lambda s: Call((s.logits(), s.labels())), lambda: udakit.cross_entropy, (9, 3.1), (9, 3.1)),
    "kd_loss": (lambda s: Call((s.logits(), s.logits())), lambda: udakit.kd_loss, (10, 6.2), (8, 4.5)),
    "ConfidentRatioSelector": (
        lambda s: Call((s.logits(),)), lambda: udakit.ConfidentRatioSelector(), (34, 8.4), (12, 4),
    ),
    "ClassQuantileSelector": (
        lambda s: Call((s.logits(),)), lambda: udakit.ClassQuantileSelector(CLASSES), (59, 10.7), (35, 7),
    ),
    "ClassMix": (_two_batches, lambda: udakit.ClassMix(CLASSES), (28, 4.5), (28, 4.5)),
    "StrongAugment": (lambda s: Call((s.images(),)), lambda: udakit.StrongAugment(**STATISTICS), (84, 68), (70, 45)),
    "color_transfer": (
        lambda s: Call((s.images(), s.images())), lambda: udakit.color_transfer, (173, 87), (100, 50),
    ),
    "InconsistencyLoss": (
        lambda s: Call((s.logits(), s.logits())), lambda: udakit.InconsistencyLoss(CLASSES), (62, 8.8), (45, 6.5),
    ),
    "ClassPrototypes.distances": (lambda s: Call((s.features(),)), _bank, (38, 14.5), (20, 9)),
    "boundary_band": (lambda s: Call((s.mask(),)), lambda: udakit.boundary_band, (16, 41), (12, 35)),
}  # fmt: skip
MARK = ", defaults"


@dataclass(frozen=True)
class Card:
    """A card by what a roofline needs: bytes and float32 operations a second, seconds a launch."""

    name: str
    bandwidth: float
    flops: float
    launch: float

    @classmethod
    def parse(cls, text: str) -> Card:
        found = re.fullmatch(r"(.+), ([\d.]+) GB/s, ([\d.]+) TFLOP/s, ([\d.]+) us", text.strip())
        if found is None:
            raise argparse.ArgumentTypeError(f'Expected a card as "{CARD}", but got {text!r}.')
        return cls(found[1], 1e9 * float(found[2]), 1e12 * float(found[3]), 1e-6 * float(found[4]))

    def seconds(self, kernels: str) -> float:
        """Every kernel takes its launch, its bytes or its arithmetic, whichever is longest; see `together`."""
        each = [[float(x) for x in kernel.split()] for kernel in kernels.split(",") if kernel]
        return sum(n * max(self.launch, b / n / self.bandwidth, f / n / self.flops) for n, b, f in each)


# --- counting -------------------------------------------------------------------------------------


def row_key(name: str, mode: str) -> str:
    return f"{name}/{mode}"


def rows() -> list[Workload]:
    """The rows of `operators.py`, Modules whose code is that of other rows, and the calls with default options."""
    found = list(workloads())
    family = {w.name: w.family for w in found} | {"StrongAugment": "mixing"}
    operations = {op.name: op for op in all_operations()}
    augment = operations["StrongAugment"]
    assert "StrongAugment" in ELSEWHERE
    found.append(
        Workload("StrongAugment", "mixing", augment, augment.example, public_call(augment), "pixels", augment.grad)
    )
    for name, (example, make, _, _) in DEFAULTS.items():
        op = operations[name.partition(".")[0]]
        kind = "features" if name == "ClassPrototypes.distances" else "pixels"
        made = Workload(name + MARK, family[name], op, example, lambda call, make=make: make(), kind, ())
        found.append(made)
    return found


def sample_of(workload: Workload, size: str) -> BenchmarkSample:
    """Tensors of a size; for pixel contrast, whose pairs grow with its fourth power, one size smaller."""
    n, side = SIZES["medium" if workload.kind == "contrast" and size == "large" else size]
    if workload.kind in ("features", "contrast"):
        side //= STRIDE
    n, d = (1, CLASSES) if workload.kind == "contrast" else (n, WIDTH)
    return BenchmarkSample(SEED, n=n, c=CLASSES, d=d, h=side, w=side)


def cost_of(
    workload: Workload, mode: str, *, rival: str = "udakit", compiled: bool = False, size: str = SIZE
) -> tuple[Cost, int]:
    """The cost of one call, and the bytes of its inputs (of its results, where it has none)."""
    with fake_card():
        call = workload.example(sample_of(workload, size))
        call = Call(*on_card((call.args, call.tensors, call.options)))
        inputs: list[Tensor] = []
        if mode == MODES[1]:
            args = list(call.args)
            for position in workload.grad:
                args[position] = tree_map_only(Tensor, partial(_differentiable, inputs), args[position])
            call = replace(call, args=tuple(args))
        with torch.device("cuda"):
            function = workload.use(call) if rival == "udakit" else partial(TEXTBOOK[workload.name], **call.options)
        held = [x for x in tree_leaves((call.args, call.tensors, call.options)) if isinstance(x, Tensor)]
        for module in (x for x in tree_leaves(call.args) if isinstance(x, nn.Module)):
            held += [*module.parameters(), *module.buffers()]
        read = sum(x.numel() * x.element_size() for x in held)
        if isinstance(function, nn.Module):
            held += [*function.parameters(), *function.buffers()]
        # A textbook version makes its constants where a user's `torch.set_default_device` puts them.
        with torch.device("cuda") if rival == "textbook" else nullcontext():
            cost = count(lambda: function(*call.args, **call.tensors), held=held, inputs=inputs, compiled=compiled)
    return cost, read if read > 4096 else cost.result_bytes


def _differentiable(inputs: list[Tensor], x: Tensor) -> Tensor:
    if x.is_floating_point():
        inputs.append(x.requires_grad_())
    return x


def measure(workload: Workload, mode: str, size: str = SIZE) -> dict[str, Any]:
    """One row: the operation and its textbook version, eager and compiled."""
    contestants: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    read = 0
    for rival in ("udakit", "textbook"):
        if rival == "textbook" and workload.name not in TEXTBOOK:
            continue
        for how in HOWS:
            try:
                cost, read = cost_of(workload, mode, rival=rival, compiled=how == "compiled", size=size)
            except NotImplementedError:  # a rule is missing
                raise
            except Exception as error:
                skipped[f"{rival}, {how}"] = why(error)
                continue
            contestants[f"{rival}, {how}"] = {
                "kernels": cost.launches,
                "bytes": cost.bytes,
                "peak_bytes": cost.peak,
                "each": together(cost.kernels) if rival == "udakit" else "",
                "names": dict(Counter(cost.names).most_common()),
            }
    return {
        "operation": workload.name,
        "family": workload.family,
        "mode": mode,
        "input_bytes": read,
        "contestants": contestants,
        "skipped": skipped,
    }


def why(error: Exception) -> str:
    """A reason without a count: most often a textbook version that indexes with a mask."""
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return "waits for the device"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


def together(kernels: list[tuple[int, int, int]]) -> str:
    """Kernels that move and compute the same in one entry, "launches bytes flops" of all of them, by comma."""
    alike = Counter(kernels)
    return ",".join(" ".join(str(n * k) for n in kernel) for kernel, k in alike.most_common())


def run(options: argparse.Namespace) -> None:
    found, unknown = Counts(options.results), []
    began = time.perf_counter()
    every = [(w, mode) for w in rows() for mode in MODES[: 1 + bool(w.grad)]]
    asked = [(w, m) for w, m in every if not options.ops or w.name.removesuffix(MARK) in options.ops]
    if not options.show:
        found.keep({row_key(w.name, mode) for w, mode in every})
        found.forget({row_key(w.name, mode) for w, mode in asked} if options.again else set())
    for workload, mode in asked:
        if options.show or not found.is_there(row_key(workload.name, mode)):
            try:
                row = measure(workload, mode)
            except NotImplementedError as error:
                unknown.append(f"{workload.name}, {mode}: {error}")
                continue
            if options.show:
                show(row)
            found.rows[row_key(workload.name, mode)] = row
            if not options.show:
                found.save()
    print(f"{len(found.rows)} rows, {time.perf_counter() - began:.0f} s")
    if unknown:
        raise SystemExit("\n".join(unknown))


class Counts:
    """The rows of the JSON file by key. Counts have no machine, but a version of torch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.is_file() else {}
        self.torch: str = content.get("torch", torch.__version__)
        self.rows: dict[str, dict[str, Any]] = content.get("rows", {})

    def is_there(self, key: str) -> bool:
        """Whether a row need not be counted."""
        return key in self.rows and not self.rows[key].get("old", False)

    def keep(self, keys: set[str]) -> None:
        """Drop the rows of operations that are gone."""
        self.rows = {key: row for key, row in self.rows.items() if key in keys}

    def forget(self, keys: set[str]) -> None:
        """Mark rows to be counted again. They stay until they are, and a run that was stopped knows what is left."""
        for key in keys & set(self.rows):
            self.rows[key]["old"] = True
        self.save()

    def save(self) -> None:
        for row in self.rows.values():
            for contestant in row["contestants"].values():
                contestant.pop("names", None)
        self.torch = torch.__version__
        write_json(self.path, {"torch": self.torch, "rows": dict(sorted(self.rows.items()))})


def show(row: dict[str, Any]) -> None:
    print(f"{row['operation']}, {row['mode']}")
    for name, c in row["contestants"].items():
        traffic = c["bytes"] / row["input_bytes"]
        print(f"  {name}: {c['kernels']} kernels, {traffic:.2f}, {c['peak_bytes'] / 2**20:.1f} MiB  {c['names']}")
    for name, reason in row["skipped"].items():
        print(f"  {name}: {reason}")


# --- tables ---------------------------------------------------------------------------------------


def summarize(found: Counts, card: Card) -> str:
    """Everything counted, as Markdown."""
    parts = [
        f"Counted with torch {found.torch}; nothing here was timed. The roofline is that of a card of "
        f"{card.bandwidth / 1e9:g} GB/s, {card.flops / 1e12:g} float32 TFLOP/s and {1e6 * card.launch:g} µs a launch "
        f"({card.name}): numbers of a data sheet, not of a measurement.",
        "### Calls with default options",
        defaults_table(found),
        "### Every operation",
        operations_table(found, card),
        "### Not counted",
        not_counted(found),
    ]
    return "\n\n".join(parts)


def defaults_table(found: Counts) -> str:
    lines = []
    for name, (_, _, before, wanted) in DEFAULTS.items():
        row = found.rows.get(row_key(name + MARK, MODES[0]))
        if row is None:
            continue
        eager, compiled = (row["contestants"][f"udakit, {how}"] for how in HOWS)
        read = row["input_bytes"]
        now = eager["kernels"], eager["bytes"] / read
        reached = now[0] <= wanted[0] * 1.02 and now[1] <= wanted[1] * 1.02
        lines.append(
            [
                f"`{name}`",
                f"{before[0]:g} / {before[1]:g}",
                f"{wanted[0]:g} / {wanted[1]:g}",
                f"{now[0]} / {now[1]:.1f}",
                "yes" if reached else "**no**",
                f"{compiled['kernels']} / {compiled['bytes'] / read:.1f}",
            ]
        )
    return markdown_table(["kernels / traffic", "before", "wanted", "now", "reached", "now, compiled"], lines)


def operations_table(found: Counts, card: Card) -> str:
    lines = []
    for row in found.rows.values():
        if row["operation"].endswith(MARK) or "udakit, eager" not in row["contestants"]:
            continue
        read = max(row["input_bytes"], 1)
        cells = [f"`{row['operation']}`" + ("" if row["mode"] == MODES[0] else ", with backward")]
        for how in HOWS:
            pair = [row["contestants"].get(f"{rival}, {how}") for rival in ("udakit", "textbook")]
            cells.append(" / ".join("–" if c is None else str(c["kernels"]) for c in pair))
            cells.append(" / ".join("–" if c is None else f"{c['bytes'] / read:.3g}" for c in pair))
        pair = [row["contestants"].get(f"{rival}, eager") for rival in ("udakit", "textbook")]
        cells.append(" / ".join("–" if c is None else f"{c['peak_bytes'] / 2**20:.3g}" for c in pair))
        for how in HOWS:
            mine = row["contestants"].get(f"udakit, {how}")
            cells.append("–" if mine is None else f"{1e3 * card.seconds(mine['each']):.2g}")
        lines.append(cells)
    head = ["ours / textbook's", "kernels", "traffic", "kernels, compiled", "traffic, compiled", "peak MiB"]
    return markdown_table([*head, "roofline ms", "roofline ms, compiled"], lines)


def not_counted(found: Counts) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in found.rows.values():
        for who, reason in row["skipped"].items():
            reasons.setdefault((who.partition(",")[0], reason), []).append(f"`{row['operation']}`")
    lines = [
        f"- {'Textbook version' if rival == 'textbook' else 'Operation'} that {reason}: "
        f"{', '.join(dict.fromkeys(names))}."
        if reason == "waits for the device"
        else f"- {', '.join(dict.fromkeys(names))}, {rival}: {reason}."
        for (rival, reason), names in reasons.items()
    ]
    return "\n".join(lines) or "Nothing."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, "gpu_cost.json", page=PAGES / "gpu.md")
    names = [w.name for w in rows() if not w.name.endswith(MARK)]
    parser.add_argument("--ops", nargs="+", metavar="NAME", choices=names, help="only these")
    parser.add_argument("--show", action="store_true", help="print the kernels by name, write nothing")
    parser.add_argument("--card", type=Card.parse, default=Card.parse(CARD), help=f'of the roofline, as "{CARD}"')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.table:
        run(options)
    if not (options.show or options.no_table):
        write_section("gpu cost", summarize(Counts(options.results), options.card), options.page)


if __name__ == "__main__":
    main()
