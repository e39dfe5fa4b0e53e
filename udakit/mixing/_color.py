"""Colour arithmetic on RGB images: Rec. 601 luma, HSV saturation and hue, CIE Lab. No constant is copied to a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

# Linear sRGB to XYZ, each row divided by the D65 white point, so that white is (1, 1, 1); and the inverse.
_RGB_TO_XYZ: Matrix = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
_XYZ_TO_RGB: Matrix = (
    (3.2404542 * 0.95047, -1.5371385, -0.4985314 * 1.08883),
    (-0.9692660 * 0.95047, 1.8760108, 0.0415560 * 1.08883),
    (0.0556434 * 0.95047, -0.2040259, 1.0572252 * 1.08883),
)
_SRGB_KNEE, _LINEAR_KNEE, _LAB_KNEE = 0.04045, 0.0031308, 6 / 29


def luma(rgb: Tensor) -> Tensor:
    """Rec. 601 grey value, (N, 1, H, W)."""
    r, g, b = rgb.unbind(1)
    return torch.add(torch.add(0.299 * r, g, alpha=0.587), b, alpha=0.114).unsqueeze(1)


def saturate_and_turn(x: Tensor, saturation: Tensor | None, hue: Tensor | None) -> Tensor:
    """Multiply the HSV saturation by (N,), not below 0, and add (N,) to the hue, without choosing a sextant.

    If the smallest channel is 0 and the largest is 1, the hue is 1 + g + b - r sextants away from red, on the side of
    the larger of g and b. Each channel is a trapezoid over its own distance.
    """
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    # 2, 11/6, 10/6, ... in turns of the circle: of red, green and blue (which lie a third apart), and 1/6 at the end.
    turns = torch.arange(2, 0, -1 / 6, dtype=x.dtype, device=x.device)
    # In turns of the circle, grey pixels of any hue.
    distance = torch.addcdiv(turns[11], (g + b) - (r + low), chroma.clamp_min(1e-12), value=1 / 6)
    place = turns[0:5:2].view(3, 1, 1)
    if hue is not None:
        hue = hue.to(x.dtype).remainder(2 * math.pi).view(-1, 1, 1, 1)
        place = torch.add(place, hue, alpha=1 / (2 * math.pi))
    turned = (torch.copysign(distance, g - b).unsqueeze(1) + place).frac()
    if saturation is not None:
        chroma = torch.minimum(chroma * saturation.to(x.dtype).view(-1, 1, 1), value)
    # low + chroma times the share of the trapezoid, clamp(2 - 6 |distance|, 0, 1), with the constants taken out.
    base = torch.sub(value, chroma, alpha=2).unsqueeze(1)
    return torch.addcmul(base, chroma.unsqueeze(1), (turned - 0.5).abs().clamp(1 / 6, 1 / 3), value=6).clamp(0, 1)


def _matrix(numbers: Matrix, like: Tensor) -> tuple[Tensor, ...]:
    """The three columns, each (3, 1, 1)."""
    return torch.stack([_number(m, like) for row in numbers for m in row]).view(3, 3, 1, 1).unbind(1)


def _transform(x: Tensor, columns: tuple[Tensor, ...]) -> Tensor:
    """The 3 x 3 matrix on the channel axis: (N, 3, H, W)."""
    a, b, c = torch.split(x, 1, dim=1)
    first, second, third = columns
    return torch.addcmul(torch.addcmul(first * a, second, b), third, c)


class Opponent:
    """Convert images to y, x - y and y - z of CIE Lab, each (N, H, W): L / 116, a / 500 and b / 200.

    Images are sRGB, denormalised by `mean` and `std` (from `per_channel`) and clamped to [0, 1]. The constants are
    computed once, for the content, the style and all their stripes.

    Both curves are the sum of two pieces, each clamped to its side of the knee. Powers then get safe values only, and
    black has a gradient. The value at the knee is counted twice in the sum and is subtracted at the end, because each
    row of the matrix sums to 1.
    """

    def __init__(self, mean: Tensor | None, std: Tensor | None, like: Tensor) -> None:
        self.scale = _number(1 / 1.055, like) if std is None else std / 1.055
        self.offset = _number(0.055 / 1.055, like) if mean is None else (mean + 0.055) / 1.055
        self.matrix = _matrix(_RGB_TO_XYZ, like)

    def __call__(self, images: Tensor) -> list[Tensor]:
        shifted = torch.addcmul(self.offset, images, self.scale)
        black, knee, slope = 0.055 / 1.055, (_SRGB_KNEE + 0.055) / 1.055, 1.055 / 12.92
        linear = torch.add(shifted.clamp(knee, 1) ** 2.4, shifted.clamp(black, knee), alpha=slope)
        xyz = _transform(linear, self.matrix)
        surplus = knee * slope
        knee, slope = _LAB_KNEE**3 + surplus, 1 / (3 * _LAB_KNEE**2)
        f = torch.add((xyz.clamp_min(knee) - surplus) ** (1 / 3), xyz.clamp_max(knee), alpha=slope)
        x, y, z = f.unbind(1)
        return [y - (slope * knee + 16 / 116), x - y, y - z]


class Rgb:
    """The inverse of `Opponent`: images clamped to [0, 1] and normalised by `mean` and `std`."""

    def __init__(self, mean: Tensor | None, std: Tensor | None, like: Tensor) -> None:
        self.bounded = mean is None and std is None
        # sRGB is 1.055 times the sum of the pieces, minus the offset of its curve and the value at the knee.
        surplus = 0.055 + 12.92 * _LINEAR_KNEE
        self.scale = _number(1.055, like) if std is None else 1.055 / std
        self.offset = _number(-surplus, like) if mean is None else -(mean + surplus)
        self.offset = self.offset if std is None else self.offset / std
        self.matrix = _matrix(_XYZ_TO_RGB, like)

    def __call__(self, opponent: list[Tensor]) -> Tensor:
        y, red, blue = opponent
        y = y + 16 / 116
        f = torch.stack([y + red, y, y - blue], dim=1)
        slope = 3 * _LAB_KNEE**2
        xyz = torch.add(f.clamp_min(_LAB_KNEE) ** 3, f.clamp_max(_LAB_KNEE), alpha=slope)
        linear = _transform(xyz, self.matrix) - slope * _LAB_KNEE
        slope = 12.92 / 1.055
        rgb = torch.add(linear.clamp(_LINEAR_KNEE, 1) ** (1 / 2.4), linear.clamp(0, _LINEAR_KNEE), alpha=slope)
        rgb = torch.addcmul(self.offset, rgb, self.scale)
        return rgb.clamp(0, 1) if self.bounded else rgb


def _number(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)
