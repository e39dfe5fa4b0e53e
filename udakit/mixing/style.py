"""Training-free stylings, each a `translate` of CrossDomainMix: give source images the look of target images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_device, check_integer, check_range, shape_of
from udakit._reduce import full_precision, upcast
from udakit.mixing._color import (
    Channels,
    channels_like,
    check_channels,
    check_rgb,
    lab_to_rgb,
    restore,
    rgb_to_lab,
)


def _check_pair(content: Tensor, style: Tensor, *, same_size: bool) -> None:
    check_rgb("content", content)
    check_rgb("style", style)
    if style.shape[0] != content.shape[0]:
        raise ValueError(
            f"Expected `style` to have the batch size of `content` {shape_of(content)}, but got {shape_of(style)}. "
            "Each image takes one style: style[:1].expand_as(content) gives all the same."
        )
    check_device("style", style, content, "content")
    if same_size and style.shape != content.shape:
        raise ValueError(
            f"Expected `style` to have the size of `content` {shape_of(content)}, but got {shape_of(style)}. "
            "Crop or resize it first: amplitudes of unequal sizes have unequal frequencies."
        )


def fourier_transfer(
    content: Float[Tensor, "n 3 h w"], style: Float[Tensor, "n 3 h w"], *, beta: float = 0.01
) -> Float[Tensor, "n 3 h w"]:
    r"""Give each image the low-frequency Fourier amplitudes of another one, and keep its own phase.

    $$x' = \mathcal F^{-1}\!\left(\left[\,M_\beta A(s) + (1 - M_\beta)\,A(c)\,\right] e^{i\,\phi(c)}\right), \qquad
    M_\beta = \left[\,|k_y|, |k_x| \le \lfloor \beta \min(H, W) \rfloor\,\right]$$

    **Convention.** Images are taken as they are, normalised or not; the result is not clamped. `style` is detached.
    Float32 inside at least. beta = 0 still swaps the mean.

    **Source.** FDA (Yang and Soatto, CVPR 2020): the centred square of 2b + 1 frequencies a side, as its numpy code
    swaps it. Its torch code swaps the frequencies -b to b - 1, which is not symmetric.

    Args:
        content: what keeps its layout.
        style: what gives its amplitudes, of the same shape.
        beta: half the side of the swapped square as a share of min(H, W), in [0, 0.5].

    Returns:
        Images in the dtype and memory format of `content`.

    Raises:
        TypeError: images that are not float.
        ValueError: unequal shapes, or `beta` out of range.

    Example:
        >>> import torch
        >>> content = torch.rand(1, 3, 16, 16, requires_grad=True)
        >>> styled = fourier_transfer(content, torch.rand(1, 3, 16, 16) + 1)
        >>> styled.square().sum().backward()
        >>> bool(styled.mean() > 1)
        True
    """
    check_range("beta", beta, 0.0, 0.5)
    _check_pair(content, style, same_size=True)
    height, width = content.shape[2:]
    reach = int(beta * min(height, width))
    with full_precision(content):
        x = upcast(content)
        s = style.detach().to(x.dtype)
        # Real images: the half spectrum holds all, and the square is symmetric about frequency 0.
        spectrum = torch.fft.rfft2(x)
        amplitude = spectrum.abs()
        wanted = torch.fft.rfft2(s).abs()
        row = torch.arange(height, device=x.device)
        near = torch.minimum(row, height - row) <= reach
        low = near[:, None] & (torch.arange(width // 2 + 1, device=x.device) <= reach)
        # Where the own amplitude is 0 the phase is 0, as angle() has it.
        silent = amplitude == 0
        factor = torch.where(low & ~silent, wanted / torch.where(silent, 1.0, amplitude), 1.0)
        spectrum = spectrum * factor + torch.where(low & silent, wanted, 0.0)
        result = torch.fft.irfft2(spectrum, s=(height, width))
    return restore(result, content)


def color_transfer(
    content: Float[Tensor, "n 3 h w"],
    style: Float[Tensor, "n 3 h2 w2"],
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Float[Tensor, "n 3 h w"]:
    r"""Give each image the colour statistics of another one: mean and standard deviation of the Lab channels.

    $$\text{Lab}' = \frac{\sigma_s}{\sigma_c} (\text{Lab}_c - \mu_c) + \mu_s$$

    **Convention.** Statistics over the pixels of each image; a channel without contrast takes the mean of the style.
    The result is clamped to displayable colours. `style` is detached. Float32 inside at least.

    **Source.** Reinhard et al. 2001, in CIE Lab (D65) instead of their l-alpha-beta.

    Args:
        content: what keeps its layout, of any size.
        style: what gives its colours, of any size and the same batch size.
        mean: channel means that the images were normalised with; None for images in [0, 1].
        std: channel deviations that the images were normalised with; None for images in [0, 1].

    Returns:
        Images in the dtype, memory format and normalisation of `content`.

    Raises:
        TypeError: images that are not float.
        ValueError: other than three channels, or unequal batch sizes.

    Example:
        >>> import torch
        >>> content = torch.rand(1, 3, 8, 8, requires_grad=True)
        >>> styled = color_transfer(content, torch.full((1, 3, 4, 4), 0.5))
        >>> styled.sum().backward()
        >>> bool((styled - 0.5).abs().max() < 1e-3)
        True
    """
    _check_pair(content, style, same_size=False)
    check_channels("mean", mean, content)
    check_channels("std", std, content)
    with full_precision(content):
        x = upcast(content)
        s = style.detach().to(x.dtype)
        offset, scale = channels_like(mean, 0.0, x), channels_like(std, 1.0, x)
        lab = rgb_to_lab((x * scale + offset).clamp(0, 1))
        style_mean, style_deviation = _statistics(rgb_to_lab((s * scale + offset).clamp(0, 1)))
        own_mean, own_deviation = _statistics(lab)
        result = lab_to_rgb((lab - own_mean) * (style_deviation / own_deviation) + style_mean)
    return restore((result - offset) / scale, content)


def _statistics(lab: Tensor) -> tuple[Tensor, Tensor]:
    mean = lab.mean(dim=(2, 3), keepdim=True)
    variance = (lab - mean).square().mean(dim=(2, 3), keepdim=True)
    return mean, variance.clamp_min(1e-8).sqrt()


def histogram_transfer(
    content: Float[Tensor, "n 3 h w"], style: Float[Tensor, "n 3 h2 w2"], *, bins: int = 1024
) -> Float[Tensor, "n 3 h w"]:
    r"""Give each channel of each image the histogram of another one: $x' = F_s^{-1}(F_c(x))$.

    **Convention.** Values are told apart to 1 / `bins` of their range, so that no sorting is needed; 8-bit levels stay
    apart with the default. Equal values stay equal: all of a bin take the place of its middle, so that a flat surface
    stays flat. Images are taken as they are, normalised or not; the result lies in the range of the style. A step
    function of the content: no gradient flows. Float32 inside at least.

    Args:
        content: what keeps its layout, of any size.
        style: what gives its values, of any size and the same batch size.
        bins: number of values told apart, at least 2.

    Returns:
        Images in the dtype and memory format of `content`.

    Raises:
        TypeError: images that are not float.
        ValueError: other than three channels, unequal batch sizes, or fewer than two bins.

    Example:
        >>> import torch
        >>> content = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(1, 3, 1, 4)
        >>> style = torch.tensor([7.0, 5.0, 6.0, 8.0]).expand(1, 3, 1, 4)
        >>> histogram_transfer(content, style)[0, 0].round(decimals=1)
        tensor([[5., 6., 7., 8.]])
    """
    check_integer("bins", bins, 2)
    _check_pair(content, style, same_size=False)
    x = upcast(content.detach()).flatten(2)
    s = style.detach().to(x.dtype).flatten(2)
    own_bin, own_counts, _, _ = _histogram(x, bins)
    _, counts, low, width = _histogram(s, bins)
    # Places in the two distributions as exact integers, over the common denominator 2 * own pixels * style pixels.
    middle = (2 * own_counts.cumsum(2) - own_counts) * s.shape[2]
    above = counts.cumsum(2) * (2 * x.shape[2])
    place = torch.searchsorted(above, middle)
    size = counts.gather(2, place) * (2 * x.shape[2])
    within = 1 - (above.gather(2, place) - middle).to(x.dtype) / size.clamp_min(1)
    value = low + (place + within) * (width / bins)
    return restore(value.gather(2, own_bin).view(content.shape), content)


def _histogram(x: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bin of each value, the count of each bin, and the range: its low end and its width."""
    low, high = x.amin(dim=2, keepdim=True), x.amax(dim=2, keepdim=True)
    width = high - low
    scale = bins / torch.where(width > 0, width, 1.0)
    index = ((x - low) * scale).long().clamp_(0, bins - 1)
    counts = torch.zeros(*x.shape[:2], bins, dtype=torch.int64, device=x.device)
    return index, counts.scatter_add(2, index, torch.ones_like(index)), low, width
