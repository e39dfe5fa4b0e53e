"""The share of a training step that is spent outside the networks, for each recipe of the reference loop.

    python benchmarks/step_overhead.py            # whatever is not in the JSON yet, then the table; all: 12 minutes
    python benchmarks/step_overhead.py --rows dacs dacs-1024 --again
    python benchmarks/step_overhead.py --table    # measures nothing, writes what is there

Inside are the nets' forward passes up to the head's own resolution, the backward pass through them, and the
optimiser's step. Everything else is outside: the parts of udakit with their backward pass, the teacher's update, the
enlargement of logits to image size (a net needs it whatever the loss, but it is no net), and what the recipe does
between them.

A clock stands around every part, in both directions. Forward it surrounds the call. Backward, identity nodes in the
graph note when the gradient enters the part at its result and leaves it at its arguments: on the CPU autograd works
through the nodes one by one in reverse order, so that a part's backward pass is one stretch of time. What of the
backward pass lies in no part is the nets'. A part inside another one counts once, as itself.

As a check from outside, the same nets are run alone (`net-only`): as many passes of the same shapes with and without
gradients, the sum of the logits as the loss, and the optimiser's step.

Images and labels are random blocks. The nets' weights are random but for those of efficientnet-lite0: the parts work on
every pixel whatever its value, so that the time does not depend on what was learned.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import udakit
from benchmarks.harness import PAGES, SEED, Results, markdown_table, parser_for, write_section
from gta2cs import frames, outputs
from gta2cs.loading import Batch
from gta2cs.nets import SegNet, build_net, param_groups
from gta2cs.recipes import RECIPES, Combined, Draws, Recipe
from gta2cs.recipes.ehtdi import Ehtdi
from gta2cs.recipes.self_training import TargetStyled

CLASSES = 19
NETS = "nets"
BACKWARD = "backward"
OPTIMIZER = "optimiser"
INSIDE = (NETS, BACKWARD, OPTIMIZER)
REST = "rest"

# Part -> the functions that the recipes' modules import.
FUNCTIONS = {
    "augmentation": ("strong_augment",),
    "mixing": (
        *("draw_classes", "class_mask", "class_mix", "paste", "target_paste", "cross_domain_mix", "boundary_band"),
    ),
    "selection": ("fuse_teachers",),
    "cross-entropy": ("cross_entropy", "upsampled_cross_entropy"),
    "distillation": ("kd_loss", "upsampled_kd_loss"),
    "pixel contrast": ("pixel_contrast_loss",),
    "prototype contrast": ("prototype_contrast_loss",),
    "feature distance": ("feature_distance_loss",),
    "label resizing": ("resize_labels", "downscale_labels"),
}
# Part -> methods, and a function that its own module calls.
METHODS: dict[str, tuple[tuple[Any, str], ...]] = {
    NETS: ((SegNet, "forward"), (SegNet, "encode")),
    "enlarging logits": ((outputs, "enlarge"), (frames, "enlarge")),
    "shrinking logits": ((Ehtdi, "_small"),),
    "target style": ((TargetStyled, "in_target_style"),),
    "selection": tuple(
        (selector, "forward")
        for selector in (
            *(udakit.ArgmaxSelector, udakit.BilateralConsensus, udakit.ClassQuantileSelector),
            *(udakit.ConfidentRatioSelector, udakit.ThresholdSelector),
        )
    ),
    "distillation": ((udakit.InconsistencyLoss, "forward"),),
    "prototypes": ((udakit.ClassPrototypes, "update"),),
    "EMA": ((udakit.EMATeacher, "update"),),
}
AUGMENT = importlib.import_module("udakit.mixing.strong_augment")  # the package has a function of that name


@dataclass(frozen=True)
class Row:
    """What is measured."""

    recipe: str
    size: int = 512
    net: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    wanted: float | None = None  # the largest share outside that we accept


LITE0 = {"arch": "deeplabv3plus", "encoder": "tu-tf_efficientnet_lite0"}
MIT_B0 = {"arch": "hf_segformer", "encoder": "mit_b0", "weights": "random"}
ROWS = {
    "dacs": Row("dacs", net=LITE0, wanted=0.07),
    "diga_warmup": Row("diga_warmup", net=LITE0, wanted=0.07),
    "diga": Row("diga", net=LITE0, wanted=0.07),
    "ehtdi": Row("ehtdi", net=LITE0, wanted=0.07),
    "duda_pre": Row("duda_pre", net=LITE0, options={"large": {"encoder": "tu-tf_efficientnet_lite2"}}),
    "duda": Row("duda", net=LITE0, wanted=0.07),
    "combined": Row("combined", net=LITE0),
    "dacs-1024": Row("dacs", 1024, net=LITE0),
    "dacs-segformer": Row("dacs", net=MIT_B0, wanted=0.07),
}


# --- clocks ----------------------------------------------------------------------------------------------------------


@dataclass
class Stretch:
    """A stretch of time of a part."""

    part: str
    start: float
    end: float = 0.0


class Clock:
    """Notes when each part works, forward and backward."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.stretches: list[Stretch] = []

    @contextmanager
    def around(self, part: str) -> Iterator[None]:
        """Time a block."""
        stretch = Stretch(part, self.now())
        self.stretches.append(stretch)
        try:
            yield
        finally:
            stretch.end = self.now()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Time a function, and what autograd does for it later (not the nets': the rest of backward is theirs)."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part in INSIDE or not torch.is_grad_enabled():
                with self.around(part):
                    return function(*args, **kwargs)
            back = Stretch(part, 0.0)  # from the gradient's arrival to its last departure
            args, kwargs = tree_map(lambda x: _mark(x, self, back, False), (args, kwargs))
            with self.around(part):
                result = function(*args, **kwargs)
            return tree_map(lambda x: _mark(x, self, back, True), result)

        return timed

    def exclusive(self) -> dict[str, float]:
        """Seconds of each part, less those of the parts inside it."""
        seconds: dict[str, float] = {}
        open_: list[Stretch] = []
        for stretch in sorted((s for s in self.stretches if s.end), key=lambda s: (s.start, -s.end)):
            while open_ and open_[-1].end <= stretch.start:
                open_.pop()
            length = stretch.end - stretch.start
            seconds[stretch.part] = seconds.get(stretch.part, 0.0) + length
            if open_:
                seconds[open_[-1].part] -= length
            open_.append(stretch)
        return seconds


class _Mark(torch.autograd.Function):
    """Identity that notes when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, stretch: Stretch, result: bool) -> Tensor:
        ctx.clock, ctx.stretch, ctx.result = clock, stretch, result
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        now = ctx.clock.now()
        if not ctx.result:
            ctx.stretch.end = now
        elif not ctx.stretch.start:
            ctx.stretch.start = now
            ctx.clock.stretches.append(ctx.stretch)
        return grad, None, None, None


def _mark(x: Any, clock: Clock, stretch: Stretch, result: bool) -> Any:
    if isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter):
        return _Mark.apply(x, clock, stretch, result)
    return x


@contextmanager
def clocks(clock: Clock) -> Iterator[None]:
    """Put the clock around every part while the block runs."""
    with ExitStack() as stack:

        def patch(owner: Any, name: str, part: str) -> None:
            stack.enter_context(mock.patch.object(owner, name, clock.wrap(part, getattr(owner, name))))

        modules = [m for name, m in sys.modules.items() if name.startswith("gta2cs.recipes.")]
        modules.append(outputs)  # the outputs of nets take the cross-entropy of their own logits
        for part, names in FUNCTIONS.items():
            for module in modules:
                for name in names:
                    if hasattr(module, name):
                        patch(module, name, part)
        for part, methods in METHODS.items():
            for owner, name in methods:
                patch(owner, name, part)
        patch(AUGMENT, "blur", "blur")
        yield


# --- a step ----------------------------------------------------------------------------------------------------------


class Step:
    """A recipe, a batch and an optimiser."""

    def __init__(self, row: Row, *, batch_size: int = 2, classes: int = CLASSES, device: str = "cpu") -> None:
        torch.manual_seed(SEED)
        self.device = torch.device(device)

        def make_net(**changes: Any) -> nn.Module:
            net = {**row.net, **changes}
            if changes:  # the large net of DUDA, whose weights are in a package of its own
                net["weights"] = "random"
            return build_net(**net, num_classes=classes)

        previous = None
        if row.recipe == "duda":
            previous = RECIPES["duda_pre"].build(make_net(), classes, {}, make_net)
        student = make_net()
        self.recipe: Recipe = RECIPES[row.recipe].build(student, classes, row.options, make_net, previous)
        if isinstance(self.recipe, Combined):
            self.recipe.trial_steps = 10**9  # a step of the trial, of the first candidate
        self.recipe = self.recipe.to(self.device, memory_format=torch.channels_last).train()
        for module in self.recipe.modules():
            if isinstance(module, udakit.ClassPrototypes):
                module.set_(torch.randn(module.prototypes.shape).to(self.device))
        groups = [*param_groups(student, lr=1e-5), *self.recipe.extra_param_groups(1e-5)]  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        batch = random_batch(batch_size, (row.size, row.size), classes)
        self.samples: list[int] = batch.samples.tolist()
        self.batch = Batch(*(x.to(self.device) for x in batch))
        self.index = 0

    def draws(self) -> Draws:
        """The draws of the next step."""
        return Draws(SEED, self.index, self.samples, self.device)

    def take(self, clock: Clock) -> None:
        """Take a step."""
        draws = self.draws()
        self.index += 1
        losses = self.recipe(self.batch, draws)
        self.optimizer.zero_grad(set_to_none=True)
        total = losses.total
        with clock.around(BACKWARD):
            total.backward()
        with clock.around(OPTIMIZER):
            self.optimizer.step()
        self.recipe.after_step()

    def run(self, clock: Clock) -> tuple[float, dict[str, float]]:
        """Take a step; return its seconds, and those of each part."""
        with clocks(clock):
            began = time.perf_counter()
            self.take(clock)
            seconds = time.perf_counter() - began
        return seconds, clock.exclusive()

    def passes(self) -> list[tuple[nn.Module, tuple[int, ...], bool]]:
        """The nets' passes of a step: the net, the shape of its input, whether with gradients."""
        seen: list[tuple[nn.Module, tuple[int, ...], bool]] = []
        forward = SegNet.forward

        def noted(net: SegNet, images: Tensor) -> Any:
            seen.append((net, tuple(images.shape), torch.is_grad_enabled()))
            return forward(net, images)

        with mock.patch.object(SegNet, "forward", noted):
            self.recipe(self.batch, self.draws())
        return seen

    def nets_alone(self, passes: list[tuple[nn.Module, tuple[int, ...], bool]]) -> Callable[[], None]:
        """Those passes at the head's own resolution, their backward pass and the optimiser's step."""
        inputs = {shape: torch.randn(shape, device=self.device) for _, shape, _ in passes}

        def call() -> None:
            total = torch.zeros((), device=self.device)
            for net, shape, graph in passes:
                with torch.set_grad_enabled(graph):
                    logits = net(inputs[shape]).head_logits
                if graph:
                    total = total + logits.sum()
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            self.optimizer.step()

        return call


def random_batch(n: int, size: tuple[int, int], classes: int) -> Batch:
    """Images and labels in blocks, as textures and classes come in regions."""
    generator = torch.Generator().manual_seed(SEED)
    cells = [max(side // 32, 1) for side in size]

    def enlarge(x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, size, mode="nearest")

    def images() -> Tensor:
        blocks = torch.randn(n, 3, *cells, generator=generator)
        return enlarge(blocks) + torch.randn(n, 3, *size, generator=generator) / 4

    labels = torch.randint(classes, (n, 1, *cells), generator=generator)
    source, target = images(), images()
    ids = torch.arange(n)
    return Batch(source, enlarge(labels.float())[:, 0].long(), ids, target, ids, ids)


def measure(row: Row, *, steps: int = 3, batch_size: int = 2, classes: int = CLASSES) -> dict[str, Any]:
    """Medians over `steps` steps after one that does not count."""
    step = Step(row, batch_size=batch_size, classes=classes)
    runs = [step.run(Clock()) for _ in range(steps + 1)][1:]
    passes = step.passes()
    nets = step.nets_alone(passes)
    alone = statistics.median(timeit.repeat(nets, number=1, repeat=max(steps, 2))[1:])
    # One step's parts add up to it; medians taken part by part would not.
    seconds, parts = sorted(runs, key=lambda run: run[0])[(len(runs) - 1) // 2]
    return {
        "recipe": row.recipe,
        "size": row.size,
        "batch": batch_size,
        "net": " / ".join(str(row.net[k]) for k in ("arch", "encoder")),
        "steps": steps,
        "passes": len(passes),
        "seconds": seconds,
        "all_seconds": [s for s, _ in runs],
        "net_only_seconds": alone,
        "parts": {**parts, REST: seconds - sum(parts.values())},
        "wanted": row.wanted,
    }


# --- the page --------------------------------------------------------------------------------------------------------


def outside(row: dict[str, Any]) -> float:
    """Share of a step outside the nets."""
    return 1 - sum(row["parts"].get(part, 0.0) for part in INSIDE) / row["seconds"]


def table(results: Results) -> str:
    """Markdown: shares, then milliseconds by part."""
    rows = {name: results.rows[name] for name in ROWS if name in results}
    if not rows:
        return "Not measured yet."
    head = ["step", "net passes", "seconds", "outside the nets", "wanted", "net-only step"]
    shares = []
    for name, row in rows.items():
        share, wanted = outside(row), ROWS[name].wanted
        cell = f"{share:.1%}" if wanted is None or share <= wanted else f"**{share:.1%}**"
        shares.append(
            [
                f"{name}, {row['size']} × {row['size']}, {row['net']}",
                str(row["passes"]),
                f"{row['seconds']:.2f}",
                cell,
                "–" if wanted is None else f"≤ {wanted:.0%}",
                f"{row['net_only_seconds'] / row['seconds']:.1%}",
            ]
        )
    parts = list(dict.fromkeys(part for row in rows.values() for part in row["parts"] if part not in INSIDE))
    parts = [part for part in parts if part != REST] + [REST]
    by_part = [
        [name, *(f"{1e3 * row['parts'][part]:.0f}" if part in row["parts"] else "–" for part in parts)]
        for name, row in rows.items()
    ]
    batch = next(iter(rows.values()))["batch"]
    return (
        f"Measured on the CPU with batches of {batch} + {batch} images. *Outside the nets* is everything but the "
        "optimiser and the passes of the nets, backward and forward up to the resolution of the head. "
        "A *net-only step* has the same passes without anything around them, as a share of the whole step. "
        "Shares above what is wanted are bold.\n\n"
        f"{markdown_table(head, shares)}\n\nMilliseconds of a step by part, forward and backward:\n\n"
        f"{markdown_table(['step', *parts], by_part)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "step_overhead.json", page=PAGES / "step.md")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    for name in results.waiting(options.rows if not options.table else (), again=options.again):
        row = measure(ROWS[name], steps=options.steps)
        results.add(name, row)
        print(f"{name:16} {row['seconds']:6.2f} s a step, {outside(row):.1%} outside the nets", flush=True)
    if not options.no_table:
        write_section("step", table(results), options.page)


if __name__ == "__main__":
    main()
