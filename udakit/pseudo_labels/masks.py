"""Masks of pixels that may carry a pseudo-label."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from udakit._checks import as_device, check_integer


def row_mask(
    height: int, width: int, top: int = 0, bottom: int = 0, *, device: torch.device | str | None = None
) -> Bool[Tensor, "h w"]:
    """Mask that leaves out the rows at the top and the bottom of every image.

    **Convention.** True = counts. Every selector takes it as `valid` for all images of a batch; for a function that
    wants (N, H, W), use `mask.expand(n, -1, -1)`.

    **Source.** DAFormer leaves out 15 rows of sky artefacts and 120 rows of the car's bonnet in its 512 x 512 crops.

    Args:
        height: rows of the mask, in pixels.
        width: columns of the mask, in pixels.
        top: rows left out at the top, in pixels.
        bottom: rows left out at the bottom, in pixels.
        device: where the mask is made; the default is torch's.

    Returns:
        Bool (H, W).

    Raises:
        ValueError: a negative number of rows, or so many that no row is left.

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
