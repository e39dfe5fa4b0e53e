"""A labelled batch, and the paste that mixes two of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer, Num
from torch import Tensor

from udakit._checks import (
    check_labels_like,
    check_mask_like,
    check_same_shape,
    check_tensor,
    check_weight_like,
    kind_of,
    shape_of,
)
from udakit._reduce import select
from udakit.mixing.images import check_image_batch

RESIZE_HINT = " Crop or resize them to one size before mixing."


class SegBatch(NamedTuple):
    """Images, their labels and, optionally, a weight of each pixel's loss.

    A missing weight counts as 1 when the batch is mixed with one that has weights.

    Attributes:
        images: (N, K, *space) float.
        labels: (N, *space) int64 or uint8, true labels or pseudo-labels.
        weight: (N, *space) float, or None.

    Example:
        >>> import torch
        >>> SegBatch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)).weight is None
        True
    """

    images: Float[Tensor, "n k *space"]
    labels: Integer[Tensor, "n *space"]
    weight: Float[Tensor, "n *space"] | None = None


def paste(
    mask: Bool[Tensor, "n *space"],
    foreground: Num[Tensor, "n *channels_and_space"],
    background: Num[Tensor, "n *channels_and_space"],
) -> Num[Tensor, "n *channels_and_space"]:
    """Take `foreground` where the mask is True and `background` elsewhere.

    **Convention.** The same mask works for images (N, K, *space), labels (N, *space) and weights (N, *space). Labels
    never pass through float: the result is int64, or uint8 when both sides are. Gradients flow to the side that was
    taken.

    Args:
        mask: True where the foreground is taken.
        foreground: the tensor that is pasted.
        background: the tensor that it is pasted onto, of the same shape.

    Returns:
        A tensor of the same shape. Two different float dtypes give the wider one.

    Raises:
        TypeError: `mask` is not bool, or one side is float and the other integer.
        ValueError: the sizes differ. Nothing is resized silently.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[True, False]]])
        >>> foreground = torch.ones(1, 3, 1, 2, requires_grad=True)
        >>> paste(mask, foreground, torch.zeros(1, 3, 1, 2)).sum().backward()
        >>> foreground.grad[0, 0]
        tensor([[1., 0.]])
        >>> paste(mask, torch.tensor([[[26001, 26001]]]), torch.tensor([[[255, 255]]], dtype=torch.uint8))
        tensor([[[26001,   255]]])
    """
    check_tensor("foreground", foreground)
    check_tensor("background", background)
    if not 2 <= foreground.ndim <= 5:
        raise ValueError(f"Expected `foreground` to be (N, K, *space) or (N, *space), but got {shape_of(foreground)}.")
    check_mask_like(mask, foreground, name="mask", reference_name="foreground", channels=None)
    if foreground.is_floating_point() != background.is_floating_point():
        raise TypeError(
            "Expected `background` to be float or integer like `foreground` "
            f"({foreground.dtype}), but got {background.dtype}. Paste images onto images and labels onto labels."
        )
    check_same_shape(background, foreground, name="background", reference_name="foreground", hint=RESIZE_HINT)
    if foreground.ndim > mask.ndim:
        mask = mask.unsqueeze(1)
    return select(mask, foreground, background)


def mix(mask: Tensor, foreground: SegBatch, background: SegBatch) -> SegBatch:
    """Paste images, labels and weights of two checked batches with one mask."""
    weight = None
    given = background.weight if foreground.weight is None else foreground.weight
    if given is not None:
        ones = torch.ones_like(given)
        weight = select(
            mask,
            ones if foreground.weight is None else foreground.weight,
            ones if background.weight is None else background.weight,
        )
    return SegBatch(
        paste(mask, foreground.images, background.images), paste(mask, foreground.labels, background.labels), weight
    )


def check_batches(
    source: SegBatch | tuple[Tensor, ...], target: SegBatch | tuple[Tensor, ...]
) -> tuple[SegBatch, SegBatch]:
    """Both as SegBatch (plain tuples are accepted) of the same size, or an error that names the field."""
    pair = _as_batch("source", source), _as_batch("target", target)
    for name, batch in zip(("source", "target"), pair, strict=True):
        images = f"{name}.images"
        check_image_batch(images, batch.images)
        check_labels_like(batch.labels, batch.images, name=f"{name}.labels", reference_name=images)
        if batch.weight is not None:
            check_weight_like(batch.weight, batch.images, name=f"{name}.weight", reference_name=images)
    check_same_shape(
        pair[1].images, pair[0].images, name="target.images", reference_name="source.images", hint=RESIZE_HINT
    )
    return pair


def _as_batch(name: str, batch: object) -> SegBatch:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else kind_of(batch)
        raise TypeError(
            f"Expected `{name}` to be a SegBatch or (images, labels[, weight]), but got {found}. "
            "Make one with SegBatch(images, labels); the labels of target images are pseudo-labels from a selector."
        )
    return SegBatch(*batch)
