"""Where our own passes and backward functions may run: on large maps on the CPU, and not under every transform."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LARGE = 2**17  # number of elements from which our own passes on the CPU are faster than torch's operators
SMALL = 2**12  # the same for operations on bits
LOOK = 2**12  # number of elements from which on a pass takes longer than to look whether it is needed

_BATCHED = torch._C._dispatch_key_parse("Batched")


def is_large(x: Tensor, times: int = 1) -> bool:
    """Whether blocks, or operations on bits, are faster than torch's operators: for large maps on the CPU.

    `times` is for an operation that gains by them only in a map so many times as large as others do.

    On a GPU each block is a launch, a compiler fuses the operators, and `torch.func` and forward-mode differentiation
    have no rules for our own code.
    """
    return x.numel() >= times * LARGE and is_eager_on_cpu(x)


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether memory may be addressed as it lies: on the CPU, without a compiler and without `torch.func`."""
    return is_run_on_cpu(x) and not is_transformed()


def may_look(x: Tensor) -> bool:
    """Whether to read a value of `x` in order to save a pass over it; on a CPU nobody waits for that."""
    # In this order: a compiler would make a graph for each side of the second comparison.
    return not torch.compiler.is_compiling() and x.numel() >= LOOK and type(x) is Tensor and is_eager_on_cpu(x)


def is_run_on_cpu(x: Tensor) -> bool:
    """Whether the CPU runs each operator when it is called, so that blocks which fit its cache are faster."""
    return x.is_cpu and not torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether `torch.func.vmap`, `grad` or `jvp` runs, or forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether `x` is many gradients at once (`is_grads_batched=True`, a vectorized Jacobian), which have no bits."""
    return torch._C._dispatch_keys(x).has(_BATCHED)


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
