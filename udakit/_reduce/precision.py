"""Numerics that all parts share: the precision of the arithmetic, and tensors without their subclass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit._checks import shape_of

# Exponents in units of log 2: on the CPU exp2 takes a third of the time of exp, and underflow does not slow it down.
LOG_2 = math.log(2)


def upcast(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exp_(x: Tensor, factor: float = 1.0) -> Tensor:
    """`(factor * x).exp_()` in place, computed with `exp2_` on the CPU; on a GPU a pass for it would not pay off."""
    if x.device.type == "cpu":
        return x.mul_(factor / LOG_2).exp2_()
    return x.exp_() if factor == 1 else x.mul_(factor).exp_()


def plain(x: Tensor) -> Tensor:
    """The tensor without its subclass (MetaTensor, tv_tensors), for code that allocates memory or calls operators.

    Such a class may change the arguments of `new_empty`, and it runs Python code at every operation. Classes that
    dispatch below autograd (fake tensors, DTensor) stay as they are.
    """
    kind = type(x)
    if kind is Tensor or torch.compiler.is_compiling() or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


def interpolate(x: Tensor, size: Sequence[int], *, align_corners: bool = False, name: str = "logits") -> Tensor:
    """Linear interpolation of (N, C, *space) to `size`, for one, two or three spatial axes; `name` is for the error."""
    size = tuple(size)
    if 0 in size:  # F.interpolate refuses it
        return x.flatten(2)[:, :, :0].view(*x.shape[:2], *size)
    if 0 in x.shape[2:]:
        raise ValueError(
            f"Expected `{name}` to have pixels, since they are interpolated to {size}, but got {shape_of(x)}."
        )
    return F.interpolate(x, size, mode=_LINEAR[x.ndim], align_corners=align_corners)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Context without autocast on the device of `x`, so that a matmul of upcast tensors is not cast down again."""
    kind = x.device.type
    # Entering torch's own costs as much as a product of small maps. "meta" has no autocast, and both would raise.
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()
