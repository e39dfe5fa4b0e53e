"""Colour arithmetic on images: channel statistics, Rec. 601 luma, CIE Lab. No constant is copied from the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from udakit._checks import check_device, check_float, is_sequence, kind_of, shape_of

Channels = Sequence[float] | Tensor

# Linear sRGB to XYZ, each row divided by the D65 white point, so that white is (1, 1, 1); and the inverse.
_RGB_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
_XYZ_TO_RGB = (
    (3.2404542 * 0.95047, -1.5371385, -0.4985314 * 1.08883),
    (-0.9692660 * 0.95047, 1.8760108, 0.0415560 * 1.08883),
    (0.0556434 * 0.95047, -0.2040259, 1.0572252 * 1.08883),
)
_LAB_KNEE = 6 / 29


def check_channels(name: str, values: Channels | None, images: Tensor | None = None) -> None:
    """Raise unless `values` is None or three numbers, as a sequence or a tensor beside the `images`."""
    if isinstance(values, Tensor):
        if values.shape != (3,):
            raise ValueError(f"Expected `{name}` to be three numbers, one a channel, but got {shape_of(values)}.")
        if images is not None:
            check_device(name, values, images, "images")
    elif values is not None and (isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 3):
        given = tuple(values) if is_sequence(values) else kind_of(values)
        raise ValueError(f"Expected `{name}` to be three numbers, one a channel, but got {given}.")


def channels_like(values: Channels | None, default: float, like: Tensor) -> Tensor:
    """Three numbers as (1, 3, 1, 1) on the device of `like`, filled there when they are Python numbers."""
    if values is None:
        values = (default,) * 3
    if not isinstance(values, Tensor):
        values = torch.stack([torch.full((), v, dtype=like.dtype, device=like.device) for v in values])
    return values.to(like.dtype).view(1, 3, 1, 1)


def check_rgb(name: str, images: Tensor) -> None:
    """Raise unless `images` is float (N, 3, H, W)."""
    check_float(name, images, 4, "(N, 3, H, W)")
    if images.shape[1] != 3:
        hint = " Channels come first by .permute(0, 3, 1, 2)." if images.shape[3] == 3 else ""
        raise ValueError(f"Expected `{name}` to be (N, 3, H, W), but got {shape_of(images)}.{hint}")


def restore(result: Tensor, images: Tensor) -> Tensor:
    """Give `result` the dtype and the memory format of `images`."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return result.to(images.dtype).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def luma(rgb: Tensor) -> Tensor:
    """Rec. 601 grey value, (N, 1, H, W)."""
    r, g, b = rgb.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def _transform(x: Tensor, matrix: tuple[tuple[float, float, float], ...]) -> list[Tensor]:
    a, b, c = x.unbind(1)
    return [row[0] * a + row[1] * b + row[2] * c for row in matrix]


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """CIE Lab (D65) of sRGB in [0, 1]: L in 0..100. Powers see safe values only, so that black has a gradient."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    x, y, z = (
        torch.where(v > _LAB_KNEE**3, v.clamp_min(_LAB_KNEE**3) ** (1 / 3), v / (3 * _LAB_KNEE**2) + 4 / 29)
        for v in _transform(linear, _RGB_TO_XYZ)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """SRGB in [0, 1] of CIE Lab (D65), clamped."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    xyz = torch.stack(
        [torch.where(v > _LAB_KNEE, v**3, 3 * _LAB_KNEE**2 * (v - 4 / 29)) for v in (y + a / 500, y, y - b / 200)],
        dim=1,
    )
    linear = torch.stack(_transform(xyz, _XYZ_TO_RGB), dim=1).clamp(0, 1)
    return torch.where(
        linear > 0.0031308, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear
    ).clamp(0, 1)
