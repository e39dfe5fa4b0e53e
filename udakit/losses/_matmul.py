"""Matrix products in full precision, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from udakit._reduce import full_precision, is_transformed, learns


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A @ b of one batch shape, untouched by autocast, even by one that is still on during backward."""
    if is_transformed():
        return torch.matmul(a, b)
    if not (learns(a) or learns(b)):
        return _product(a, b)
    product: Tensor = _MatMul.apply(a, b)
    return product


def _product(a: Tensor, b: Tensor) -> Tensor:
    with full_precision(a):
        return torch.matmul(a, b)


class _MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with full_precision(gradient):
            return (
                torch.matmul(gradient, b.mT) if ctx.needs_input_grad[0] else None,
                torch.matmul(a.mT, gradient) if ctx.needs_input_grad[1] else None,
            )
