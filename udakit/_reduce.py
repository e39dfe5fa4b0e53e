"""Numerics that all parts share: the precision of the arithmetic, and the reduction of pixels to a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from udakit._checks import check_option, shape_of

Reduction = Literal["mean", "mean_all", "sum", "none"]
# Defined here and not in the functions, because torch.compile of torch 2.5 does not trace get_args.
REDUCTIONS = get_args(Reduction)
Kind = Literal["logits", "probabilities"]
KINDS = get_args(Kind)
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


BLOCK = 2**18  # elements of a class map processed at once on the CPU; they fit the cache


def top_class(scores: Tensor) -> Tensor:
    """`scores.argmax(dim=1)`, (N, *space) of (N, C, *space)."""
    if by_blocks(scores):
        return top_by_blocks(scores, confidence=False)[0]
    return scores.max(dim=1).indices  # twice as fast as `argmax` on the CPU


def by_blocks(scores: Tensor) -> bool:
    """Whether `top_by_blocks` is faster than `max`, which is not vectorised on the CPU."""
    return is_large(scores) and scores.shape[1] <= 255


def top_by_blocks(scores: Tensor, *, confidence: bool) -> tuple[Tensor, Tensor]:
    """The arg-max class, and with `confidence` its softmax, otherwise its score; for the CPU, in pieces.

    The largest score comes from a vectorised maximum. Its class comes from a minimum over bytes, which are c where
    class c has that score and 255 elsewhere. A pixel with a NaN has class 0.
    """
    maps = plain(scores.detach()).flatten(2)
    n, c, size = maps.shape
    labels, top = maps.new_empty((n, size), dtype=torch.int64), upcast(maps[:, 0]).new_empty((n, size))
    ids = torch.arange(c, dtype=torch.uint8, device=maps.device).unsqueeze(1)
    pixels = max(BLOCK // c, 1)
    buffer = top.new_empty(c * min(pixels, size))  # allocating for each block would cost more than the arithmetic
    bits = maps.new_empty(buffer.shape, dtype=torch.bool)
    for i in range(n):
        for j in range(0, size, pixels):
            z = upcast(maps[i, :, j : j + pixels])
            most = top[i, j : j + pixels]
            torch.amax(z, dim=0, out=most)
            lower = torch.lt(z, most, out=bits[: z.numel()].view(z.shape)).view(torch.uint8)
            labels[i, j : j + pixels] = lower.mul_(255).bitwise_or_(ids).amin(0)
            if confidence:
                # The softmax at its largest entry. It is exact at any magnitude, unlike exp(max - logsumexp).
                shifted = torch.sub(z, most, out=buffer[: z.numel()].view(z.shape))
                torch.sum(exp_(shifted), dim=0, out=most).reciprocal_()
    space = scores.shape[2:]
    return labels.view(n, *space), top.view(n, *space)


def count_ids(ids: Tensor, bins: int) -> Tensor:
    """Count each of 0..bins-1, int64; other ids are an error. `bincount` would make a GPU wait."""
    counts = torch.zeros(bins, dtype=torch.int64, device=ids.device)
    if ids.device.type != "cpu" and not torch.compiler.is_compiling():
        return counts.scatter_(0, ids.flatten(), 1, reduce="add")  # saves a launch
    one = torch.ones((), dtype=torch.int64, device=ids.device)  # a map of ones would be a pass over memory
    return counts.scatter_add_(0, ids.flatten(), one.expand(ids.numel()))


def divisor(count: int, length: int) -> int:
    """The largest number up to 512 of equal parts of `count`, each of at least `length`; 1 if there is none.

    Compiled, it is 32 or 1: with `count` dynamic, each number that is tried is a condition of the graph, and each
    result is another graph.
    """
    if torch.compiler.is_compiling():
        return 32 if count >= 32 * length and count % 32 == 0 else 1
    return next((parts for parts in range(min(count // length, 512), 1, -1) if count % parts == 0), 1)


def cut_evenly(count: int, length: int) -> tuple[int, int]:
    """A number of equal parts of about `length`, and how much must be added to `count` for that.

    Nothing is added where `divisor` finds half of the parts that we want, or more. Compiled, it never is.
    """
    parts, wanted = divisor(count, length), min(count // max(length, 1), 512)
    if torch.compiler.is_compiling() or 2 * parts >= wanted:
        return parts, 0
    return wanted, -count % wanted


def class_ids(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels as int64 ids 0..C-1; ignored pixels and unknown ids become C."""
    labels = labels.long()
    ids = torch.where(labels.clamp(0, num_classes - 1) == labels, labels, num_classes)
    return torch.where(labels == ignore_index, num_classes, ids) if 0 <= ignore_index < num_classes else ids


def look_up(values: Tensor, ids: Tensor) -> Tensor:
    """`values[ids]` of (C,) and a map of ids, in a sixth of the time on the CPU."""
    return values.index_select(0, ids.flatten()).view(ids.shape)


LARGE = 2**17  # number of elements from which our own passes on the CPU are faster than torch's operators
SMALL = 2**14  # the same for operations on bits that autograd does not record
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_large(x: Tensor, times: int = 1) -> bool:
    """Whether blocks, or operations on bits, are faster than torch's operators: for large maps on the CPU.

    `times` is for an operation that gains by them only in a map so many times as large as others do.

    On a GPU each block is a launch, a compiler fuses the operators, and `torch.func` and forward-mode differentiation
    have no rules for our own code.
    """
    return x.numel() >= times * LARGE and is_eager_on_cpu(x)


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether memory may be addressed as it lies: on the CPU, without a compiler and without `torch.func`."""
    return not torch.compiler.is_compiling() and x.is_cpu and not is_transformed()


def is_transformed() -> bool:
    """Whether `torch.func.vmap`, `grad` or `jvp` runs, or forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_transforms(x: Tensor, *, vmap: bool = False) -> None:
    """Raise where our own code has no rules: in forward mode, under `torch.func.grad`, and with `vmap` under that.

    torch would let an operator drop a tangent without a word, and its errors would be about our code.
    """
    if not is_transformed():
        return
    kinds = torch._C._functorch.TransformType
    refused = [kinds.Grad, kinds.Jvp, kinds.Vmap] if vmap else [kinds.Grad]
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
    if dual or any(level.key() in refused for level in torch._C._functorch.get_interpreter_stack() or ()):
        raise NotImplementedError(
            "Forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) and torch.func.grad, vjp"
            f"{', vmap' if vmap else ''} and jacrev are not implemented for this function. Use torch.autograd.grad or "
            ".backward()."
        )


def select(mask: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
    """`torch.where(mask, x, other)`, bit for bit; `other=None` is 0.

    On the CPU, `torch.where` branches at every element, which is five times slower for a large ragged mask. The
    arithmetic m x + (1 - m) y would let a NaN of the other side through. Operations on bits do not.
    """
    pair = x.dtype if other is None else torch.promote_types(x.dtype, other.dtype)
    recorded = learns(x) or (other is not None and learns(other))
    if x.numel() < (LARGE if recorded else SMALL) or not is_eager_on_cpu(x) or pair.itemsize not in _BITS:
        return torch.where(mask, x, 0 if other is None else other)
    x, other = x.to(pair), None if other is None else other.to(pair)
    selected: Tensor = _Select.apply(mask, x, other) if recorded else _selected(mask, x, other)
    return selected


def _selected(mask: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    bits = _BITS[x.itemsize]
    if other is None and x.itemsize < 8:  # for 8 bytes there is no fast product
        return (x.view(bits) * mask).view(x.dtype)
    ones = mask.to(bits).neg_()  # in -1 all bits are set
    if other is None:
        return torch.bitwise_and(x.view(bits), ones).view(x.dtype)
    rest = other.view(bits)
    return torch.bitwise_xor(x.view(bits), rest).bitwise_and_(ones).bitwise_xor_(rest).view(x.dtype)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(mask: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
        return _selected(mask, x, other)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        _, wants_x, wants_other = ctx.needs_input_grad
        return None, select(mask, grad) if wants_x else None, select(~mask, grad) if wants_other else None


def zero_where_not_(mask: Tensor, x: Tensor) -> Tensor:
    """Set `x` to exactly 0 where the mask is False, even at NaN, in place; the memory of `x` must be the caller's."""
    if not x.is_contiguous() and any(n > 1 and not step for step, n in zip(x.stride(), x.shape, strict=True)):
        return select(mask, x)  # the elements of an expanded tensor share memory
    if x.device.type == "cpu" and x.itemsize in _BITS:
        bits = _BITS[x.itemsize]
        if x.itemsize == 8:
            x.view(bits).bitwise_and_(mask.to(bits).neg_())
        else:  # also without NaN, and fewer calls; for 8 bytes there is no fast product
            x.view(bits).mul_(mask)
        return x
    return x.masked_fill_(~mask, 0)


def learns(x: Tensor) -> bool:
    """Whether autograd records what is computed from `x`; where not, an own function of autograd is only a detour."""
    return x.requires_grad and torch.is_grad_enabled()


def guard(x: Tensor, valid: Tensor | None) -> Tensor:
    """`x` (N, C, *space), without gradients from pixels that are not valid.

    At such a pixel, 0 times the derivative at a NaN or an infinity would be NaN. `reduce_pixels` hides the value.
    Removing the pixel before the arithmetic would cost a pass over the map in the forward pass as well.
    """
    if valid is None or not learns(x):
        return x
    if torch.compiler.is_compiling():
        guarded: Tensor = _CompiledGuard.apply(x, valid)
        return guarded
    if is_transformed():
        return torch.where(valid.unsqueeze(1), x, 0)
    guarded = x.view_as(x)
    guarded.register_hook(partial(_zeroed, valid))  # type: ignore[no-untyped-call]  # quicker than a Function
    return guarded


def _zeroed(valid: Tensor, grad: Tensor | None) -> Tensor | None:
    if grad is None:  # torch 2.5 calls the hook of a result that has no gradient
        return None
    mask = valid.unsqueeze(1)
    # create_graph=True: others use this gradient. Otherwise only the loss itself uses the result of `guard`, so nobody
    # else holds the memory of its gradient.
    return select(mask, grad) if torch.is_grad_enabled() else zero_where_not_(mask, grad)


def softmax_where(valid: Tensor | None, x: Tensor, *, log: bool = False) -> tuple[Tensor, bool]:
    """`F.softmax(x, dim=1)`, or its log, without gradients from pixels that are not valid; and whether it is 0 there.

    The result is set to 0 at these pixels where that is quicker than `guard`. The backward pass reads the result and
    not the logits, so a gradient that is 0 there stays 0, even where the logits are NaN.
    """
    function = F.log_softmax if log else F.softmax
    if valid is None or not learns(x):
        return function(x, dim=1), False
    if not is_eager_on_cpu(x) or _saves_elsewhere():
        return function(guard(x, valid), dim=1), False
    result = function(x, dim=1)
    zero_where_not_(valid.unsqueeze(1), result.data)  # `.data`, because autograd is meant to use what is written
    return result, True


# torch before 2.8 does not tell.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _saves_elsewhere() -> bool:
    """Whether hooks may keep a copy of what autograd saves, as `saved_tensors_hooks` and checkpoints do."""
    return _hooks_of_saved_tensors is None or _hooks_of_saved_tensors(True) is not None


class _CompiledGuard(torch.autograd.Function):
    """The same in a form that torch.compile traces. The compiler fuses the `where`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0].unsqueeze(1), grad, 0), None


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
    `zeroed` says that `loss` is already 0 there, which saves a pass in each direction.
    """
    check_reduction(reduction)
    if pixel_weight is not None:
        pixel_weight = pixel_weight.to(loss.dtype)
        loss = loss * (pixel_weight if valid is None else select(valid, pixel_weight))
    if valid is not None and not zeroed:
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


def first_derivative_only(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Refuse a second derivative of `what`, whose backward pass is not made of differentiable operators.

    torch's `once_differentiable` looks only at the incoming gradients: where these are constants, a second derivative
    would silently be 0. It also has no way back to the input, so `torch.autograd.grad` of a sum that contains such a
    gradient would skip the error. Here `ctx.saved_tensors` must contain a tensor that leads back to the input.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def guarded(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            links = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
            one = isinstance(results, Tensor)
            results = [None if x is None else _Once.apply(what, x, *links) for x in ((results,) if one else results)]
            return results[0] if one else tuple(results)

        return guarded

    return decorate


class _Once(torch.autograd.Function):
    """The first tensor, as the derivative of the others that cannot be differentiated."""

    @staticmethod
    def forward(what: str, x: Tensor, *links: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.what = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            f"The second derivative (`create_graph=True`) of {ctx.what} is not implemented. "
            "To run `backward` again on the same graph, use `retain_graph=True`."
        )
