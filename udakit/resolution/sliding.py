"""Logits of images that are too large for a net, from overlapping windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_callable, check_maps, check_size, net_logits
from udakit._reduce import interpolate, is_transformed, upcast


class _Grid(NamedTuple):
    """The windows for one image size: their size, and the first pixel of each along every axis."""

    window: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]


def sliding_logits(
    model: Callable[[Tensor], Any],
    images: Float[Tensor, "n k *space"],
    window: Sequence[int],
    stride: Sequence[int] | None = None,
) -> Float[Tensor, "n c *space"]:
    r"""Average the logits of a net over windows that slide over the images.

    $$z_p = \frac{1}{|\{w : p \in w\}|} \sum_{w \ni p} f(x_w)_p$$

    **Convention.** Along an axis of length L there are $\lceil (L - w) / s \rceil + 1$ windows. The last one is moved
    back to end with the image, so nothing is padded. An axis that is shorter than the window has one window, the whole
    axis. The net sees one window of all N images at a time. Logits that are smaller than the window are resized to it,
    linearly in each axis and with align_corners=False. Gradients flow through the net; use `torch.no_grad()` if you do
    not need them. The average uses at least float32.

    **Source.** HRDA's grid of detail crops and its "slide" inference at test time. Both average logits, not
    probabilities, with a stride of half a window.

    Args:
        model: any callable that takes images and returns logits, or an output that holds them (`.logits`, "out", a
            tuple).
        images: images (N, K, *space), with one to three spatial axes.
        window: size of a window in pixels, one number for each spatial axis.
        stride: step between windows in pixels, at most `window`; by default half of it.

    Returns:
        The logits at the size of the images, float32 (float64 for float64 logits).

    Raises:
        TypeError: `images` is not a float tensor, or the net does not return logits.
        ValueError: `window` or `stride` does not fit.

    Example:
        >>> import torch
        >>> net = torch.nn.Conv2d(3, 5, 1)
        >>> images = torch.randn(1, 3, 20, 30)
        >>> torch.allclose(sliding_logits(net, images, (8, 8)), net(images), atol=1e-6)
        True
    """
    grid = _grid(model, images, window, stride)
    total = _summed(model, images, grid)
    count = _coverage(images.shape[2:], grid, total)
    # torch takes a subclass that was written to through views for a leaf, and refuses to change it.
    return total.div_(count) if type(total) is Tensor else total / count


def sliding_bands(
    model: Callable[[Tensor], Any],
    images: Float[Tensor, "n k *space"],
    window: Sequence[int],
    stride: Sequence[int] | None = None,
) -> Iterator[tuple[int, Float[Tensor, "n c rows *rest"]]]:
    """Yield `sliding_logits` in bands from top to bottom, each as soon as it is complete.

    **Convention.** Only one row of windows is in memory at a time, whatever the height of the image. Stacked, the bands
    are exactly the result of `sliding_logits`.

    Args:
        model: see `sliding_logits`.
        images: images (N, K, *space), with one to three spatial axes.
        window: size of a window in pixels, one number for each spatial axis.
        stride: step between windows in pixels, at most `window`; by default half of it.

    Yields:
        (index of the first row, logits of the band that begins there).

    Raises:
        TypeError: `images` is not a float tensor, or the net does not return logits.
        ValueError: `window` or `stride` does not fit.

    Example:
        >>> import torch
        >>> net = torch.nn.Conv2d(3, 5, 1)
        >>> [(top, tuple(band.shape)) for top, band in sliding_bands(net, torch.randn(1, 3, 20, 30), (8, 8))]
        [(0, (1, 5, 4, 30)), (4, (1, 5, 4, 30)), (8, (1, 5, 4, 30)), (12, (1, 5, 8, 30))]
    """
    grid = _grid(model, images, window, stride)
    height, tops = images.shape[2], grid.starts[0]
    held: Tensor | None = None
    counts: Tensor | None = None
    for number, top in enumerate(tops):
        row = _summed(model, images.narrow(2, top, grid.window[0]), grid, 1)
        if held is not None:  # the rows that the windows above cover as well
            shared = tops[number - 1] + grid.window[0] - top
            row.narrow(2, 0, shared).add_(held.narrow(2, grid.window[0] - shared, shared))
        end = tops[number + 1] if number + 1 < len(tops) else height
        band = row.narrow(2, 0, end - top)
        counts = _coverage(images.shape[2:], grid, row) if counts is None else counts
        yield top, band / counts.narrow(0, top, end - top)
        held = row


def window_starts(length: int, window: int, stride: int) -> tuple[int, ...]:
    """The first pixel of each window along an axis; the last window ends with the axis."""
    return (0,) if length <= window else (*range(0, length - window, stride), length - window)


def _grid(model: object, images: Tensor, window: Sequence[int], stride: Sequence[int] | None) -> _Grid:
    check_callable("model", model, "model(images)")
    check_maps("images", images, "N, K")
    spatial = images.ndim - 2
    check_size("window", window, spatial)
    if stride is None:
        stride = tuple(max(1, side // 2) for side in window)
    check_size("stride", stride, spatial)
    if any(s > w for s, w in zip(stride, window, strict=True)):
        raise ValueError(
            f"Expected `stride` to be at most `window` {tuple(window)} along each axis, but got {tuple(stride)}."
        )
    sides = tuple(min(w, length) for w, length in zip(window, images.shape[2:], strict=True))
    starts = tuple(window_starts(*axis) for axis in zip(images.shape[2:], sides, stride, strict=True))
    return _Grid(sides, starts)


def _summed(model: Callable[[Tensor], Any], images: Tensor, grid: _Grid, axis: int = 0) -> Tensor:
    """Sum of the logits of all windows. Along the axes before `axis`, the images have been cut to one window."""
    if axis == len(grid.starts):  # a row of a sequence is one window, and is changed in place
        return upcast(_logits(model, images)).clone()
    dim, last = axis + 2, axis + 1 == len(grid.starts)
    cuts = (images.narrow(dim, start, grid.window[axis]) for start in grid.starts[axis])
    parts = (_logits(model, cut) if last else _summed(model, cut, grid, axis + 1) for cut in cuts)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return _overlaid(parts, dim, grid.starts[axis], images.shape[dim])  # holds one part at a time
    held = list(parts)
    if any(type(part) is not Tensor or not part.requires_grad for part in held):
        return _overlaid(held, dim, grid.starts[axis], images.shape[dim])
    total: Tensor = _Overlaid.apply(dim, grid.starts[axis], images.shape[dim], last, *held)
    return total


def _logits(model: Callable[[Tensor], Any], seen: Tensor) -> Tensor:
    """The logits of one window, at its size."""
    logits = net_logits(model(seen))
    check_maps("model(images)", logits)
    return logits if logits.shape[2:] == seen.shape[2:] else interpolate(upcast(logits), seen.shape[2:])


def _overlaid(parts: Iterable[Tensor], dim: int, starts: Sequence[int], length: int) -> Tensor:
    """Sum of the parts at their places along an axis of this length, in new memory."""
    total: Tensor | None = None
    for start, part in zip(starts, parts, strict=True):
        if total is None:
            sides, size = [*part.shape], part.shape[dim]
            sides[dim] = length
            total = part.new_empty(sides, dtype=torch.promote_types(part.dtype, torch.float32))
            total.narrow(dim, 0, size).copy_(part)
            total.narrow(dim, size, length - size).zero_()
        else:
            total.narrow(dim, start, part.shape[dim]).add_(part)
    assert total is not None
    return total


class _Overlaid(torch.autograd.Function):
    """`_overlaid` with a gradient. torch's gradient of writing to a view copies the whole map for every part."""

    @staticmethod
    def forward(ctx: Any, dim: int, starts: Sequence[int], length: int, last: bool, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.last = dim, last
        ctx.places = [(start, part.shape[dim], part.dtype) for start, part in zip(starts, parts, strict=True)]
        return _overlaid(parts, dim, starts, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The net gets memory of its own: the parts overlap.
        found = (grad.narrow(ctx.dim, start, size).to(dtype, copy=ctx.last) for start, size, dtype in ctx.places)
        return None, None, None, None, *found


def _coverage(space: Sequence[int], grid: _Grid, like: Tensor) -> Tensor:
    """The number of windows that cover each pixel."""
    covered: Tensor | None = None
    for length, window, starts in zip(space, grid.window, grid.starts, strict=True):
        count = torch.ones(length, dtype=like.dtype, device=like.device)
        for before, start in zip(starts[:-1], starts[1:], strict=True):  # noqa: RUF007  # torch 2.5 compiles no `pairwise`
            count.narrow(0, start, before + window - start).add_(1)
        covered = count if covered is None else covered.unsqueeze(-1) * count
    assert covered is not None
    return covered
