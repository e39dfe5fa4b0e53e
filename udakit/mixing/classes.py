"""Draw classes of a label map, and mark their pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from udakit._checks import (
    check_device,
    check_flag,
    check_ignore_index,
    check_integer,
    check_label_map,
    check_option,
    check_range,
    check_tensor,
    is_integer,
    kind_of,
    shape_of,
)
from udakit._reduce import class_ids
from udakit.mixing._random import Generators, check_generators, uniform

Rounding = Literal["up", "down"]
Scope = Literal["image", "batch"]
ROUNDINGS = get_args(Rounding)
SCOPES = get_args(Scope)


def check_draw(
    num_classes: int, fraction: float, rounding: str, scope: str, include_ignore: bool, ignore_index: int
) -> None:
    """Raise unless the options of a draw are what they must be."""
    check_integer("num_classes", num_classes)
    check_range("fraction", fraction, 0.0, 1.0)
    check_option("rounding", rounding, ROUNDINGS)
    check_option("scope", scope, SCOPES)
    check_flag("include_ignore", include_ignore)
    check_ignore_index(ignore_index, num_classes)


def candidate_mask(candidates: Sequence[int] | Tensor, num_classes: int, device: torch.device | None) -> Tensor:
    """Bool (C,): the classes that may be drawn. Ids are filled in one by one, which copies nothing from the host."""
    if isinstance(candidates, Tensor):
        if candidates.dtype != torch.bool or candidates.shape != (num_classes,):
            raise ValueError(
                f"Expected `candidates` to be class ids or a bool tensor ({num_classes},), "
                f"but got {kind_of(candidates)}. Ids are a list, for example [6, 7]."
            )
        return candidates
    if not isinstance(candidates, (tuple, list)):
        candidates = list(candidates) if isinstance(candidates, Iterable) else [candidates]
    if not all(is_integer(c) and 0 <= c < num_classes for c in candidates):
        hint = " A mask is a bool tensor." if any(isinstance(c, bool) for c in candidates) else ""
        raise ValueError(
            f"Expected `candidates` to be class ids in [0, {num_classes}), but got {list(candidates)}.{hint}"
        )
    allowed = torch.zeros(num_classes, dtype=torch.bool, device=device)
    for c in candidates:
        allowed[c].fill_(True)
    return allowed


def draw_classes(
    labels: Integer[Tensor, "n *space"],
    *,
    num_classes: int,
    fraction: float = 0.5,
    rounding: Rounding = "up",
    scope: Scope = "image",
    candidates: Sequence[int] | Bool[Tensor, "c"] | None = None,
    include_ignore: bool = False,
    ignore_index: int = 255,
    generator: Generators | None = None,
) -> Bool[Tensor, "n columns"]:
    r"""Draw a share of the classes that are present, for each image.

    $$K_i \subset P_i = \text{present} \cap \text{candidates}, \qquad
    |K_i| = \lceil f\,|P_i| \rceil \text{ or } \lfloor f\,|P_i| \rfloor$$

    **Convention.** Each image draws from its own classes, and by `scope="batch"` from all that occur in the batch
    (the draws stay independent). Ids that are no class count as ignored. A class that is absent is never drawn, except
    under `scope="batch"`, where it may be absent from the image.

    **Source.** ClassMix (Olsson et al. 2021) and DiGA round down; DACS rounds up and counts the ignored pixels as one
    more class: `include_ignore=True`; DAFormer draws from the whole batch: `scope="batch"`. EHTDI's released draw can
    never pick the largest present id; that slip is not reproduced.

    Args:
        labels: (N, *space), int64 or uint8.
        num_classes: C.
        fraction: share in [0, 1] of the present candidates.
        rounding: "up" | "down".
        scope: "image" | "batch".
        candidates: ids, or bool (C,), of the classes that may be drawn; None for all.
        include_ignore: count the ignored pixels as one more class, which may be drawn.
        ignore_index: the label that is no class.
        generator: on the device of `labels`; a list has one for each image.

    Returns:
        Bool (N, C), or (N, C + 1) with `include_ignore`: True for the classes drawn.

    Raises:
        TypeError: labels that are neither int64 nor uint8.
        ValueError: an unknown option, an id outside [0, C), or a generator on another device.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 1], [2, 255]], [[3, 3], [3, 3]]])
        >>> draw_classes(labels, num_classes=4, fraction=0.5).sum(1)
        tensor([2, 1])
    """
    check_draw(num_classes, fraction, rounding, scope, include_ignore, ignore_index)
    check_label_map(labels)
    check_generators(generator, len(labels), labels.device)
    columns = num_classes + 1
    present = torch.zeros(labels.shape[0], columns, dtype=torch.bool, device=labels.device)
    present.scatter_(1, class_ids(labels, num_classes, ignore_index).flatten(1), True)
    if candidates is not None:
        allowed = candidate_mask(candidates, num_classes, labels.device)
        check_device("candidates", allowed, labels, "labels")
        present = present & torch.cat([allowed, allowed.new_ones(1)])
    if not include_ignore:
        columns = num_classes
        present = present[:, :columns]
    if scope == "batch":
        present = present.any(dim=0, keepdim=True).expand(labels.shape[0], -1)

    # Present classes get a random place, absent ones stand behind them; the first `count` places are drawn.
    keys = uniform(present.shape, generator, labels.device)
    place = torch.add(keys, present, alpha=-2).argsort(dim=1).argsort(dim=1)
    # 0.1 * 30 is 3.0000000000000004: a product within rounding of a whole number is that number.
    shift = -1e-4 if rounding == "up" else 1e-4
    share = torch.rsub(present.sum(dim=1, keepdim=True, dtype=torch.float32), shift, alpha=-fraction)
    count = share.ceil() if rounding == "up" else share.floor()
    return present & (place < count)


def class_mask(
    labels: Integer[Tensor, "n *space"],
    chosen: Bool[Tensor, "n columns"],
    *,
    num_classes: int | None = None,
    paste_ignore: bool = False,
    ignore_index: int = 255,
) -> Bool[Tensor, "n *space"]:
    r"""Mark the pixels of the chosen classes: $M_p = [y_p \in K]$.

    **Convention.** With (N, C) columns ignored pixels are False; with (N, C + 1), as `draw_classes` returns them under
    `include_ignore=True`, the last column decides about them. The two are told apart by `num_classes`; without it every
    column is a class. An id that is no class counts as ignored. `paste_ignore=True` makes ignored pixels True always.

    Args:
        labels: (N, *space), int64 or uint8.
        chosen: bool (N, C) or (N, C + 1), from `draw_classes`.
        num_classes: C, needed when `chosen` has C + 1 columns.
        paste_ignore: ignored pixels are always True (DiGA).
        ignore_index: the label that is no class.

    Returns:
        Bool (N, *space).

    Raises:
        TypeError: labels that are neither int64 nor uint8, or a `chosen` that is not bool.
        ValueError: shapes that do not match.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 1, 255]]])
        >>> class_mask(labels, torch.tensor([[True, False]]))
        tensor([[[ True, False, False]]])
        >>> class_mask(labels, torch.tensor([[True, False, True]]), num_classes=2)
        tensor([[[ True, False,  True]]])
    """
    check_flag("paste_ignore", paste_ignore)
    if num_classes is not None:
        check_integer("num_classes", num_classes)
    check_ignore_index(ignore_index, num_classes)
    check_label_map(labels)
    check_tensor("chosen", chosen, "a bool tensor")
    if chosen.dtype != torch.bool:
        raise TypeError(
            f"Expected `chosen` to be a bool tensor, but got {kind_of(chosen)}. "
            "It has a column for each class: draw_classes makes one."
        )
    wanted = "C" if num_classes is None else f"{num_classes} or {num_classes + 1}"
    columns = num_classes if num_classes is not None or chosen.ndim != 2 else chosen.shape[1]
    if columns is None or chosen.ndim != 2 or chosen.shape[0] != len(labels) or chosen.shape[1] - columns not in (0, 1):
        raise ValueError(
            f"Expected `chosen` to be (N, {wanted}) matching `labels` {shape_of(labels)}, but got {shape_of(chosen)}."
        )
    check_device("chosen", chosen, labels, "labels")
    if paste_ignore or chosen.shape[1] == columns:
        last = torch.full_like(chosen[:, :1], paste_ignore)
        chosen = torch.cat([chosen[:, :columns], last], dim=1)
    return chosen.gather(1, class_ids(labels, columns, ignore_index).flatten(1)).view(labels.shape)
