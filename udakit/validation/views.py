"""Views of an image that can be undone: mirror, shift, crop, rotation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit._checks import (
    check_integer,
    check_maps,
    check_range,
    check_two_dimensional,
    is_integer,
    is_sequence,
    kind_of,
    shape_of,
)
from udakit._reduce import full_precision, upcast

Transform = Callable[[Tensor], Tensor]
Inverse = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class View(NamedTuple):
    """A transformation of images and its inverse for logits: `view_consistency(model, images, *view)`.

    Attributes:
        transform: function from images (N, K, *space) to images.
        inverse: function that maps the logits of the transformed images, at their size, back to the pixels of the
            original images. It returns logits, or (logits, valid) if some pixels have no counterpart.
    """

    transform: Transform
    inverse: Inverse


def mirror_view(axis: int = -1) -> View:
    """Mirror images along a spatial axis, by default the last one.

    Args:
        axis: spatial axis of the images, counted as in `torch.flip`.

    Returns:
        The view. It is its own inverse.

    Raises:
        TypeError: `axis` is not an integer.
        ValueError: when the view is used, `axis` is not a spatial axis of the images.

    Example:
        >>> import torch
        >>> mirror_view().transform(torch.arange(3.0).view(1, 1, 3))
        tensor([[[2., 1., 0.]]])
    """
    if not is_integer(axis):
        raise TypeError(f"Expected `axis` to be an integer, but got {kind_of(axis)}.")

    def flip(x: Tensor) -> Tensor:
        if not (2 <= axis < x.ndim or 2 - x.ndim <= axis < 0):
            raise ValueError(f"Expected `axis` to be a spatial axis of {shape_of(x)}, but got {axis}.")
        return x.flip(axis)

    return View(flip, flip)


def shift_view(offset: Sequence[int]) -> View:
    """Shift images by whole pixels, with one number for each spatial axis. The border pixels are repeated.

    A shift by less than the net's stride shows how much the prediction depends on the position of its grid.

    Args:
        offset: number of pixels to shift along each spatial axis; positive numbers shift towards higher indices.

    Returns:
        The view. Pixels that were shifted out of the image are not valid.

    Raises:
        ValueError: `offset` does not hold integers; when the view is used, their number is not that of the axes.

    Example:
        >>> import torch
        >>> view = shift_view((1,))
        >>> view.transform(torch.arange(3.0).view(1, 1, 3))
        tensor([[[0., 0., 1.]]])
        >>> view.inverse(torch.arange(3.0).view(1, 1, 3))
        (tensor([[[1., 2., 2.]]]), tensor([[ True,  True, False]]))
    """
    steps = _per_axis("offset", offset)

    def move(x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        _check_axes("offset", steps, x)
        inside = torch.ones(x.shape[:1] + x.shape[2:], dtype=torch.bool, device=x.device)
        for axis, step in enumerate(steps, 2):
            # Clamped indices repeat the border, even if the shift is larger than the image.
            wanted = torch.arange(x.shape[axis], device=x.device) - sign * step
            index = wanted.clamp(0, x.shape[axis] - 1)
            x = x.index_select(axis, index)
            inside = inside & (wanted == index).view([-1 if a == axis - 1 else 1 for a in range(inside.ndim)])
        return x, inside

    return View(lambda images: move(images, 1)[0], lambda logits: move(logits, -1))


def crop_view(margin: Sequence[tuple[int, int]]) -> View:
    """Crop (before, after) pixels of each spatial axis, so that the net sees the rest without its context.

    The remaining size should be a multiple of the net's stride.

    Args:
        margin: numbers of pixels (before, after) to remove, for each spatial axis.

    Returns:
        The view. Its inverse fills the margin with 0, which is not valid.

    Raises:
        TypeError: `margin` does not hold integers.
        ValueError: `margin` does not hold pairs, or a number is negative; when the view is used, their number is not
            that of the axes, or nothing is left.

    Example:
        >>> import torch
        >>> view = crop_view([(1, 0)])
        >>> view.transform(torch.arange(3.0).view(1, 1, 3))
        tensor([[[1., 2.]]])
        >>> view.inverse(torch.ones(1, 1, 2))
        (tensor([[[0., 1., 1.]]]), tensor([[False,  True,  True]]))
    """
    if not is_sequence(margin) or not all(is_sequence(ends) and len(ends) == 2 for ends in margin):
        raise ValueError(f"Expected `margin` to be (before, after) for each spatial axis, but got {margin!r}.")
    for ends in margin:
        for end in ends:
            check_integer("margin", end, 0)
    margins = [tuple(ends) for ends in margin]
    padding = [end for ends in reversed(margins) for end in ends]

    def cut(images: Tensor) -> Tensor:
        _check_axes("margin", margins, images)
        for axis, (before, after) in enumerate(margins, 2):
            left = images.shape[axis] - before - after
            if left < 1:
                raise ValueError(f"Expected `margin` to leave something of {shape_of(images)}, but got {margin!r}.")
            images = images.narrow(axis, before, left)
        return images

    def back(logits: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.ones(logits.shape[:1] + logits.shape[2:], dtype=torch.bool, device=logits.device)
        return F.pad(logits, padding), F.pad(inside, padding)

    return View(cut, back)


def rotation_view(degrees: float) -> View:
    """Rotate images (N, K, H, W) about their centre. The border pixels are repeated.

    Args:
        degrees: angle in [-180, 180]; positive angles turn counter-clockwise.

    Returns:
        The view. Pixels that were rotated out of the image are not valid.

    Raises:
        ValueError: `degrees` is out of range; when the view is used, the images are not two-dimensional.

    Example:
        >>> import torch
        >>> view = rotation_view(90.0)
        >>> view.transform(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)).round()
        tensor([[[[2., 4.],
                  [1., 3.]]]])
    """
    check_range("degrees", degrees, -180.0, 180.0)

    def turn(x: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        check_maps("images", x, "N, K")
        check_two_dimensional("images", x, "a rotation", "N, K")
        n, _, h, w = x.shape
        values = upcast(x)
        if 0 in (h, w):  # nothing to turn
            return values, torch.ones((n, h, w), dtype=torch.bool, device=x.device)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        # Pixel centres, in pixels from the centre of the image. In [-1, 1] this would be a rotation only if H = W.
        down = (torch.arange(h, dtype=values.dtype, device=x.device) - (h - 1) / 2).view(h, 1)
        right = (torch.arange(w, dtype=values.dtype, device=x.device) - (w - 1) / 2).view(1, w)
        column, row = (cos * right - sin * down) * (2 / w), (sin * right + cos * down) * (2 / h)
        grid = torch.stack([column, row], -1).unsqueeze(0).expand(n, -1, -1, -1)
        with full_precision(values):
            turned = F.grid_sample(values, grid, padding_mode="border", align_corners=False)
        inside = (column.abs() <= 1 - 1 / w) & (row.abs() <= 1 - 1 / h)
        return turned, inside.unsqueeze(0).expand(n, -1, -1)

    return View(lambda images: turn(images, degrees)[0].to(images.dtype), lambda logits: turn(logits, -degrees))


def _per_axis(name: str, values: Sequence[int]) -> list[int]:
    if not is_sequence(values) or not all(is_integer(v) for v in values):
        raise ValueError(f"Expected `{name}` to be one integer for each spatial axis, but got {values!r}.")
    return list(values)


def _check_axes(name: str, values: Sequence[Any], x: Tensor) -> None:
    if len(values) != x.ndim - 2:
        raise ValueError(
            f"Expected `{name}` to have one entry for each spatial axis of {shape_of(x)}, but got {len(values)}."
        )
