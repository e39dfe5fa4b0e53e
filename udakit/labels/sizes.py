"""Label maps of another size, without inventing a class."""

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
    """Bring labels to feature size: the majority of each cell of side `factor`, where it is clear enough.

    **Convention.** Ignored pixels (and ids >= C) compete: a cell that they win is ignored. They lose ties, and a tie of
    two classes goes to the lower id. A winner with less than `min_ratio` of the cell is ignored. No one-hot map
    is made: the counts, C + 1 integers a cell, are those of the cells. In volumes a cell is a cube, in signals a run.

    **Source.** DAFormer and SePiCo, with ratio 0.75.

    Args:
        labels: class ids 0..C-1 or `ignore_index`, int64 or uint8.
        factor: side of a cell, the stride of the features in every axis.
        num_classes: C, the number of classes.
        min_ratio: smallest share of the cell that decides it, in [0, 1].
        ignore_index: the label that takes no part, and the label of an undecided cell.

    Returns:
        Labels of the cells, dtype as given.

    Raises:
        TypeError: `labels` that are neither int64 nor uint8.
        ValueError: a side that `factor` does not divide, or an option out of range.

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
    winner = counts.argmax(dim=1)  # the first of equals: the lowest id, and ignored pixels last
    share = counts.gather(1, winner[:, None])[:, 0]
    enough = math.ceil(min_ratio * factor**axes - 1e-9)  # in whole pixels, so that no share is lost to rounding
    kept = (winner < num_classes) & (share >= enough)
    return torch.where(kept, winner, ignore_index).to(labels.dtype)


def resize_labels(labels: Integer[Tensor, "n *space"], size: Sequence[int]) -> Integer[Tensor, "n *space2"]:
    """Resize labels to a size by the nearest pixel, the very pixel that `F.interpolate(mode="nearest")` takes.

    **Convention.** Pixels are picked, never computed: the ids do not pass through a float (id 26001 survives) and the
    dtype stays.

    Args:
        labels: integer ids, any integer dtype.
        size: the new (H, W); (L,) of signals, (D, H, W) of volumes.

    Returns:
        Labels of the new size.

    Raises:
        TypeError: `labels` that are not integers.
        ValueError: `labels` that are not (N, *space), or a `size` without a positive number for each axis.

    Example:
        >>> resize_labels(torch.tensor([[[1, 26001]]]), (2, 4))
        tensor([[[    1,     1, 26001, 26001],
                 [    1,     1, 26001, 26001]]])
    """
    check_integer_labels(labels)
    check_spatial("labels", labels)
    single = is_sequence(size) and len(size) == labels.ndim
    hint = " A single one becomes a batch by .unsqueeze(0)." if single else ""
    check_size("size", size, labels.ndim - 1, of=f" for `labels` {shape_of(labels)}", hint=hint)
    for axis, new in enumerate(size, 1):
        labels = labels.index_select(axis, _nearest(labels, axis, new))
    return labels


def _nearest(labels: Tensor, axis: int, new: int) -> Tensor:
    old = labels.shape[axis]
    # float32 on purpose: F.interpolate computes its source index so, and must be met exactly.
    places = torch.arange(new, device=labels.device, dtype=torch.float32) * (old / new)
    return places.floor().long().clamp_max(old - 1)
