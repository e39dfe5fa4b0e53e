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
    """Raise unless the options of a draw are valid."""
    check_integer("num_classes", num_classes)
    check_range("fraction", fraction, 0.0, 1.0)
    check_option("rounding", rounding, ROUNDINGS)
    check_option("scope", scope, SCOPES)
    check_flag("include_ignore", include_ignore)
    check_ignore_index(ignore_index, num_classes)


def candidate_mask(candidates: Sequence[int] | Tensor, num_classes: int, device: torch.device | None) -> Tensor:
    """The classes that may be drawn, bool (C,). Ids are filled in one by one, which copies nothing to a GPU."""
    if isinstance(candidates, Tensor):
        if candidates.dtype != torch.bool or candidates.shape != (num_classes,):
            raise ValueError(
                f"Expected `candidates` to be class ids or a bool tensor ({num_classes},), "
                f"but got {kind_of(candidates)}. Pass ids as a list, for example [6, 7]."
            )
        return candidates
    if not isinstance(candidates, (tuple, list)):
        candidates = list(candidates) if isinstance(candidates, Iterable) else [candidates]
    if not all(is_integer(c) and 0 <= c < num_classes for c in candidates):
        hint = " Pass a mask as a bool tensor." if any(isinstance(c, bool) for c in candidates) else ""
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
    r"""Draw a fraction of the classes that are present, for each image.

    $$K_i \subset P_i = \text{present} \cap \text{candidates}, \qquad
    |K_i| = \lceil f\,|P_i| \rceil \text{ or } \lfloor f\,|P_i| \rfloor$$

    **Convention.** Each image draws from its own classes, or with `scope="batch"` from all classes in the batch. In
    both cases the images draw independently. With `scope="image"`, a class that is absent from the image is never
    drawn. Ids that are not a class count as ignored.

    **Source.** ClassMix (Olsson et al. 2021) and DiGA round down. DACS rounds up and counts the ignored pixels as one
    more class (`include_ignore=True`). DAFormer draws from the whole batch (`scope="batch"`). EHTDI's released code can
    never draw the largest id that is present; this bug is not reproduced.

    Args:
        labels: (N, *space), int64 or uint8.
        num_classes: C, the number of classes.
        fraction: fraction of the present candidates to draw, in [0, 1].
        rounding: "up" | "down", for the number of classes to draw.
        scope: "image" | "batch", the source of the classes that an image draws from.
        candidates: the classes that may be drawn, as ids or as bool (C,); None for all.
        include_ignore: whether the ignored pixels count as one more class, which may be drawn.
        ignore_index: the label of ignored pixels.
        generator: generator of the draw, on the device of `labels`; or a list with one generator for each image.

    Returns:
        Bool (N, C), or (N, C + 1) with `include_ignore`: True for the drawn classes.

    Raises:
        TypeError: `labels` is neither int64 nor uint8.
        ValueError: an option is unknown, a candidate is outside [0, C), or the generator is on another device.

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

    # Present classes get a random rank, and absent ones rank behind them. The first `count` ranks are drawn.
    keys = uniform(present.shape, generator, labels.device)
    place = torch.add(keys, present, alpha=-2).argsort(dim=1).argsort(dim=1)
    # 0.1 * 30 is 3.0000000000000004: treat a product within rounding of a whole number as that number.
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

    **Convention.** If `chosen` is (N, C), ignored pixels are False. If it is (N, C + 1), as `draw_classes` returns it
    with `include_ignore=True`, the last column says whether ignored pixels are True. `num_classes` tells the two cases
    apart; without it, every column is a class. An id that is not a class counts as ignored. With `paste_ignore=True`,
    ignored pixels are always True.

    Args:
        labels: (N, *space), int64 or uint8.
        chosen: bool (N, C) or (N, C + 1), from `draw_classes`.
        num_classes: C, required if `chosen` has C + 1 columns.
        paste_ignore: whether ignored pixels are always True (as in DiGA).
        ignore_index: the label of ignored pixels.

    Returns:
        Bool (N, *space).

    Raises:
        TypeError: `labels` is neither int64 nor uint8, or `chosen` is not bool.
        ValueError: the shapes do not match.

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
            "It has one column for each class; draw_classes returns one."
        )
    wanted = "C" if num_classes is None else f"{num_classes} or {num_classes + 1}"
    columns = num_classes if num_classes is not None or chosen.ndim != 2 else chosen.shape[1]
    matches = chosen.ndim == 2 and chosen.shape[0] == len(labels)
    if not columns or not matches or chosen.shape[1] - columns not in (0, 1):
        raise ValueError(
            f"Expected `chosen` to be (N, {wanted}) matching `labels` {shape_of(labels)}, but got {shape_of(chosen)}."
        )
    check_device("chosen", chosen, labels, "labels")
    if paste_ignore or chosen.shape[1] == columns:
        last = torch.full_like(chosen[:, :1], paste_ignore)
        chosen = torch.cat([chosen[:, :columns], last], dim=1)
    return chosen.gather(1, class_ids(labels, columns, ignore_index).flatten(1)).view(labels.shape)
