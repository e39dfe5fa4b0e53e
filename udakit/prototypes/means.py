"""The mean feature of each class."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from udakit._checks import check_flag, check_ignore_index, check_integer, check_labels_like, check_maps
from udakit._reduce import (
    class_ids,
    cut_evenly,
    full_precision,
    is_run_on_cpu,
    learns,
    may_look,
    plain,
    refuse_transforms,
    select,
    upcast,
)

__all__ = ["class_means"]


def class_means(
    features: Float[Tensor, "n d *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    num_classes: int,
    per_image: bool = False,
    min_pixels: int = 1,
    ignore_index: int = 255,
) -> tuple[Float[Tensor, "*n c d"], Int64[Tensor, "*n c"]]:
    r"""Mean feature of each class, over the batch or per image.

    $$v_c = \frac{1}{|P_c|} \sum_{p \in P_c} f_p, \qquad P_c = \{p : y_p = c\}$$

    **Convention.** Sums use at least float32. Ignored pixels and ids outside 0..C-1 are left out, even if their
    features are NaN. A class with fewer than `min_pixels` pixels has the mean 0 and no gradient, but its true count.
    Gradients flow to the features.

    **Source.** DiGA requires 5 pixels of a class in an image.

    Args:
        features: features, (N, D, *space), in any float dtype.
        labels: class ids, (N, *space), at the size of the features; resize them with `udakit.downscale_labels` or
            `udakit.resize_labels`.
        num_classes: C, the number of classes.
        per_image: whether to return the means of each image instead of those of the batch.
        min_pixels: smallest number of pixels for a mean.
        ignore_index: the label of the pixels to ignore.

    Returns:
        The means (C, D) and the pixel counts (C,), or with `per_image` (N, C, D) and (N, C).

    Raises:
        TypeError: `features` is not a float tensor, or `labels` is neither int64 nor uint8.
        ValueError: the sizes do not match, or `num_classes` or `min_pixels` is below 1.

    Example:
        >>> import torch
        >>> features = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 1, 3).requires_grad_()
        >>> means, counts = class_means(features, torch.tensor([[[0, 0, 255]]]), num_classes=2)
        >>> means.sum().backward()
        >>> means.flatten().tolist(), counts.tolist(), features.grad.flatten().tolist()
        ([2.0, 0.0], [2, 0], [0.5, 0.5, 0.0])
    """
    check_integer("num_classes", num_classes)
    check_integer("min_pixels", min_pixels)
    check_flag("per_image", per_image)
    check_ignore_index(ignore_index, num_classes)
    check_maps("features", features, "N, D")
    check_labels_like(labels, features, reference_name="features")
    sums, counts = class_sums(features, labels, num_classes, ignore_index)
    if not per_image:
        sums, counts = sums.sum(0), counts.sum(0)
    return means_of(sums, counts, min_pixels), counts


def class_sums(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sums (N, C, D) and counts (N, C)."""
    features, labels = plain(features), plain(labels)
    ids = class_ids(labels, num_classes, ignore_index).flatten(1)
    counts = ids.new_zeros(len(ids), num_classes + 1).scatter_add_(1, ids, torch.ones_like(ids))
    refuse_transforms(features, vmap=True)
    values = features.flatten(2)
    sums: Tensor = _SumMembers.apply(values, ids, num_classes) if learns(values) else _sums(values, ids, num_classes)
    return sums, counts[:, :num_classes]


class _SumMembers(torch.autograd.Function):
    """Sums (N, C, D) of the pixels (N, D, P) of each class, in float32 at least; `ids` (N, P) are C for no class.

    The backward pass is written by hand to stay in full precision under autocast, and to store ids instead of a one-hot
    map.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.dtype = values.dtype
        ctx.by_pixel, ctx.channels_last = _by_pixel(values), _channels_last(values)
        return _sums(values, ids, num_classes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        rows = F.pad(gradient, (0, 0, 0, 1)).to(ctx.dtype)
        if ctx.by_pixel and ctx.channels_last and not torch.is_grad_enabled():
            result = rows.new_empty(*ids.shape, rows.shape[2])
            for own, row, k in zip(result, rows, ids, strict=True):
                torch.index_select(row, 0, k, out=own)
            return result.transpose(1, 2), None, None
        rows = rows.transpose(1, 2).contiguous()
        if ctx.by_pixel and not torch.is_grad_enabled():
            result = rows.new_empty(*rows.shape[:2], ids.shape[1])
            # A CPU selects numbers of two bytes four times as slowly as it selects and rounds float32.
            room = result.new_empty(result.shape[1:], dtype=torch.float32) if rows.dtype.itemsize < 4 else None
            for own, row, k in zip(result, upcast(rows), ids.int(), strict=True):  # which `gather` refuses
                chosen = torch.index_select(row, 1, k, out=own if room is None else room)
                if room is not None:
                    own.copy_(chosen)
            return result, None, None
        if torch.compiler.is_compiling() and rows.device.type == "cpu":
            _, d, c = rows.shape  # a table in memory, not its arithmetic at every pixel
            rows = rows.as_strided(rows.shape, (d * c, c, 1))
        return rows.gather(2, ids.unsqueeze(1).expand(-1, rows.shape[1], -1)), None, None


def _by_pixel(values: Tensor) -> bool:
    return values.shape[2] >= LANES * 128 and is_run_on_cpu(values)


def _channels_last(values: Tensor) -> bool:
    return values.stride(1) == 1 < min(values.shape[1], values.stride(2))


def _sums(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    if not _by_pixel(values):
        return _sums_by_product(upcast(values), ids, num_classes)
    if _channels_last(values):
        return _sums_by_row(upcast(values), ids, num_classes)
    sums = _sums_if_finite(values, ids, num_classes) if num_classes <= FEW and may_look(values) else None
    return _sums_by_pixel(upcast(values), ids, num_classes) if sums is None else sums


LANES, LENGTH = 8, 1024  # number of parallel sums, and largest number of summands of each, except for remainders
FEW = 32  # up to this many classes, a product takes less time than an addition for each number


def _sums_if_finite(values: Tensor, ids: Tensor, num_classes: int) -> Tensor | None:
    """The product as it is, in pieces of pixels; None where it is not finite, which may come from no class at all."""
    n, d, pixels = values.shape
    step = min(LENGTH, pixels)
    sums = values.new_empty(n, -(-pixels // step), d, num_classes + 1, dtype=upcast(values[:0]).dtype)
    one_hot = sums.new_empty(step, num_classes + 1)
    with full_precision(values):
        for own, x, k in zip(sums, values, ids, strict=True):
            for i, out in zip(range(0, pixels, step), own, strict=True):
                part = one_hot[: min(step, pixels - i)].zero_()
                torch.mm(x[:, i : i + step].to(out.dtype), part.scatter_(1, k[i : i + step, None], 1), out=out)
    total = sums.sum(1)
    return total[:, :, :num_classes].transpose(1, 2) if math.isfinite(float(total.abs().sum())) else None


def _sums_by_pixel(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """One addition for each number, for the CPU. Pixels without a class, even NaN ones, go to a sum of their own.

    Neighbouring pixels usually have the same class, and each addition would wait for the one before. The pixels
    therefore take turns among `lanes` sums of a class. Short sums are also more accurate than the matrix product.
    """
    n, d, _ = values.shape
    lanes, places = _places(ids, num_classes)
    sums = values.new_zeros(n, d, lanes * (num_classes + 1))
    sums.scatter_add_(2, places.unsqueeze(1).expand(-1, d, -1), values)
    return sums.view(n, d, lanes, num_classes + 1).sum(2)[:, :, :num_classes].transpose(1, 2)


def _sums_by_row(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """The same for channels last: a pixel is a row of D numbers, which are added at once."""
    n, d, _ = values.shape
    lanes, places = _places(ids, num_classes)
    sums = values.new_zeros(n, lanes * (num_classes + 1), d)
    for own, place, rows in zip(sums, places, values.transpose(1, 2), strict=True):
        own.index_add_(0, place, rows)
    return sums.view(n, lanes, num_classes + 1, d).sum(1)[:, :num_classes]


def _places(ids: Tensor, num_classes: int) -> tuple[int, Tensor]:
    """The number of lanes, and the sum that each pixel belongs to."""
    pixels = ids.shape[1]
    lanes = max(LANES, 1 << (pixels // LENGTH - 1).bit_length())
    return lanes, ids + torch.arange(pixels, device=ids.device) % lanes * (num_classes + 1)


def _sums_by_product(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """The one-hot matrix product reads the features once, whatever C is.

    Pixels without a class are set to 0 before, because 0 times NaN would make every class NaN. A GPU has a block of
    threads for each small result, and would leave a long sum to a single one: the pixels are cut into several sums.
    Compiled for a CPU, they are not: copying the values into parts would take longer than it saves.
    """
    n, d, pixels = values.shape
    whole = values.device.type == "cpu" and torch.compiler.is_compiling()
    parts, more = (1, 0) if whole else cut_evenly(pixels, LENGTH)
    if more:
        values, ids, pixels = F.pad(values, (0, more)), F.pad(ids, (0, more), value=num_classes), pixels + more
    known = (ids < num_classes).unsqueeze(1)
    if parts == 1:
        members = select(known, values)
    else:
        ids = ids.reshape(n * parts, pixels // parts)
        members = _known_in_parts(values, known, parts)
    with full_precision(values):
        sums = torch.bmm(_one_hot(ids, num_classes, values.dtype), members.transpose(1, 2))
    return (sums if parts == 1 else sums.view(n, parts, -1, d).sum(1))[:, :num_classes]


def _known_in_parts(values: Tensor, known: Tensor, parts: int) -> Tensor:
    """`values` (N, D, P), 0 where not `known` (N, 1, P), as (N parts, D, P / parts), in a single pass."""
    n, d, pixels = values.shape
    cut = (parts, pixels // parts)
    known, values = (torch.unflatten(x, 2, cut).transpose(1, 2) for x in (known, values))
    if torch.compiler.is_compiling():  # a compiler writes where it likes, and cannot trace this `out`
        return torch.where(known, values, 0).reshape(n * parts, d, cut[1])
    result = values.new_empty(n, parts, d, cut[1])
    torch.where(known, values, torch.zeros((), dtype=values.dtype, device=values.device), out=result)
    return result.view(n * parts, d, cut[1])


def _one_hot(ids: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(N, C + 1, P) of ids (N, P)."""
    n, pixels = ids.shape
    rows = torch.zeros(n, num_classes + 1, pixels, dtype=dtype, device=ids.device)
    return rows.scatter_(1, ids.unsqueeze(1), 1)


def means_of(sums: Tensor, counts: Tensor, min_pixels: int) -> Tensor:
    counts = counts.unsqueeze(-1)
    return torch.where(counts < min_pixels, 0, sums / counts.clamp_min(1))
