"""The mean feature of each class."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from udakit._checks import check_float, check_integer, check_labels_like
from udakit._reduce import class_ids, full_precision, upcast

__all__ = ["class_means"]


def class_means(
    features: Float[Tensor, "n d h w"],
    labels: Integer[Tensor, "n h w"],
    *,
    num_classes: int,
    per_image: bool = False,
    min_pixels: int = 1,
    ignore_index: int = 255,
) -> tuple[Float[Tensor, "*n c d"], Int64[Tensor, "*n c"]]:
    r"""Mean feature of each class, over the batch or per image.

    $$v_c = \frac{1}{|P_c|} \sum_{p \in P_c} f_p, \qquad P_c = \{p : y_p = c\}$$

    **Convention.** Sums run in float32 at least. Ignored pixels and ids outside 0..C-1 take no part. A class of fewer
    than `min_pixels` pixels has the mean 0 and no gradient, but its true count. Gradients flow to the features.

    **Source.** DiGA asks for 5 pixels of a class in an image.

    Args:
        features: any float dtype; finite at ignored pixels, too.
        labels: at the features' size (`udakit.downscale_labels` or `udakit.resize_labels` bring them there).
        num_classes: C.
        per_image: one mean per image and class instead of one over the batch.
        min_pixels: pixels that a mean needs.
        ignore_index: the label that takes no part.

    Returns:
        Means (C, D) and counts (C,), or (N, C, D) and (N, C) per image.

    Raises:
        TypeError: `features` that are not float, or `labels` that are neither int64 nor uint8.
        ValueError: sizes that do not match, `num_classes` or `min_pixels` below 1.

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
    check_float("features", features, 4, "(N, D, h, w)")
    check_labels_like(labels, features, reference_name="features")
    sums, counts = class_sums(features, labels, num_classes, ignore_index)
    if not per_image:
        sums, counts = sums.sum(0), counts.sum(0)
    return means_of(sums, counts, min_pixels), counts


def class_sums(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sums (N, C, D) and counts (N, C). The one-hot matrix product reads the features once, whatever C is."""
    ids = class_ids(labels, num_classes, ignore_index).flatten(1)
    counts = ids.new_zeros(len(ids), num_classes + 1).scatter_add(1, ids, torch.ones_like(ids))
    sums: Tensor = _SumMembers.apply(upcast(features).flatten(2), ids, num_classes)
    return sums, counts[:, :num_classes]


class _SumMembers(torch.autograd.Function):
    """Sums (N, C, D) of the pixels (N, D, P) of each class; `ids` (N, P) are 0..C-1, and C for none.

    Written out for its backward: it stays in full precision under autocast, and keeps ids instead of their one-hot map.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_classes = num_classes
        with full_precision(values):
            return torch.bmm(_one_hot(ids, num_classes, values.dtype), values.transpose(1, 2))[:, :num_classes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        with full_precision(gradient):
            member = _one_hot(ids, ctx.num_classes, gradient.dtype)[:, : ctx.num_classes]
            return torch.bmm(gradient.transpose(1, 2).contiguous(), member), None, None


def _one_hot(ids: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(N, C + 1, P) of ids (N, P)."""
    n, pixels = ids.shape
    rows = torch.zeros(n, num_classes + 1, pixels, dtype=dtype, device=ids.device)
    return rows.scatter_(1, ids.unsqueeze(1), 1)


def means_of(sums: Tensor, counts: Tensor, min_pixels: int) -> Tensor:
    enough = (counts >= min_pixels).unsqueeze(-1)
    return torch.where(enough, sums / counts.clamp_min(1).unsqueeze(-1), 0)
