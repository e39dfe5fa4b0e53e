"""Class probabilities times a weight, renormalised over the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from udakit._reduce import BLOCK, is_large, learns

Place = tuple[slice, slice, slice]  # images, all classes, pixels


def renormalised(p: Tensor, weight: Tensor) -> Tensor:
    """P times weight, divided by the sum over the classes; `p` where the sum is 0.

    `weight` is a map like `p` (N, C, *space), or has one value for each class, (C, 1, ...), and no gradient.
    """
    if is_large(p) and type(p) is type(weight) is Tensor:
        run = _Renormalised.apply if learns(p) or learns(weight) else _Renormalised.forward
        result: Tensor = run(p, weight)[0]
        return result
    product = p * weight
    total = product.sum(1, keepdim=True)
    empty = total <= 0
    return torch.where(empty, p, product / torch.where(empty, 1, total))


class _Renormalised(torch.autograd.Function):
    """The same in pieces that stay in the cache of a CPU."""

    @staticmethod
    def forward(p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        maps, weights = _flat(p, weight)
        result, divisor = renormalised_in_pieces(maps, lambda place, _: weights[place])
        return result.view(p.shape), divisor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        p, weight, result, divisor = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: in operations that have a derivative
            return _slopes(p, weight, grad, *ctx.needs_input_grad)
        maps, weights = _flat(p, weight)
        results, grads = result.flatten(2), grad.reshape(maps.shape)
        of_p, of_weight = (torch.empty_like(maps) if wanted else None for wanted in ctx.needs_input_grad)
        divisor = divisor.unsqueeze(1)
        for place in _pieces(maps):
            g, total = grads[place], divisor[place]
            common = g - (g * results[place]).sum(1, keepdim=True)
            common.div_(total)  # 0 where the result is `p` itself
            if of_weight is not None:
                torch.mul(common, maps[place], out=of_weight[place])
            if of_p is not None:
                out = torch.mul(common, weights[place], out=of_p[place])
                out.addcmul_(g, (total == torch.inf).to(g.dtype))
        return tuple(None if x is None else x.view(p.shape) for x in (of_p, of_weight))  # type: ignore[return-value]


def renormalised_in_pieces(maps: Tensor, weight: Callable[[Place, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The result for maps (N, C, P), and the sums (N, P) that divided it, +inf where nothing did.

    `weight(place, out)` gives the weights of a piece; it may write them to `out`.
    """
    result, divisor = torch.empty_like(maps), maps.new_empty(len(maps), 1, maps.shape[2])
    for place in _pieces(maps):
        z, out, total = maps[place], result[place], divisor[place]
        torch.sum(torch.mul(z, weight(place, out), out=out), 1, keepdim=True, out=total)
        empty = total <= 0
        out.div_(total.masked_fill_(empty, torch.inf)).addcmul_(z, empty.to(z.dtype))
    return result, divisor.squeeze(1)


def _slopes(
    p: Tensor, weight: Tensor, grad: Tensor, of_p: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `p` and of a map of weights."""
    total = (p * weight).sum(1, keepdim=True)
    empty = total <= 0
    total = torch.where(empty, torch.inf, total)
    common = (grad - (grad * p * weight / total).sum(1, keepdim=True)) / total
    return torch.where(empty, grad, common * weight) if of_p else None, common * p if of_weight else None


def _flat(p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, C, P)."""
    n, c = p.shape[:2]
    maps = p.reshape(n, c, -1)
    return maps, weight.reshape(n, c, -1) if weight.ndim == p.ndim else weight.reshape(1, c, 1).expand_as(maps)


def _pieces(maps: Tensor) -> Iterator[Place]:
    """Where each piece of maps (N, C, P) lies."""
    n, c, size = maps.shape
    pixels = max(BLOCK // c, 1)
    images = max(pixels // size, 1)
    for i in range(0, n, images):
        for start in range(0, size, pixels):
            yield slice(i, i + images), slice(None), slice(start, start + pixels)
