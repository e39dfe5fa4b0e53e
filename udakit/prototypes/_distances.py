"""Distances of pixels to centres."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit._reduce import first_derivative_only, full_precision, is_run_on_cpu, learns, refuse_transforms, upcast

SMALL = 2**16  # up to this many numbers, the calls of a CPU take longer than the memory of whole maps


def class_distances(values: Tensor, centres: Tensor, square: Tensor) -> Tensor:
    """L2 distances (N, C, P) of pixels (N, D, P) to centres (C, D), computed in the dtype of the centres.

    `square` (C, 1) is the squared norm of each centre, or +inf for a centre at an infinite distance.
    """
    refuse_transforms(values, vmap=True)
    if not learns(values):
        return _all_distances(values, centres, square)
    distance: Tensor = _Distances.apply(values, centres, square)
    return distance


def _all_distances(values: Tensor, centres: Tensor, square: Tensor) -> Tensor:
    with full_precision(values):
        if in_pieces(values):
            return _distances_in_pieces(values, centres, square)
        return _joined([_distances(x, centres, square) for x in _batches(values)])


class _Distances(torch.autograd.Function):
    """Distances and their gradient, written by hand to store only the inputs and the result.

    A CPU works in pieces that stay in its cache and share one buffer: allocating a megabyte for each piece can take
    longer than the arithmetic. Other devices use as few kernels as possible.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, centres: Tensor, square: Tensor) -> Tensor:
        result = _all_distances(values, centres, square)
        ctx.save_for_backward(values, centres, result)
        return result

    @staticmethod
    @first_derivative_only("distances to prototypes")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        values, centres, distance = ctx.saved_tensors
        with full_precision(values):
            if in_pieces(values):
                return _slopes_in_pieces(values, centres, distance, gradient), None, None
            parts = zip(*(_batches(x, values.shape[1]) for x in (values, distance, gradient)), strict=True)
            return _joined([_slopes(x, centres, d, g) for x, d, g in parts]), None, None


def in_pieces(values: Tensor) -> bool:
    """Whether to work in pieces that fit the cache of a CPU: unless the map is small."""
    return values.numel() > SMALL and is_run_on_cpu(values)


def _blocks(values: Tensor) -> tuple[int, int, Iterator[tuple[int, slice, list[slice]]]]:
    """Columns in a block of (N, D, P) and in a piece; and image, columns, and pieces (counted from the block) of each.

    A piece of pixels fits the cache. A block of their distances, which are fewer, fits it too, and saves calls.
    """
    n, d, pixels = values.shape
    step = max(1, min(2**17 // max(d, 1), pixels))
    block = min(8 * step, pixels)
    starts = ((k, i, min(block, pixels - i)) for k in range(n) for i in range(0, pixels, block))
    parts = (
        (k, slice(i, i + size), [slice(j, min(j + step, size)) for j in range(0, size, step)]) for k, i, size in starts
    )
    return block, step, parts


def _distances_in_pieces(values: Tensor, centres: Tensor, square: Tensor) -> Tensor:
    n, d, pixels = values.shape
    block, step, parts = _blocks(values)
    classes = len(centres)
    result = torch.empty(n, classes, pixels, dtype=upcast(values[:0]).dtype, device=values.device)
    twice = F.pad(-2 * centres, (0, 0, 0, -classes % 4))  # the product takes four rows at a time
    wide, squared, norms = (centres.new_empty(*size) for size in ((d, step), (len(twice), block), (1, block)))
    for k, at, own in parts:
        y, size = values[k, :, at], at.stop - at.start
        for piece in own:
            x = wide[:, : piece.stop - piece.start].copy_(y[:, piece])
            torch.mm(twice, x, out=squared[:, piece])
            torch.sum(x.square_(), 0, keepdim=True, out=norms[:, piece])
        distance = squared[:classes, :size].add_(square).add_(norms[:, :size])
        result[k, :, at] = distance.clamp_min_(0).sqrt_()
    return result


def _slopes_in_pieces(values: Tensor, centres: Tensor, distance: Tensor, gradient: Tensor) -> Tensor:
    block, step, parts = _blocks(values)
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    sizes = ((values.shape[1], step), (len(centres), block), (1, block))
    wide, slopes, totals = (centres.new_empty(*size) for size in sizes)
    flat = torch.empty(len(centres), block, dtype=torch.bool, device=values.device)
    for k, at, own in parts:
        size = at.stop - at.start
        slope, total, zero = slopes[:, :size], totals[:, :size], flat[:, :size]
        apart = distance[k, :, at]
        torch.eq(apart, 0, out=zero)
        torch.div(gradient[k, :, at], apart, out=slope).masked_fill_(zero, 0)
        torch.sum(slope, 0, keepdim=True, out=total)
        y, out = values[k, :, at], result[k, :, at]
        for piece in own:
            x = wide[:, : piece.stop - piece.start].copy_(y[:, piece])
            out[:, piece] = x.mul_(total[:, piece]).addmm_(centres.T, slope[:, piece], alpha=-1)
    return result


def _batches(x: Tensor, dim: int | None = None) -> tuple[Tensor, ...]:
    """Images (N, ., P) in groups, which limits the memory for maps in the dtype of the centres."""
    return torch.split(x, max(1, 2**26 // max(1, (dim or x.shape[1]) * x.shape[2])))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _distances(values: Tensor, centres: Tensor, square: Tensor) -> Tensor:
    centres_of = centres.expand(len(values), -1, -1)
    squared = torch.baddbmm(square, centres_of, values.to(centres.dtype), alpha=-2)
    # The norm reads the original values: squares of the wide ones would need one more map.
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True, dtype=centres.dtype)
    return squared.addcmul_(norm, norm).clamp_min_(0).sqrt_().to(upcast(values[:0]).dtype)


def _slopes(values: Tensor, centres: Tensor, distance: Tensor, gradient: Tensor) -> Tensor:
    # The gradient is 0 where the distance is 0, because the square root has no slope there.
    slope = torch.where(distance == 0, 0, gradient / distance).to(centres.dtype)
    pulled = values * slope.sum(1, keepdim=True)
    return pulled.baddbmm_(centres.T.expand(len(values), -1, -1), slope, alpha=-1).to(values.dtype)
