"""Class ids changed by a table, and checked on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Integer
from numpy.typing import NDArray
from torch import Tensor

from udakit._checks import check_ignore_index, check_integer, check_tensor, is_integer, kind_of

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
            "A list of old ids, in the order of the new ones, becomes one by {old: new for new, old in enumerate(ids)}."
        )
    if isinstance(labels, Tensor):
        check_integer_labels(labels)
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
    if not isinstance(labels, (np.ndarray, np.generic)):
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


def check_integer_labels(labels: Tensor, name: str = "labels") -> None:
    """Raise unless `labels` is a tensor of integers."""
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
    It looks at ids alone. Labels of any shape pass; a wrong shape is refused by the function that takes the labels.

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
    check_integer_labels(labels, name)
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
