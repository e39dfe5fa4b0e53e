"""Masks that no label is needed for: CutMix boxes, MIC blocks, and the band along a mask's boundary."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from udakit._checks import check_integer, check_mask, check_pair, check_range, check_size, draw_device


def _check_size(n: int, size: tuple[int, int]) -> None:
    check_integer("n", n, 0)
    check_size("size", size)


def draw_box_mask(
    n: int,
    size: tuple[int, int],
    *,
    area: tuple[float, float] = (0.5, 0.5),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "n h w"]:
    r"""Draw one box for each of `n` masks, of a given share of the image, of random shape and place (CutMix).

    $$a \sim U(\text{area}), \quad h = H\,a^{u}, \quad w = W\,a^{1 - u}, \quad u \sim U(0, 1)$$

    **Convention.** True inside the box, which lies inside the image. Its sides are rounded to whole pixels.

    **Source.** French et al. 2020 (CutMix for segmentation) with `area=(0.5, 0.5)`.

    Args:
        n: number of masks.
        size: (height, width).
        area: lowest and highest share of the image, in (0, 1].
        generator: random numbers are drawn on `device`.
        device: of the masks; by default that of the generator, else the CPU.

    Returns:
        Bool (n, height, width).

    Raises:
        ValueError: an option out of range, or a generator on another device.

    Example:
        >>> draw_box_mask(2, (8, 8), area=(1.0, 1.0)).all().item()
        True
    """
    _check_size(n, size)
    check_pair("area", area, "(low, high), shares of the image")
    check_range("area", area[0], 0.0, 1.0, open_low=True)
    check_range("area", area[1], area[0], 1.0)
    device = draw_device(generator, device)
    low, high = area
    u = torch.rand(4, n, 1, generator=generator, device=device, dtype=torch.float32)
    share = low + (high - low) * u[0]
    inside = []
    for length, exponent, offset in ((size[0], u[1], u[2]), (size[1], 1 - u[1], u[3])):
        extent = (length * share**exponent).round()
        # One of length - extent + 1 places, each equally likely.
        start = (offset * (length - extent + 1)).floor().clamp_max(length - extent)
        place = torch.arange(length, device=device)
        inside.append(((place >= start) & (place < start + extent)).to(torch.uint8))
    # As bytes: "and" of booleans is ten times slower on the CPU.
    return (inside[0][:, :, None] & inside[1][:, None, :]).to(torch.bool)


def draw_block_mask(
    n: int,
    size: tuple[int, int],
    *,
    block_size: int = 64,
    ratio: float = 0.7,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "n h w"]:
    r"""Draw which blocks of each of `n` images are removed (masked image consistency).

    **Convention.** True is removed; `ratio` is the share removed, each block by itself. The grid has
    round(H / block) x round(W / block) cells, at least one, stretched over the image when the division leaves a rest.
    Apply it with `torch.where(mask.unsqueeze(1), 0, images)`: 0 is the mean colour of normalised images.

    **Source.** MIC (Hoyer et al., CVPR 2023): 64 pixels, ratio 0.7.

    Args:
        n: number of masks.
        size: (height, width).
        block_size: side of a block in pixels.
        ratio: share removed, in [0, 1].
        generator: random numbers are drawn on `device`.
        device: of the masks; by default that of the generator, else the CPU.

    Returns:
        Bool (n, height, width).

    Raises:
        ValueError: an option out of range, or a generator on another device.

    Example:
        >>> draw_block_mask(1, (4, 8), block_size=4, ratio=1.0).all().item()
        True
    """
    _check_size(n, size)
    check_integer("block_size", block_size)
    check_range("ratio", ratio, 0.0, 1.0)
    device = draw_device(generator, device)
    rows, columns = (max(round(length / block_size), 1) for length in size)
    removed = torch.rand(n, rows, columns, generator=generator, device=device, dtype=torch.float32) < ratio
    row = torch.arange(size[0], device=device) * rows // size[0]
    column = torch.arange(size[1], device=device) * columns // size[1]
    return removed.index_select(2, column).index_select(1, row)  # whole rows last: they are copied at once


def boundary_band(mask: Bool[Tensor, "n h w"], *, kernel_size: int = 3) -> Bool[Tensor, "n h w"]:
    r"""Mark the band along the boundary of a mask: where its dilation differs from its erosion.

    $$B_p = \left[\exists\,q \in W_p: M_q\right] \wedge \left[\exists\,q \in W_p: \neg M_q\right]$$

    with W_p the square of `kernel_size` pixels around p, as far as it lies in the image.

    **Convention.** Outside the image is neutral: the image border is no boundary. An odd size is symmetric; an even one
    reaches one pixel further up and left, so that 2 looks at a pixel and its up, left and up-left neighbours. Size 1
    has no band. No pixel passes through float.

    **Source.** EHTDI's released code is `kernel_size=2`. Its loss weights the band of the target paste outside the
    source mask: `boundary_band(mask) & ~source_mask`.

    Args:
        mask: bool (N, H, W).
        kernel_size: side of the square in pixels, at least 1.

    Returns:
        Bool (N, H, W).

    Raises:
        TypeError: a mask that is not bool.
        ValueError: a mask of another form, or a size below 1.

    Example:
        >>> import torch
        >>> boundary_band(torch.tensor([[[False, False, True, True]]]), kernel_size=2)
        tensor([[[False, False,  True, False]]])
    """
    check_integer("kernel_size", kernel_size)
    check_mask(mask)
    # Bytes instead of booleans: inductor cannot pad a boolean on the CPU.
    inside = mask.to(torch.uint8)
    return (_any_near(inside, kernel_size) & _any_near(1 - inside, kernel_size)).to(torch.bool)


def _any_near(mask: Tensor, size: int) -> Tensor:
    """Whether any pixel of the window is True: along one axis, then the other, the window doubling at each step."""
    before, after = size // 2, (size - 1) // 2
    for axis, padding in ((2, (before, after)), (1, (0, 0, before, after))):
        mask = pad(mask, padding, value=0)
        width = 1
        while width < size:
            step = min(width, size - width)
            kept = mask.shape[axis] - step
            mask = mask.narrow(axis, 0, kept) | mask.narrow(axis, step, kept)
            width += step
    return mask
