"""Class probabilities times a weight, renormalised over the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from udakit._reduce import BLOCK, is_batched, is_eager_on_cpu, learns, may_look, upcast

Place = tuple[slice, slice, slice]  # images, all classes, pixels


def renormalised(p: Tensor, weight: Tensor) -> Tensor:
    """P times weight, divided by the sum over the classes; `p` where the sum is 0.

    `weight` is a map like `p` (N, C, *space), or has one value for each class, (C, 1, ...), and no gradient.
    """
    if is_eager_on_cpu(p) and type(p) is type(weight) is Tensor and p.numel():
        if learns(p) or learns(weight):
            result: Tensor = _Renormalised.apply(p, weight)
            return result
        return _whole(p, weight)[0]
    p = upcast(p)
    product = p * weight
    total = product.sum(1, keepdim=True)
    empty = total <= 0
    return torch.where(empty, p, product / torch.where(empty, 1, total))


def _whole(p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if p.numel() <= BLOCK:  # a single piece, without its views
        result = p * weight
        total = result.sum(1, keepdim=True)
        _divide_(result, total, p)
        return result, total.flatten(2).squeeze(1)
    maps, weights = _flat(p, weight)
    result, divisor = renormalised_in_pieces(maps, lambda place, _: weights[place])
    return result.view(p.shape), divisor


class _Renormalised(torch.autograd.Function):
    """The same in pieces that stay in the cache of a CPU."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, weight: Tensor) -> Tensor:
        result, divisor = _whole(p, weight)
        ctx.save_for_backward(p, weight, result, divisor)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, weight, result, divisor = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True: in operations that have a derivative
            return _slopes(p, weight, grad, *ctx.needs_input_grad)
        maps, weights = _flat(p, weight)
        results, grads = result.flatten(2), grad.reshape(maps.shape)
        of_p, of_weight = (
            torch.empty_like(maps, dtype=x.dtype) if wanted else None
            for x, wanted in zip((p, weight), ctx.needs_input_grad, strict=True)
        )
        divisor = divisor.unsqueeze(1)
        for place in _pieces(maps):
            g, total = grads[place], divisor[place]
            # Written where the result belongs, unless that is of a half type.
            slope = None if of_p is None or of_p.dtype != g.dtype else of_p[place]
            slope = torch.mul(g, results[place], out=slope)
            torch.sub(g, slope.sum(1, keepdim=True), out=slope).div_(total)  # 0 where the result is `p` itself
            if of_weight is not None:
                torch.mul(slope, maps[place], out=of_weight[place])
            if of_p is not None:
                slope.mul_(weights[place])
                if not may_look(maps) or not bool(total.amax() < torch.inf):
                    slope.addcmul_(g, (total == torch.inf).to(g.dtype))
                if of_p.dtype != g.dtype:
                    of_p[place] = slope
        return tuple(None if x is None else x.view(p.shape) for x in (of_p, of_weight))  # type: ignore[return-value]


def renormalised_in_pieces(maps: Tensor, weight: Callable[[Place, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The result for maps (N, C, P), and the sums (N, P) that divided it, +inf where nothing did.

    `weight(place, out)` gives the weights of a piece, in the dtype of the result; it may write them to `out`.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)
    result = torch.empty_like(maps, dtype=dtype, memory_format=torch.contiguous_format)
    divisor = maps.new_empty(len(maps), 1, maps.shape[2], dtype=dtype)
    for place in _pieces(maps):
        z, out, total = maps[place], result[place], divisor[place]
        w = weight(place, out)
        if z.dtype == dtype or w is out:
            torch.mul(z, w, out=out)
        else:  # a product of two dtypes is slower than a copy and a product of one
            out.copy_(z).mul_(w)
        torch.sum(out, 1, keepdim=True, out=total)
        _divide_(out, total, z)
    return result, divisor.squeeze(1)


def _divide_(product: Tensor, total: Tensor, p: Tensor) -> None:
    """Divide by the total, or where it is 0 take `p` and change the total to +inf."""
    if may_look(product) and bool(total.amin() > 0):  # a CPU waits for nothing to look, and a pass is saved
        product.div_(total)
    else:
        empty = total <= 0
        product.div_(total.masked_fill_(empty, torch.inf)).addcmul_(p, empty.to(product.dtype))


def _slopes(
    p: Tensor, weight: Tensor, grad: Tensor, of_p: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `p` and of a map of weights."""
    half, p = p.dtype, upcast(p)
    total = (p * weight).sum(1, keepdim=True)
    empty = total <= 0
    total = torch.where(empty, torch.inf, total)
    common = (grad - (grad * p * weight / total).sum(1, keepdim=True)) / total
    return torch.where(empty, grad, common * weight).to(half) if of_p else None, common * p if of_weight else None


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
