"""Fuse logits of a whole image at low resolution with those of a crop at high resolution by attention (HRDA)."""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_device, check_maps, check_same_shape, check_scores, shape_of
from udakit._reduce import interpolate, upcast
from udakit.resolution._fusion_by_slices import can_slice, crop_of, fused_by_slices, size_of
from udakit.resolution.detail import DetailBox, check_box, put_pixels


def fuse_scales(
    context_logits: Float[Tensor, "n c *space"],
    detail_logits: Float[Tensor, "n c *space2"],
    attention: Float[Tensor, "n c *space"],
    box: DetailBox | None = None,
) -> Float[Tensor, "n c *space3"]:
    r"""Fuse the logits of two scales. The attention says where to trust the detail, separately for each class.

    $$z = \operatorname{up}(a)\, z_d + \operatorname{up}((1 - a)\, z_c)$$

    where $z_d$ are the detail logits at their position and 0 elsewhere, and the attention $a$ is 0 outside the detail.

    **Convention.** The result covers the whole image at the resolution of the detail logits: its size is that of
    `detail_logits` times `box.image` / `box.size`. `up` is linear in each axis, with align_corners=False. The attention
    is set to 0 outside the crop before it is upsampled, so it fades over one context pixel at the border of the crop.
    Positions are exact if `box.start` is a multiple of the strides of both maps, and rounded down otherwise. Gradients
    flow to all three maps. Computations use at least float32.

    **Source.** HRDA (Hoyer et al., ECCV 2022). There, `attention` is the sigmoid of a head on the context features,
    with one channel for each class. The loss is 0.9 times that of the fused logits plus 0.1 times that of the detail
    logits.

    Args:
        context_logits: logits of the whole image at the lower scale.
        detail_logits: logits of the crop; or with `box=None` those of the whole image at the higher scale, for example
            from `sliding_logits`.
        attention: attention in [0, 1], at the size of the context logits.
        box: the position of the crop, or None.

    Returns:
        The logits of the whole image at the resolution of the detail, float32 (float64 for float64 logits).

    Raises:
        TypeError: a map is not a float tensor, or `box` has the wrong type.
        ValueError: the maps or `box` do not match.
        IndexError: the box reaches out of the image (on the CPU; a GPU stops with an error of its own).

    Example:
        >>> import torch
        >>> box = DetailBox(torch.tensor([[0, 8]]), (8, 8), (8, 16))
        >>> context, detail = torch.zeros(1, 2, 1, 2, requires_grad=True), torch.ones(1, 2, 2, 2)
        >>> fused = fuse_scales(context, detail, torch.ones(1, 2, 1, 2), box)
        >>> fused.sum().backward()
        >>> fused.shape, fused[0, 0, 0].tolist()
        (torch.Size([1, 2, 2, 4]), [0.0, 0.0, 0.75, 1.0])
    """
    check_scores("context_logits", context_logits)
    check_scores("detail_logits", detail_logits)
    check_maps("attention", attention)
    check_same_shape(attention, context_logits, name="attention", reference_name="context_logits")
    if detail_logits.ndim != context_logits.ndim or detail_logits.shape[:2] != context_logits.shape[:2]:
        raise ValueError(
            f"Expected `detail_logits` to have the images and classes of `context_logits` {shape_of(context_logits)}, "
            f"but got {shape_of(detail_logits)}."
        )
    check_device("detail_logits", detail_logits, context_logits, "context_logits")
    maps = (context_logits, detail_logits, attention)
    if box is not None:
        _check_fits(box, context_logits)
        if can_slice(*maps, box):
            return fused_by_slices(*maps, box, _fused)
    return _fused(*maps, box)


def _fused(context: Tensor, detail: Tensor, attention: Tensor, box: DetailBox | None = None) -> Tensor:
    context, detail = upcast(context), upcast(detail)
    attention, size = upcast(attention).to(context.dtype), tuple(detail.shape[2:])
    if box is not None:
        size = size_of(box, size)
        attention = torch.where(_inside(box, context.shape[2:]), attention, 0)
        detail = _in_place(detail, box, size)
    context = interpolate((1 - attention) * context, size, name="context_logits")
    return torch.addcmul(context, interpolate(attention, size), detail)


def _check_fits(box: DetailBox, context: Tensor) -> None:
    check_box(box)
    if 0 in (*box.size, *box.image):
        raise ValueError(f"Expected `box` to hold pixels, but got a crop of {box.size} out of {box.image}.")
    if len(box.start) != len(context) or len(box.size) != context.ndim - 2:
        raise ValueError(
            f"Expected `box` to have the {len(context)} images of `context_logits` {shape_of(context)}, but got "
            f"`start` {shape_of(box.start)}."
        )
    check_device("box", box.start, context, "context_logits")


def _inside(box: DetailBox, size: tuple[int, ...]) -> Tensor:
    """The mask (N, 1, *size) that is True on the cells of the crop."""
    masks = []
    for axis, (cells, crop) in enumerate(zip(size, crop_of(box, size), strict=True)):
        offset = torch.arange(cells, device=box.start.device) - _first_cells(box, axis, cells)
        masks.append(_along(offset // crop == 0, axis, len(size)))
    return reduce(torch.logical_and, masks)


def _first_cells(box: DetailBox, axis: int, cells: int) -> Tensor:
    """The cell with the first pixel of each crop, (N, 1), on an axis with `cells` cells; rounded down."""
    return box.start[:, axis : axis + 1] * cells // box.image[axis]


def _in_place(detail: Tensor, box: DetailBox, size: tuple[int, ...]) -> Tensor:
    """The detail logits at their position in a map of the whole image, which is 0 elsewhere."""
    places = [
        _first_cells(box, axis, cells) + torch.arange(side, device=detail.device)
        for axis, (cells, side) in enumerate(zip(size, detail.shape[2:], strict=True))
    ]
    return put_pixels(detail, places, size)


def _along(x: Tensor, axis: int, spatial: int) -> Tensor:
    """(N, L) as a map (N, 1, ..., L, ...)."""
    view = [1] * (spatial + 2)
    view[0], view[axis + 2] = x.shape
    return x.view(view)
