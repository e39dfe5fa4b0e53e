"""Reduce the loss of every pixel to a mean, and the names of the options that all losses share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from udakit._checks import check_option
from udakit._reduce.eager import may_look
from udakit._reduce.masks import select

Reduction = Literal["mean", "mean_all", "sum", "none"]
# Defined here and not in the functions, because torch.compile of torch 2.5 does not trace get_args.
REDUCTIONS = get_args(Reduction)
Kind = Literal["logits", "probabilities"]
KINDS = get_args(Kind)


def check_reduction(reduction: str) -> None:
    """Raise unless `reduction` is one of the four."""
    check_option("reduction", reduction, REDUCTIONS)


def reduce_pixels(
    loss: Tensor,
    valid: Tensor | None = None,
    *,
    pixel_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    zeroed: bool = False,
) -> Tensor:
    """Reduce a per-pixel (or per-anchor, per-image) loss; `valid` and `pixel_weight` have its shape.

    Invalid entries become exactly 0 with zero gradient. "mean" divides by the number of valid entries and "mean_all" by
    the number of all entries; `pixel_weight` does not change the divisor. Without any valid entry, the result is 0 with
    a graph. NaN and infinity at invalid entries do not reach the value, and `guard` keeps them out of the gradient.
    `zeroed` says that `loss` is already 0 there, which saves a pass in each direction. With "none" the pass hides what
    arrives there from above, since 0 times NaN is NaN.
    """
    if pixel_weight is not None:
        pixel_weight = pixel_weight.to(loss.dtype)
        looks = zeroed and valid is not None and reduction != "none"
        if looks and type(pixel_weight) is Tensor and may_look(loss):
            total = (loss * pixel_weight).sum()
            if math.isfinite(float(total.detach())):  # 0 times a weight that is not finite would be NaN
                return divided(total, loss.shape, valid, reduction)
        loss = loss * (pixel_weight if valid is None else select(valid, pixel_weight))
    if valid is not None and (not zeroed or reduction == "none"):
        loss = select(valid, loss)
    if reduction == "none":
        return loss
    return divided(loss.sum(), loss.shape, valid, reduction)


def divided(total: Tensor, shape: Sequence[int], valid: Tensor | None, reduction: Reduction) -> Tensor:
    """The sum of a loss of this shape, which is that of `valid`, divided as `reduction` says."""
    if reduction == "sum":
        return total
    if reduction == "mean_all" or valid is None:
        return total / max(math.prod(shape), 1)
    return total / valid.sum().clamp_min(1)
