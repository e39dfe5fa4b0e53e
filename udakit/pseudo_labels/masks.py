"""Masks of the pixels that may have a pseudo-label."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from udakit._checks import as_device, check_integer


def row_mask(
    height: int, width: int, top: int = 0, bottom: int = 0, *, device: torch.device | str | None = None
) -> Bool[Tensor, "h w"]:
    """Make a mask that leaves out rows at the top and the bottom of an image.

    **Convention.** True means that a pixel counts. Every selector accepts the mask as `valid` for all images of a
    batch. For a function that expects (N, H, W), use `mask.expand(n, -1, -1)`.

    **Source.** DAFormer leaves out 15 rows of sky artefacts and 120 rows of the car's bonnet in its 512 x 512 crops.

    Args:
        height: number of rows of the mask.
        width: number of columns of the mask.
        top: number of rows to leave out at the top.
        bottom: number of rows to leave out at the bottom.
        device: device of the mask; None means torch's default device.

    Returns:
        Bool (H, W).

    Raises:
        ValueError: a number of rows is negative, or no row is left.

    Example:
        >>> row_mask(4, 2, 1, 1)[:, 0].tolist()
        [False, True, True, False]
    """
    check_integer("height", height)
    check_integer("width", width)
    check_integer("top", top, 0)
    check_integer("bottom", bottom, 0)
    if top + bottom >= height:
        raise ValueError(
            f"Expected `top` + `bottom` to leave at least one of `height` = {height} rows, but got {top} + {bottom}."
        )
    row = torch.arange(height, device=None if device is None else as_device(device))
    return ((row >= top) & (row < height - bottom)).unsqueeze(1).expand(height, width).contiguous()
