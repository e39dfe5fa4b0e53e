"""Strong photometric augmentation, drawn for each image: jitter, greyscale, sharpness, Gaussian blur."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from kornia.enhance import sharpness
from torch import Tensor, nn

from udakit._checks import check_generator, check_integer, check_pair, check_range, draw_device, kind_of, shape_of
from udakit._reduce import full_precision, upcast
from udakit.mixing._color import Channels, channels_like, check_channels, check_rgb, luma, restore

BLOCK = 2**18  # elements worked on at once on the CPU: small enough that the steps between stay in its cache


class StrongAugmentDraw(NamedTuple):
    """What to do to each image, as (N,) tensors; None for an operation that is switched off for all.

    Attributes:
        jitter: bool, whether the four colour factors below are applied.
        brightness: added to the values.
        contrast: factor of the values.
        saturation: factor of the HSV saturation.
        hue: angle in radians.
        greyscale: bool.
        sharpness: factor, 1 keeps, 0 blurs, 2 sharpens; 1 where it was not drawn.
        blur: bool.
        sigma: standard deviation of the blur in pixels.
        max_sigma: the largest that could have been drawn: a Python number, it sizes the kernel.
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


def _check_options(
    strengths: dict[str, float], probabilities: dict[str, float], blur_sigma: tuple[float, float]
) -> None:
    for name, value in strengths.items():
        check_range(name, value, 0.0, 0.5 if name == "hue" else 1.0)
    for name, value in probabilities.items():
        check_range(name, value, 0.0, 1.0)
    check_pair("blur_sigma", blur_sigma, "(low, high) with 0 < low <= high")
    if not 0 < blur_sigma[0] <= blur_sigma[1]:
        raise ValueError(f"Expected `blur_sigma` to be (low, high) with 0 < low <= high, but got {blur_sigma}.")


def draw_strong_augment(
    n: int,
    *,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 0.2,
    jitter_probability: float = 0.8,
    greyscale_probability: float = 0.0,
    sharpness: float = 0.5,
    sharpness_probability: float = 0.0,
    blur_probability: float = 0.5,
    blur_sigma: tuple[float, float] = (0.15, 1.15),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> StrongAugmentDraw:
    r"""Draw the parameters of a strong augmentation for each of `n` images, all uniform.

    $$b \sim U(-s, s), \quad c \sim U(1 - s, 1 + s), \quad h \sim 2\pi\,U(-s, s), \quad
    \sigma \sim U(\sigma_{\min}, \sigma_{\max})$$

    **Convention.** Each image has its own draw. The order of random numbers is fixed, whatever is switched off.

    **Source.** DAFormer: strength 0.2 in 80 % of the cases, blur in 50 % with sigma 0.15..1.15, one draw for the whole
    batch; DACS: strength 0.25.

    Args:
        n: number of images.
        brightness: s of the added brightness.
        contrast: s of the contrast factor.
        saturation: s of the saturation factor.
        hue: s of the hue, as a share of the full circle, at most 0.5.
        jitter_probability: share of images whose colours are jittered.
        greyscale_probability: share of images that lose their colour.
        sharpness: s of the sharpness factor.
        sharpness_probability: share of images whose sharpness changes.
        blur_probability: share of images that are blurred.
        blur_sigma: lowest and highest standard deviation of the blur, in pixels.
        generator: random numbers are drawn on `device`.
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
    check_integer("n", n, 0)
    _check_options(
        {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "sharpness": sharpness},
        {
            "jitter_probability": jitter_probability,
            "greyscale_probability": greyscale_probability,
            "sharpness_probability": sharpness_probability,
            "blur_probability": blur_probability,
        },
        blur_sigma,
    )
    device = draw_device(generator, device)
    u = torch.rand(10, n, generator=generator, device=device, dtype=torch.float32)
    signed = 2 * u - 1
    blurred, sharpened = u[6] < blur_probability, u[8] < sharpness_probability
    low, high = blur_sigma
    jitter = jitter_probability > 0
    return StrongAugmentDraw(
        jitter=u[0] < jitter_probability if jitter else None,
        brightness=brightness * signed[1] if jitter and brightness else None,
        contrast=1 + contrast * signed[2] if jitter and contrast else None,
        saturation=1 + saturation * signed[3] if jitter and saturation else None,
        hue=2 * math.pi * hue * signed[4] if jitter and hue else None,
        greyscale=u[5] < greyscale_probability if greyscale_probability else None,
        sharpness=torch.where(sharpened, 1 + sharpness * signed[9], 1.0) if sharpness_probability else None,
        blur=blurred if blur_probability else None,
        sigma=low + (high - low) * u[7] if blur_probability else None,
        max_sigma=high if blur_probability else 0.0,
    )


def strong_augment(
    images: Float[Tensor, "n 3 h w"], draw: StrongAugmentDraw, *, mean: Channels | None, std: Channels | None
) -> Float[Tensor, "n 3 h w"]:
    r"""Apply a drawn augmentation: brightness, contrast, saturation, hue, greyscale, sharpness, blur, in this order.

    **Convention.** Denormalises to [0, 1], clamps after each operation, normalises again. An image for which nothing
    was drawn comes back bit for bit. Pixels stay in place: labels need no change. The blur reaches to four times the
    largest sigma; at the border it averages over the part that lies in the image. Float32 inside at least.

    **Source.** The operations of DAFormer's released code (additive brightness, multiplicative contrast, HSV saturation
    and hue), which permutes the order of the four and sizes the blur's kernel as 10 % of the image.

    Args:
        images: (N, 3, H, W).
        draw: from `draw_strong_augment`, on the same device.
        mean: channel means that the images were normalised with, as numbers or a (3,) tensor; None: in [0, 1].
        std: channel deviations that the images were normalised with; None: in [0, 1].

    Returns:
        Images in the dtype, memory format and normalisation of the input.

    Raises:
        TypeError: images that are not float.
        ValueError: other than three channels, or a draw for another number of images.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 16, 16)
        >>> draw = draw_strong_augment(2, generator=torch.Generator().manual_seed(0))
        >>> strong_augment(images, draw, mean=None, std=None).shape
        torch.Size([2, 3, 16, 16])
    """
    check_rgb("images", images)
    check_channels("mean", mean, images)
    check_channels("std", std, images)
    if not isinstance(draw, StrongAugmentDraw):
        raise TypeError(
            f"Expected `draw` to be a StrongAugmentDraw, but got {kind_of(draw)}. draw_strong_augment makes one."
        )
    parameters = [p for p in draw if isinstance(p, Tensor)]
    for p in parameters:
        if p.shape != images.shape[:1]:
            raise ValueError(
                f"Expected `draw` to hold tensors of shape (N,) matching `images` {shape_of(images)}, "
                f"but got {shape_of(p)}. Draw for as many images: draw_strong_augment(len(images), ...)."
            )
        if p.device != images.device:
            raise ValueError(
                f"Expected `draw` to be on the device of `images` '{images.device}', but got one on '{p.device}'. "
                "Draw there: draw_strong_augment(len(images), device=images.device)."
            )
    if not parameters:
        return images
    with full_precision(images):
        x = upcast(images)
        offset, scale = channels_like(mean, 0.0, x), channels_like(std, 1.0, x)
        x = torch.cat([_colours(block * scale + offset, draw) for block in _row_blocks(x)], dim=2)
        if draw.sharpness is not None and min(x.shape[2:]) >= 3:
            x = sharpness(x, draw.sharpness)
        if draw.blur is not None and draw.sigma is not None:
            x = _blur(x, draw.blur, draw.sigma, draw.max_sigma)
        x = restore((x - offset) / scale, images)
    return torch.where(_per_image(_touched(draw, parameters[0])), x, images)


def _row_blocks(x: Tensor) -> Sequence[Tensor]:
    """Stripes of rows on the CPU; a GPU and a compiler take the image at once."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= BLOCK:
        return (x,)
    return torch.split(x, max(BLOCK * x.shape[2] // x.numel(), 1), dim=2)


def _per_image(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def _touched(draw: StrongAugmentDraw, like: Tensor) -> Tensor:
    touched = torch.zeros_like(like, dtype=torch.bool)
    for applied in (draw.jitter, draw.greyscale, draw.blur):
        touched = touched if applied is None else touched | applied
    return touched if draw.sharpness is None else touched | (draw.sharpness != 1)


def _colours(x: Tensor, draw: StrongAugmentDraw) -> Tensor:
    """What is done to each pixel by itself: jitter and greyscale, from [0, 1] to [0, 1]."""
    x = x.clamp(0, 1)
    if draw.jitter is not None:
        x = torch.where(_per_image(draw.jitter), _jitter(x, draw), x)
    if draw.greyscale is not None:
        x = torch.where(_per_image(draw.greyscale), luma(x), x)
    return x


def _jitter(x: Tensor, draw: StrongAugmentDraw) -> Tensor:
    if draw.brightness is not None:
        x = (x + _per_image(draw.brightness).to(x.dtype)).clamp(0, 1)
    if draw.contrast is not None:
        x = (x * _per_image(draw.contrast).to(x.dtype)).clamp(0, 1)
    if draw.saturation is not None or draw.hue is not None:
        x = _saturate_and_turn(x, draw.saturation, draw.hue).clamp(0, 1)
    return x


def _saturate_and_turn(x: Tensor, saturation: Tensor | None, hue: Tensor | None) -> Tensor:
    """Multiply the HSV saturation, add to the hue, without a sextant to choose: each step is one vectorised pass.

    With the smallest channel at 0 and the largest at 1, the distance of the hue from red is 1 + g + b - r sextants, on
    the side of the larger of g and b; and a channel is a trapezoid over its own distance.
    """
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    distance = (g + b - r - low) / (6 * chroma).clamp_min(1e-12) + 1 / 6  # a full circle is 1; grey pixels have any hue
    angle = torch.copysign(distance, g - b)
    if hue is not None:
        angle = angle + (hue / (2 * math.pi)).to(x.dtype).view(-1, 1, 1)
    angle = 6 * (angle - angle.floor())
    if saturation is not None:
        chroma = torch.minimum(chroma * saturation.to(x.dtype).clamp_min(0).view(-1, 1, 1), value)
    low = value - chroma
    share = ((angle - 3).abs() - 1, 2 - (angle - 2).abs(), 2 - (angle - 4).abs())
    return torch.stack([torch.addcmul(low, chroma, s.clamp(0, 1)) for s in share], dim=1)


def _blur(x: Tensor, applied: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Separable convolution with a kernel for each image; where nothing is blurred the kernel is a single 1."""
    n, channels, height, width = x.shape
    reach = math.ceil(4 * max_sigma)
    distance = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (distance / sigma.to(x.dtype).unsqueeze(1)).square())
    kernel = torch.where(applied.unsqueeze(1), kernel, (distance == 0).to(x.dtype)).unsqueeze(1)
    weight = kernel.repeat_interleave(channels, dim=0)
    x = x.reshape(1, n * channels, height, width)
    if x.device.type == "cpu":  # its depthwise convolution is several times faster with the channels innermost
        x = x.contiguous(memory_format=torch.channels_last)
    x = F.conv2d(x, weight.unsqueeze(2), padding=(0, reach), groups=n * channels)
    x = F.conv2d(x, weight.unsqueeze(3), padding=(reach, 0), groups=n * channels)
    # The share of the kernel that lies in the image, along each axis: zero padding, divided out again.
    across, down = (F.conv1d(x.new_ones(1, n, m), kernel, padding=reach, groups=n) for m in (width, height))
    x = x.contiguous().view(n, channels, height, width)
    return x / (down.view(n, 1, height, 1) * across.view(n, 1, 1, width))


class StrongAugment(nn.Module):
    """Draw and apply: `strong_augment(images, draw_strong_augment(N, ...), mean=mean, std=std)`.

    Options as in [`draw_strong_augment`][udakit.mixing.draw_strong_augment]; `mean` and `std` are buffers.

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
        saturation: float = 0.2,
        hue: float = 0.2,
        jitter_probability: float = 0.8,
        greyscale_probability: float = 0.0,
        sharpness: float = 0.5,
        sharpness_probability: float = 0.0,
        blur_probability: float = 0.5,
        blur_sigma: tuple[float, float] = (0.15, 1.15),
    ) -> None:
        super().__init__()
        check_channels("mean", mean)
        check_channels("std", std)
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
        }
        draw_strong_augment(0, **self.options)  # checks the options

    def forward(
        self, images: Float[Tensor, "n 3 h w"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n 3 h w"]:
        """Draw for each image and apply."""
        check_rgb("images", images)
        check_generator(generator, images.device)
        draw = draw_strong_augment(len(images), generator=generator, device=images.device, **self.options)
        return strong_augment(images, draw, mean=self.mean, std=self.std)

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
