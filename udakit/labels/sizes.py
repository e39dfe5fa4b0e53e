"""Resize label maps without inventing a class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Integer
from torch import Tensor

from udakit._checks import (
    axis_hint,
    check_ignore_index,
    check_integer,
    check_label_map,
    check_range,
    check_size,
    check_spatial,
    is_sequence,
    shape_of,
)
from udakit._reduce import class_ids
from udakit.labels.ids import check_integer_labels


def downscale_labels(
    labels: Integer[Tensor, "n *space"],
    factor: int,
    *,
    num_classes: int,
    min_ratio: float = 0.75,
    ignore_index: int = 255,
) -> Integer[Tensor, "n *space2"]:
    """Downscale labels to the size of features: each cell gets its most frequent label, if that is frequent enough.

    **Convention.** Ignored pixels (and ids outside 0..C-1) are counted, too: a cell in which they are the most frequent
    is ignored. Ignored pixels lose ties, and a tie between two classes goes to the lower id. A cell is also ignored if
    its most frequent label covers less than `min_ratio` of it. No one-hot map is made, only C + 1 counts for each cell.
    In volumes a cell is a cube, and in signals an interval.

    **Source.** DAFormer and SePiCo, with ratio 0.75.

    Args:
        labels: class ids 0..C-1 or `ignore_index`, int64 or uint8.
        factor: side of a cell in pixels, which is the stride of the features along every axis.
        num_classes: C, the number of classes.
        min_ratio: smallest fraction of a cell that its most frequent label must cover, in [0, 1].
        ignore_index: the label of ignored pixels, and of cells without a frequent enough label.

    Returns:
        The labels of the cells, with the dtype of `labels`.

    Raises:
        TypeError: `labels` is neither int64 nor uint8.
        ValueError: `factor` does not divide a side, or an option is out of range.

    Example:
        >>> downscale_labels(torch.tensor([[[1, 1, 0, 2], [1, 2, 0, 255]]]), 2, num_classes=3)
        tensor([[[  1, 255]]])
    """
    check_label_map(labels)
    check_integer("factor", factor)
    check_integer("num_classes", num_classes)
    check_ignore_index(ignore_index, num_classes)
    check_range("min_ratio", min_ratio, 0, 1)
    if labels.dtype == torch.uint8:
        check_range("ignore_index", ignore_index, 0, 255)
    n, *space = labels.shape
    if any(side % factor for side in space):
        hint = axis_hint(labels) if labels.shape[1] == 1 else f" Crop or pad to a multiple of {factor}."
        raise ValueError(
            f"Expected `labels` to have sides that `factor` {factor} divides, but got {shape_of(labels)}.{hint}"
        )
    cells = [side // factor for side in space]
    axes = len(space)
    split = labels.reshape(n, *(part for side in cells for part in (side, factor)))
    inside, between = range(2, 2 * axes + 1, 2), range(1, 2 * axes, 2)
    ids = class_ids(split.permute(0, *inside, *between).reshape(n, factor**axes, *cells), num_classes, ignore_index)
    counts = ids.new_zeros((n, num_classes + 1, *cells), dtype=torch.int32)
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int32))
    winner = counts.argmax(dim=1)  # ties go to the lowest id, and ignored pixels come last
    share = counts.gather(1, winner[:, None])[:, 0]
    enough = math.ceil(min_ratio * factor**axes - 1e-9)  # in whole pixels, so that rounding does not matter
    kept = (winner < num_classes) & (share >= enough)
    return torch.where(kept, winner, ignore_index).to(labels.dtype)


def resize_labels(labels: Integer[Tensor, "n *space"], size: Sequence[int]) -> Integer[Tensor, "n *space2"]:
    """Resize labels by nearest-neighbour interpolation, with exactly the pixels of `F.interpolate(mode="nearest")`.

    **Convention.** Labels never pass through float, so large ids such as 26001 are exact, and the dtype stays.

    Args:
        labels: ids, (N, *space), in any integer dtype.
        size: the new size, (H, W); (L,) for signals and (D, H, W) for volumes.

    Returns:
        The labels, (N, *size).

    Raises:
        TypeError: `labels` are not integers.
        ValueError: `labels` are not (N, *space) or have no pixels, or `size` does not have a positive number for each
            axis.

    Example:
        >>> resize_labels(torch.tensor([[[1, 26001]]]), (2, 4))
        tensor([[[    1,     1, 26001, 26001],
                 [    1,     1, 26001, 26001]]])
    """
    check_integer_labels(labels)
    check_spatial("labels", labels)
    single = is_sequence(size) and len(size) == labels.ndim
    hint = " For a single map, add the batch axis with .unsqueeze(0)." if single else ""
    check_size("size", size, labels.ndim - 1, labels=labels, hint=hint)
    if 0 in labels.shape[1:]:
        raise ValueError(f"Expected `labels` to have pixels to resize, but got {shape_of(labels)}.")
    for axis, new in enumerate(size, 1):
        labels = labels.index_select(axis, _nearest(labels, axis, new))
    return labels


def _nearest(labels: Tensor, axis: int, new: int) -> Tensor:
    old = labels.shape[axis]
    # float32 on purpose, because F.interpolate computes its source index in float32.
    places = torch.arange(new, device=labels.device, dtype=torch.float32) * (old / new)
    return places.floor().long().clamp_max(old - 1)
