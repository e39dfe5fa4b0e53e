"""Numerics that every part shares: precision of the arithmetic, and the one place where pixels become a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from udakit._checks import check_option

Reduction = Literal["mean", "mean_all", "sum", "none"]
# Named here and not in the functions: torch.compile of torch 2.5 does not trace get_args.
REDUCTIONS = get_args(Reduction)
Kind = Literal["logits", "probabilities"]
KINDS = get_args(Kind)
# Exponents in units of log 2: on the CPU exp2 takes a third of the time of exp, and no longer where it underflows.
LOG_2 = math.log(2)


def upcast(x: Tensor) -> Tensor:
    """Float32 at least: float16 and bfloat16 go up, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exp_(x: Tensor) -> Tensor:
    """`x.exp_()`, on the CPU by way of `exp2_`; a GPU would only pay for the extra pass."""
    return x.mul_(1 / LOG_2).exp2_() if x.device.type == "cpu" else x.exp_()


def plain(x: Tensor) -> Tensor:
    """The tensor without its subclass (MetaTensor, tv_tensors), for code that makes memory like it or calls operators.

    Such a class may give `new_empty` other arguments, and runs Python code at every operation. What dispatches below
    autograd (fake tensors, DTensor) stays as it is.
    """
    kind = type(x)
    if kind is Tensor or torch.compiler.is_compiling() or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


def interpolate(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Linear interpolation of (N, C, *space) to `size`, by the name that it has for one, two or three axes."""
    return F.interpolate(x, tuple(size), mode=_LINEAR[x.ndim], align_corners=align_corners)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off on the device of `x`, so that a matmul of upcast tensors is not cast down again."""
    return torch.autocast(x.device.type, enabled=False)


BLOCK = 2**18  # elements of a class map worked on at once on the CPU: small enough to stay in the cache


def top_class(scores: Tensor) -> Tensor:
    """`scores.argmax(dim=1)`, (N, *space) of (N, C, *space)."""
    if by_blocks(scores):
        return top_by_blocks(scores, confidence=False)[0]
    return scores.max(dim=1).indices  # twice as fast as `argmax` on the CPU


def by_blocks(scores: Tensor) -> bool:
    """Whether `top_by_blocks` is quicker than `max`, which looks at one element after another on the CPU."""
    large = scores.numel() >= LARGE and scores.shape[1] <= 255
    return large and scores.device.type == "cpu" and not torch.compiler.is_compiling()


def top_by_blocks(scores: Tensor, *, confidence: bool) -> tuple[Tensor, Tensor]:
    """Arg-max class and, where asked, the softmax there; else the largest score. For the CPU, in pieces.

    The largest score comes from a vectorised maximum, its class from a minimum of bytes: c where the class has that
    score, 255 where it has less. A pixel with a NaN has class 0.
    """
    maps = plain(scores.detach()).flatten(2)
    n, c, size = maps.shape
    labels, top = maps.new_empty((n, size), dtype=torch.int64), upcast(maps[:, 0]).new_empty((n, size))
    ids = torch.arange(c, dtype=torch.uint8, device=maps.device).unsqueeze(1)
    pixels = max(BLOCK // c, 1)
    buffer = top.new_empty(c * min(pixels, size))  # fresh memory a block would cost more than the arithmetic
    bits = maps.new_empty(buffer.shape, dtype=torch.bool)
    for i in range(n):
        for j in range(0, size, pixels):
            z = upcast(maps[i, :, j : j + pixels])
            most = top[i, j : j + pixels]
            torch.amax(z, dim=0, out=most)
            lower = torch.lt(z, most, out=bits[: z.numel()].view(z.shape)).view(torch.uint8)
            labels[i, j : j + pixels] = lower.mul_(255).bitwise_or_(ids).amin(0)
            if confidence:
                # The softmax at its largest entry: exact at any magnitude, unlike exp(max - logsumexp).
                shifted = torch.sub(z, most, out=buffer[: z.numel()].view(z.shape))
                torch.sum(exp_(shifted), dim=0, out=most).reciprocal_()
    space = scores.shape[2:]
    return labels.view(n, *space), top.view(n, *space)


def count_ids(ids: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs, int64 (`bincount` would make a GPU wait); other ids are an error."""
    counts = torch.zeros(bins, dtype=torch.int64, device=ids.device)
    if ids.device.type != "cpu" and not torch.compiler.is_compiling():
        return counts.scatter_(0, ids.flatten(), 1, reduce="add")  # a launch less
    one = torch.ones((), dtype=torch.int64, device=ids.device)  # expanded: a map of ones is a pass over memory
    return counts.scatter_add_(0, ids.flatten(), one.expand(ids.numel()))


def class_ids(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels as int64 ids 0..C-1; whatever is no class, ignored pixels and unknown ids, shares C."""
    labels = labels.long()
    ids = torch.where(labels.clamp(0, num_classes - 1) == labels, labels, num_classes)
    return torch.where(labels == ignore_index, num_classes, ids) if 0 <= ignore_index < num_classes else ids


LARGE = 2**17  # elements from which on `select` is quicker by bits than by branches
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def select(mask: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
    """`torch.where(mask, x, other)`, to the last bit; `other=None` is 0.

    On the CPU `torch.where` is a branch at every element, five times slower where a large mask is ragged. Arithmetic,
    m x + (1 - m) y, would let a NaN of the side that was not taken through. Operations on bits do not.
    """
    small = x.numel() < LARGE
    pair = x.dtype if other is None else torch.promote_types(x.dtype, other.dtype)
    if small or x.device.type != "cpu" or torch.compiler.is_compiling() or pair.itemsize not in _BITS:
        return torch.where(mask, x, 0 if other is None else other)
    x, other = x.to(pair), None if other is None else other.to(pair)
    selected: Tensor = _Select.apply(mask, x, other)
    return selected


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(mask: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
        bits = _BITS[x.itemsize]
        ones = mask.to(bits).neg_()  # -1 has all bits set
        if other is None:
            return torch.bitwise_and(x.view(bits), ones).view(x.dtype)
        rest = other.view(bits)
        return torch.bitwise_xor(x.view(bits), rest).bitwise_and_(ones).bitwise_xor_(rest).view(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        _, wants_x, wants_other = ctx.needs_input_grad
        return None, select(mask, grad) if wants_x else None, select(~mask, grad) if wants_other else None


def zero_where_not_(mask: Tensor, x: Tensor) -> Tensor:
    """`x` with exactly 0 where the mask is not, NaN or not, in the memory of `x`, which must be the caller's own."""
    if any(stride == 0 and side > 1 for stride, side in zip(x.stride(), x.shape, strict=True)):
        return select(mask, x)  # an expanded tensor has no memory of its own for each element
    if x.device.type == "cpu" and x.itemsize in _BITS:
        bits = _BITS[x.itemsize]
        x.view(bits).bitwise_and_(mask.to(bits).neg_())
        return x
    return x.masked_fill_(~mask, 0)


def guard(x: Tensor, valid: Tensor | None) -> Tensor:
    """`x` (N, C, *space), to which no gradient comes back from pixels that are not valid.

    There 0 times the derivative at a NaN or an infinity would be NaN. The value is hidden by `reduce_pixels`; taking
    the pixel out before the arithmetic would cost a pass over the map on the way there as well.
    """
    if valid is None or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    if x.numel() < LARGE or torch.compiler.is_compiling():  # a pass over a small map is less than a call of Python code
        return torch.where(valid.unsqueeze(1), x, 0)
    guarded: Tensor = _Guard.apply(x, valid)
    return guarded


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, valid: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mask = ctx.saved_tensors[0].unsqueeze(1)
        if torch.is_grad_enabled():  # create_graph=True: others hold this gradient
            return select(mask, grad), None
        # Only the loss itself has seen what `guard` returned, so its gradient is memory that nobody else holds.
        return zero_where_not_(mask, grad), None


def check_reduction(reduction: str) -> None:
    """Raise for a `reduction` that is not one of the four."""
    check_option("reduction", reduction, REDUCTIONS)


def reduce_pixels(
    loss: Tensor,
    valid: Tensor | None = None,
    *,
    pixel_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    zeroed: bool = False,
) -> Tensor:
    """Reduce a per-pixel (or per-anchor, per-image) loss.

    Invalid entries become exactly 0 with zero gradient. "mean" divides by the number of valid entries, "mean_all" by
    all of them; a `pixel_weight` enters the numerator only. With nothing valid the result is 0 with a graph attached.
    What is not finite at an invalid entry stays out of the value. `guard` keeps it out of the gradient. `zeroed` says
    that `loss` already is 0 there, which saves a pass each way.
    """
    check_reduction(reduction)
    if pixel_weight is not None:
        pixel_weight = pixel_weight.to(loss.dtype)
        loss = loss * (pixel_weight if valid is None else select(valid, pixel_weight))
    if valid is not None and not zeroed:
        loss = select(valid, loss)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean_all" or valid is None:
        return loss.sum() / max(loss.numel(), 1)
    return loss.sum() / valid.expand_as(loss).sum().clamp_min(1)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The `once_differentiable` of torch that also minds what `backward` keeps.

    Its own looks at the incoming gradient alone, and where that is a constant a second derivative would silently be 0.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            grads = tuple(None if g is None else g.detach().requires_grad_() for g in grads)
        return once(ctx, *grads)

    return guarded
