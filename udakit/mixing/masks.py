"""Masks that need no labels: CutMix boxes, MIC blocks, and the band along the boundary of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from udakit._checks import check_integer, check_mask, check_pair, check_range, check_size, is_sequence
from udakit._reduce import is_eager_on_cpu
from udakit.mixing._random import Generators, device_of_draw, uniform

FEW = 32  # up to this many masks, filling the box of each is quicker than looking at every pixel


def _check_size(n: int, size: Sequence[int]) -> None:
    check_integer("n", n, 0)
    axes, hint = len(size) if is_sequence(size) else 2, ""
    if isinstance(size, torch.Size) and axes in (1, 3):  # (C, H, W) or (D, H, W)?
        hint = " Take the spatial part of a shape with .shape[-2:]; of signals and volumes with tuple(x.shape[2:])."
    check_size("size", size, axes if axes in (1, 2, 3) and not hint else 2, hint=hint)


def draw_box_mask(
    n: int,
    size: Sequence[int],
    *,
    area: tuple[float, float] = (0.5, 0.5),
    generator: Generators | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "n *space"]:
    r"""Draw one random box for each of `n` masks, covering a given fraction of the image (CutMix).

    $$a \sim U(\text{area}), \quad h = H\,a^{u}, \quad w = W\,a^{1 - u}, \quad u \sim U(0, 1)$$

    **Convention.** The mask is True inside the box, and the box is inside the image. The sides are rounded to whole
    pixels. For volumes, the three exponents are the lengths of the parts into which two uniform numbers split (0, 1).
    For signals, the exponent is 1.

    **Source.** French et al. 2020 (CutMix for segmentation) with `area=(0.5, 0.5)`.

    Args:
        n: number of masks.
        size: (height, width); (length,) for signals, (depth, height, width) for volumes.
        area: lowest and highest area of the box as a fraction of the image, in (0, 1].
        generator: generator of the draw, on `device`; or a list with one generator for each mask.
        device: device of the masks; by default that of the generator, or the CPU without one.

    Returns:
        Bool (n, height, width), or (n, *size).

    Raises:
        ValueError: an option is out of range, or the generator is on another device.

    Example:
        >>> draw_box_mask(2, (8, 8), area=(1.0, 1.0)).all().item()
        True
    """
    _check_size(n, size)
    check_pair("area", area, "(low, high), shares of the image")
    check_range("area", area[0], 0.0, 1.0, open_low=True)
    check_range("area", area[1], area[0], 1.0)
    device = device_of_draw(generator, n, device)
    axes = len(size)
    u = uniform((2 * axes, n, 1), generator, device, axis=1)
    if axes > 2:
        u[1:axes] = u[1:axes].sort(dim=0).values
    if n <= FEW and type(u) is Tensor and is_eager_on_cpu(u):
        return _filled(n, size, area, u)
    inside: Tensor | None = None
    for i, (start, end) in enumerate(_spans(size, area, u)):
        place = torch.arange(size[i], dtype=torch.float32, device=device)
        # Use bytes, because "and" of booleans is ten times slower on the CPU.
        along = ((place >= start) & (place < end)).view(torch.uint8)
        inside = along if inside is None else inside.unsqueeze(-1) & along.view(n, *(1,) * i, size[i])
    assert inside is not None
    if torch.compiler.is_compiling():  # which cannot compile a view of bytes together with what uses it
        return inside != 0
    return inside.view(torch.bool)


def _spans(size: Sequence[int], area: tuple[float, float], u: Any) -> list[tuple[Any, Any]]:
    """Where boxes begin and end along each axis, (n, 1), from uniform numbers: a tensor, or numpy's quicker array."""
    axes, (low, high) = len(size), area
    share = low if low == high and axes > 1 else low + (high - low) * u[0]
    ends = [*u[1:axes], 1.0]
    spans = []
    for i, length in enumerate(size):
        extent = (length * share ** (ends[i] - ends[i - 1] if i else ends[i])).round()
        room = length - extent
        start = (u[axes + i] * (room + 1)).clip(max=room) // 1  # each position is equally likely
        spans.append((start, start + extent))
    return spans


def _filled(n: int, size: Sequence[int], area: tuple[float, float], u: Tensor) -> Tensor:
    """Masks with their boxes filled in, which a CPU does without looking at any other pixel."""
    masks = torch.zeros(n, *size, dtype=torch.bool, device="cpu")
    # Both tensors are in the CPU's own memory (see `draw_box_mask`), so reading them does not wait.
    ends = [x for span in _spans(size, area, u.numpy()) for x in span]
    for mask, box in zip(masks.numpy(), np.concatenate(ends, axis=1).astype(int).tolist(), strict=True):
        mask[tuple(slice(*box[i : i + 2]) for i in range(0, len(box), 2))] = True
    return masks


def draw_block_mask(
    n: int,
    size: Sequence[int],
    *,
    block_size: int = 64,
    ratio: float = 0.7,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "n *space"]:
    r"""Draw the blocks to remove from each of `n` images (masked image consistency).

    **Convention.** True means removed. Each block is removed with probability `ratio`, independently. The grid has
    round(H / block) x round(W / block) cells, at least one, and is stretched over the image if the division leaves a
    remainder. Signals and volumes have cells along each of their axes.

    Apply the mask with `torch.where(mask.unsqueeze(1), 0, images)`; 0 is the mean colour of normalised images. `~mask`
    removes the pixels that `mask` keeps. The two views complement each other, and with `ratio=0.5` they are about
    equally large.

    **Source.** MIC (Hoyer et al., CVPR 2023) uses blocks of 64 pixels and ratio 0.7. MaskTwins trains on both
    complementary views.

    Args:
        n: number of masks.
        size: (height, width); (length,) for signals, (depth, height, width) for volumes.
        block_size: side of a block in pixels.
        ratio: probability that a block is removed, in [0, 1].
        generator: generator of the draw, on `device`; or a list with one generator for each mask.
        device: device of the masks; by default that of the generator, or the CPU without one.

    Returns:
        Bool (n, height, width), or (n, *size).

    Raises:
        ValueError: an option is out of range, or the generator is on another device.

    Example:
        >>> draw_block_mask(1, (4, 8), block_size=4, ratio=1.0).all().item()
        True
    """
    _check_size(n, size)
    check_integer("block_size", block_size)
    check_range("ratio", ratio, 0.0, 1.0)
    device = device_of_draw(generator, n, device)
    cells = [max(round(length / block_size), 1) for length in size]
    removed = uniform((n, *cells), generator, device) < ratio
    # The last axis first, so that the final repeats copy whole rows.
    for axis in reversed(range(len(size))):
        cell = torch.arange(size[axis], device=device) * cells[axis] // size[axis]
        removed = removed.index_select(axis + 1, cell)
    return removed


def boundary_band(mask: Bool[Tensor, "n *space"], *, kernel_size: int = 3) -> Bool[Tensor, "n *space"]:
    r"""Mark the band along the boundary of a mask: where its dilation differs from its erosion.

    $$B_p = \left[\exists\,q \in W_p: M_q\right] \wedge \left[\exists\,q \in W_p: \neg M_q\right]$$

    where W_p is the part inside the image of the square (for volumes the cube, for signals the interval) with sides of
    `kernel_size` pixels around p.

    **Convention.** The image border is not a boundary. An odd `kernel_size` is symmetric. An even one reaches one pixel
    further up and left: 2 covers a pixel and its upper, left and upper-left neighbours. With 1 the band is empty. The
    mask is never converted to float.

    **Source.** EHTDI's released code corresponds to `kernel_size=2`. Its loss weights the band of the target paste
    outside the source mask: `boundary_band(mask) & ~source_mask`.

    Args:
        mask: bool (N, *space).
        kernel_size: side of the square in pixels, at least 1.

    Returns:
        Bool (N, *space).

    Raises:
        TypeError: `mask` is not bool.
        ValueError: `mask` has the wrong number of axes, or `kernel_size` is below 1.

    Example:
        >>> import torch
        >>> boundary_band(torch.tensor([[[False, False, True, True]]]), kernel_size=2)
        tensor([[[False, False,  True, False]]])
    """
    check_integer("kernel_size", kernel_size)
    check_mask(mask)
    # One bit says that a False is near, the other that a True is near; padding has neither. Use bytes, because
    # inductor cannot pad booleans on the CPU.
    near = mask.to(torch.uint8) + 1
    before, after = kernel_size // 2, (kernel_size - 1) // 2
    near = pad(near, (before, after) * (mask.ndim - 1))
    for axis in reversed(range(1, mask.ndim)):
        width = 1
        while width < kernel_size:  # the window doubles at each step
            step = min(width, kernel_size - width)
            kept = near.shape[axis] - step
            near = near.narrow(axis, 0, kept) | near.narrow(axis, step, kept)
            width += step
    return near == 3
