"""Strong photometric augmentation for each image: jitter, greyscale, sharpness, Gaussian blur and noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import kind_of, shape_of
from udakit._reduce import full_precision, upcast
from udakit._state import FullPrecisionState
from udakit.mixing._photometric import Colours, Normalise, blur, gaussian_noise, per_image, sharpen
from udakit.mixing._random import Generators, check_generators
from udakit.mixing.augment_draw import StrongAugmentDraw, draw_strong_augment
from udakit.mixing.images import (
    Channels,
    check_image_batch,
    check_rgb,
    check_statistics,
    join,
    per_channel,
    restore,
    row_blocks,
)


def strong_augment(
    images: Float[Tensor, "n k *space"], draw: StrongAugmentDraw, *, mean: Channels | None, std: Channels | None
) -> Float[Tensor, "n k *space"]:
    r"""Apply a drawn augmentation: brightness, contrast, gamma, saturation, hue, greyscale, sharpness, blur, noise.

    **Convention.** Pixels do not move, so labels need no change. An image for which nothing was drawn is returned bit
    for bit. Computations use at least float32.

    **Range.** Images are denormalised to [0, 1], clamped after each operation, and normalised again. Images in 0..255,
    or normalised images without their `mean` and `std`, come out white, black or in primary colours; `check_images`
    finds such images.

    **Channels.** Images may have any number of channels and one, two or three dimensions. Saturation, hue and greyscale
    need images (N, 3, H, W). Other images skip saturation and hue if these are on by default, and raise an error if one
    of the three was requested.

    **Details.** Below 1e-3, gamma is a straight line, so that black has a gradient. Sharpness uses windows of 3 pixels
    along each axis. The blur reaches up to four times the largest sigma; at the border it averages over the part inside
    the image. Noise depends only on the draw and the position, so all renderings of an image get the same noise.

    **Source.** The operations of DAFormer's released code (additive brightness, multiplicative contrast, HSV saturation
    and hue), which also permutes these four and uses a blur kernel of 10 % of the image.

    Args:
        images: images, (N, K, *space).
        draw: result of `draw_strong_augment`, on the same device.
        mean: channel means that the images were normalised with, as K numbers or a (K,) tensor; None if they are in [0,
            1].
        std: channel standard deviations that the images were normalised with; None if they are in [0, 1].

    Returns:
        Images in the dtype, memory format and normalisation of the input.

    Raises:
        TypeError: an image tensor is not float.
        ValueError: the draw is for another number of images, or asks for colour operations on images that are not RGB.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 16, 16)
        >>> draw = draw_strong_augment(2, generator=torch.Generator().manual_seed(0))
        >>> strong_augment(images, draw, mean=None, std=None).shape
        torch.Size([2, 3, 16, 16])
    """
    check_image_batch("images", images)
    check_statistics(mean, std, images)
    if not isinstance(draw, StrongAugmentDraw):
        raise TypeError(
            f"Expected `draw` to be a StrongAugmentDraw, but got {kind_of(draw)}. Make one with draw_strong_augment."
        )
    parameters = [p for p in draw if isinstance(p, Tensor)]
    for p in parameters:
        if p.shape != images.shape[:1]:
            raise ValueError(
                f"Expected `draw` to hold tensors of shape (N,) matching `images` {shape_of(images)}, "
                f"but got {shape_of(p)}. Draw for this number of images with draw_strong_augment(len(images), ...)."
            )
        if p.device != images.device:
            raise ValueError(
                f"Expected `draw` to be on the device of `images` '{images.device}', but got one on '{p.device}'. "
                "Draw on it with draw_strong_augment(len(images), device=images.device)."
            )
    draw = _without_default_colours(draw, images)
    applied = (draw.jitter, draw.greyscale, draw.blur, draw.noise, draw.sharpness)
    if all(p is None for p in applied) or images.numel() == 0:
        return images.clone()
    with full_precision(images):
        x = upcast(images)
        mean, std = (None if v is None else per_channel(v, x) for v in (mean, std))
        touched = per_image(_touched(draw), x)
        colours, normalise = Colours(draw, mean, std, x), Normalise(mean, std)
        blocks: Sequence[Tensor] = [colours(block) for block in row_blocks(x)]
        if draw.sharpness is not None or draw.blur is not None or draw.noise is not None:
            blocks = row_blocks(_neighbours(join(blocks), draw))
        blocks = [
            torch.where(touched, normalise(block).to(images.dtype), image)
            for block, image in zip(blocks, row_blocks(images), strict=True)
        ]
    return restore(join(blocks), images)


def _neighbours(x: Tensor, draw: StrongAugmentDraw) -> Tensor:
    """The operations after those on single colours: sharpness, blur, noise."""
    if draw.sharpness is not None and min(x.shape[2:]) >= 3:
        x = sharpen(x, draw.sharpness)
    if draw.blur is not None and draw.sigma is not None:
        x = blur(x, draw.blur, draw.sigma, draw.max_sigma)
    if draw.noise is not None and draw.noise_seed is not None:
        x = torch.addcmul(x, per_image(draw.noise, x), gaussian_noise(x, draw.noise_seed)).clamp(0, 1)
    return x


def _without_default_colours(draw: StrongAugmentDraw, images: Tensor) -> StrongAugmentDraw:
    """The draw for images that are not RGB: without the default colours, or an error for requested ones."""
    if images.ndim == 4 and images.shape[1] == 3:
        return draw
    for name in ("saturation", "hue", "greyscale"):
        if getattr(draw, name) is not None and name not in draw.default_colours:
            check_rgb("images", images, f"`{name}`")
    # Without saturation and hue. Do not use `_replace`, which torch.compile of torch 2.5 cannot trace.
    return StrongAugmentDraw(*draw[:3], None, None, *draw[5:])  # type: ignore[arg-type]


def _touched(draw: StrongAugmentDraw) -> Tensor:
    """The images for which something was drawn, bool (N,)."""
    touched = [applied for applied in (draw.jitter, draw.greyscale, draw.blur) if applied is not None]
    touched += [] if draw.noise is None else [draw.noise != 0]
    touched += [] if draw.sharpness is None else [draw.sharpness != 1]
    return reduce(torch.logical_or, touched)


class StrongAugment(FullPrecisionState):
    """Draw a strong augmentation for each image and apply it.

    A call is `strong_augment(images, draw_strong_augment(N, ...), mean=mean, std=std)`. The options are those of
    [`draw_strong_augment`][udakit.mixing.draw_strong_augment]; `mean` and `std` are buffers. Images that are not RGB
    skip saturation and hue, unless these were requested.

    Attributes:
        mean: float32 buffer (K,), or None.
        std: float32 buffer (K,), or None.

    Example:
        >>> import torch
        >>> augment = StrongAugment(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        >>> augment(torch.zeros(2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 16])
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        *,
        mean: Channels | None,
        std: Channels | None,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float | None = None,
        hue: float | None = None,
        jitter_probability: float = 0.8,
        greyscale_probability: float = 0.0,
        sharpness: float = 0.5,
        sharpness_probability: float = 0.0,
        blur_probability: float = 0.5,
        blur_sigma: tuple[float, float] = (0.15, 1.15),
        gamma: tuple[float, float] = (1.0, 1.0),
        noise: float = 0.05,
        noise_probability: float = 0.0,
    ) -> None:
        super().__init__()
        check_statistics(mean, std)
        self.register_buffer("mean", None if mean is None else torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", None if std is None else torch.as_tensor(std, dtype=torch.float32))
        self.options: dict[str, Any] = {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
            "jitter_probability": jitter_probability,
            "greyscale_probability": greyscale_probability,
            "sharpness": sharpness,
            "sharpness_probability": sharpness_probability,
            "blur_probability": blur_probability,
            "blur_sigma": blur_sigma,
            "gamma": gamma,
            "noise": noise,
            "noise_probability": noise_probability,
        }
        draw_strong_augment(0, **self.options)  # checks the options

    def forward(
        self, images: Float[Tensor, "n k *space"], *, generator: Generators | None = None
    ) -> Float[Tensor, "n k *space"]:
        """Draw an augmentation for each image and apply it."""
        check_image_batch("images", images)
        check_generators(generator, len(images), images.device)
        draw = draw_strong_augment(len(images), generator=generator, device=images.device, **self.options)
        return strong_augment(images, draw, mean=self.mean, std=self.std)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
