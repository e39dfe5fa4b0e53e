"""The fusion of two scales on the CPU, which reads and writes the crop alone where everything else is 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from udakit._reduce import interpolate, is_batched, learns, upcast
from udakit.resolution.detail import DetailBox, first_cells, takes_slices, window

Otherwise = Callable[[Tensor, Tensor, Tensor, DetailBox], Tensor]


class _Places(NamedTuple):
    """Where the crop of each image lies."""

    size: tuple[int, ...]  # of the result
    sides: tuple[int, ...]  # of a crop in the result
    first: list[tuple[int, ...]]
    cells: tuple[int, ...]  # sides of a crop in the context
    context: list[tuple[int, ...]]


def can_slice(context: Tensor, detail: Tensor, attention: Tensor, box: DetailBox) -> bool:
    """Whether `fused_by_slices` is for these maps."""
    if not takes_slices(box, context, detail, attention) or not context.numel() or not detail.numel():
        return False
    one, other = (torch.promote_types(x.dtype, torch.float32) for x in (context, detail))
    return one == other


def fused_by_slices(context: Tensor, detail: Tensor, attention: Tensor, box: DetailBox, otherwise: Otherwise) -> Tensor:
    """`fuse_scales`. A second derivative is that of the function `otherwise`, which computes the same."""
    cells, sides = tuple(context.shape[2:]), tuple(detail.shape[2:])
    size, crop = size_of(box, sides), crop_of(box, cells)
    places = _Places(size, sides, first_cells(box, size, sides), crop, first_cells(box, cells, crop))
    if not (learns(context) or learns(detail) or learns(attention)):
        return _forward(context, detail, attention, places)[0]
    result: Tensor = _Fused.apply(context, detail, attention, box, places, otherwise)
    return result


def _forward(context: Tensor, detail: Tensor, attention: Tensor, places: _Places) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what its gradient needs: the attention, which is 0 outside of the crop, and upsampled."""
    wide, form = torch.promote_types(context.dtype, torch.float32), _quick_format(context)
    inside = torch.zeros_like(attention, dtype=wide, memory_format=form)
    for to, x, first in zip(inside, attention, places.context, strict=True):
        window(to, first, places.cells).copy_(window(x, first, places.cells))
    result, up = interpolate((1 - inside).mul_(context), places.size), interpolate(inside, places.size)
    result = result.contiguous() if context.is_contiguous() else result
    for to, trust, x, first in zip(result, up, upcast(detail), places.first, strict=True):
        window(to, first, places.sides).addcmul_(window(trust, first, places.sides), x)
    return result, inside, up


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: Tensor, detail: Tensor, attention: Tensor, box: DetailBox, places: _Places, fuse: Otherwise
    ) -> Tensor:
        result, inside, up = _forward(context, detail, attention, places)
        ctx.box, ctx.places, ctx.fuse = box, places, fuse
        ctx.save_for_backward(context, detail, attention, inside, up)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        context, detail, attention, inside, up = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True: in operations that have a derivative
            return (*_slopes(ctx, (context, detail, attention), grad), None, None, None)
        places, (wants_context, wants_detail, wants_attention, *_) = ctx.places, ctx.needs_input_grad
        of_context = of_detail = of_attention = None
        if wants_detail:
            of_detail = torch.empty_like(detail)
            for to, g, trust, first in zip(of_detail, grad, up, places.first, strict=True):
                to.copy_(window(g, first, places.sides) * window(trust, first, places.sides))
        if wants_context or wants_attention:
            form = _quick_format(context)
            of_rest = _downsampled(grad.contiguous(memory_format=form), context.shape)
        if wants_attention:
            of_attention, of_up = torch.zeros_like(attention), torch.zeros_like(grad, memory_format=form)
            for to, g, x, first in zip(of_up, grad, detail, places.first, strict=True):
                torch.mul(window(g, first, places.sides), x, out=window(to, first, places.sides))
            parts = of_attention, _downsampled(of_up, context.shape), of_rest, context
            for *images, first in zip(*parts, places.context, strict=True):
                to, slope, rest, x = (window(image, first, places.cells) for image in images)
                to.copy_(slope.addcmul_(rest, x, value=-1))
        if wants_context:
            of_context = torch.empty_like(context).copy_(of_rest.mul_(1 - inside))
        return of_context, of_detail, of_attention, None, None, None


def _slopes(ctx: Any, maps: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradients, in operations that have a derivative."""
    wanted = ctx.needs_input_grad[:3]
    with torch.enable_grad():
        context, detail, attention = (x.view_as(x) for x in maps)  # one tensor may be two of the maps
        result = ctx.fuse(context, detail, attention, ctx.box)
    inputs = [x for x, want in zip((context, detail, attention), wanted, strict=True) if want]
    found = iter(torch.autograd.grad(result, inputs, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if want else None for want in wanted]


def _quick_format(x: Tensor) -> torch.memory_format:
    """The memory format in which torch resizes maps faster, to the same values: its loops over classes are vectorised.

    At 19 classes that takes a quarter of the time, at 3 it takes longer.
    """
    return torch.channels_last if x.ndim == 4 and x.shape[1] >= 8 else torch.contiguous_format


_DOWN = {
    3: torch.ops.aten.upsample_linear1d_backward,
    4: torch.ops.aten.upsample_bilinear2d_backward,
    5: torch.ops.aten.upsample_trilinear3d_backward,
}


def _downsampled(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of `interpolate` for a map of this shape."""
    found: Tensor = _DOWN[grad.ndim](grad, grad.shape[2:], shape, False)
    return found


def size_of(box: DetailBox, sides: Sequence[int]) -> tuple[int, ...]:
    """The size of a map of the whole image with the resolution of a crop that has `sides`."""
    return tuple(i * d // s for i, d, s in zip(box.image, sides, box.size, strict=True))


def crop_of(box: DetailBox, cells: Sequence[int]) -> tuple[int, ...]:
    """Sides of the crop, at least 1, in a map that has `cells` for the whole image."""
    return tuple(max(1, s * c // i) for s, c, i in zip(box.size, cells, box.image, strict=True))
