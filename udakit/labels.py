"""Label maps: the id tables of the street data sets, checks on request, and sizes changed without inventing a class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from numpy.typing import NDArray
from torch import Tensor

from udakit._checks import (
    check_ignore_index,
    check_integer,
    check_label_map,
    check_range,
    check_size,
    check_spatial,
    check_tensor,
    is_integer,
    kind_of,
    shape_of,
)
from udakit._reduce import class_ids

__all__ = [
    "CITYSCAPES_CLASSES",
    "CITYSCAPES_IDS",
    "CITYSCAPES_PALETTE",
    "GTA5_IDS",
    "SYNTHIA_13_CLASSES",
    "SYNTHIA_16_CLASSES",
    "SYNTHIA_IDS",
    "check_labels",
    "downscale_labels",
    "map_ids",
    "resize_labels",
]

CITYSCAPES_CLASSES: Final = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""The 19 class names, in the order of the train ids."""

CITYSCAPES_PALETTE: Final[UInt8[np.ndarray, "19 3"]] = np.array(
    [
        *([128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153], [153, 153, 153]),
        *([250, 170, 30], [220, 220, 0], [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60]),
        *([255, 0, 0], [0, 0, 142], [0, 0, 70], [0, 60, 100], [0, 80, 100], [0, 0, 230], [119, 11, 32]),
    ],
    dtype=np.uint8,
)
"""RGB colour of each train id, as every paper draws it."""
CITYSCAPES_PALETTE.flags.writeable = False

_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

CITYSCAPES_IDS: Final[Mapping[int, int]] = {label_id: train_id for train_id, label_id in enumerate(_EVALUATED)}
"""Cityscapes `_labelIds` -> train id; every other id is ignored."""

GTA5_IDS: Final[Mapping[int, int]] = CITYSCAPES_IDS
"""GTA5 labels (palette PNGs) hold Cityscapes ids."""

# fmt: off
SYNTHIA_IDS: Final[Mapping[int, int]] = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15, 20: 16,
    12: 17, 11: 18,
}
# fmt: on
"""SYNTHIA-RAND-CITYSCAPES id (first channel of the 16-bit PNG) -> train id. 16, 18 and 20 do not occur in the data."""

SYNTHIA_16_CLASSES: Final = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Train ids of the 16-class protocol: without terrain, truck and train."""

SYNTHIA_13_CLASSES: Final = (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Train ids of the 13-class protocol: the 16 without wall, fence and pole."""

DENSE = 2**20  # ids that a table is laid out for; a wider one is searched

Labels = TypeVar("Labels", Tensor, NDArray[np.integer])


def map_ids(labels: Labels, table: Mapping[int, int], *, default: int = 255) -> Labels:
    """Replace every id by its entry in `table`, and every id without one by `default`.

    **Convention.** One lookup, exact for any integer, whatever ids the table spans: no float, no loop over ids, nothing
    modified in place. To re-index for a head with fewer outputs, map twice:
    `map_ids(x, {t: k for k, t in enumerate(SYNTHIA_16_CLASSES)})`.

    Args:
        labels: integer ids of any shape, a tensor or a NumPy array (what a data loader has in hand).
        table: old id -> new id, for example `GTA5_IDS`.
        default: what all other ids become.

    Returns:
        The new ids, of the type, shape and dtype of `labels`.

    Raises:
        TypeError: `labels` that are not integers.
        ValueError: a new id that the dtype of `labels` cannot hold.

    Example:
        >>> map_ids(torch.tensor([[7, 26, 0]], dtype=torch.uint8), CITYSCAPES_IDS)
        tensor([[  0,  13, 255]], dtype=torch.uint8)
    """
    if not is_integer(default):
        raise TypeError(f"Expected `default` to be an integer, but got {kind_of(default)}.")
    if not isinstance(table, (dict, Mapping)) or not all(is_integer(i) for pair in table.items() for i in pair):
        given = f"{dict(list(table.items())[:3])}" if isinstance(table, Mapping) else kind_of(table)
        raise TypeError(
            f"Expected `table` to map integer ids to integer ids, but got {given}. "
            "A list of old ids, in the order of the new ones, becomes one by {old: new for new, old in enumerate(ids)}."
        )
    if isinstance(labels, Tensor):
        _check_integer(labels)
        pairs, low, high = _pairs(table, torch.iinfo(labels.dtype), default)
        ids = labels.long()
        if high - low > DENSE:
            old, new = ids.new_zeros((2, len(pairs)))
            for place, pair in enumerate(pairs):  # entry by entry: a copy of a host list would make a GPU wait
                old[place].fill_(pair[0])
                new[place].fill_(pair[1])
            place_of = torch.searchsorted(old, ids).clamp_max(len(pairs) - 1)
            return torch.where(old[place_of] == ids, new[place_of], default).to(labels.dtype)
        lookup = labels.new_full((high - low + 2,), default)  # the last place is for every id outside the table
        for key, value in pairs:
            lookup[key - low].fill_(value)
        return lookup[torch.where((ids >= low) & (ids <= high), ids - low, high - low + 1)]
    if not isinstance(labels, np.ndarray | np.generic):
        raise TypeError(
            f"Expected `labels` to be an integer tensor or array, but got {kind_of(labels)}. "
            "Lists and Pillow images become an array by np.asarray."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Expected `labels` to be an integer array, but got {labels.dtype}. .astype makes one.")
    pairs, low, high = _pairs(table, np.iinfo(labels.dtype), default)
    if high - low > DENSE:
        keys, values = np.array(pairs, dtype=np.int64).T
        wide = labels.astype(np.int64)
        places = np.searchsorted(keys, wide).clip(max=len(pairs) - 1)
        return np.where(keys[places] == wide, values[places], default).astype(labels.dtype)
    array_lookup: NDArray[Any] = np.full(high - low + 2, default, dtype=labels.dtype)
    for key, value in pairs:
        array_lookup[key - low] = value
    if low == 0 and high == np.iinfo(labels.dtype).max:
        return array_lookup.take(labels)
    wide = labels.astype(np.int64)
    return array_lookup.take(np.where((wide >= low) & (wide <= high), wide - low, high - low + 1))


def _pairs(
    table: Mapping[int, int], limits: torch.iinfo | np.iinfo[Any], default: int
) -> tuple[list[tuple[int, int]], int, int]:
    """Check that the new ids fit; return the pairs that labels of the dtype can meet, and the ids they span."""
    new = [default, *table.values()]
    if min(new) < limits.min or max(new) > limits.max:
        raise ValueError(
            "Expected `labels` to have a dtype that holds the new ids "
            f"{min(new)}..{max(new)}, but got {str(limits.dtype).removeprefix('torch.')}. "
            "Widen it first: .long() of a tensor, .astype(np.int64) of an array."
        )
    pairs = sorted((int(old), int(to)) for old, to in table.items() if limits.min <= old <= min(limits.max, 2**63 - 1))
    if limits.min == 0 and limits.max < 2**16:  # every id that the dtype has: no comparison is needed
        return pairs, 0, int(limits.max)
    return pairs, pairs[0][0] if pairs else 0, pairs[-1][0] if pairs else 0


def _check_integer(labels: Tensor, name: str = "labels") -> None:
    check_tensor(name, labels, "an integer tensor")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"Expected `{name}` to be an integer tensor, but got {kind_of(labels)}. Class ids become one by .long()."
        )


def check_labels(
    labels: Integer[Tensor, "..."], *, num_classes: int, ignore_index: int = 255, name: str = "labels"
) -> None:
    """Raise when a label is neither a class nor `ignore_index`, naming the unexpected ids and their pixel counts.

    **Convention.** This reads values, so on a GPU it waits: call it on a data set's first batches, not in every step.

    Args:
        labels: ids of any shape, any integer dtype.
        num_classes: C; ids 0..C-1 are expected.
        ignore_index: the one further id that is expected.
        name: what the message calls the labels, for example a file name.

    Raises:
        TypeError: `labels` that are not integers.
        ValueError: an unexpected id.

    Example:
        >>> check_labels(torch.tensor([0, 18, 255]), num_classes=19)
        >>> check_labels(torch.tensor([0, 26, 26, 33]), num_classes=19)
        Traceback (most recent call last):
        ValueError: Expected `labels` to hold ids 0..18 or 255, but got 26 (2 pixels), 33 (1 pixel). Bring the ids \
of a data set to these with map_ids, or correct `num_classes` or `ignore_index`.
    """
    check_integer("num_classes", num_classes)
    check_ignore_index(ignore_index)
    _check_integer(labels, name)
    # Reads values because it is asked to: for the first batches of a data set, not for each step.
    found = dict(zip(*(x.tolist() for x in torch.unique(labels, return_counts=True)), strict=True))
    wrong = {i: n for i, n in found.items() if not 0 <= i < num_classes and i != ignore_index}
    if wrong:
        listed = [f"{i} ({n} pixel{'s' * (n != 1)})" for i, n in list(wrong.items())[:8]]
        more = f" and {len(wrong) - 8} more ids" if len(wrong) > 8 else ""
        raise ValueError(
            f"Expected `{name}` to hold ids 0..{num_classes - 1} or {ignore_index}, but got {', '.join(listed)}{more}. "
            "Bring the ids of a data set to these with map_ids, or correct `num_classes` or `ignore_index`."
        )


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
        num_classes: C.
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
        raise ValueError(
            f"Expected `labels` to have sides that `factor` {factor} divides, but got {shape_of(labels)}. "
            f"Crop or pad to a multiple of {factor}."
        )
    cells = [side // factor for side in space]
    axes = len(space)
    split = labels.reshape(n, *(part for side in cells for part in (side, factor)))
    inside, between = range(2, 2 * axes + 1, 2), range(1, 2 * axes, 2)
    ids = class_ids(split.permute(0, *inside, *between).reshape(n, -1, *cells), num_classes, ignore_index)
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
    _check_integer(labels)
    check_spatial("labels", labels)
    check_size("size", size, labels.ndim - 1, of=f" for `labels` {shape_of(labels)}")
    for axis, new in enumerate(size, 1):
        labels = labels.index_select(axis, _nearest(labels, axis, new))
    return labels


def _nearest(labels: Tensor, axis: int, new: int) -> Tensor:
    old = labels.shape[axis]
    # float32 on purpose: F.interpolate computes its source index so, and must be met exactly.
    places = torch.arange(new, device=labels.device, dtype=torch.float32) * (old / new)
    return places.floor().long().clamp_max(old - 1)
