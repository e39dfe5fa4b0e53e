"""The registry of every public operation: what the contract checks, the benchmark and the API page run over.

An entry says how to call the operation once, on tensors made by a `Sample`, and what kind of operation it is; the
checks in `test_contract.py` do the rest. A check that cannot apply is named in `exempt`, with its reason.

Split by family in `ops_<family>.py`, each with a list `OPERATIONS`; `all_operations()` is their concatenation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

FAMILIES = (
    "losses",
    "contrast",
    "mixing",
    "pseudo_labels",
    "prototypes",
    "teachers",
    "labels",
    "sampling",
    "features",
    "validation",
    "resolution",
    "norms",
)

# The checks an entry can be exempted from (the functions test_<check> of test_contract.py).
CHECKS = (
    "module",  # function == Module
    "gradcheck",  # float64 numerical gradient
    "fake_tensors",  # runs on fake CPU and fake CUDA tensors: no data-dependent shape, no host read
    "defaults",  # torch's default device and dtype change nothing
    "no_device_copy",  # a dispatch mode sees no copy between devices
    "compile",  # torch.compile(fullgraph=True, backend="aot_eager") gives the same values
    "half",  # bfloat16 and float16 finite and close to float32
    "autocast",  # the same under CPU autocast to bfloat16
    "all_ignored",  # losses: exactly 0, with a graph, zero gradient
    "strides",  # non-contiguous and channels_last inputs give the same
    "batch_permutation",
    "class_permutation",
    "seed",  # same generator state, same result; another state, another result
    "unmodified",  # arguments keep their values
    "state_dict",  # Modules: saved and loaded, the next call gives the same
    "cast",  # Modules: their own buffers keep dtype and values under .half(), .bfloat16() and .type()
    "extreme_values",  # logits +-1e4 and features 1e-15..1e15: nothing non-finite
    "shape_errors",  # a transposed or truncated tensor raises ValueError or TypeError naming an argument
    "space",  # signals and volumes: as `Operation.space` says
    "subclass",  # a strict subclass of Tensor passes, with the same values
    "one_channel",  # logits or probabilities of one channel are refused, naming binary_logits or binary_probabilities
    "nan_outside",  # NaN and inf where nothing counts: the same values and gradients
    "wrong_options",  # every option refuses every wrong value, by name
)

# The checks that also run with the thresholds of large maps lowered, so that the examples are large.
OF_LARGE_MAPS = ("gradcheck", "half", "strides", "extreme_values", "subclass", "nan_outside", "defaults")

# Parts of a check that an entry can be exempted from as "<check>.<part>", leaving the rest of the check in force.
PARTS = {
    "extreme_values": ("float16", "bfloat16", "one_class", "one_image"),
    "shape_errors": ("axes", "size", "dtype"),
    "seed": ("another", "device"),  # another seed, another result; a generator of another device is refused
    "fake_tensors": ("backward",),
}

# What a tensor is, so that the checks can permute, cast and shrink it: axis 0 is always the batch except for "class*".
Role = Literal[
    "logits",  # (N, C, H, W): class axis 1, |x| <= 1e4
    "probabilities",  # (N, C, H, W): class axis 1
    "features",  # (N, D, h, w): no class axis, 1e-15 .. 1e15
    "images",  # (N, 3, H, W)
    "labels",  # (N, H, W): holds class ids
    "valid",  # (N, H, W) bool: True counts
    "mask",  # (N, H, W) bool, no meaning for `all_ignored`
    "weight",  # (N, H, W) float
    "chosen",  # (N, C) bool: class axis 1
    "class_vectors",  # (C, D): class axis 0
    "class_values",  # (C,): class axis 0
    "scalar",  # ()
    "batch_values",  # (N,)
    "batch_class_values",  # (N, C): class axis 1
    "batch_class_vectors",  # (N, C, D): class axis 1
    "other",  # not permuted, not cast
]


class Sample:
    """Makes the tensors of one example call from a seed and remembers what role each of them has."""

    def __init__(
        self, seed: int = 0, *, n: int = 2, c: int = 4, d: int = 6, h: int = 8, w: int = 12, dtype: Any = torch.float32
    ) -> None:
        self.n, self.c, self.d, self.h, self.w, self.dtype = n, c, d, h, w, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.roles: dict[int, Role] = {}
        self._keep: list[Tensor] = []  # ids stay unique only while the tensors live

    def tag(self, x: Tensor, role: Role) -> Tensor:
        """Give a tensor of your own making a role."""
        self.roles[id(x)] = role
        self._keep.append(x)
        return x

    def normal(self, *shape: int) -> Tensor:
        # Drawn in float64 whatever the dtype, so that one seed means one example at every precision.
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def logits(self, h: int | None = None, w: int | None = None) -> Tensor:
        return self.tag(2 * self.normal(self.n, self.c, h or self.h, w or self.w), "logits")

    def probabilities(self) -> Tensor:
        x = torch.randn(self.n, self.c, self.h, self.w, generator=self.generator, dtype=torch.float64)
        return self.tag(x.softmax(1).to(self.dtype), "probabilities")

    def features(self, h: int | None = None, w: int | None = None) -> Tensor:
        return self.tag(self.normal(self.n, self.d, h or self.h, w or self.w), "features")

    def images(self) -> Tensor:
        return self.tag(self.normal(self.n, 3, self.h, self.w), "images")

    def images01(self) -> Tensor:
        x = torch.rand(self.n, 3, self.h, self.w, generator=self.generator, dtype=torch.float64)
        return self.tag(x.to(self.dtype), "images")

    def labels(self, *, ignored: float = 0.2, ignore_index: int = 255) -> Tensor:
        """Every class occurs in every image when there are enough pixels; a share is ignored."""
        shape = (self.n, self.h, self.w)
        x = torch.randint(self.c, shape, generator=self.generator)
        drop = torch.rand(shape, generator=self.generator) < ignored
        return self.tag(torch.where(drop, ignore_index, x), "labels")

    def valid(self, share: float = 0.8) -> Tensor:
        return self.tag(torch.rand(self.n, self.h, self.w, generator=self.generator) < share, "valid")

    def mask(self, share: float = 0.5) -> Tensor:
        return self.tag(torch.rand(self.n, self.h, self.w, generator=self.generator) < share, "mask")

    def weight(self) -> Tensor:
        x = torch.rand(self.n, self.h, self.w, generator=self.generator, dtype=torch.float64)
        return self.tag(x.to(self.dtype), "weight")

    def class_values(self) -> Tensor:
        x = torch.rand(self.c, generator=self.generator, dtype=torch.float64)
        return self.tag(x.to(self.dtype), "class_values")

    def class_vectors(self) -> Tensor:
        return self.tag(self.normal(self.c, self.d), "class_vectors")


@dataclass
class Call:
    """One call: positional tensors, keyword tensors, keyword options (Python values, hashable or plain)."""

    args: tuple[Any, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.tensors, **self.options)


@dataclass(frozen=True)
class Operation:
    """One public operation.

    name: public name of the function (or of the Module where there is no function), importable from `udakit`.
    example: makes the call. It must use every tensor argument (an optional `valid` or `pixel_weight`, too).
    function: what is called; for stateful Modules a small wrapper that builds the Module and applies it.
    module: the Module class, checked against the function: `module(**options)(*args, **tensors)` == function call.
        None with an exemption "module" where there is none.
    module_options: options of the constructor, where they are not simply `call.options`.
    covers: further public names that this entry proves (the Module, a NamedTuple).
    kind: "loss" (float result, differentiable in `grad`), "map" (tensors to tensors), "draw" (random), "state".
        An operation whose signature has `generator` (whatever its kind) is given a freshly seeded one at every call,
        and None where it is compiled or run on fake tensors: an example makes no generator itself.
    grad: positions in `args` that gradients flow to; `()` for an operation that detaches, or has no float input.
    space: "pixel" for what looks at single pixels: in signals and volumes it gives what it gives on the flattened map.
        "two" for what is two-dimensional by nature, and refuses the others by name. "none" for what takes no map, or
        hands it to a net of the user's. Else the test, "test_file.py::test_name", that holds it to a textbook version
        in one, two and three dimensions.
    wrong: options of the function or Module to values that they must refuse, beside or in place of those of
        `wrong_options.py`; an empty tuple leaves the option out, with the reason in a comment.
    makes: whether the public function takes the options alone, and what it returns takes the tensors.
    output: the role of the output (or of each tensor of a tuple, in order; None and nesting are left out), for the
        permutation checks. "other" is not compared.
    exempt: name of a check, or "<check>.<part>" (see PARTS), to the reason why it cannot apply.
    build: stateful operations whose wrapper makes a Module: what `function` does, split for `torch.compile`, which
        shall compile the use and not the making: `build(call)` returns a fresh callable taking `call`'s arguments.

    A wrapper that makes a stateful Module does so on the input's device, without a copy: `with x.device: Module(...)`.
    """

    name: str
    example: Callable[[Sample], Call]
    function: Callable[..., Any]
    module: type[nn.Module] | None = None
    module_options: Callable[[Call], dict[str, Any]] | None = None
    covers: tuple[str, ...] = ()
    kind: Literal["loss", "map", "draw", "state"] = "loss"
    grad: tuple[int, ...] = (0,)
    output: Role | tuple[Role, ...] = "scalar"
    space: str = "pixel"
    wrong: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    makes: bool = False
    exempt: dict[str, str] = field(default_factory=dict)
    # The inductor backend takes seconds each: a handful of operations ask for it.
    inductor: bool = False
    build: Callable[[Call], Callable[..., Any]] | None = None


@cache
def all_operations() -> tuple[Operation, ...]:
    operations: list[Operation] = []
    for family in FAMILIES:
        operations += importlib.import_module(f"contract.ops_{family}").OPERATIONS
    return tuple(operations)
