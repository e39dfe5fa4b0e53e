"""The mean feature of each class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from udakit._checks import check_flag, check_ignore_index, check_integer, check_labels_like, check_maps
from udakit._reduce import class_ids, full_precision, plain, upcast
from udakit.prototypes._distances import in_pieces, pieces

__all__ = ["class_means"]


def class_means(
    features: Float[Tensor, "n d *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    num_classes: int,
    per_image: bool = False,
    min_pixels: int = 1,
    ignore_index: int = 255,
) -> tuple[Float[Tensor, "*n c d"], Int64[Tensor, "*n c"]]:
    r"""Mean feature of each class, over the batch or per image.

    $$v_c = \frac{1}{|P_c|} \sum_{p \in P_c} f_p, \qquad P_c = \{p : y_p = c\}$$

    **Convention.** Sums run in float32 at least. Ignored pixels and ids outside 0..C-1 take no part, whatever
    the features are there. A class of fewer
    than `min_pixels` pixels has the mean 0 and no gradient, but its true count. Gradients flow to the features.

    **Source.** DiGA asks for 5 pixels of a class in an image.

    Args:
        features: (N, D, *space), any float dtype.
        labels: (N, *space), at the features' size: `udakit.downscale_labels` or `udakit.resize_labels` bring them
            there.
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
    check_flag("per_image", per_image)
    check_ignore_index(ignore_index, num_classes)
    check_maps("features", features, "N, D")
    check_labels_like(labels, features, reference_name="features")
    sums, counts = class_sums(features, labels, num_classes, ignore_index)
    if not per_image:
        sums, counts = sums.sum(0), counts.sum(0)
    return means_of(sums, counts, min_pixels), counts


def class_sums(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sums (N, C, D) and counts (N, C). The one-hot matrix product reads the features once, whatever C is."""
    features, labels = plain(features), plain(labels)
    ids = class_ids(labels, num_classes, ignore_index).flatten(1)
    counts = ids.new_zeros(len(ids), num_classes + 1).scatter_add(1, ids, torch.ones_like(ids))
    sums: Tensor = _SumMembers.apply(features.flatten(2), ids, num_classes)
    return sums, counts[:, :num_classes]


class _SumMembers(torch.autograd.Function):
    """Sums (N, C, D) of the pixels (N, D, P) of each class, in float32 at least; `ids` (N, P) are C for no class.

    What is in no class is set to 0 before the product: 0 times a NaN would poison every class. Written out for its
    backward: it stays in full precision under autocast, and keeps ids instead of their one-hot map.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_classes, ctx.dtype = num_classes, values.dtype
        with full_precision(values):
            if in_pieces(values):
                return _sums_in_pieces(values, ids, num_classes)
            members = torch.where((ids < num_classes).unsqueeze(1), upcast(values), 0)
            return torch.bmm(_one_hot(ids, num_classes, members.dtype), members.transpose(1, 2))[:, :num_classes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        rows = F.pad(gradient, (0, 0, 0, 1)).transpose(1, 2).contiguous().to(ctx.dtype)
        return rows.gather(2, ids.unsqueeze(1).expand(-1, rows.shape[1], -1)), None, None


def _sums_in_pieces(values: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """The masked copy of a piece stays in a CPU's cache, so that masking reads no map twice."""
    n, d, _ = values.shape
    step, parts = pieces(values)
    members = torch.empty(d, step, dtype=upcast(values[:0]).dtype, device=values.device)
    sums = members.new_zeros(n, num_classes + 1, d)
    bits = torch.int64 if members.dtype == torch.float64 else torch.int32
    ones = (ids < num_classes).to(bits).neg_()  # -1 has all bits set
    rows = _one_hot(ids, num_classes, members.dtype)
    for k, at in parts:
        x, own = values[k, :, at], members[:, : at.stop - at.start]
        x = x if x.dtype == own.dtype else own.copy_(x)
        torch.bitwise_and(x.view(bits), ones[k, at], out=own.view(bits))
        sums[k].addmm_(rows[k, :, at], own.T)
    return sums[:, :num_classes]


def _one_hot(ids: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(N, C + 1, P) of ids (N, P)."""
    n, pixels = ids.shape
    rows = torch.zeros(n, num_classes + 1, pixels, dtype=dtype, device=ids.device)
    return rows.scatter_(1, ids.unsqueeze(1), 1)


def means_of(sums: Tensor, counts: Tensor, min_pixels: int) -> Tensor:
    enough = (counts >= min_pixels).unsqueeze(-1)
    return torch.where(enough, sums / counts.clamp_min(1).unsqueeze(-1), 0)
