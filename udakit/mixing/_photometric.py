"""The operations of strong augmentation on (N, K, *space) images in [0, 1], with parameters for each image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit.mixing._color import luma, saturate_and_turn
from udakit.mixing.augment_draw import StrongAugmentDraw

CONVOLUTION = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
DARK = 1e-3  # below this, gamma is a straight line: a quarter of a level of 8 bits


def per_image(x: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, ...), in the dtype of the images `like` unless it is bool."""
    return (x if x.dtype == torch.bool else x.to(like.dtype)).view(-1, *(1,) * (like.ndim - 1))


class Colours:
    """The operations on single pixels, jitter and greyscale, from normalised images to [0, 1].

    `mean` and `std` come from `per_channel`. The parameters of each image are computed once, for all its stripes.

    Denormalising, brightness and contrast are one straight line between two bounds for each image and channel. An image
    that is not jittered gets factors that change nothing. This takes fewer passes than one operation at a time.
    """

    def __init__(self, draw: StrongAugmentDraw, mean: Tensor | None, std: Tensor | None, like: Tensor) -> None:
        self.draw = draw
        self.scale: Tensor | float = 1.0 if std is None else std
        self.offset: Tensor | float = 0.0 if mean is None else mean
        self.bounds: tuple[Tensor, Tensor] | None = None
        self.hue = None if draw.jitter is None or draw.hue is None else draw.hue * draw.jitter
        contrast, self.saturation = self._factors(draw.contrast, draw.saturation)
        bounds = None
        if draw.jitter is not None and draw.brightness is not None:
            brightness = per_image(draw.brightness * draw.jitter, like)
            self.offset = brightness if mean is None else brightness + mean
            ends = torch.arange(2, dtype=like.dtype, device=like.device).view(2, *(1,) * like.ndim)
            bounds = (brightness + ends).clamp(0, 1)  # of what 0 and 1 become
        if contrast is not None:
            contrast = per_image(contrast, like)
            self.scale, self.offset = contrast * self.scale, contrast * self.offset
            bounds = None if bounds is None else (contrast * bounds).clamp_max(1)
        self.bounds = None if bounds is None else (bounds[0], bounds[1])

    def _factors(self, *factors: Tensor | None) -> list[Tensor | None]:
        """Each factor from 0 on, 1 where an image is not jittered."""
        given = [f for f in factors if f is not None]
        if self.draw.jitter is None or not given:
            return [None] * len(factors)
        found = iter(torch.where(self.draw.jitter, torch.stack(given), 1.0).clamp_min(0))
        return [None if f is None else next(found) for f in factors]

    def __call__(self, x: Tensor) -> Tensor:
        x = _line(x, self.scale, self.offset)
        x = x.clamp(0, 1) if self.bounds is None else torch.clamp(x, *self.bounds)
        if self.draw.jitter is not None and self.draw.gamma is not None:
            gamma = per_image(torch.where(self.draw.jitter, self.draw.gamma, 1.0), x)
            x = x * x.clamp_min(DARK) ** (gamma - 1)
        if self.saturation is not None or self.hue is not None:
            x = saturate_and_turn(x, self.saturation, self.hue)
        if self.draw.greyscale is not None:
            x = torch.where(per_image(self.draw.greyscale, x), luma(x), x)
        return x


def _line(x: Tensor, scale: Tensor | float, offset: Tensor | float) -> Tensor:
    """`x * scale + offset` in as few passes as it takes."""
    if isinstance(scale, Tensor) and isinstance(offset, Tensor):
        return torch.addcmul(offset, x, scale)
    x = x * scale if isinstance(scale, Tensor) else x
    return x + offset if isinstance(offset, Tensor) else x


class Normalise:
    """`(x - mean) / std` in as few passes as it takes."""

    def __init__(self, mean: Tensor | None, std: Tensor | None) -> None:
        self.scale: Tensor | float = 1.0 if std is None else std.reciprocal()
        self.offset: Tensor | float = 0.0 if mean is None else -mean * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        return _line(x, self.scale, self.offset)


def sharpen(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the 3 x 3 window, in which the pixel itself counts five times; the border stays."""
    channels, axes = x.shape[1], x.ndim - 2
    weight = 1 / (3**axes + 4)
    kernel = torch.full((channels, 1, *(3,) * axes), weight, dtype=x.dtype, device=x.device)
    everything, between = slice(None), slice(1, -1)
    centre: tuple[slice | int, ...] = (everything, everything, *(1 for _ in range(axes)))
    inner: tuple[slice | int, ...] = (everything, everything, *(between for _ in range(axes)))
    kernel[centre] = 5 * weight
    smooth = CONVOLUTION[x.ndim](x, kernel, groups=channels)
    sharp = x.clone()
    sharp[inner] = torch.lerp(smooth, x[inner], per_image(factor, x)).clamp(0, 1)
    return sharp


def blur(x: Tensor, applied: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Separable convolution with a kernel for each image; an image that is not blurred gets a kernel of a single 1."""
    n, channels, *size = x.shape
    reach = math.ceil(4 * max_sigma)
    distance = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    # For an image that is not blurred, use a sigma so small that only the middle of the kernel is not 0.
    sigma = torch.where(applied, sigma, 1e-2).to(x.dtype).unsqueeze(1)
    kernel = torch.exp(-0.5 * (distance / sigma).square()).unsqueeze(1)
    weight = kernel.repeat_interleave(channels, dim=0)
    y = x.reshape(1, n * channels, *size)
    if x.device.type == "cpu" and x.ndim == 4:  # depthwise convolution is several times faster in channels_last
        y = y.contiguous(memory_format=torch.channels_last)
    # Divide by the part of the kernel inside the image along each axis, because the padding is 0.
    shares: dict[int, Tensor] = {}
    covered: Tensor | None = None
    for axis, length in reversed(list(enumerate(size))):
        along = [1] * len(size)
        along[axis] = -1
        padding = [reach if i == axis else 0 for i in range(len(size))]
        y = CONVOLUTION[x.ndim](y, weight.view(n * channels, 1, *along), padding=padding, groups=n * channels)
        if length not in shares:
            inside = torch.ones(1, n, length, dtype=x.dtype, device=x.device)
            shares[length] = F.conv1d(inside, kernel, padding=reach, groups=n)
        share = shares[length].view(n, 1, *along)
        covered = share if covered is None else share * covered
    assert covered is not None
    return y.contiguous().view(x.shape).div_(covered)


def gaussian_noise(like: Tensor, seed: Tensor) -> Tensor:
    """Standard normal values for images (N, K, *space) that depend only on the seed of the image and on the position.

    One draw therefore gives the same noise to several renderings of an image, on any device. Two rounds of an integer
    hash (32 bits, in int64) give 16 + 16 random bits, and the Box-Muller transform turns them into two values.
    """
    n, count = like.shape[0], like[0].numel()
    place = torch.arange((count + 1) // 2, device=like.device)
    bits = _hash(_hash(place) + _hash(seed.unsqueeze(1) * 2 + 1))
    radius = (-2 * torch.log(((bits >> 16).float() + 0.5).to(like.dtype) / 2**16)).sqrt()
    angle = (bits & 0xFFFF).to(like.dtype) * (2 * math.pi / 2**16)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :count].reshape(n, *like.shape[1:])


def _hash(x: Tensor) -> Tensor:
    """Mix 32 bits: every bit of the result depends on every bit of `x` (multiplications and shifts to the right)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    x = x & 0xFFFFFFFF
    return x ^ (x >> 15)
