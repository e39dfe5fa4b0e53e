"""What a GPU has to do for a whole training step outside the nets, counted on fake CUDA tensors.

    python benchmarks/gpu_step.py            # every recipe, then the table
    python benchmarks/gpu_step.py --table    # counts nothing

The steps and their parts are those of `step_overhead.py`, the rules of the count those of `kernels.py`. A backward node
belongs to the part that was at work when the node was made, and where the gradients of a parameter from several passes
of a net are added up is the net's. A step that runs here at all reads nothing on the host and
has shapes that no value decides: fake tensors have no values.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_cost import CARD, Card, together
from benchmarks.harness import PAGES, SEED, markdown_table, parser_for, write_section
from benchmarks.kernels import Kernel, Meter, backward, fake_card, on_card
from benchmarks.step_overhead import NETS, REST, ROWS, Clock, Step, clocks
from gta2cs.files import write_json
from gta2cs.recipes import Draws

COUNTED = ("dacs", "diga_warmup", "diga", "ehtdi", "duda_pre", "duda", "combined")
WANTED = {"dacs": 400}  # kernels outside the nets


class CardGenerator(torch.Generator):
    """A generator that says it is on the card; fake tensors draw nothing."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


class CardDraws(Draws):
    """The draws of a step, on the card."""

    generators = property(lambda self: [CardGenerator() for _ in self.samples])  # type: ignore[assignment]


class Parts(Clock):
    """In place of a clock: which part each kernel belongs to, forward and backward."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.open: list[str] = [REST]
        self.ranges: list[tuple[int, int, str]] = []  # of the numbers of the nodes that a part made, inner ones first
        self.of: list[str] = []  # part of each kernel

    @contextmanager
    def around(self, part: str) -> Iterator[None]:
        """Give what runs in a block to a part."""
        first = torch._C._autograd._get_sequence_nr()
        self.enter(part)
        try:
            yield
        finally:
            self.leave()
            self.ranges.append((first, torch._C._autograd._get_sequence_nr(), part))

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Give a function to a part."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.around(part):
                return function(*args, **kwargs)

        return counted

    def note(self) -> None:
        """The kernels since the last note are those of the part at work."""
        self.of += [self.open[-1]] * (len(self.meter.kernels) - len(self.of))

    def enter(self, part: str) -> None:
        """From here on kernels are those of `part`."""
        self.note()
        self.open.append(part)
        self.meter.lenient = part == NETS

    def leave(self) -> None:
        """Back to the part around it."""
        self.note()
        self.open.pop()
        self.meter.lenient = self.open[-1] == NETS

    @contextmanager
    def node(self, node: Any) -> Iterator[None]:
        """Give what a backward node does to the part that made it."""
        number = node._sequence_nr()
        part = next((p for first, last, p in self.ranges if first <= number < last), REST)
        self.enter(NETS if type(node).__name__ == "AccumulateGrad" else part)
        try:
            yield
        finally:
            self.leave()

    def kernels(self, part: str) -> list[Kernel]:
        """The kernels of a part."""
        self.note()
        return [k for k, p in zip(self.meter.kernels, self.of, strict=True) if p == part]


def count_step(name: str, *, batch_size: int = 2, modes: tuple[Any, ...] = ()) -> Parts:
    """One step of a recipe on a fake card, without the optimiser; `modes` also look on."""
    step = Step(ROWS[name], batch_size=batch_size)
    recipe, batch = step.recipe, step.batch
    with fake_card():
        on_card(recipe)
        batch = type(batch)(*(on_card(x) for x in batch))
        learned = [p for p in recipe.parameters() if p.requires_grad]
        meter = Meter()
        meter.hold(x for x in tree_leaves((tuple(batch), list(recipe.parameters()), list(recipe.buffers()))))
        parts = Parts(meter)
        draws = CardDraws(SEED, 0, list(range(batch_size)), torch.device("cuda"))
        for mode in modes:
            mode.__enter__()
        try:
            with meter, clocks(parts):
                total = recipe(batch, draws).total
                parts.note()
                backward([total], [torch.ones_like(total)], learned, around=parts.node)
                recipe.after_step()
                parts.note()
        finally:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)
    return parts


def measure(name: str) -> dict[str, Any]:
    """Kernels and bytes of each part."""
    parts = count_step(name)
    found = {}
    for part in dict.fromkeys(parts.of):
        kernels = parts.kernels(part)
        found[part] = {
            "kernels": len(kernels),
            "bytes": sum(k.bytes for k in kernels),
            "each": together([(1, k.bytes, k.flops) for k in kernels]) if part != NETS else "",
        }
    return {"size": ROWS[name].size, "batch": 2, "parts": found}


def outside_nets(row: dict[str, Any]) -> int:
    """Kernels of a step that are not the nets'."""
    return sum(c["kernels"] for part, c in row["parts"].items() if part != NETS)


def table(rows: dict[str, Any], card: Card) -> str:
    """Markdown: kernels and gigabytes outside the nets, then kernels by part."""
    outside = {name: {p: c for p, c in row["parts"].items() if p != NETS} for name, row in rows.items()}
    lines = []
    for name, parts in outside.items():
        kernels, wanted = outside_nets(rows[name]), WANTED.get(name)
        lines.append(
            [
                f"{name}, {rows[name]['size']} × {rows[name]['size']}",
                str(rows[name]["parts"][NETS]["kernels"]),
                str(kernels) if wanted is None or kernels <= wanted else f"**{kernels}**",
                "–" if wanted is None else f"≤ {wanted}",
                f"{sum(c['bytes'] for c in parts.values()) / 1e9:.2f}",
                f"{1e3 * sum(card.seconds(c['each']) for c in parts.values()):.1f}",
            ]
        )
    head = ["step", "kernels of the nets", "kernels outside", "wanted", "GB outside", "roofline ms outside"]
    names = [*dict.fromkeys(p for parts in outside.values() for p in parts if p != REST), REST]
    by_part = [
        [name, *(str(parts[p]["kernels"]) if p in parts else "–" for p in names)] for name, parts in outside.items()
    ]
    return (
        f"Batches of 2 + 2 images, 19 classes, eager, forward, backward and the teacher's update; the optimiser is "
        f"left out. Roofline: {card.name}.\n\n{markdown_table(head, lines)}\n\nKernels by part:\n\n"
        f"{markdown_table(['step', *names], by_part)}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Count, then write the page."""
    parser = parser_for(__doc__, "gpu_step.json", page=PAGES / "gpu.md")
    parser.add_argument("--rows", nargs="+", default=list(COUNTED), choices=list(COUNTED))
    options = parser.parse_args(arguments)
    rows: dict[str, Any] = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for name in options.rows if not options.table else []:
        rows[name] = measure(name)
        print(f"{name:16} {outside_nets(rows[name])} kernels outside the nets", flush=True)
        write_json(options.results, {k: rows[k] for k in COUNTED if k in rows})
    if not options.no_table:
        write_section("gpu step", table(rows, Card.parse(CARD)), options.page)


if __name__ == "__main__":
    main()
