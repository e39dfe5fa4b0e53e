"""Training-free stylings, each a `translate` of CrossDomainMix: give source images the look of target images."""

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

# A standard deviation of L / 116, a / 500 or b / 200 below which a channel counts as without contrast: rounding gives
# grey images 1e-7, an 8-bit level is 4e-3.
FLOOR = 1e-4


def check_content_style(content: Tensor, style: Tensor, *, same_size: bool) -> None:
    """Raise unless both are images of one batch size and one number of channels (and, where asked, one size)."""
    check_image_batch("content", content)
    check_image_batch("style", style)
    if style.shape[0] != content.shape[0]:
        raise ValueError(
            f"Expected `style` to have the batch size of `content` {shape_of(content)}, but got {shape_of(style)}. "
            "Each image takes one style: style[:1].expand_as(content) gives all the same."
        )
    if style.ndim != content.ndim:
        raise ValueError(
            f"Expected `style` to have as many axes as `content` {shape_of(content)}, but got {shape_of(style)}."
        )
    if style.shape[1] != content.shape[1]:
        raise ValueError(
            f"Expected `style` to have the channels of `content` {shape_of(content)}, but got {shape_of(style)}."
        )
    check_device("style", style, content, "content")
    if same_size and style.shape != content.shape:
        raise ValueError(
            f"Expected `style` to have the size of `content` {shape_of(content)}, but got {shape_of(style)}. "
            "Crop or resize it first: amplitudes of unequal sizes have unequal frequencies."
        )


def fourier_transfer(
    content: Float[Tensor, "n k *space"], style: Float[Tensor, "n k *space"], *, beta: float = 0.01
) -> Float[Tensor, "n k *space"]:
    r"""Give each image the low-frequency Fourier amplitudes of another one, and keep its own phase.

    $$x' = \mathcal F^{-1}\!\left(\left[\,M_\beta A(s) + (1 - M_\beta)\,A(c)\,\right] e^{i\,\phi(c)}\right), \qquad
    M_\beta = \left[\,|k_y|, |k_x| \le \lfloor \beta \min(H, W) \rfloor\,\right]$$

    **Convention.** Any number of channels, each by itself; signals and volumes have one or three frequencies instead of
    two. Images are taken as they are, normalised or not; the result is not clamped. `style` is detached.
    Float32 inside at least. beta = 0 still swaps the mean. A NaN makes NaN of its channel of its image, and of no
    other: nothing hides it, and `check_images` finds it.

    **Source.** FDA (Yang and Soatto, CVPR 2020): the centred square of 2b + 1 frequencies a side, as its numpy code
    swaps it. Its torch code swaps the frequencies -b to b - 1, which is not symmetric.

    Args:
        content: (N, K, *space), what keeps its layout.
        style: what gives its amplitudes, of the same shape.
        beta: half the side of the swapped square as a share of the shortest side of the image, in [0, 0.5].

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
    check_content_style(content, style, same_size=True)
    if content.numel() == 0:  # the libraries of Fourier transforms refuse it
        return restore(content.clone(), content)
    size = content.shape[2:]
    axes = list(range(2, content.ndim))
    reach = int(beta * min(size))
    with full_precision(content):
        x = upcast(content)
        s = style.detach().to(x.dtype)
        # Real images: the half spectrum holds all, and the square is symmetric about frequency 0.
        spectrum = torch.fft.rfftn(x, dim=axes)
        amplitude = spectrum.abs()
        wanted = torch.fft.rfftn(s, dim=axes).abs()
        low = _low_frequencies(size, reach, x.device)
        # Where the own amplitude is 0 the phase is 0, as angle() has it.
        silent = amplitude == 0
        factor = torch.where(low & ~silent, wanted / torch.where(silent, 1.0, amplitude), 1.0)
        spectrum = spectrum * factor + torch.where(low & silent, wanted, 0.0)
        result = torch.fft.irfftn(spectrum, s=size, dim=axes)
    return restore(result, content)


def _low_frequencies(size: Sequence[int], reach: int, device: torch.device) -> Tensor:
    """Which frequencies of the half spectrum lie in the centred square, over the axes of space."""
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
    r"""Give each image the colour statistics of another one: mean and standard deviation of the Lab channels.

    $$\text{Lab}' = \frac{\sigma_s}{\sigma_c} (\text{Lab}_c - \mu_c) + \mu_s$$

    **Convention.** For colour images, (N, 3, H, W), in [0, 1] once denormalised: what lies outside is clamped first
    (`check_images` looks for it). Statistics over the pixels of each image: a NaN makes NaN of its image, and of no
    other. A channel without contrast takes the mean of the style: below a deviation of 0.01 in L, 0.05 in a and 0.02 in
    b, far under what an eye sees and far above what rounding makes of a grey image, the factor falls to 0. The result
    is clamped to displayable colours. `style` is detached. Float32 inside at least.

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
        ValueError: other than three channels or two dimensions, or unequal batch sizes.

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
        # The ratio of the deviations down to the floor, and 0 at 0.
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
    # The same in two passes, which on the CPU take a fifth of the time.
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
