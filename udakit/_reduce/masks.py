"""Set pixels that are not valid to 0, in values and in gradients, also where they are NaN."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit._reduce import eager
from udakit._reduce.eager import is_batched, is_eager_on_cpu, is_transformed, may_look

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def select(mask: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
    """`torch.where(mask, x, other)`, bit for bit; `other=None` is 0.

    On the CPU, `torch.where` branches at every element, which is five times slower for a large ragged mask. The
    arithmetic m x + (1 - m) y would let a NaN of the other side through. Operations on bits do not.
    """
    pair = x.dtype if other is None else torch.promote_types(x.dtype, other.dtype)
    by_bits = x.numel() >= eager.SMALL and is_eager_on_cpu(x) and pair.itemsize in _BITS
    if not by_bits or not _has_bits(x) or not (other is None or _has_bits(other)):
        return torch.where(mask, x, 0 if other is None else other)
    x, other = x.to(pair), None if other is None else other.to(pair)
    recorded = learns(x) or (other is not None and learns(other))
    selected: Tensor = _Select.apply(mask, x, other) if recorded else _selected(mask, x, other)
    return selected


def _has_bits(x: Tensor) -> bool:
    """Whether the memory of `x` holds its numbers: not those of a negated view, nor many gradients at once."""
    return not (x.is_neg() or is_batched(x))


def _selected(mask: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    bits = x.view(_BITS[x.itemsize])
    if other is None:
        return (bits * mask if x.itemsize < 8 else torch.bitwise_and(bits, _ones(mask))).view(x.dtype)
    rest = other.view(bits.dtype)
    return _mask_(torch.bitwise_xor(bits, rest), mask).bitwise_xor_(rest).view(x.dtype)


def _mask_(bits: Tensor, mask: Tensor) -> Tensor:
    """Set integers to 0 where the mask is False, in place."""
    return bits.mul_(mask) if bits.itemsize < 8 else bits.bitwise_and_(_ones(mask))


def _ones(mask: Tensor) -> Tensor:
    """-1, in which all bits are set, where the mask is True: for 8 bytes there is no fast product."""
    return mask.long().neg_()


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return _selected(mask, x, other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        _, wants_x, wants_other = ctx.needs_input_grad
        return None, select(mask, grad) if wants_x else None, select(~mask, grad) if wants_other else None


def zero_where_not_(mask: Tensor, x: Tensor) -> Tensor:
    """Set `x` to exactly 0 where the mask is False, even at NaN, in place; the memory of `x` must be the caller's."""
    shared = not x.is_contiguous() and any(n > 1 and not step for step, n in zip(x.stride(), x.shape, strict=True))
    if shared or (x.is_cpu and not torch.compiler.is_compiling() and not _has_bits(x)):
        return select(mask, x)  # the elements of an expanded tensor share memory
    if x.device.type == "cpu" and x.itemsize in _BITS:  # also without NaN, and fewer calls
        _mask_(x.view(_BITS[x.itemsize]), mask)
        return x
    return x.masked_fill_(~mask, 0)


def learns(x: Tensor) -> bool:
    """Whether autograd records what is computed from `x`; where not, an own function of autograd is only a detour."""
    # In this order: torch 2.5 cannot compile the latter in a backward pass.
    return torch.is_grad_enabled() and x.requires_grad


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


def softmax_where(valid: Tensor | None, x: Tensor, *, log: bool = False, only_nan: bool = False) -> tuple[Tensor, bool]:
    """`F.softmax(x, dim=1)`, or its log, without gradients from pixels that are not valid; and whether it is 0 there.

    The result is set to 0 at these pixels where that is quicker than `guard`. The backward pass reads the result and
    not the logits, so a gradient that is 0 there stays 0, even where the logits are NaN. `only_nan` says that the
    gradient which arrives there is 0 unless the result is NaN, so that a map without NaN may stay as it is.
    """
    function = F.log_softmax if log else F.softmax
    if valid is None or not learns(x):
        return function(x, dim=1), False
    if not is_eager_on_cpu(x) or _saves_elsewhere():
        return function(guard(x, valid), dim=1), False
    result = function(x, dim=1)
    if only_nan and may_look(x) and not has_nan(result):
        return result, False
    zero_where_not_(valid.unsqueeze(1), result.data)  # `.data`, because autograd is meant to use what is written
    return result, True


def has_nan(softmax: Tensor) -> bool:
    """Whether a softmax over axis 1, or its log, has a NaN: where one class has it, the first has it as well."""
    return math.isnan(float(softmax.detach()[:, 0].sum()))


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
