"""Training-free styling: give source images the look of target images. Each can be `translate` of CrossDomainMix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_device, check_range, shape_of
from udakit._reduce import full_precision, upcast
from udakit.mixing._color import Opponent, Rgb
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

# A channel counts as flat below this standard deviation of L / 116, a / 500 or b / 200. Rounding gives grey images
# 1e-7; one 8-bit level is 4e-3.
FLOOR = 1e-4


def check_content_style(content: Tensor, style: Tensor, *, same_size: bool) -> None:
    """Raise unless both are images with the same batch size and channels, and the same size with `same_size`."""
    check_image_batch("content", content)
    check_image_batch("style", style)
    if style.shape[0] != content.shape[0]:
        raise ValueError(
            f"Expected `style` to have the batch size of `content` {shape_of(content)}, but got {shape_of(style)}. "
            "Each image needs a style: style[:1].expand_as(content) gives all images the same one."
        )
    if style.ndim != content.ndim:
        raise ValueError(
            f"Expected `style` to have the number of axes of `content` {shape_of(content)}, but got {shape_of(style)}."
        )
    if style.shape[1] != content.shape[1]:
        raise ValueError(
            f"Expected `style` to have the channels of `content` {shape_of(content)}, but got {shape_of(style)}."
        )
    check_device("style", style, content, "content")
    if same_size and style.shape != content.shape:
        raise ValueError(
            f"Expected `style` to have the size of `content` {shape_of(content)}, but got {shape_of(style)}. "
            "Crop or resize it first, because the frequencies depend on the size."
        )


def fourier_transfer(
    content: Float[Tensor, "n k *space"], style: Float[Tensor, "n k *space"], *, beta: float = 0.01
) -> Float[Tensor, "n k *space"]:
    r"""Give each image the low-frequency Fourier amplitudes of another image and keep its own phase.

    $$x' = \mathcal F^{-1}\!\left(\left[\,M_\beta A(s) + (1 - M_\beta)\,A(c)\,\right] e^{i\,\phi(c)}\right), \qquad
    M_\beta = \left[\,|k_y|, |k_x| \le \lfloor \beta \min(H, W) \rfloor\,\right]$$

    **Convention.** Images may have any number of channels, and each channel is transformed by itself, in one, two or
    three dimensions. Images are used as given, normalised or not, and the result is not clamped. `style` is detached.
    Computations use at least float32. beta = 0 still swaps the mean. A NaN makes the result NaN in that channel of
    that image, and nowhere else; `check_images` finds it.

    **Source.** FDA (Yang and Soatto, CVPR 2020). Like its numpy code, this swaps a centred square of 2b + 1 frequencies
    per side. Its torch code swaps the frequencies -b to b - 1, which is not symmetric.

    Args:
        content: the images that keep their layout, (N, K, *space).
        style: the images that give their amplitudes, of the same shape.
        beta: half the side of the swapped square as a fraction of the shortest side of the image, in [0, 0.5].

    Returns:
        Images in the dtype and memory format of `content`.

    Raises:
        TypeError: an image tensor is not float.
        ValueError: the shapes differ, or `beta` is out of range.

    Example:
        >>> import torch
        >>> content = torch.rand(1, 3, 16, 16, requires_grad=True)
        >>> styled = fourier_transfer(content, torch.rand(1, 3, 16, 16) + 1)
        >>> styled.square().sum().backward()
        >>> bool(styled.mean() > 1)
        True
    """
    check_range("beta", beta, 0.0, 0.5)
    check_content_style(content, style, same_size=True)
    if content.numel() == 0:  # FFT libraries refuse it
        return restore(content.clone(), content)
    size = content.shape[2:]
    axes = list(range(2, content.ndim))
    reach = int(beta * min(size))
    with full_precision(content):
        x = upcast(content)
        s = style.detach().to(x.dtype)
        # For real images half of the spectrum is enough, and the square is symmetric about frequency 0.
        spectrum = torch.fft.rfftn(x, dim=axes)
        amplitude = spectrum.abs()
        wanted = torch.fft.rfftn(s, dim=axes).abs()
        low = _low_frequencies(size, reach, x.device)
        # Where the amplitude of the content is 0, its phase is 0, as in angle().
        silent = amplitude == 0
        factor = torch.where(low & ~silent, wanted / torch.where(silent, 1.0, amplitude), 1.0)
        spectrum = spectrum * factor + torch.where(low & silent, wanted, 0.0)
        result = torch.fft.irfftn(spectrum, s=size, dim=axes)
    return restore(result, content)


def _low_frequencies(size: Sequence[int], reach: int, device: torch.device) -> Tensor:
    """The frequencies of the half spectrum inside the centred square, over the spatial axes."""
    low: Tensor | None = None
    for i, length in enumerate(size):
        frequency = torch.arange(length if i + 1 < len(size) else length // 2 + 1, device=device)
        near = torch.minimum(frequency, length - frequency) <= reach
        low = near if low is None else low.unsqueeze(-1) & near
    assert low is not None
    return low


def color_transfer(
    content: Float[Tensor, "n 3 h w"],
    style: Float[Tensor, "n 3 h2 w2"],
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Float[Tensor, "n 3 h w"]:
    r"""Give each image the mean and standard deviation of the Lab channels of another image.

    $$\text{Lab}' = \frac{\sigma_s}{\sigma_c} (\text{Lab}_c - \mu_c) + \mu_s$$

    **Convention.** Images must be colour images, (N, 3, H, W), in [0, 1] after denormalising. Values outside are
    clamped first; `check_images` finds them. The statistics are over the pixels of each image, so a NaN makes only its
    own image NaN. The result is clamped to displayable colours. `style` is detached. Computations use at least float32.

    A channel without contrast takes the mean of the style. Below a standard deviation of 0.01 in L, 0.05 in a and 0.02
    in b, the factor falls towards 0. This is far below what the eye can see and far above the rounding error of a grey
    image.

    **Source.** Reinhard et al. 2001, in CIE Lab (D65) instead of their l-alpha-beta space.

    Args:
        content: the images that keep their layout, of any size.
        style: the images that give their colours, of any size and with the same batch size.
        mean: channel means that the images were normalised with; None for images in [0, 1].
        std: channel standard deviations that the images were normalised with; None for images in [0, 1].

    Returns:
        Images in the dtype, memory format and normalisation of `content`.

    Raises:
        TypeError: an image tensor is not float.
        ValueError: the images do not have three channels and two dimensions, or the batch sizes differ.

    Example:
        >>> import torch
        >>> content = torch.rand(1, 3, 8, 8, requires_grad=True)
        >>> styled = color_transfer(content, torch.full((1, 3, 4, 4), 0.5))
        >>> styled.sum().backward()
        >>> bool((styled - 0.5).abs().max() < 1e-3)
        True
    """
    check_rgb("content", content, "`color_transfer`")
    check_rgb("style", style, "`color_transfer`")
    check_content_style(content, style, same_size=False)
    check_statistics(mean, std, content)
    with full_precision(content):
        x = upcast(content)
        s = style.detach().to(x.dtype)
        mean, std = (None if v is None else per_channel(v, x) for v in (mean, std))
        opponent, rgb = Opponent(mean, std, x), Rgb(mean, std, x)
        blocks = [opponent(block) for block in row_blocks(x)]
        own_mean, own_deviation = _statistics([_moments(planes) for planes in blocks])
        style_mean, style_deviation = _statistics([_moments(opponent(block)) for block in row_blocks(s)])
        # The ratio of the deviations above the floor; it falls to 0 at 0.
        factor = style_deviation * own_deviation / own_deviation.clamp_min(FLOOR).square()
        shift = style_mean - own_mean * factor
        moved = [
            [torch.addcmul(b, plane, a) for b, plane, a in zip(_columns(shift), planes, _columns(factor), strict=True)]
            for planes in blocks
        ]
        result = join([rgb(planes) for planes in moved])
    return restore(result, content)


def _columns(x: Tensor) -> list[Tensor]:
    return [column.view(-1, 1, 1) for column in x.unbind(1)]


def _moments(planes: list[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Pixels of a stripe, and their means and variances (N, 3)."""
    pixels = planes[0].shape[1] * planes[0].shape[2]
    if planes[0].device.type != "cpu":
        variances, means = zip(*(torch.var_mean(p, dim=(1, 2), correction=0) for p in planes), strict=True)
        return pixels, torch.stack(means, dim=1), torch.stack(variances, dim=1)
    # The same in two passes, which take a fifth of the time on the CPU.
    centres = [p.mean(dim=(1, 2), keepdim=True) for p in planes]
    squares = [(p - m).square().mean(dim=(1, 2)) for p, m in zip(planes, centres, strict=True)]
    return pixels, torch.cat(centres, dim=1).flatten(1), torch.stack(squares, dim=1)


def _statistics(moments: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all stripes together, (N, 3); the root of 0 has no gradient."""
    count = sum(pixels for pixels, _, _ in moments)
    if len(moments) == 1:
        _, mean, variance = moments[0]
    else:
        mean = torch.stack([m * (pixels / count) for pixels, m, _ in moments]).sum(0)
        apart = [(v + (m - mean).square()) * (pixels / count) for pixels, m, v in moments]
        variance = torch.stack(apart).sum(0)
    return mean, variance.clamp_min(1e-20).sqrt()
