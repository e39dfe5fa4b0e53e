"""Stylings against textbook versions: a full complex spectrum, kornia's Lab, sorting."""

import math

import kornia
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit.mixing._color import lab_to_rgb, rgb_to_lab


def pair(seed: int, h: int = 9, w: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    content = torch.rand(2, 3, h, w, generator=g, dtype=torch.float64)
    return content, 0.3 + 0.5 * torch.rand(2, 3, h, w, generator=g, dtype=torch.float64)


def textbook_fourier(content: Tensor, style: Tensor, beta: float) -> Tensor:
    """FDA on the full spectrum: shift, swap the centred square of amplitudes, shift back, keep the phase."""
    fc, fs = torch.fft.fft2(content), torch.fft.fft2(style)
    amplitude = torch.fft.fftshift(fc.abs(), dim=(2, 3))
    other = torch.fft.fftshift(fs.abs(), dim=(2, 3))
    h, w = content.shape[2:]
    b = math.floor(min(h, w) * beta)
    y, x = h // 2, w // 2
    square = (..., slice(max(y - b, 0), y + b + 1), slice(max(x - b, 0), x + b + 1))
    amplitude[square] = other[square]
    amplitude = torch.fft.ifftshift(amplitude, dim=(2, 3))
    return torch.fft.ifft2(torch.polar(amplitude, fc.angle())).real


@given(
    seed=st.integers(0, 2**31), h=st.integers(2, 12), w=st.integers(2, 12), beta=st.sampled_from([0.0, 0.1, 0.3, 0.45])
)
def test_fourier_transfer(seed, h, w, beta):
    content, style = pair(seed, h, w)
    # At half the sampling rate an even side has one frequency for two signs: stay below it.
    if int(beta * min(h, w)) >= min(h, w) / 2:
        return
    torch.testing.assert_close(
        udakit.fourier_transfer(content, style, beta=beta), textbook_fourier(content, style, beta)
    )


def test_fourier_transfer_of_itself_is_the_identity():
    content, _ = pair(0)
    torch.testing.assert_close(udakit.fourier_transfer(content, content, beta=0.5), content)


def test_fourier_transfer_of_black():
    """No amplitude, no phase: the style's mean arrives, and nothing is NaN."""
    content = torch.zeros(1, 3, 8, 8, requires_grad=True)
    styled = udakit.fourier_transfer(content, torch.full((1, 3, 8, 8), 0.25), beta=0.0)
    torch.testing.assert_close(styled.detach(), torch.full((1, 3, 8, 8), 0.25))
    styled.square().sum().backward()  # the Fourier transforms of torch 2.5 refuse the expanded gradient of a plain sum
    assert content.grad.isfinite().all()


@pytest.mark.parametrize("flat", [False, True])
def test_lab_against_kornia(flat):
    rgb, _ = pair(1)
    if flat:
        rgb = torch.zeros_like(rgb)
        rgb[1] = 1
    lab = rgb_to_lab(rgb)
    torch.testing.assert_close(lab, kornia.color.rgb_to_lab(rgb), atol=0.02, rtol=1e-3)
    torch.testing.assert_close(lab_to_rgb(lab), rgb, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mean", [None, (0.485, 0.456, 0.406)])
def test_color_transfer_statistics(mean):
    """The result has the style's Lab statistics, as long as no colour leaves the gamut."""
    std = None if mean is None else (0.229, 0.224, 0.225)
    offset = torch.tensor(mean or (0.0,) * 3, dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor(std or (1.0,) * 3, dtype=torch.float64).view(3, 1, 1)
    content, style = pair(2)
    content, style = 0.4 + 0.2 * content, 0.45 + 0.1 * style
    styled = udakit.color_transfer((content - offset) / scale, (style - offset) / scale, mean=mean, std=std)
    got, wanted = rgb_to_lab(styled * scale + offset), rgb_to_lab(style)
    torch.testing.assert_close(got.mean((2, 3)), wanted.mean((2, 3)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got.std((2, 3), correction=0), wanted.std((2, 3), correction=0), atol=1e-3, rtol=1e-3)


def test_color_transfer_gradient_is_finite_at_black_and_flat():
    content = torch.zeros(1, 3, 4, 4, requires_grad=True)
    udakit.color_transfer(content, torch.rand(1, 3, 4, 4)).sum().backward()
    assert content.grad.isfinite().all()


def textbook_histogram(content: Tensor, style: Tensor) -> Tensor:
    """For one channel: each value's middle rank among the sorted values of the style."""
    values = style.sort().values
    out = torch.empty_like(content)
    for i, v in enumerate(content):
        middle = ((content < v).sum() + (content <= v).sum()).item() / 2
        out[i] = values[math.ceil(round(middle * len(values) / len(content), 9)) - 1]
    return out


@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 3, 256]))
def test_histogram_transfer(seed, levels):
    content, style = pair(seed, 5, 6)
    content = (content * levels).floor() / levels
    style = style[:, :, :4]
    got = udakit.histogram_transfer(content, style, bins=100_000)
    for i in range(2):
        for k in range(3):
            expected = textbook_histogram(content[i, k].flatten(), style[i, k].flatten())
            torch.testing.assert_close(got[i, k].flatten(), expected, atol=1e-4, rtol=0)


def test_histogram_transfer_of_itself_is_the_identity():
    content, _ = pair(0)
    torch.testing.assert_close(udakit.histogram_transfer(content, content), content, atol=1e-3, rtol=0)
    levels = (content * 255).round() / 255
    back = udakit.histogram_transfer(levels, levels)
    assert torch.equal((back * 255).round() / 255, levels)


def test_histogram_transfer_keeps_flat_surfaces_flat():
    """Sorting alone would spread a uniform sky over all the style's values."""
    styled = udakit.histogram_transfer(torch.full((1, 3, 4, 4), 0.3), torch.rand(1, 3, 9, 9))
    assert styled.flatten(2).std(dim=2).max() == 0


def test_styles_of_any_size():
    content, style = torch.rand(2, 3, 6, 7), torch.rand(2, 3, 9, 5)
    for transfer in (udakit.color_transfer, udakit.histogram_transfer):
        assert transfer(content, style).shape == content.shape
        with pytest.raises(ValueError, match=r"Expected `style` to have the batch size of `content` \(2, 3, 6, 7\)"):
            transfer(content, style[:1])
        with pytest.raises(ValueError, match=r"Expected `content` to be \(N, 3, H, W\), but got \(2, 1, 6, 7\)"):
            transfer(content[:, :1], style)
    with pytest.raises(ValueError, match=r"Expected `style` to have the size of `content`"):
        udakit.fourier_transfer(content, style)
    with pytest.raises(ValueError, match="Expected `beta` to be in"):
        udakit.fourier_transfer(content, content, beta=0.7)
    with pytest.raises(ValueError, match="Expected `mean` to be three numbers"):
        udakit.color_transfer(content, style, mean=(0.5,))


@pytest.mark.parametrize("transfer", [udakit.fourier_transfer, udakit.color_transfer, udakit.histogram_transfer])
def test_style_follows_its_input(transfer):
    content = torch.rand(2, 3, 6, 7).half().contiguous(memory_format=torch.channels_last)
    style = torch.rand(2, 3, 6, 7, requires_grad=True)
    styled = transfer(content, style)
    assert styled.dtype == torch.float16
    assert styled.is_contiguous(memory_format=torch.channels_last)
    assert not styled.requires_grad
