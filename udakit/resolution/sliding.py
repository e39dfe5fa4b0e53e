"""Logits of images that are too large for a net, from overlapping windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_callable, check_maps, check_size, net_logits
from udakit._reduce import interpolate, upcast


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
    total: Tensor | None = None
    for top in grid.starts[0]:
        row = _row(model, images, top, grid)
        if total is None:
            total = row.new_zeros(*row.shape[:2], *images.shape[2:])
        total.narrow(2, top, grid.window[0]).add_(row)
    assert total is not None
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
        row = _row(model, images, top, grid)
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


def _row(model: Callable[[Tensor], Any], images: Tensor, top: int, grid: _Grid) -> Tensor:
    """Sum of the logits of all windows that begin at row `top`, with the size of the images except for the height."""
    rows = images.narrow(2, top, grid.window[0])
    total: Tensor | None = None
    for place in product(*grid.starts[1:]):
        seen = rows
        for axis, start in enumerate(place):
            seen = seen.narrow(axis + 3, start, grid.window[axis + 1])
        logits = upcast(net_logits(model(seen)))
        check_maps("model(images)", logits)
        if logits.shape[2:] != seen.shape[2:]:
            logits = interpolate(logits, seen.shape[2:])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *rows.shape[2:])
        part = total
        for axis, start in enumerate(place):
            part = part.narrow(axis + 3, start, grid.window[axis + 1])
        part.add_(logits)
    assert total is not None
    return total


def _coverage(space: Sequence[int], grid: _Grid, like: Tensor) -> Tensor:
    """The number of windows that cover each pixel."""
    covered: Tensor | None = None
    for length, window, starts in zip(space, grid.window, grid.starts, strict=True):
        count = torch.zeros(length, dtype=like.dtype, device=like.device)
        for start in starts:
            count.narrow(0, start, window).add_(1)
        covered = count if covered is None else covered.unsqueeze(-1) * count
    assert covered is not None
    return covered
