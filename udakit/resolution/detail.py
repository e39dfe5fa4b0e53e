"""Draw and cut out a crop at full resolution, to be used with the whole image at a lower resolution (HRDA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from udakit._checks import (
    check_device,
    check_integer,
    check_option,
    check_size,
    check_tensor,
    draw_device,
    drawn_by,
    is_sequence,
    shape_of,
)
from udakit._reduce import is_batched, is_eager_on_cpu, learns, plain

Scope = Literal["batch", "image"]
SCOPES = get_args(Scope)


class DetailBox(NamedTuple):
    """The position of the detail crop of each image.

    Attributes:
        start: first pixel along each of the d spatial axes, int64 (N, d); this tensor stays on the device.
        size: sides of the crop in pixels, one for each spatial axis.
        image: sides of the images for which it was drawn.
    """

    start: Int64[Tensor, "n d"]
    size: tuple[int, ...]
    image: tuple[int, ...]


def draw_detail_box(
    n: int,
    size: Sequence[int],
    *,
    detail: Sequence[int],
    divisor: int = 8,
    scope: Scope = "batch",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> DetailBox:
    """Draw the position of the detail crop of each of `n` images.

    **Convention.** The first pixels are multiples of `divisor`, all equally likely. If `divisor` is the output stride
    of the net times the factor between the scales, the logits of the crop lie on the grid of the context logits.
    `scope="batch"` draws one position for all images, and "image" draws one for each.

    **Source.** HRDA (Hoyer et al., ECCV 2022), which uses half of the sides, one position for the batch, and multiples
    of 8 (stride 4, factor 2). Its code never draws the last position, and it raises an error if one side has no margin
    and the other has one.

    Args:
        n: number of images.
        size: sides of the images in pixels, for example (height, width).
        detail: sides of the crop in pixels, at most those of the image.
        divisor: the first pixels are multiples of this number.
        scope: "batch" | "image".
        generator: generator of the draw, on `device`.
        device: device of the result; by default that of the generator, or the CPU without one.

    Returns:
        A `DetailBox`.

    Raises:
        ValueError: an option is out of range, or the generator is on another device.

    Example:
        >>> box = draw_detail_box(2, (64, 128), detail=(32, 64))
        >>> box.start.shape, box.size, bool((box.start % 8 == 0).all())
        (torch.Size([2, 2]), (32, 64), True)
    """
    check_integer("n", n, 0)
    check_size("size", size, len(size) if is_sequence(size) and 1 <= len(size) <= 3 else 2)
    check_size("detail", detail, len(size))
    check_integer("divisor", divisor)
    check_option("scope", scope, SCOPES)
    if any(d > s for d, s in zip(detail, size, strict=True)):
        raise ValueError(f"Expected `detail` to be at most `size` {tuple(size)}, but got {tuple(detail)}.")
    device = draw_device(generator, device)
    count = 1 if scope == "batch" else n
    u = torch.rand(len(size), count, **drawn_by(generator), device=device, dtype=torch.float32)
    starts = []
    for axis, (side, crop) in enumerate(zip(size, detail, strict=True)):
        places = (side - crop) // divisor + 1
        starts.append((u[axis] * places).floor().clamp_max(places - 1).long() * divisor)
    start = torch.stack(starts, 1).expand(n, len(size)).contiguous()
    return DetailBox(start, tuple(detail), tuple(size))


def crop_detail(x: Shaped[Tensor, "n ..."], box: DetailBox) -> Shaped[Tensor, "n ..."]:
    """Cut the detail crop out of images, labels or weights.

    **Convention.** A GPU gathers the pixels, because slicing would copy the position to the host; the CPU slices. Any
    dtype works; gradients flow to `x`.

    Args:
        x: tensor (N, K, *space) or (N, *space), at the size for which the box was drawn.
        box: result of `draw_detail_box`.

    Returns:
        The crops, with the sides of the box.

    Raises:
        TypeError: `x` or `box` has the wrong type.
        ValueError: `x` does not match the box.
        IndexError: the box reaches out of the image (on the CPU; a GPU stops with an error of its own).

    Example:
        >>> import torch
        >>> box = DetailBox(torch.tensor([[0, 1]]), (1, 2), (2, 3))
        >>> crop_detail(torch.arange(6).view(1, 2, 3), box)
        tensor([[[1, 2]]])
    """
    check_tensor("x", x)
    check_box(box)
    spatial = box.start.shape[1]
    if x.ndim not in (spatial + 1, spatial + 2) or len(x) != len(box.start) or tuple(x.shape[-spatial:]) != box.image:
        raise ValueError(
            f"Expected `x` to hold {len(box.start)} maps of the size {box.image} of `box`, but got {shape_of(x)}."
        )
    check_device("box", box.start, x, "x")
    if x.numel() and 0 not in box.size and takes_slices(box, plain(x)):
        starts = first_cells(box, box.image, box.size)
        crops: Tensor = _Crop.apply(x, box, starts) if learns(x) else _cut(x, starts, box.size)
        return crops
    pixels = gather_pixels(x.flatten(-spatial), joint(_places(box.start, box.size), box.image))
    return pixels.view(*x.shape[:-spatial], *box.size)


def _places(start: Tensor, size: Sequence[int]) -> list[Tensor]:
    return [start[:, axis : axis + 1] + torch.arange(side, device=start.device) for axis, side in enumerate(size)]


def takes_slices(box: DetailBox, *maps: Tensor) -> bool:
    """Whether crops of these maps are slices: where the CPU runs each operator at once, it waits for no position.

    A slice takes two or three calls, the places of its pixels a dozen.
    """
    return is_eager_on_cpu(maps[0]) and type(box.start) is Tensor and all(type(x) is Tensor for x in maps)


def first_cells(box: DetailBox, cells: Sequence[int], sides: Sequence[int]) -> list[tuple[int, ...]]:
    """The first cell of each crop of `sides` cells in a map that has `cells` for the whole image, rounded down."""
    found = []
    for start in box.start.tolist():  # on a CPU, see `takes_slices`: nobody waits
        first = tuple(i * c // image for i, c, image in zip(start, cells, box.image, strict=True))
        if not all(0 <= i <= c - side for i, c, side in zip(first, cells, sides, strict=True)):
            raise IndexError(
                f"Expected `box` to lie inside an image of {box.image}, but got {tuple(start)} as the first pixel of a "
                f"crop of {box.size}, which is out of range."
            )
        found.append(first)
    return found


def window(x: Tensor, first: Sequence[int], size: Sequence[int]) -> Tensor:
    """The part of a map (..., *space) that begins at `first`. It is a single view, through which no gradient flows."""
    spatial, steps = len(size), x.stride()
    offset = sum(i * step for i, step in zip(first, steps[-spatial:], strict=True))
    return x.as_strided((*x.shape[:-spatial], *size), steps, x.storage_offset() + offset)


def _cut(x: Tensor, starts: list[tuple[int, ...]], size: Sequence[int]) -> Tensor:
    return torch.stack([window(image, first, size) for image, first in zip(x.unbind(), starts, strict=True)])


class _Crop(torch.autograd.Function):
    """`_cut` with a gradient that is copied to its place. That of `gather` would add, in float32 for half types."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, box: DetailBox, starts: list[tuple[int, ...]]) -> Tensor:
        ctx.size, ctx.image, ctx.starts = box.size, box.image, starts
        return _cut(x, starts, box.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size, image, starts = ctx.size, ctx.image, ctx.starts
        if torch.is_grad_enabled() or is_batched(grad):  # in operations that have a derivative
            return put_pixels(grad, _places(torch.tensor(starts, device=grad.device), size), image), None, None
        maps = grad.new_zeros(*grad.shape[: -len(size)], *image)
        for whole, crop, first in zip(maps.unbind(), grad.unbind(), starts, strict=True):
            window(whole, first, size).copy_(crop)
        return maps, None, None


def check_box(box: DetailBox) -> None:
    """Raise unless `box` is a DetailBox with parts that match each other."""
    if not isinstance(box, DetailBox):
        raise TypeError(
            f"Expected `box` to be a DetailBox, such as draw_detail_box returns, but got {type(box).__name__}."
        )
    check_tensor("box", box.start, "one with an int64 tensor `start`")
    if box.start.dtype != torch.int64 or box.start.ndim != 2 or box.start.shape[1] != len(box.size):
        raise ValueError(
            f"Expected `box` to have an int64 `start` (N, {len(box.size)}), but got {box.start.dtype} "
            f"{shape_of(box.start)}."
        )


def joint(places: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Positions (N, L) in the flattened map, from those along each axis, (N, L_i); `sizes` are the sides of the map."""
    flat = places[0]
    for place, size in zip(places[1:], sizes[1:], strict=True):
        flat = torch.add(place.unsqueeze(1), flat.unsqueeze(2), alpha=size).flatten(1)
    return flat


def put_pixels(x: Tensor, places: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Maps with the sides `sizes` that have the pixels of x (N, *space) or (N, K, *space) at `places` and 0 elsewhere.

    This touches less memory than picking a pixel for each position, and its gradient is the crop again.
    """
    leading, place = x.shape[: -len(sizes)], joint(places, sizes)
    if len(leading) == 2:
        place = place.unsqueeze(1).expand(*leading, -1)
    maps = x.new_zeros(*leading, math.prod(sizes)).scatter_(-1, place, x.reshape(place.shape))
    return maps.view(*leading, *sizes)


def gather_pixels(x: Tensor, place: Tensor) -> Tensor:
    """Pick the positions `place` (N, L) of x (N, P) or (N, K, P), different ones in each image."""
    return x.gather(-1, place if x.ndim == 2 else place.unsqueeze(1).expand(-1, x.shape[1], -1))
