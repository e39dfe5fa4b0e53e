"""Draw the parameters of a strong augmentation, separately from applying it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from udakit._checks import check_integer, check_pair, check_range
from udakit.mixing._random import Generators, device_of_draw, uniform

COLOUR = 0.2  # strength of saturation and hue if the user gives none


class StrongAugmentDraw(NamedTuple):
    """The parameters of a strong augmentation, as one (N,) tensor for each; None for an operation that is switched off.

    Attributes:
        jitter: bool, whether brightness, contrast, saturation, hue and gamma are applied.
        brightness: number that is added to the values.
        contrast: factor of the values.
        saturation: factor of the HSV saturation.
        hue: angle in radians that is added to the hue.
        greyscale: bool, whether the image becomes grey.
        sharpness: factor; 0 blurs, 1 keeps and 2 sharpens the image. It is 1 where nothing was drawn.
        blur: bool, whether the image is blurred.
        sigma: standard deviation of the blur in pixels.
        max_sigma: largest sigma that could have been drawn, a Python number; it determines the size of the kernel.
        gamma: exponent of the values.
        noise: standard deviation of the noise. It is 0 where nothing was drawn.
        noise_seed: int64, the seed of the noise of each image.
        default_colours: names of the colour operations that are on by default; images that are not RGB skip them.
    """

    jitter: Bool[Tensor, "n"] | None = None
    brightness: Float[Tensor, "n"] | None = None
    contrast: Float[Tensor, "n"] | None = None
    saturation: Float[Tensor, "n"] | None = None
    hue: Float[Tensor, "n"] | None = None
    greyscale: Bool[Tensor, "n"] | None = None
    sharpness: Float[Tensor, "n"] | None = None
    blur: Bool[Tensor, "n"] | None = None
    sigma: Float[Tensor, "n"] | None = None
    max_sigma: float = 0.0
    gamma: Float[Tensor, "n"] | None = None
    noise: Float[Tensor, "n"] | None = None
    noise_seed: Integer[Tensor, "n"] | None = None
    default_colours: tuple[str, ...] = ()


def _check_strengths(**strengths: float) -> None:
    for name, value in strengths.items():
        check_range(name, value, 0.0, 0.5 if name == "hue" else 1.0)


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        check_range(name, value, 0.0, 1.0)


def _check_bounds(**pairs: tuple[float, float]) -> None:
    for name, pair in pairs.items():
        form = "(low, high) with 0 < low <= high"
        check_pair(name, pair, form)
        if not 0 < pair[0] <= pair[1] < math.inf:
            raise ValueError(f"Expected `{name}` to be {form}, but got {pair}.")


def draw_strong_augment(
    n: int,
    *,
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
    generator: Generators | None = None,
    device: torch.device | str | None = None,
) -> StrongAugmentDraw:
    r"""Draw the parameters of a strong augmentation for each of `n` images, uniformly (log-uniformly for gamma).

    $$b \sim U(-s, s), \quad c \sim U(1 - s, 1 + s), \quad h \sim 2\pi\,U(-s, s), \quad
    \log\gamma \sim U(\log\gamma_{\min}, \log\gamma_{\max}), \quad \sigma \sim U(\sigma_{\min}, \sigma_{\max})$$

    **Convention.** Each image has its own draw. The order of the random numbers is fixed, whatever is switched off;
    gamma and noise draw theirs last, and only if they are on. Saturation and hue need RGB images. With None, they have
    the strength 0.2 on RGB images and are off on others. With a number, images that are not RGB raise an error.

    **Source.** DAFormer uses strength 0.2 in 80 % of the cases, a blur with sigma 0.15..1.15 in 50 %, and one draw for
    the whole batch. DACS uses strength 0.25.

    Args:
        n: number of images.
        brightness: strength s of the added brightness.
        contrast: strength s of the contrast factor.
        saturation: strength s of the saturation factor; None means 0.2 for RGB images and off for others.
        hue: strength s of the hue as a fraction of the full circle, at most 0.5; None means 0.2 for RGB images and off
            for others.
        jitter_probability: fraction of images with jittered brightness, contrast, gamma, saturation and hue.
        greyscale_probability: fraction of images that lose their colour.
        sharpness: strength s of the sharpness factor.
        sharpness_probability: fraction of images with a changed sharpness.
        blur_probability: fraction of images that are blurred.
        blur_sigma: lowest and highest standard deviation of the blur, in pixels.
        gamma: lowest and highest exponent of the values. Exponents below 1 brighten and those above 1 darken; (0.5,
            2.0) is a wide range.
        noise: largest standard deviation of the Gaussian noise, for values in [0, 1].
        noise_probability: fraction of images that get noise.
        generator: generator of the draw, on `device`; or a list with one generator for each image.
        device: device of the draw; by default that of the generator, or the CPU without one.

    Returns:
        A `StrongAugmentDraw`, in which operations of probability 0 are None.

    Raises:
        ValueError: an option is out of range, or the generator is on another device.

    Example:
        >>> draw = draw_strong_augment(4, blur_probability=0)
        >>> draw.hue.shape, draw.blur
        (torch.Size([4]), None)
    """
    given = {"saturation": saturation, "hue": hue}
    default_colours = tuple(name for name, value in given.items() if value is None)
    saturation, hue = (COLOUR if value is None else value for value in given.values())
    check_integer("n", n, 0)
    _check_strengths(
        brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, sharpness=sharpness, noise=noise
    )
    _check_probabilities(
        jitter_probability=jitter_probability,
        greyscale_probability=greyscale_probability,
        sharpness_probability=sharpness_probability,
        blur_probability=blur_probability,
        noise_probability=noise_probability,
    )
    _check_bounds(blur_sigma=blur_sigma, gamma=gamma)
    device = device_of_draw(generator, n, device)
    u = uniform((10, n), generator, device, axis=1)
    jitter = jitter_probability > 0
    bent = jitter and tuple(gamma) != (1, 1)
    # Drawn later, and only then: a seed gives the same draw as in versions without the two.
    later = uniform((4, n), generator, device, axis=1) if bent or noise_probability else u
    return StrongAugmentDraw(
        jitter=u[0] < jitter_probability if jitter else None,
        brightness=_between(u[1], -brightness, brightness) if jitter and brightness else None,
        contrast=_between(u[2], 1 - contrast, 1 + contrast) if jitter and contrast else None,
        saturation=_between(u[3], 1 - saturation, 1 + saturation) if jitter and saturation else None,
        hue=_between(u[4], -2 * math.pi * hue, 2 * math.pi * hue) if jitter and hue else None,
        greyscale=u[5] < greyscale_probability if greyscale_probability else None,
        sharpness=torch.where(u[8] < sharpness_probability, _between(u[9], 1 - sharpness, 1 + sharpness), 1.0)
        if sharpness_probability
        else None,
        blur=u[6] < blur_probability if blur_probability else None,
        sigma=_between(u[7], *blur_sigma) if blur_probability else None,
        max_sigma=blur_sigma[1] if blur_probability else 0.0,
        gamma=torch.exp(_between(later[0], math.log(gamma[0]), math.log(gamma[1]))) if bent else None,
        noise=torch.where(later[1] < noise_probability, noise * later[2], 0.0) if noise_probability else None,
        noise_seed=(later[3] * 2**24).long() if noise_probability else None,
        default_colours=default_colours,
    )


def _between(u: Tensor, low: float, high: float) -> Tensor:
    """Numbers in [0, 1) stretched to [low, high), in one launch."""
    return torch.rsub(u, low, alpha=low - high)
