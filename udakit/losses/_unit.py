"""Lengths and directions of embeddings of any magnitude: in float32 1e-23 squared is 0 and 1e20 squared inf.

Vectors are divided by their largest entry before they are squared. A CPU first takes plain squares, in half the passes,
and looks whether their sums lost anything.

The gradients are written by hand, so one map is kept for the backward pass, where autograd would keep three. On the
CPU, large maps are processed in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from udakit._reduce import is_batched, is_large, learns, may_look, refuse_transforms, select, zero_where_not_

BLOCK = 2**20  # numbers of a piece: fewer would make short rows


def lengths(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """|x| over axis 1, which is kept. Zero vectors and pixels that are not `valid` have gradient 0."""
    refuse_transforms(x, vmap=True)
    if not learns(x):
        return _length(x)
    length: Tensor = _Lengths.apply(x, valid)
    return length


def unit_vectors(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """X / |x| over axis 1. Zero vectors and pixels that are not `valid`, even NaN ones, give 0 with zero gradient."""
    refuse_transforms(x, vmap=True)
    if not learns(x):
        return _unit_and_length(x, valid, needs_length=False)[0]
    unit: Tensor = _UnitVectors.apply(x, valid)[0]
    return unit


def _scale(magnitude: Tensor) -> Tensor:
    """The largest entry of axis 1, but not 0: the divisor before squaring."""
    return magnitude.amax(1, keepdim=True).clamp_min(torch.finfo(magnitude.dtype).tiny)


def _inverse(length: Tensor) -> Tensor:
    """1 / length, and 0 for 0 and the subnormal numbers above it, where infinity times 0 would be NaN."""
    return torch.where(length < torch.finfo(length.dtype).tiny, torch.inf, length).reciprocal()


def _in_pieces(x: Tensor) -> bool:
    return x.ndim > 2 and is_large(x, 2)


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Places in (N, D, P): one image, all channels, some pixels."""
    step = max(BLOCK // max(x.shape[1], 1), 1)
    for k in range(len(x)):
        for i in range(0, x.shape[2], step):
            yield slice(k, k + 1), slice(None), slice(i, i + step)


def _flat(*maps: Tensor) -> list[Tensor]:
    return [x.flatten(2) for x in maps]


def _masks(x: Tensor, valid: Tensor | None) -> Tensor | None:
    """`valid` over the pixels of (N, D, P), to be cut in the same way."""
    return None if valid is None else valid.flatten(1).unsqueeze(1)


def _plain_squares(x: Tensor, out: Tensor | None) -> Tensor:
    """Sums over axis 1 of the squares; `out` is the memory for these."""
    return torch.mul(x, x, out=out).sum(1, keepdim=True)


def _are_exact(sums: Tensor) -> bool:
    """Whether no sum of squares lost a small one by underflow, overflowed, or is NaN."""
    low, high = torch.aminmax(sums)
    limits = torch.finfo(sums.dtype)
    return limits.tiny / limits.eps**2 <= float(low) and float(high) < torch.inf


class _Lengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None) -> Tensor:
        length = _length(x)
        ctx.save_for_backward(x, length, valid)
        return length

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, length, valid = ctx.saved_tensors
        factor = grad * _inverse(length)
        if torch.is_grad_enabled() or not _in_pieces(x):
            gradient: Tensor = x * factor
            if valid is None:
                return gradient, None
            # create_graph=True: the gradient has a derivative, and is not to be changed.
            hide = select if torch.is_grad_enabled() or torch.compiler.is_compiling() else zero_where_not_
            return hide(valid.unsqueeze(1), gradient), None
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        result, flat, factor = _flat(gradient, x, factor)
        mask = _masks(flat, valid)
        for at in _pieces(flat):
            torch.mul(flat[at], factor[at], out=result[at])
            if mask is not None:
                zero_where_not_(mask[at], result[at])
        return gradient, None


def _length(x: Tensor) -> Tensor:
    """|x| over axis 1, which is kept."""
    if not _in_pieces(x):
        return _whole_length(x, None)
    length = x.new_empty((len(x), 1, *x.shape[2:]))
    flat, result = _flat(x, length)
    scratch = x.new_empty((1, x.shape[1], max(BLOCK // x.shape[1], 1)))
    for at in _pieces(flat):
        part = flat[at]
        result[at] = _whole_length(part, scratch[:, :, : part.shape[2]])
    return length


def _whole_length(x: Tensor, scratch: Tensor | None) -> Tensor:
    if may_look(x) and _are_exact(sums := _plain_squares(x, scratch)):
        return sums.sqrt_()
    magnitude = x.abs() if scratch is None else torch.abs(x, out=scratch)
    scale = _scale(magnitude)
    return scale * magnitude.div_(scale).square_().sum(1, keepdim=True).sqrt_()


class _UnitVectors(torch.autograd.Function):
    """Returns the length as well, so that a second derivative reaches x through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        unit, length = _unit_and_length(x, valid)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(unit, length)
        return unit, length

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_length: Tensor | None) -> tuple[Tensor, None]:
        unit, length = ctx.saved_tensors
        grad = torch.zeros_like(unit) if grad is None else grad
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or grad_length is not None or is_batched(grad):
            along = (unit * grad).sum(1, keepdim=True)
            along = along if grad_length is None else along - grad_length * length
            gradient: Tensor = (grad - unit * along) * _inverse(length)
            return gradient, None
        if not _in_pieces(unit):
            return _slope(unit, grad, _inverse(length), None), None
        gradient = torch.empty_like(unit)
        result, units, grad, inverse = _flat(gradient, unit, grad, _inverse(length))
        for at in _pieces(units):
            _slope(units[at], grad[at], inverse[at], result[at])
        return gradient, None


def _slope(unit: Tensor, grad: Tensor, inverse: Tensor, out: Tensor | None) -> Tensor:
    """The part of `grad` across the unit vectors, divided by the lengths."""
    own = torch.mul(unit, grad, out=out)
    pull = own.sum(1, keepdim=True)
    return torch.addcmul(grad, unit, pull, value=-1, out=own).mul_(inverse)


def _unit_and_length(x: Tensor, valid: Tensor | None, *, needs_length: bool = True) -> tuple[Tensor, Tensor]:
    """X / |x|, and |x| (anything, unless it is needed)."""
    if not _in_pieces(x):
        mask = None if valid is None else valid.unsqueeze(1)
        quick = _quick_direction(x, mask, None) if may_look(x) else None
        return quick or _scaled_direction(x if mask is None else select(mask, x), needs_length)
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    length = x.new_empty((len(x), 1, *x.shape[2:]))
    flat, units, norms = _flat(x, unit, length)
    masks = _masks(flat, valid)
    scratch: Tensor | None = None
    for at in _pieces(flat):
        part, own, mask = flat[at], units[at], None if masks is None else masks[at]
        quick = _quick_direction(part, mask, own) if may_look(part) else None
        if quick is not None:
            norms[at] = quick[1]
            continue
        if mask is not None:
            part = zero_where_not_(mask, own.copy_(part))
        if scratch is None:
            scratch = x.new_empty((1, x.shape[1], max(BLOCK // x.shape[1], 1)))
        _direction(part, own, norms[at], scratch[:, :, : part.shape[2]])
    return unit, length


def _quick_direction(x: Tensor, mask: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """X / |x| and |x| by plain squares, 0 where the mask is False; None where a pixel that counts needs a scale."""
    squares = torch.mul(x, x, out=out)
    sums = squares.sum(1, keepdim=True)
    finite = mask is None or bool(sums.amax() < torch.inf)
    if mask is not None:
        sums = torch.where(mask, sums, 1)
    if not _are_exact(sums):
        return None
    inverse = sums.rsqrt()
    length = sums.sqrt_()
    if mask is not None:
        inverse, length = inverse.mul_(mask), length.mul_(mask)
    unit = torch.mul(x, inverse, out=squares)
    if mask is not None and not finite:  # 0 times NaN
        unit = zero_where_not_(mask, unit)
    return unit, length


def _scaled_direction(x: Tensor, needs_length: bool) -> tuple[Tensor, Tensor]:
    """X / |x| and |x| of any magnitude."""
    scratch = x.abs()
    scale = _scale(scratch)
    unit = x / scale
    with torch.no_grad():  # torch.compile of torch 2.5 traces gradients here, and `unit` changes below
        # Channels-last images after others make a compiled `out=` fail.
        squares = unit.square() if torch.compiler.is_compiling() else torch.mul(unit, unit, out=scratch)
        norm = squares.sum(1, keepdim=True).sqrt_()
    unit.mul_(_inverse(norm))
    return unit, (scale * norm).clamp_max_(torch.finfo(x.dtype).max) if needs_length else norm


def _direction(x: Tensor, unit: Tensor, length: Tensor, scratch: Tensor) -> None:
    """Write x / |x| and |x| of a piece; `x` may be `unit`."""
    scale = _scale(torch.abs(x, out=scratch))
    torch.div(x, scale, out=unit)
    norm = torch.mul(unit, unit, out=scratch).sum(1, keepdim=True).sqrt_()
    unit.mul_(_inverse(norm))
    torch.mul(scale, norm, out=length).clamp_max_(torch.finfo(x.dtype).max)
