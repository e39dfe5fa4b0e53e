"""Training-free translators that give source images the style of the target, by name for the recipes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from udakit import color_transfer, fourier_transfer, histogram_transfer

Channels = tuple[float, ...]

# Of (source, target, mean, std): the images, and what they were normalised with.
TRANSLATORS: dict[str, Callable[[Tensor, Tensor, Channels, Channels], Tensor]] = {
    "none": lambda source, target, mean, std: source,
    "color": lambda source, target, mean, std: color_transfer(source, target, mean=mean, std=std),
    "fourier": lambda source, target, mean, std: fourier_transfer(source, target, beta=0.01),
    "histogram": lambda source, target, mean, std: histogram_transfer(source, target),
}
