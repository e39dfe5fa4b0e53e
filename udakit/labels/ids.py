"""Map class ids with a table, and check them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Integer
from numpy.typing import NDArray
from torch import Tensor

from udakit._checks import check_ignore_index, check_integer, check_tensor, is_integer, kind_of
from udakit._reduce import look_up

DENSE = 2**20  # largest range of ids for a look-up table; wider tables are searched

Labels = TypeVar("Labels", Tensor, NDArray[np.integer])


def map_ids(labels: Labels, table: Mapping[int, int], *, default: int = 255) -> Labels:
    """Replace every id with its entry in `table`, and every id without an entry with `default`.

    **Convention.** This is a single look-up, which is exact for any integers: nothing passes through float, there is no
    loop over ids, and nothing is modified in place. To re-index for a head with fewer outputs, map the result again:
    `map_ids(x, {t: k for k, t in enumerate(SYNTHIA_16_CLASSES)})`.

    Args:
        labels: integer ids of any shape, as a tensor or a NumPy array.
        table: mapping from old to new ids, for example `GTA5_IDS`.
        default: new id of all other ids.

    Returns:
        The new ids, with the type, shape and dtype of `labels`.

    Raises:
        TypeError: `labels` are not integers.
        ValueError: the dtype of `labels` cannot hold a new id.

    Example:
        >>> from udakit.labels import CITYSCAPES_IDS
        >>> map_ids(torch.tensor([[7, 26, 0]], dtype=torch.uint8), CITYSCAPES_IDS)
        tensor([[  0,  13, 255]], dtype=torch.uint8)
    """
    if not is_integer(default):
        raise TypeError(f"Expected `default` to be an integer, but got {kind_of(default)}.")
    if not isinstance(table, (dict, Mapping)) or not all(is_integer(i) for pair in table.items() for i in pair):
        given = f"{dict(list(table.items())[:3])}" if isinstance(table, Mapping) else kind_of(table)
        raise TypeError(
            f"Expected `table` to map integer ids to integer ids, but got {given}. "
            "Convert a list of old ids, in the order of the new ones, with {old: new for new, old in enumerate(ids)}."
        )
    if isinstance(labels, Tensor):
        check_integer_labels(labels)
        pairs, low, high = _pairs(table, torch.iinfo(labels.dtype), default)
        ids = labels.long()
        if high - low > DENSE:
            old, new = ids.new_zeros((2, len(pairs)))
            for place, pair in enumerate(pairs):  # entry by entry, because copying a list to a GPU would make it wait
                old[place].fill_(pair[0])
                new[place].fill_(pair[1])
            place_of = torch.searchsorted(old, ids).clamp_max(len(pairs) - 1)
            found = look_up(old, place_of) == ids
            return torch.where(found, look_up(new, place_of), default).to(labels.dtype)
        lookup = labels.new_full((high - low + 2,), default)  # the last entry is for all ids outside the table
        for key, value in pairs:
            lookup[key - low].fill_(value)
        return look_up(lookup, torch.where((ids >= low) & (ids <= high), ids - low, high - low + 1))
    if not isinstance(labels, (np.ndarray, np.generic)):
        raise TypeError(
            f"Expected `labels` to be an integer tensor or array, but got {kind_of(labels)}. "
            "Convert lists and Pillow images with np.asarray."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"Expected `labels` to be an integer array, but got {labels.dtype}. Convert it with .astype.")
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
    """Check that the new ids fit; return the pairs that labels of the dtype can contain, and the range of their ids."""
    new = [default, *table.values()]
    if min(new) < limits.min or max(new) > limits.max:
        raise ValueError(
            "Expected `labels` to have a dtype that holds the new ids "
            f"{min(new)}..{max(new)}, but got {str(limits.dtype).removeprefix('torch.')}. "
            "Widen it first, with .long() for a tensor or .astype(np.int64) for an array."
        )
    pairs = sorted((int(old), int(to)) for old, to in table.items() if limits.min <= old <= min(limits.max, 2**63 - 1))
    if limits.min == 0 and limits.max < 2**16:  # the table covers every id of the dtype, so no comparison is needed
        return pairs, 0, int(limits.max)
    return pairs, pairs[0][0] if pairs else 0, pairs[-1][0] if pairs else 0


def check_integer_labels(labels: Tensor, name: str = "labels") -> None:
    """Raise unless `labels` is a tensor of integers."""
    check_tensor(name, labels, "an integer tensor")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"Expected `{name}` to be an integer tensor, but got {kind_of(labels)}. Convert class ids with .long()."
        )


def check_labels(
    labels: Integer[Tensor, "..."], *, num_classes: int, ignore_index: int = 255, name: str = "labels"
) -> None:
    """Raise if a label is neither a class nor `ignore_index`. The message lists the unexpected ids and pixel counts.

    **Convention.** This function reads values, so it waits for the GPU. Call it on the first batches of a data set, not
    in every step. It checks only the ids, and accepts labels of any shape: the function that uses the labels checks
    their shape.

    Args:
        labels: ids of any shape and any integer dtype.
        num_classes: C; ids 0..C-1 are expected.
        ignore_index: the only other id that is expected.
        name: name of the labels in the message, for example a file name.

    Raises:
        TypeError: `labels` are not integers.
        ValueError: there is an unexpected id.

    Example:
        >>> check_labels(torch.tensor([0, 18, 255]), num_classes=19)
        >>> check_labels(torch.tensor([0, 26, 26, 33]), num_classes=19)
        Traceback (most recent call last):
        ValueError: Expected `labels` to hold ids 0..18 or 255, but got 26 (2 pixels), 33 (1 pixel). Map the ids \
of a data set with map_ids, or correct `num_classes` or `ignore_index`.
    """
    check_integer("num_classes", num_classes)
    check_ignore_index(ignore_index)
    check_integer_labels(labels, name)
    # This check reads values by design. It is meant for the first batches of a data set, not for each step.
    found = dict(zip(*(x.tolist() for x in torch.unique(labels, return_counts=True)), strict=True))
    wrong = {i: n for i, n in found.items() if not 0 <= i < num_classes and i != ignore_index}
    if wrong:
        listed = [f"{i} ({n} pixel{'s' * (n != 1)})" for i, n in list(wrong.items())[:8]]
        more = f" and {len(wrong) - 8} more ids" if len(wrong) > 8 else ""
        raise ValueError(
            f"Expected `{name}` to hold ids 0..{num_classes - 1} or {ignore_index}, but got {', '.join(listed)}{more}. "
            "Map the ids of a data set with map_ids, or correct `num_classes` or `ignore_index`."
        )
