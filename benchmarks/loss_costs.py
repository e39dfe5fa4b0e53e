"""Time and memory of each loss of an EHTDI step, and contrast beside pytorch-metric-learning on the same pixels.

    python benchmarks/loss_costs.py            # whatever is not in the JSON yet, then the tables
    python benchmarks/loss_costs.py --rows "pixel contrast" --again
    python benchmarks/loss_costs.py --quick --results /tmp/quick.json --no-table
    python benchmarks/loss_costs.py --table    # measures nothing, writes the tables of docs/performance/losses.md

A row is forward and backward to the gradient of the loss's own input: the logits of the head at a quarter of the crop,
for the contrasts the logits or features at an eighth of it. Memory is the most that the call holds at once beyond its
inputs, by the events of torch's allocator.

Beside pytorch-metric-learning stand its `SupConLoss` and `NTXentLoss` on the same rows, where all three define one
number. It is optional; without it, or where a contestant would hold too much, the row says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

import torch
import torch.nn.functional as F
from torch import Tensor

import udakit
from benchmarks.harness import (
    PAGES,
    SEED,
    Results,
    markdown_table,
    parser_for,
    peak_extra_bytes,
    settle_memory,
    time_together,
    write_section,
)
from benchmarks.peers import metric_learning
from gta2cs.outputs import SegOutput

HEAD, STRIDE, WIDTH, ANCHORS = 4, 8, 256, 64
LIMIT = 2 * 2**30  # bytes of pair matrices that a contestant may hold
PEERS = ("SupConLoss", "NTXentLoss")
TIMING = {"min_run_time": 0.3, "min_runs": 5, "max_time": 3.0}
QUICK = {"min_run_time": 0.005, "min_runs": 2, "max_time": 0.05}
NOTHING = "Not measured yet."
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """A batch of crops of one domain."""

    batch: int
    height: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"{self.height} × {self.width}, batch {self.batch}, {self.classes} classes"


SIZES = (Size(4, 160, 208, 11), Size(2, 512, 512, 19))  # of the CPU-sized rows of docs/results.md, and the paper's


# --- the losses of a step -----------------------------------------------------------------------------------------


def regions(size: Size, generator: torch.Generator) -> Tensor:
    """Labels in blocks of 32 pixels."""
    cells = torch.randint(size.classes, (size.batch, -(-size.height // 32), -(-size.width // 32)), generator=generator)
    return cells.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : size.height, : size.width]


def gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """Forward and backward to the inputs; returns the value."""
    leaves = [x.requires_grad_() for x in inputs]

    def call() -> Tensor:
        value = loss(*leaves)
        torch.autograd.grad(value, leaves)
        return value.detach()

    return call


def step_losses(size: Size) -> dict[str, Callable[[], Call]]:
    """How to make each call; the inputs live no longer than its row takes."""
    generator = torch.Generator().manual_seed(SEED)
    everything = regions(size, generator)
    mask = everything % 2 == 0  # half of the classes are pasted
    labels = everything.masked_fill(torch.rand(everything.shape, generator=generator) < 0.1, 255)
    small = (-(-size.height // STRIDE), -(-size.width // STRIDE))

    def normal(channels: int, shape: tuple[int, int]) -> Tensor:
        return torch.randn(size.batch, channels, *shape, generator=generator)

    def on_head(loss: Callable[[SegOutput], Tensor]) -> Call:
        head = normal(size.classes, (-(-size.height // HEAD), -(-size.width // HEAD)))
        return gradient(lambda x: loss(SegOutput(x, x, x, (size.height, size.width))), head)

    def both(output: SegOutput) -> Tensor:
        everywhere, inside = output.cross_entropy_and_band(labels, udakit.boundary_band(mask))
        return everywhere + inside

    def views() -> tuple[Tensor, Tensor]:
        return normal(size.classes, small), normal(size.classes, small)

    def pixel_contrast(a: Tensor, b: Tensor) -> Tensor:
        return udakit.pixel_contrast_loss(a.softmax(1), b.softmax(1), temperature=1 / 20)

    def prototype_contrast(a: Tensor, b: Tensor) -> Tensor:
        return udakit.prototype_contrast_loss(a, b, udakit.resize_labels(labels, small), num_classes=size.classes)

    def supervised_contrast(features: Tensor) -> Tensor:
        return udakit.supervised_pixel_contrast_loss(
            features,
            udakit.resize_labels(labels, small),
            num_classes=size.classes,
            max_anchors=ANCHORS,
            generator=torch.Generator().manual_seed(SEED),
        )

    return {
        "cross-entropy": lambda: on_head(lambda output: output.cross_entropy(labels)),
        "cross-entropy and boundary term": lambda: on_head(both),
        "shrinking one view": lambda: on_head(lambda output: output.averaged(STRIDE).sum()),
        "pixel contrast": lambda: gradient(pixel_contrast, *views()),
        "prototype contrast": lambda: gradient(prototype_contrast, *views()),
        "supervised contrast": lambda: gradient(supervised_contrast, normal(WIDTH, small)),
    }


def measure_loss(size: Size, name: str, timing: dict[str, Any]) -> dict[str, Any]:
    call = step_losses(size)[name]()
    return {
        "loss": name,
        "size": str(size),
        "value": float(call()),
        **time_together({name: call}, **timing)[name],
        "peak_bytes": peak_extra_bytes(call),
    }


# --- beside pytorch-metric-learning -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Unit vectors of `classes` x `rows` pixels on which our loss and the peers named define one number.

    As many rows in each class: `NTXentLoss` is a mean over pairs, ours is one over anchors.
    """

    name: str
    classes: int
    rows: int
    peers: tuple[str, ...]
    width: int = WIDTH

    @property
    def key(self) -> str:
        return f"{self.name}, {self.classes} × {self.rows}"

    def bytes(self, contestant: str) -> int:
        """What a contestant's matrices of pairs take: rows x rows, for `NTXentLoss` positive x negative pairs."""
        n = self.classes * self.rows
        if contestant == "NTXentLoss":
            return 24 * n * (self.rows - 1) * n * (n - self.rows)
        return 12 * n * n if contestant == "SupConLoss" else 0


VIEWS, ALL, NEGATIVES = "two views", 'labels, denominator="all"', 'labels, denominator="negatives"'
TEMPERATURE = {VIEWS: 0.05, ALL: 0.1, NEGATIVES: 0.1}
COMPARISONS = (
    *(Comparison(VIEWS, side * side, 2, PEERS, width=19) for side in (8, 12, 32, 64)),  # a class a pixel: its two views
    *(Comparison(ALL, c, a, PEERS[:1]) for c, a in ((4, 16), (19, 64), (19, 256))),
    *(Comparison(NEGATIVES, c, a, PEERS[1:]) for c, a in ((4, 16), (19, 64), (19, 256))),
)
QUICK_COMPARISONS = (
    Comparison(VIEWS, 9, 2, PEERS),
    Comparison(ALL, 3, 4, PEERS[:1]),
    Comparison(NEGATIVES, 3, 4, PEERS[1:]),
)


def contestants(comparison: Comparison) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls on the same rows, one class after another, and why others are left out."""
    c, r, d, temperature = comparison.classes, comparison.rows, comparison.width, TEMPERATURE[comparison.name]
    rows = F.normalize(torch.randn(c, r, d, generator=torch.Generator().manual_seed(SEED)), dim=2)
    classes = torch.arange(c).repeat_interleave(r)

    def views(a: Tensor, b: Tensor) -> Tensor:
        return udakit.pixel_contrast_loss(a, b, temperature=temperature)

    def supervised(features: Tensor) -> Tensor:
        return udakit.supervised_pixel_contrast_loss(
            features,
            classes.view(1, c, r),
            num_classes=c,
            max_anchors=r,
            temperature=temperature,
            denominator="all" if comparison.name == ALL else "negatives",
            generator=torch.Generator().manual_seed(SEED),
        )

    if comparison.name == VIEWS:
        ours = gradient(views, *(rows[:, i].T.reshape(1, d, c, 1).clone() for i in range(2)))
    else:
        ours = gradient(supervised, rows.permute(2, 0, 1)[None].clone())
    calls, skipped = {"udakit": ours}, {}
    for name in comparison.peers:
        if comparison.bytes(name) > LIMIT:
            skipped[name] = f"its pairs would take {comparison.bytes(name) / 2**30:.0f} GiB"
            continue
        try:
            calls[name] = gradient(
                partial(metric_learning(name, temperature), labels=classes), rows.flatten(0, 1).clone()
            )
        except ImportError as error:
            skipped[name] = str(error)
    return calls, skipped


def measure_comparison(comparison: Comparison, timing: dict[str, Any]) -> dict[str, Any]:
    calls, skipped = contestants(comparison)
    times = time_together(calls, **timing)
    found = {
        name: {"value": float(call()), **times[name], "peak_bytes": peak_extra_bytes(call)}
        for name, call in calls.items()
    }
    return {"comparison": comparison.key, "contestants": found, "skipped": skipped}


# --- the page -----------------------------------------------------------------------------------------------------


def cells(found: dict[str, Any] | None, why: str = "–") -> list[str]:
    """Milliseconds with half of the interquartile range, and MiB."""
    if found is None:
        return [why, "–"]
    return [f"{1e3 * found['median']:.3g} ± {500 * found['iqr']:.2g}", f"{found['peak_bytes'] / 2**20:.3g}"]


def loss_table(results: Results) -> str:
    rows = [r for r in results.rows.values() if "loss" in r]
    if not rows:
        return NOTHING
    sizes, losses = (list(dict.fromkeys(r[k] for r in rows)) for k in ("size", "loss"))
    by_place = {(r["size"], r["loss"]): r for r in rows}
    head = [text for size in sizes for text in (f"{size}: ms", "peak extra MiB")]
    lines = [[loss, *(x for size in sizes for x in cells(by_place.get((size, loss))))] for loss in losses]
    return (
        f"The first three rows start from the logits of the head, at stride {HEAD}, and do not enlarge them. The "
        f"contrasts work at stride {STRIDE}. The supervised contrast, which EHTDI does not use, takes features of "
        f"width {WIDTH} with {ANCHORS} anchors for each class. One step of EHTDI computes cross-entropy alone once, "
        "with its boundary term twice, the shrinking twice, and each contrast once.\n\n"
        f"{markdown_table(['forward and backward', *head], lines)}"
    )


def difference(row: dict[str, Any]) -> str:
    """Largest difference of a peer's value from ours, as a share of ours."""
    ours = row["contestants"]["udakit"]["value"]
    others = [f["value"] for name, f in row["contestants"].items() if name != "udakit"]
    return f"{max(abs(v - ours) for v in others) / abs(ours):.0e}" if others else "–"


def peer_table(results: Results) -> str:
    rows = [r for r in results.rows.values() if "comparison" in r]
    if not rows:
        return NOTHING
    lines = []
    for row in rows:
        found = [x for name in ("udakit", *PEERS) for x in cells(row["contestants"].get(name))]
        lines.append([row["comparison"], *found, difference(row)])
    reasons = [f"- {r['comparison']}, `{name}`: {why}." for r in rows for name, why in r["skipped"].items()]
    head = [text for name in ("udakit", *(f"`{p}`" for p in PEERS)) for text in (f"{name}: ms", "MiB")]
    text = markdown_table(["classes × pixels", *head, "values differ by"], lines)
    return text + ("\n\nLeft out:\n\n" + "\n".join(reasons) if reasons else "")


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "loss_costs.json", page=PAGES / "losses.md")
    names = [*step_losses(Size(1, 8, 8, 2)), *(c.key for c in COMPARISONS)]
    parser.add_argument("--rows", nargs="+", choices=names, help="losses or comparisons; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two runs each: does everything run?")
    options = parser.parse_args(arguments)
    if options.quick and options.results == parser.get_default("results"):
        parser.error("--quick measures nothing worth keeping: give it --results of its own")
    results = Results(options.results)
    settle_memory()
    if not options.table:
        run(options, results)
    if not options.no_table:
        write_section("loss_costs", loss_table(results), options.page)
        write_section("contrast_peers", peer_table(results), options.page)


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure the rows that are asked for and not there."""
    timing, sizes, comparisons = (
        (QUICK, (Size(1, 64, 96, 4),), QUICK_COMPARISONS) if options.quick else (TIMING, SIZES, COMPARISONS)
    )
    plan = {f"{size}/{name}": (name, partial(measure_loss, size, name)) for size in sizes for name in step_losses(size)}
    plan |= {c.key: (c.key, partial(measure_comparison, c)) for c in comparisons}
    asked = [key for key, (name, _) in plan.items() if not options.rows or name in options.rows]
    for key in results.waiting(asked, again=options.again):
        results.add(key, plan[key][1](timing))
        print(key, flush=True)


if __name__ == "__main__":
    main()
