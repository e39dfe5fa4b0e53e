"""ClassMix: draw classes of a label map, and paste their pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Integer
from torch import Tensor, nn

from udakit._checks import (
    check_device,
    check_generator,
    check_integer,
    check_label_map,
    check_mask_like,
    check_option,
    check_range,
    check_tensor,
    is_integer,
    kind_of,
    shape_of,
)
from udakit._reduce import class_ids
from udakit.mixing.batch import SegBatch, check_batches, mix

Rounding = Literal["up", "down"]
Scope = Literal["image", "batch"]
ROUNDINGS = get_args(Rounding)
SCOPES = get_args(Scope)


def _check_draw(num_classes: int, fraction: float, rounding: str, scope: str) -> None:
    check_integer("num_classes", num_classes)
    check_range("fraction", fraction, 0.0, 1.0)
    check_option("rounding", rounding, ROUNDINGS)
    check_option("scope", scope, SCOPES)


def _candidate_mask(candidates: Sequence[int] | Tensor, num_classes: int, device: torch.device | None) -> Tensor:
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
    labels: Integer[Tensor, "n h w"],
    *,
    num_classes: int,
    fraction: float = 0.5,
    rounding: Rounding = "up",
    scope: Scope = "image",
    candidates: Sequence[int] | Bool[Tensor, "c"] | None = None,
    include_ignore: bool = False,
    ignore_index: int = 255,
    generator: torch.Generator | None = None,
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
        labels: (N, H, W), int64 or uint8.
        num_classes: C.
        fraction: share in [0, 1] of the present candidates.
        rounding: "up" | "down".
        scope: "image" | "batch".
        candidates: ids, or bool (C,), of the classes that may be drawn; None for all.
        include_ignore: count the ignored pixels as one more class, which may be drawn.
        ignore_index: the label that is no class.
        generator: on the device of `labels`.

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
    _check_draw(num_classes, fraction, rounding, scope)
    check_label_map(labels)
    check_generator(generator, labels.device)
    columns = num_classes + 1
    present = torch.zeros(labels.shape[0], columns, dtype=torch.bool, device=labels.device)
    present = present.scatter(1, class_ids(labels, num_classes, ignore_index).flatten(1), True)
    if candidates is not None:
        allowed = _candidate_mask(candidates, num_classes, labels.device)
        check_device("candidates", allowed, labels, "labels")
        present = present & torch.cat([allowed, allowed.new_ones(1)])
    if not include_ignore:
        columns = num_classes
        present = present[:, :columns]
    if scope == "batch":
        present = present.any(dim=0, keepdim=True).expand(labels.shape[0], -1)

    # Present classes get a random place, absent ones stand behind them; the first `count` places are drawn.
    keys = torch.rand(present.shape, generator=generator, device=labels.device, dtype=torch.float32)
    place = torch.where(present, keys, 2.0).argsort(dim=1).argsort(dim=1)
    share = fraction * present.sum(dim=1, keepdim=True)
    # 0.1 * 30 is 3.0000000000000004: a product within rounding of a whole number is that number.
    count = (share - 1e-4).ceil() if rounding == "up" else (share + 1e-4).floor()
    return present & (place < count)


def class_mask(
    labels: Integer[Tensor, "n h w"],
    chosen: Bool[Tensor, "n columns"],
    *,
    num_classes: int | None = None,
    paste_ignore: bool = False,
    ignore_index: int = 255,
) -> Bool[Tensor, "n h w"]:
    r"""Mark the pixels of the chosen classes: $M_p = [y_p \in K]$.

    **Convention.** With (N, C) columns ignored pixels are False; with (N, C + 1), as `draw_classes` returns them under
    `include_ignore=True`, the last column decides about them. The two are told apart by `num_classes`; without it every
    column is a class. An id that is no class counts as ignored. `paste_ignore=True` makes ignored pixels True always.

    Args:
        labels: (N, H, W), int64 or uint8.
        chosen: bool (N, C) or (N, C + 1), from `draw_classes`.
        num_classes: C, needed when `chosen` has C + 1 columns.
        paste_ignore: ignored pixels are always True (DiGA).
        ignore_index: the label that is no class.

    Returns:
        Bool (N, H, W).

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


def class_mix(
    source: SegBatch | tuple[Tensor, ...], target: SegBatch | tuple[Tensor, ...], mask: Bool[Tensor, "n h w"]
) -> SegBatch:
    """Paste `source` onto `target` where the mask is True: images, labels and weights alike.

    **Convention.** A missing weight counts as 1 when the other side has one; with neither the result has none. Any pair
    of batches will do: source onto target, target onto source, target onto target.

    Args:
        source: what the mask takes where it is True; a plain tuple (images, labels[, weight]) is welcome.
        target: what stays elsewhere, of the same size.
        mask: bool (N, H, W), from `class_mask` or any other source.

    Returns:
        The mixed batch; labels int64, or uint8 when both sides are.

    Raises:
        TypeError: labels that are neither int64 nor uint8, images or weights that are not float, a mask not bool.
        ValueError: unequal sizes.

    Example:
        >>> import torch
        >>> source = SegBatch(torch.ones(1, 3, 1, 2), torch.zeros(1, 1, 2, dtype=torch.int64))
        >>> target = SegBatch(torch.zeros(1, 3, 1, 2), torch.full((1, 1, 2), 7), torch.full((1, 1, 2), 0.5))
        >>> mixed = class_mix(source, target, torch.tensor([[[True, False]]]))
        >>> mixed.labels, mixed.weight
        (tensor([[[0, 7]]]), tensor([[[1.0000, 0.5000]]]))
    """
    source, target = check_batches(source, target)
    check_mask_like(mask, source.images, name="mask", reference_name="source.images")
    return mix(mask, source, target)


class ClassMix(nn.Module):
    """Draw classes of the source labels and paste their pixels onto target: `draw_classes`, `class_mask`, `class_mix`.

    Options as in [`draw_classes`][udakit.mixing.draw_classes] and [`class_mask`][udakit.mixing.class_mask]; DACS is
    `ClassMix(19, include_ignore=True)`, DAFormer adds `scope="batch"`, DiGA's self-training is
    `ClassMix(19, rounding="down", include_ignore=True, paste_ignore=True)`.

    Example:
        >>> import torch
        >>> source = SegBatch(torch.ones(2, 3, 4, 4), torch.arange(4).expand(2, 4, 4))
        >>> target = SegBatch(torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 9))
        >>> mixed, mask = ClassMix(19)(source, target)
        >>> mask.float().mean().item()
        0.5
    """

    candidates: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        fraction: float = 0.5,
        rounding: Rounding = "up",
        scope: Scope = "image",
        candidates: Sequence[int] | Bool[Tensor, "c"] | None = None,
        include_ignore: bool = False,
        paste_ignore: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        _check_draw(num_classes, fraction, rounding, scope)
        allowed = None if candidates is None else _candidate_mask(candidates, num_classes, None)
        self.register_buffer("candidates", allowed)
        self.num_classes = num_classes
        self.fraction = fraction
        self.rounding: Rounding = rounding
        self.scope: Scope = scope
        self.include_ignore = include_ignore
        self.paste_ignore = paste_ignore
        self.ignore_index = ignore_index

    def draw_mask(
        self, labels: Integer[Tensor, "n h w"], *, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "n h w"]:
        """Draw classes of `labels` and mark their pixels, to use one mask in several places."""
        chosen = draw_classes(
            labels,
            num_classes=self.num_classes,
            fraction=self.fraction,
            rounding=self.rounding,
            scope=self.scope,
            candidates=self.candidates,
            include_ignore=self.include_ignore,
            ignore_index=self.ignore_index,
            generator=generator,
        )
        return class_mask(
            labels,
            chosen,
            num_classes=self.num_classes,
            paste_ignore=self.paste_ignore,
            ignore_index=self.ignore_index,
        )

    def forward(
        self,
        source: SegBatch | tuple[Tensor, ...],
        target: SegBatch | tuple[Tensor, ...],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[SegBatch, Bool[Tensor, "n h w"]]:
        """Draw one mask from the source labels, mix with it, and return both."""
        source, target = check_batches(source, target)
        mask = self.draw_mask(source.labels, generator=generator)
        return mix(mask, source, target), mask

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"{self.num_classes}, fraction={self.fraction}, rounding={self.rounding!r}, scope={self.scope!r}, "
            f"include_ignore={self.include_ignore}, paste_ignore={self.paste_ignore}, ignore_index={self.ignore_index}"
        )
