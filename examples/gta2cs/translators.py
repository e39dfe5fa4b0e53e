"""Source images in the style of target, without training: what the recipes call by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gta2cs.loading import MEAN, STD
from udakit import color_transfer, fourier_transfer, histogram_transfer

TRANSLATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda source, target: source,
    "color": lambda source, target: color_transfer(source, target, mean=MEAN, std=STD),
    "fourier": lambda source, target: fourier_transfer(source, target, beta=0.01),
    "histogram": lambda source, target: histogram_transfer(source, target),
}
