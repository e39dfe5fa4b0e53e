"""The rows of the operator benchmark: each entry of the contract's registry once, at realistic sizes, with its rivals.

An operation that joins the registry is measured without a change here. Where an entry's example is made for checking
(a temperature, a chunk of 40 pixels, a table of three ids) `REALISTIC` has what a training step would use, and a
Module with several methods has a row for each of them in `METHODS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from benchmarks.harness import ROOT, SEED

sys.path.insert(0, str(ROOT / "tests"))

import udakit
from benchmarks.peers import PEERS, cross_entropy_unit
from contract.devices import moved
from contract.registry import FAMILIES, Call, Operation, Sample, all_operations
from textbook import NO_TEXTBOOK, TEXTBOOK, single

CLASSES, WIDTH, STRIDE = 19, 256, 4
# name -> images of a batch, side of a label map in pixels
SIZES = {"tiny": (2, 32), "small": (2, 64), "medium": (4, 256), "large": (4, 512)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE_LIMIT = 4 * 2**30  # bytes of pair matrices that a rival may hold at once

Example = Callable[[Sample], Call]
Use = Callable[[Call], Callable[..., Any]]


class BenchmarkSample(Sample):
    """Draws in float32: twenty million numbers take a second in float64."""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)


@dataclass(frozen=True)
class Workload:
    """One operation to be measured: what it is called with, and how it is called."""

    name: str
    family: str
    operation: Operation
    example: Example
    use: Use
    kind: str  # "pixels", "features", "contrast" or "constant": see `sample`
    grad: tuple[int, ...]
    peers: dict[str, Callable[[Call], Callable[..., Any]]] = field(default_factory=dict)

    def sample(self, size: str, dtype: torch.dtype) -> Sample:
        n, side = SIZES[size]
        if self.kind == "features":
            side //= STRIDE
        if self.kind == "contrast":  # of two views of one image, at stride 2, 4, 4
            n, side = 1, max(side // 4, min(side // 2, 32))
        d = CLASSES if self.kind == "contrast" else WIDTH
        return BenchmarkSample(SEED, n=n, c=CLASSES, d=d, h=side, w=side, dtype=dtype)

    def shape(self, size: str) -> str:
        """The tensor that decides, as a user writes it."""
        s = self.sample(size, torch.float32)
        if self.kind == "contrast":
            return f"{s.d} x {s.h} x {s.w}, two views of one image"
        return f"{s.n} x {s.d if self.kind == 'features' else s.c} x {s.h} x {s.w}"


# --- how an operation is called -------------------------------------------------------------------


def public_call(op: Operation) -> Use:
    """The function with its options, or the Module made once: what a training script has in hand."""

    def use(call: Call) -> Callable[..., Any]:
        if op.build is not None:
            return op.build(call)
        if op.module is not None and getattr(udakit, op.name) is op.module:
            return op.module(**call.options)
        return partial(op.function, **call.options)

    return use


# --- realistic examples ---------------------------------------------------------------------------


def _with(**options: Any) -> Callable[[Operation], Example]:
    def make(op: Operation) -> Example:
        def example(s: Sample) -> Call:
            call = op.example(s)
            changed = {k: v(s) if callable(v) else v for k, v in options.items()}
            return replace(call, options={**call.options, **changed})

        return example

    return make


def _pixel_contrast(s: Sample) -> Call:
    views = (F.normalize(s.features().float(), dim=1).to(s.dtype) for _ in range(2))
    return Call(tuple(views), {"valid": s.valid()}, {"temperature": 0.05})


def _upsampled_cross_entropy(s: Sample) -> Call:
    logits = s.logits(s.h // STRIDE, s.w // STRIDE)
    return Call((logits, s.labels()), {"pixel_weight": s.weight()}, {"class_weight": s.class_values()})


def _upsampled_kd(s: Sample) -> Call:
    student, teacher = (s.logits(s.h // STRIDE, s.w // STRIDE) for _ in range(2))
    options = {"temperature": 2.0, "divergence": "kl", "size": (s.h, s.w)}
    return Call((student, teacher), {"valid": s.valid(), "pixel_weight": s.weight()}, options)


def _projection(s: Sample) -> Call:
    return Call((s.features(), s.features()), {"valid": s.valid()}, {"dim": s.d, "reference_dim": s.d})


def _consensus(s: Sample) -> Call:
    features = s.features(s.h // STRIDE, s.w // STRIDE)
    return Call((s.logits(), features, s.class_vectors()), {"valid": s.valid()})


def _augment(s: Sample) -> Call:
    draw = udakit.draw_strong_augment(s.n, generator=s.generator)
    draw = draw._replace(
        **{k: v.to(s.dtype) for k, v in draw._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
    )
    return Call((s.images01(), draw), {}, {"mean": (0.1, 0.0, 0.1), "std": (0.8, 0.9, 0.8)})


def _map_ids(s: Sample) -> Call:
    ids = torch.randint(34, (s.n, s.h, s.w), generator=s.generator, dtype=torch.uint8)
    return Call((ids,), {}, {"table": dict(udakit.CITYSCAPES_IDS)})


REALISTIC: dict[str, Callable[[Operation], Example]] = {
    "pixel_contrast_loss": lambda op: _pixel_contrast,
    "supervised_pixel_contrast_loss": _with(max_anchors=64, denominator="all"),
    "upsampled_cross_entropy": lambda op: _upsampled_cross_entropy,
    "upsampled_kd_loss": lambda op: _upsampled_kd,
    "ProjectedFeatureLoss": lambda op: _projection,
    "BilateralConsensus": lambda op: _consensus,
    "RectifiedSelector": lambda op: _consensus,
    "ClassQuantileSelector": _with(bins=4096),
    "AdaptiveThresholdSelector": _with(momentum=0.0),  # the same at every call
    "LabelFreeScores": _with(samples=0),  # a draw has no textbook
    "ConfidenceThreshold": _with(bins=4096),
    "strong_augment": lambda op: _augment,
    "fourier_transfer": _with(beta=0.01),
    "downscale_labels": _with(factor=STRIDE, min_ratio=0.75),
    "resize_labels": _with(size=lambda s: (s.h // STRIDE, s.w // STRIDE)),
    "map_ids": lambda op: _map_ids,
}
CONTRAST = ("pixel_contrast_loss",)
FEATURES = (
    *("feature_distance_loss", "ProjectedFeatureLoss", "pixel_prototype_contrast_loss"),
    *("distribution_contrast_loss", "ClassDistributions.update"),
    *("supervised_pixel_contrast_loss", "class_means", "ClassPrototypes.update", "ClassPrototypes.distances"),
)
CONSTANT = (
    "row_mask",
    "draw_detail_box",
    "draw_token_mask",
    "mask_tokens",
    "adapt_batch_norm",
    "draw_strong_augment",
    "rare_class_probabilities",
    "RareClassSampler",
    "EMATeacher.update",
)
# Entries whose code is that of other rows, one after another.
ELSEWHERE = {
    "StrongAugment": "it calls `draw_strong_augment` and `strong_augment`, which have rows",
    "ClassPrototypes": "its methods have rows",
    "ClassDistributions": "its `update` has a row",
    "EMATeacher": "its `update` has a row, and a call costs what the net costs",
    **dict.fromkeys(
        ("mirror_view", "shift_view", "crop_view", "rotation_view"),
        "it is part of the row of `view_consistency`",
    ),
}


# --- methods --------------------------------------------------------------------------------------


def _features_and_bank(s: Sample) -> Call:
    return Call((s.features(),), {}, {"prototypes": s.class_vectors().float()})


def _update_example(s: Sample) -> Call:
    options = {"prototypes": s.class_vectors().float(), "momentum": 1e-4, "min_pixels": 5}
    return Call((s.features(), s.labels()), {}, options)


def _bank(call: Call) -> udakit.ClassPrototypes:
    prototypes = call.options["prototypes"]
    options = {k: v for k, v in call.options.items() if k != "prototypes"}
    return udakit.ClassPrototypes(*prototypes.shape, **options).set_(prototypes)


def _use_update(call: Call) -> Callable[..., Any]:
    bank = _bank(call)

    def update(features: Tensor, labels: Tensor) -> Tensor:
        bank.update(features, labels)
        return bank.prototypes

    return update


def _teacher_example(s: Sample) -> Call:
    """A net of 60 convolutions with BatchNorm, nine million numbers."""
    student = nn.Sequential(*(m for _ in range(60) for m in (nn.Conv2d(128, 128, 3), nn.BatchNorm2d(128))))
    teacher = udakit.EMATeacher(student, decay=0.999, warmup=False)
    return Call((teacher.module, student), {}, {"decay": 0.999})


def _use_teacher(call: Call) -> Callable[..., Any]:
    teacher = udakit.EMATeacher(call.args[1], warmup=False, **call.options)
    return lambda _, student: teacher.update(student)


def _distributions_example(s: Sample) -> Call:
    return Call((s.features(), s.labels()), {}, {"num_classes": s.c, "dim": s.d})


def _use_distributions(call: Call) -> Callable[..., Any]:
    def update(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with features.device:  # moving it there would wait for a card
            module = udakit.ClassDistributions(**call.options)
        module.update(features, labels)
        return module.means, module.variances

    return update


METHODS: dict[str, tuple[str, Example, Use, tuple[int, ...]]] = {
    "ClassPrototypes.update": ("ClassPrototypes", _update_example, _use_update, ()),
    "ClassPrototypes.distances": ("ClassPrototypes", _features_and_bank, lambda call: _bank(call).distances, (0,)),
    "ClassDistributions.update": ("ClassDistributions", _distributions_example, _use_distributions, ()),
    "EMATeacher.update": ("EMATeacher", _teacher_example, _use_teacher, ()),
}


def workloads() -> Iterator[Workload]:
    """Every public operation of the registry once, in its order; a variant "name[...]" is the same code."""
    methods = {op: [m for m, (of, *_) in METHODS.items() if of == op] for op in ELSEWHERE}
    for family in FAMILIES:
        for op in all_operations():
            if "[" in op.name or _family(op) != family:
                continue
            for name in methods.get(op.name, [op.name]):
                yield _workload(name, family, op)


def _family(op: Operation) -> str:
    names = {f: {entry.name for entry in sys.modules[f"contract.ops_{f}"].OPERATIONS} for f in FAMILIES}
    return next(f for f in FAMILIES if op.name in names[f])


def _workload(name: str, family: str, op: Operation) -> Workload:
    if name in METHODS:
        _, example, use, grad = METHODS[name]
    else:
        example = REALISTIC[name](op) if name in REALISTIC else op.example
        use, grad = public_call(op), op.grad
    kinds = {"contrast": CONTRAST, "features": FEATURES, "constant": CONSTANT}
    kind = next((k for k, names in kinds.items() if name in names), "pixels")
    peers = dict(PEERS.get(name, {}))
    if family in ("losses", "contrast") and kind == "pixels" and grad and not name.startswith("upsampled"):
        peers["F.cross_entropy"] = cross_entropy_unit
    return Workload(name, family, op, example, use, kind, grad, peers)


# --- one row --------------------------------------------------------------------------------------


@dataclass
class Case:
    """The calls to be compared on one set of inputs, what was left out and why, and the bytes that must move."""

    contestants: dict[str, Callable[[], Any]]
    skipped: dict[str, str]
    bytes: int


class NotThere(Exception):
    """This row does not exist: the operation has no such dtype or no gradient."""


def build_case(
    workload: Workload,
    size: str,
    dtype: torch.dtype = torch.float32,
    *,
    backward: bool = False,
    compiled: bool = False,
    sample: Sample | None = None,
    rivals: bool = True,
    device: str = "cpu",
    backend: str = "inductor",
) -> Case:
    """Make the inputs and the contestants: "udakit", and unless without `rivals` "textbook" and the peers.

    `backend` is that of the compiled calls.
    `device` is where everything lies. A `sample` for another one than the CPU has a generator of that device.
    """
    if backward and not workload.grad:
        raise NotThere
    torch.manual_seed(SEED)
    with torch.device(device):
        call = moved(workload.example(sample or workload.sample(size, dtype)), device)
    tensors = [x for x in tree_leaves((call.args, call.tensors)) if isinstance(x, Tensor)]
    if dtype == torch.bfloat16 and not any(x.dtype == dtype for x in tensors):
        raise NotThere
    call, inputs = _requiring_gradients(call, workload.grad if backward else ())

    with torch.device(device):
        functions, skipped = {"udakit": workload.use(call)}, {}
    if rivals and workload.name in TEXTBOOK:
        textbook = TEXTBOOK[workload.name]
        in_full = dtype == torch.bfloat16 and workload.family in ("losses", "contrast")
        functions["textbook"] = partial(_in_float32(textbook) if in_full else textbook, **call.options)
    elif rivals:
        skipped["textbook"] = NO_TEXTBOOK.get(workload.name, "not written yet")
    if compiled:
        eager = functions.get("textbook")
        functions = {k: torch.compile(f, fullgraph=k == "udakit", backend=backend) for k, f in functions.items()}
        if eager is not None:
            functions["textbook, eager"] = eager
    elif rivals:
        for name, make in workload.peers.items():
            try:
                functions[name] = make(call)
            except ImportError as error:
                skipped[name] = str(error)
    if pair_bytes(workload, call) > DENSE_LIMIT:
        for name in functions.keys() - {"udakit"}:
            skipped[name] = f"its pair matrices would take {pair_bytes(workload, call) / 2**30:.0f} GiB"
            del functions[name]

    steps = {name: _step(f, call, inputs) for name, f in functions.items()}
    for name in [n for n in steps if n != "udakit"]:
        try:
            try:
                steps[name]()
            except RuntimeError:  # a textbook version makes its constants where `torch.set_default_device` puts them
                if device == "cpu":
                    raise
                steps[name] = _by_default_on(device, steps[name])
                steps[name]()
        except Exception as error:  # a rival that cannot take the dtype, or cannot be compiled, is a finding
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
            del steps[name]
    return Case(steps, skipped, moved_bytes(call, steps["udakit"](), inputs))


def _by_default_on(device: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def there() -> Any:
        with torch.device(device):
            return call()

    return there


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss on float32 copies, as autocast computes softmax, norms and cross-entropy: as exact as ours."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, single, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _requiring_gradients(call: Call, positions: tuple[int, ...]) -> tuple[Call, list[Tensor]]:
    args, inputs = list(call.args), []
    for position in positions:
        leaves, spec = tree_flatten(args[position])
        leaves = [
            x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in leaves
        ]
        inputs += [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        args[position] = tree_unflatten(leaves, spec)
    return replace(call, args=tuple(args)), inputs


def _step(function: Callable[..., Any], call: Call, inputs: list[Tensor]) -> Callable[[], Any]:
    """One call, with its gradients when there are inputs to have them; returns the tensors that came out."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [x for x in tree_leaves(function(*call.args, **call.tensors)) if isinstance(x, Tensor)]

    incoming: list[Tensor] = []

    def both() -> list[Tensor]:
        found = [x for x in tree_leaves(function(*call.args, **call.tensors)) if isinstance(x, Tensor)]
        reached = [x for x in found if x.requires_grad]
        if not incoming:  # made once: what arrives from further up is no cost of the operation
            incoming.extend(torch.ones_like(x) for x in reached)
        gradients = torch.autograd.grad(reached, inputs, incoming, allow_unused=True)
        return [*found, *(g for g in gradients if g is not None)]

    return both if inputs else forward


def moved_bytes(call: Call, produced: list[Tensor], inputs: list[Tensor]) -> int:
    """Bytes that any implementation moves: each input read once, each output and each gradient written once.

    A backward pass reads its incoming gradients once as well.
    """
    given = [x for x in tree_leaves((call.args, call.tensors, call.options)) if isinstance(x, Tensor)]
    for module in (x for x in tree_leaves(call.args) if isinstance(x, nn.Module)):
        given += [*module.parameters(), *module.buffers()]
    incoming = [x for x in produced if x.requires_grad] if inputs else []
    # A result that is an input's memory is not written again.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in [*given, *produced]}
    return sum(storages.values()) + sum(x.numel() * x.element_size() for x in incoming)


def pair_bytes(workload: Workload, call: Call) -> int:
    """Bytes of the matrices of all pairs that a dense rival holds at once: similarities, their exponentials, a mask."""
    if workload.name != "pixel_contrast_loss":
        return 0
    n, _, h, w = call.args[0].shape
    return n * (2 * h * w) ** 2 * 3 * 4
