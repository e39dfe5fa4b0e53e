"""Shared state of parts that keep vectors of each class and count what they have seen."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from udakit._checks import (
    check_device,
    check_float,
    check_ignore_index,
    check_integer,
    check_maps,
    check_tensor,
    kind_of,
    shape_of,
    space_form,
)
from udakit._state import FullPrecisionState


class ClassState(FullPrecisionState):
    """Named buffers (C, D), which start at 0, and `counts` (C,)."""

    counts: Tensor

    def __init__(self, num_classes: int, dim: int, ignore_index: int, names: tuple[str, ...]) -> None:
        super().__init__()
        check_integer("num_classes", num_classes)
        check_integer("dim", dim)
        check_ignore_index(ignore_index, num_classes)
        self.num_classes, self.dim, self.ignore_index = num_classes, dim, ignore_index
        self._names = names
        for name in names:
            self.register_buffer(name, torch.zeros(num_classes, dim, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def seen(self) -> Bool[Tensor, "c"]:
        """The classes that have been seen, bool (C,)."""
        return self.counts > 0

    def _check(self, features: Tensor) -> None:
        check_maps("features", features, "N, D")
        if features.shape[1] != self.dim:
            form = f"{space_form('N, D', features.ndim - 2)} with D = {self.dim}"
            raise ValueError(f"Expected `features` to be {form}, but got {shape_of(features)}.")
        check_device("features", features, getattr(self, self._names[0]), self._names[0])

    def _take(self, given: Tensor | None, **vectors: Tensor) -> None:
        """Copy given vectors and counts (None: 0) into the buffers; raise if their kind, shape or sign is wrong."""
        shape = (self.num_classes, self.dim)
        for name, x in vectors.items():
            check_float(name, x)
            if x.shape != shape:
                raise ValueError(f"Expected `{name}` to be (C, D) = {shape}, but got {shape_of(x)}.")
        counts = torch.zeros_like(self.counts) if given is None else given
        check_tensor("counts", counts, "an integer tensor")
        if counts.is_floating_point() or counts.dtype == torch.bool:
            raise TypeError(f"Expected `counts` to be an integer tensor, but got {kind_of(counts)}.")
        if counts.shape != self.counts.shape:
            raise ValueError(f"Expected `counts` to be (C,) = {shape_of(self.counts)}, but got {shape_of(counts)}.")
        for kind, numbers in {"variances": vectors.get("variances"), "counts": given}.items():
            # Nobody waits on a CPU for the value read here. On a GPU, negative numbers are taken as they are.
            if numbers is not None and numbers.device.type == "cpu" and bool((numbers < 0).any()):
                raise ValueError(f"Expected `{kind}` to have no negative numbers, but got {float(numbers.amin()):g}.")
        with torch.no_grad():
            for name, x in vectors.items():
                getattr(self, name).copy_(x)
            self.counts.copy_(counts)


def finite_rows(x: Tensor) -> Tensor:
    """Whether all numbers of a row (..., D) are finite, in three launches: 0 times anything else is NaN."""
    return x.mul(0).sum(-1) == 0
