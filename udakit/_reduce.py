"""Numerics that every part shares: precision of the arithmetic, and the one place where pixels become a mean."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch
from torch import Tensor

from udakit._checks import check_option

Reduction = Literal["mean", "mean_all", "sum", "none"]


def upcast(x: Tensor) -> Tensor:
    """Float32 at least: float16 and bfloat16 go up, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off on the device of `x`, so that a matmul of upcast tensors is not cast down again."""
    return torch.autocast(x.device.type, enabled=False)


def check_reduction(reduction: str) -> None:
    """Raise for a `reduction` that is not one of the four."""
    check_option("reduction", reduction, get_args(Reduction))


def reduce_pixels(
    loss: Tensor, valid: Tensor | None = None, *, pixel_weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Reduce a per-pixel (or per-anchor, per-image) loss.

    Invalid entries become exactly 0 with zero gradient. "mean" divides by the number of valid entries, "mean_all" by
    all of them; a `pixel_weight` enters the numerator only. With nothing valid the result is 0 with a graph attached.
    The loss must be finite at invalid entries: `torch.where` hides a value, not the gradient of a NaN.
    """
    check_reduction(reduction)
    if pixel_weight is not None:
        loss = loss * pixel_weight.to(loss.dtype)
    if valid is not None:
        loss = torch.where(valid, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean_all" or valid is None:
        return loss.sum() / max(loss.numel(), 1)
    return loss.sum() / valid.expand_as(loss).sum().clamp_min(1)
