"""What a strong augmentation does to each image, drawn apart from the images themselves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from udakit._checks import check_integer, check_pair, check_range
from udakit.mixing._random import Generators, device_of_draw, uniform

COLOUR = 0.2  # strength of saturation and hue where the user gave none


class StrongAugmentDraw(NamedTuple):
    """What to do to each image, as (N,) tensors; None for an operation that is switched off for all.

    Attributes:
        jitter: bool, whether the factors of colour below are applied.
        brightness: added to the values.
        contrast: factor of the values.
        saturation: factor of the HSV saturation.
        hue: angle in radians.
        greyscale: bool.
        sharpness: factor, 1 keeps, 0 blurs, 2 sharpens; 1 where it was not drawn.
        blur: bool.
        sigma: standard deviation of the blur in pixels.
        max_sigma: the largest that could have been drawn: a Python number, it sizes the kernel.
        gamma: exponent of the values.
        noise: standard deviation of the noise; 0 where it was not drawn.
        noise_seed: int64, what the noise of each image is computed from.
        default_colours: names of the operations on colour that nobody asked for: images that are no RGB go without.
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


def _check_options(
    strengths: dict[str, float], probabilities: dict[str, float], pairs: dict[str, tuple[float, float]]
) -> None:
    for name, value in strengths.items():
        check_range(name, value, 0.0, 0.5 if name == "hue" else 1.0)
    for name, value in probabilities.items():
        check_range(name, value, 0.0, 1.0)
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
    r"""Draw the parameters of a strong augmentation for each of `n` images, all uniform (gamma in its logarithm).

    $$b \sim U(-s, s), \quad c \sim U(1 - s, 1 + s), \quad h \sim 2\pi\,U(-s, s), \quad
    \log\gamma \sim U(\log\gamma_{\min}, \log\gamma_{\max}), \quad \sigma \sim U(\sigma_{\min}, \sigma_{\max})$$

    **Convention.** Each image has its own draw. The order of random numbers is fixed, whatever is switched off; gamma
    and noise draw theirs behind all others, and only where they are on. Saturation and hue are for RGB images: of None
    they have the strength 0.2 there and are off for other images; asked for by a number, they refuse those.

    **Source.** DAFormer: strength 0.2 in 80 % of the cases, blur in 50 % with sigma 0.15..1.15, one draw for the whole
    batch; DACS: strength 0.25.

    Args:
        n: number of images.
        brightness: s of the added brightness.
        contrast: s of the contrast factor.
        saturation: s of the saturation factor; None: 0.2 where images are RGB.
        hue: s of the hue, as a share of the full circle, at most 0.5; None: 0.2 where images are RGB.
        jitter_probability: share of images whose colours are jittered: brightness, contrast, gamma, saturation, hue.
        greyscale_probability: share of images that lose their colour.
        sharpness: s of the sharpness factor.
        sharpness_probability: share of images whose sharpness changes.
        blur_probability: share of images that are blurred.
        blur_sigma: lowest and highest standard deviation of the blur, in pixels.
        gamma: lowest and highest exponent of the values: below 1 brighter, above darker; (0.5, 2.0) is wide.
        noise: largest standard deviation of the Gaussian noise, as a share of [0, 1].
        noise_probability: share of images that get noise.
        generator: random numbers are drawn on `device`; a list has one for each image.
        device: of the draw; by default that of the generator, else the CPU.

    Returns:
        A `StrongAugmentDraw`; operations of probability 0 are None in it.

    Raises:
        ValueError: an option out of range, or a generator on another device.

    Example:
        >>> draw = draw_strong_augment(4, blur_probability=0)
        >>> draw.hue.shape, draw.blur
        (torch.Size([4]), None)
    """
    given = {"saturation": saturation, "hue": hue}
    default_colours = tuple(name for name, value in given.items() if value is None)
    saturation, hue = (COLOUR if value is None else value for value in given.values())
    check_integer("n", n, 0)
    _check_options(
        {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
            "sharpness": sharpness,
            "noise": noise,
        },
        {
            "jitter_probability": jitter_probability,
            "greyscale_probability": greyscale_probability,
            "sharpness_probability": sharpness_probability,
            "blur_probability": blur_probability,
            "noise_probability": noise_probability,
        },
        {"blur_sigma": blur_sigma, "gamma": gamma},
    )
    device = device_of_draw(generator, n, device)
    u = uniform((10, n), generator, device, axis=1)
    low, high = blur_sigma
    jitter = jitter_probability > 0
    bent = jitter and tuple(gamma) != (1, 1)
    # Drawn only where it is used, so that a seed without gamma and noise draws the same as before there were such.
    more = uniform((4, n), generator, device, axis=1) if bent or noise_probability else u
    dark, bright = math.log(gamma[0]), math.log(gamma[1])
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
        sigma=_between(u[7], low, high) if blur_probability else None,
        max_sigma=high if blur_probability else 0.0,
        default_colours=default_colours,
        gamma=torch.exp(_between(more[0], dark, bright)) if bent else None,
        noise=torch.where(more[1] < noise_probability, noise * more[2], 0.0) if noise_probability else None,
        noise_seed=(more[3] * 2**24).long() if noise_probability else None,
    )


def _between(u: Tensor, low: float, high: float) -> Tensor:
    """Numbers in [0, 1) stretched to [low, high), in one launch."""
    return torch.rsub(u, low, alpha=low - high)
