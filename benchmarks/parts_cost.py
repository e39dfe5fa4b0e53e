"""Processor time and memory that a part adds to a step of DACS.

    python benchmarks/parts_cost.py            # whatever is not in the JSON yet, then the table; all: 3 minutes
    python benchmarks/parts_cost.py --parts mic_random hrda --again
    python benchmarks/parts_cost.py --table    # measures nothing, writes what is there

A step of plain DACS and a step with the part take turns on the same batch, one thread: whatever else the machine does
then slows both alike, and their ratio stays. Time is processor time of forward, backward, optimiser and teacher, the
median over the turns after one that does not count. Memory is the most bytes that tensors hold during one step beyond
those held before it: activations, gradients, optimiser state.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
from torch import nn

from benchmarks.adaptation_rows import FPN
from benchmarks.harness import SEED, Results, markdown_table, parser_for, peak_extra_bytes, write_section
from benchmarks.parts import BASE, PARTS
from benchmarks.step_overhead import random_batch
from gta2cs.config import NetConfig
from gta2cs.loading import Batch
from gta2cs.nets import param_groups
from gta2cs.recipes import Dacs, Draws, Preparation, Recipe

PAGE = ROOT / "docs" / "results" / "parts.md"
CLASSES, BATCH, CROP = 7, 4, (128, 192)  # of the toy pair
TITLES = {**{name: title for name, (title, _) in PARTS.items()}, "hrda": "two scales (HRDA)"}


class Step:
    """A training step of DACS with a part."""

    def __init__(self, part: str) -> None:
        options = dict(FPN["options"], **({"scale_attention": True} if part == "hrda" else {}))

        def make_net(**changes: Any) -> nn.Module:
            return NetConfig(arch="fpn", weights="random", options=options).build(CLASSES)

        torch.manual_seed(SEED)
        chosen = PARTS[part][1] if part in PARTS else {}
        self.recipe: Recipe = Dacs.build(make_net(), CLASSES, chosen, make_net)
        self.recipe.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.batch = random_batch(BATCH, CROP, CLASSES)

        def batches(start: int, stop: int) -> list[Batch]:
            return [self.batch]

        self.recipe.prepare(Preparation(batches))
        groups = [*param_groups(self.recipe.student, lr=1e-5), *self.recipe.extra_param_groups(1e-5)]  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(groups)
        self.done = 0

    def __call__(self) -> None:
        losses = self.recipe(self.batch, Draws(SEED, self.done, range(BATCH), torch.device("cpu")))
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.optimizer.step()
        self.recipe.after_step()
        self.done += 1


def seconds(step: Callable[[], None]) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    step()
    return time.process_time() - began


def measure(part: str, turns: int) -> dict[str, Any]:
    """Medians over `turns` of a plain step and one with the part, and the most bytes of each."""
    plain, with_part = Step(BASE), Step(part)
    times = [(seconds(plain), seconds(with_part)) for _ in range(turns + 1)][1:]
    ratios = sorted(b / a for a, b in times)
    return {
        "seconds": statistics.median(b for _, b in times),
        "plain_seconds": statistics.median(a for a, _ in times),
        "ratio": statistics.median(ratios),
        "ratio_range": (ratios[0], ratios[-1]),
        "bytes": peak_extra_bytes(with_part),
        "plain_bytes": peak_extra_bytes(plain),
        "turns": turns,
        "crop": CROP,
        "batch": BATCH,
    }


def table(results: Results) -> str:
    """Markdown: a line a part."""
    rows = {name: results.rows[name] for name in TITLES if name in results}
    if not rows:
        return "Not measured yet."
    lines = [
        [
            TITLES[name],
            f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})",
            f"{row['seconds']:.2f}",
            f"{row['bytes'] / row['plain_bytes']:.2f}",
            f"{row['bytes'] / 1e6:.0f}",
        ]
        for name, row in rows.items()
    ]
    first = next(iter(rows.values()))
    head = ["added to DACS", "time / DACS (range)", "seconds a step", "memory / DACS", "MB"]
    return (
        f"{markdown_table(head, lines)}\n\nProcessor time of a step on one thread, median of {first['turns']} turns in "
        f"which a plain step and one with the part alternate; the first line is DACS against itself. Memory is the "
        f"most that tensors hold during a step beyond what is held before it. Crops of {first['crop'][0]} × "
        f"{first['crop'][1]}, {first['batch']} + {first['batch']} images, the half-width FPN of the toy pair, float32."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "parts_cost.json", page=PAGE)
    parser.add_argument("--parts", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results(options.results)
    for name in results.waiting(options.parts if not options.table else (), again=options.again):
        results.add(name, measure(name, options.turns))
        row = results.rows[name]
        print(f"{name:22} {row['ratio']:.2f} of a step, {row['bytes'] / 1e6:.0f} MB", flush=True)
    if not options.no_table:
        write_section("parts_cost", table(results), options.page)


if __name__ == "__main__":
    main()
