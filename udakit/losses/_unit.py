"""Lengths and directions of embeddings of any magnitude: in float32 1e-23 squared is 0 and 1e20 squared inf.

Written out with their gradients: one map is kept for the backward pass, where the formula's own graph keeps three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lengths(x: Tensor) -> Tensor:
    """|x| over axis 1, which stays; the zero vector has gradient 0."""
    length: Tensor = _Lengths.apply(x)
    return length


def unit_vectors(x: Tensor) -> Tensor:
    """X / |x| over axis 1, and 0 with zero gradient for the zero vector."""
    unit: Tensor = _UnitVectors.apply(x)[0]
    return unit


def _scale(magnitude: Tensor) -> Tensor:
    """The largest of axis 1, 1 where all is 0: what to divide by before squaring."""
    largest = magnitude.amax(1, keepdim=True)
    return torch.where(largest == 0, 1, largest)


def _inverse(length: Tensor) -> Tensor:
    zero = length == 0
    return ~zero / torch.where(zero, 1, length)


class _Lengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        magnitude = x.abs()
        scale = _scale(magnitude)
        length = scale * magnitude.div_(scale).square_().sum(1, keepdim=True).sqrt_()
        ctx.save_for_backward(x, length)
        return length

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, length = ctx.saved_tensors
        gradient: Tensor = x * (grad * _inverse(length))
        return gradient


class _UnitVectors(torch.autograd.Function):
    """Returns the length as well, so that a second derivative reaches x through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scratch = x.abs()
        scale = _scale(scratch)
        scaled = x / scale
        with torch.no_grad():  # torch.compile of torch 2.5 traces gradients here, which `out=` refuses
            norm = torch.mul(scaled, scaled, out=scratch).sum(1, keepdim=True).sqrt_()
        unit, length = scaled.mul_(_inverse(norm)), (scale * norm).clamp_max_(torch.finfo(x.dtype).max)
        ctx.save_for_backward(unit, length)
        return unit, length

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_length: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (unit * grad).sum(1, keepdim=True) - grad_length * length
        gradient: Tensor = (grad - unit * along) * _inverse(length)
        return gradient
