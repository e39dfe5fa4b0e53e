"""Stylings against textbook versions: a full complex spectrum, kornia's Lab, sorting."""

import math
from typing import Any
from unittest import mock

import kornia
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import udakit
from udakit.mixing._color import Opponent, Rgb
from udakit.mixing.images import per_channel


def rgb_to_lab(rgb: Tensor) -> Tensor:
    y, red, blue = Opponent(None, None, rgb)(rgb)
    return torch.stack([116 * y, 500 * red, 200 * blue], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    lightness, a, b = lab.unbind(1)
    return Rgb(None, None, lab)([lightness / 116, a / 500, b / 200])


def pair(seed: int, *size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    content = torch.rand(2, channels, *(size or (9, 12)), generator=g, dtype=torch.float64)
    return content, 0.3 + 0.5 * torch.rand(content.shape, generator=g, dtype=torch.float64)


def textbook_fourier(content: Tensor, style: Tensor, beta: float) -> Tensor:
    """FDA on the full spectrum: shift, swap the centred square of amplitudes, shift back, keep the phase."""
    axes = tuple(range(2, content.ndim))
    fc, fs = torch.fft.fftn(content, dim=axes), torch.fft.fftn(style, dim=axes)
    amplitude = torch.fft.fftshift(fc.abs(), dim=axes)
    other = torch.fft.fftshift(fs.abs(), dim=axes)
    b = math.floor(min(content.shape[2:]) * beta)
    square = (..., *(slice(max(side // 2 - b, 0), side // 2 + b + 1) for side in content.shape[2:]))
    amplitude[square] = other[square]
    amplitude = torch.fft.ifftshift(amplitude, dim=axes)
    return torch.fft.ifftn(torch.polar(amplitude, fc.angle()), dim=axes).real


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


@pytest.mark.parametrize("size", [(11,), (12,), (5, 8, 6)])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_fourier_transfer_in_any_space(size, channels):
    """Signals and volumes of any number of channels, each channel alone."""
    content, style = pair(1, *size, channels=channels)
    got = udakit.fourier_transfer(content, style, beta=0.3)
    torch.testing.assert_close(got, textbook_fourier(content, style, 0.3))
    alone = [udakit.fourier_transfer(content[:, k : k + 1], style[:, k : k + 1], beta=0.3) for k in range(channels)]
    torch.testing.assert_close(got, torch.cat(alone, dim=1))


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


def test_color_transfer_of_grey_is_as_in_float64():
    """Grey has no chroma but rounding's: a floor far below it made colour of that, off by 0.145."""
    g = torch.Generator().manual_seed(0)
    grey = torch.rand(1, 1, 32, 32, generator=g).expand(1, 3, 32, 32)
    style = torch.rand(1, 3, 32, 32, generator=g)
    for mean, std in ((None, None), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        offset = torch.tensor(mean or (0.0,) * 3).view(3, 1, 1)
        scale = torch.tensor(std or (1.0,) * 3).view(3, 1, 1)
        content = (grey - offset) / scale
        got = udakit.color_transfer(content, (style - offset) / scale, mean=mean, std=std)
        want = udakit.color_transfer(
            (grey.double() - offset) / scale, (style.double() - offset) / scale, mean=mean, std=std
        )
        torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=0)
        assert (got - content).abs().max() > 0.1


def test_stripes_change_nothing(monkeypatch):
    """On the CPU large images are worked on in stripes: the statistics are put together again."""
    monkeypatch.setattr("udakit.mixing.histogram.EXACT", 0)
    content, style = pair(5, 13, 17)
    whole = [transfer(content, style) for transfer in (udakit.color_transfer, udakit.histogram_transfer)]
    for block in (1, 300):
        monkeypatch.setattr("udakit.mixing.images.BLOCK", block)
        for transfer, want in zip((udakit.color_transfer, udakit.histogram_transfer), whole, strict=True):
            torch.testing.assert_close(transfer(content, style), want, atol=1e-12, rtol=0)


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


@given(
    seed=st.integers(0, 2**31), levels=st.sampled_from([1, 3, 256]), channels=st.sampled_from([1, 2, 4, 13]),
    size=st.sampled_from([(30,), (5, 6), (2, 3, 5)]), exact=st.sampled_from([0, 2048]),
)  # fmt: skip
def test_histogram_transfer(seed, levels, channels, size, exact):
    content, style = pair(seed, *size, channels=channels)
    content = (content * levels).floor() / levels
    style = style[:, :, :4]
    with mock.patch("udakit.mixing.histogram.EXACT", exact):
        got = udakit.histogram_transfer(content, style, bins=100_000)
    for i in range(2):
        for k in range(channels):
            expected = textbook_histogram(content[i, k].flatten(), style[i, k].flatten())
            torch.testing.assert_close(got[i, k].flatten(), expected, atol=0 if exact else 1e-4, rtol=1e-6)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 1.0, 3e4]), shift=st.sampled_from([-2.0, 0.0, 5.0]))
def test_histogram_transfer_at_any_scale(seed, scale, shift):
    """Bins follow the values: of either sign, of any size, exact ranks to a bin."""
    content, style = pair(seed, 6, 7)
    content = content.flatten(2).argsort(2).view_as(content) / 42  # no two in one bin
    content, style = (scale * (x - 0.5 + shift) for x in (content, style))
    with mock.patch("udakit.mixing.histogram.EXACT", 0):
        got = udakit.histogram_transfer(content, style, bins=100_000)
    for i in range(2):
        for k in range(3):
            expected = textbook_histogram(content[i, k].flatten(), style[i, k].flatten())
            torch.testing.assert_close(got[i, k].flatten(), expected, atol=3e-4 * scale * (1 + abs(shift)), rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 5.0])
def test_values_of_one_bin_share_the_rank_of_its_middle(scale, shift, monkeypatch):
    """Equal ones and such that differ by a few of the last bits, of either sign: as if all six of a level were one."""
    monkeypatch.setattr("udakit.mixing.histogram.EXACT", 0)
    content, style = pair(1, 6, 7)
    levels = scale * ((content.flatten(2).argsort(2).argsort(2) // 6).view_as(content) / 7 - 0.45 + shift)
    style = scale * (style - 0.5 + shift)
    bits = torch.randint(3, levels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    got = udakit.histogram_transfer((levels.view(torch.int32) + bits).view(torch.float32), style, bins=5000)
    assert torch.equal(got, udakit.histogram_transfer(levels, style, bins=5000))
    for one, level, values in zip(got.flatten(0, 1), levels.flatten(0, 1), style.flatten(0, 1), strict=True):
        expected = textbook_histogram(level.flatten(), values.flatten())
        torch.testing.assert_close(one.flatten(), expected, atol=2e-3 * scale * (1 + abs(shift)), rtol=0)
        assert len(one.unique()) == 7


@pytest.mark.parametrize("sizes", [((0, 4), (4, 4)), ((4, 4), (0, 4)), ((0, 4), (0, 4))])
def test_histogram_transfer_of_images_without_pixels(sizes):
    content, style = (torch.rand(2, 3, *size) for size in sizes)
    assert torch.equal(udakit.histogram_transfer(content, style), content)


@pytest.mark.parametrize("outlier", [-32767.0, 65535.0, 1e30])
@pytest.mark.parametrize("exact", [0, 2048])
def test_one_pixel_far_away_moves_no_other(outlier, exact, monkeypatch):
    """A pixel without data (-32767) in style or content used to take all bins for itself: the median went to -15."""
    monkeypatch.setattr("udakit.mixing.histogram.EXACT", exact)
    content, style = pair(3, 40, 50)
    plain = udakit.histogram_transfer(content, style)
    spoilt_style = style.clone()
    spoilt_style[:, :, 7, 9] = outlier
    got = udakit.histogram_transfer(content, spoilt_style).flatten(2)
    moved = (got - plain.flatten(2)).abs().sort(dim=2).values
    assert moved[:, :, :-1].max() < 2e-2  # one rank further in a tail of 2000 pixels; the last one is the outlier's own
    assert moved.median() < 1e-3
    assert (got == outlier).sum(2).max() <= 1
    spoilt_content = content.clone()
    spoilt_content[:, :, 7, 9] = outlier
    moved = (udakit.histogram_transfer(spoilt_content, style) - plain).abs().flatten(2).sort(dim=2).values
    assert moved[:, :, :-1].max() < 2e-2
    assert moved.median() < 1e-3


@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
@pytest.mark.parametrize("exact", [0, 2048])
def test_infinities_of_a_style_are_given_as_they_are(infinite, exact, monkeypatch):
    """They share their bins with NaN, which used to be what most of their pixels became."""
    monkeypatch.setattr("udakit.mixing.histogram.EXACT", exact)
    content, style = pair(4, 40, 50)
    got = udakit.histogram_transfer(content, style.index_fill(3, torch.arange(25), infinite))
    torch.testing.assert_close(
        (got == infinite).double().mean((2, 3)), torch.full((2, 3), 0.5).double(), atol=1e-3, rtol=0
    )
    assert (got[got != infinite] - 0.55).abs().max() <= 0.251  # no value is far from those of the style


def test_histogram_transfer_computes_in_float32_whatever_the_default():
    content, style = (image.float() for image in pair(6, 80, 90))
    expected = udakit.histogram_transfer(content, style)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(udakit.histogram_transfer(content, style), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_histogram_transfer_sums_integers_only():
    """With `torch.use_deterministic_algorithms(True)` a GPU refuses a `cumsum` of floats."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "cumsum" not in str(func) or not args[0].is_floating_point()
            return func(*args, **(kwargs or {}))

    content, style = pair(5, 80, 90)
    with Watched():
        udakit.histogram_transfer(content, style)
        udakit.histogram_transfer(content[..., :9, :9], style[..., :9, :9])


def test_histogram_transfer_is_monotone_and_keeps_ties():
    """A larger value never becomes smaller, equal ones stay equal, -0.0 is 0.0."""
    content = torch.randn(1, 2, 5000, generator=torch.Generator().manual_seed(0)).mul(50).round().div(50)
    assert (content == 0).any()
    content = torch.where(content == 0, torch.tensor([0.0, -0.0]).repeat(2500), content)
    styled = udakit.histogram_transfer(content, torch.randn(1, 2, 700).exp())
    for values, results in zip(content[0], styled[0], strict=True):
        order = values.argsort()
        assert (results[order].diff() >= 0).all()
        assert len(torch.stack([values + 0.0, results]).unique(dim=1)[0]) == len(values.unique())


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
    with pytest.raises(ValueError, match=r"Expected `style` to have the channels of `content` \(2, 3, 6, 7\)"):
        udakit.histogram_transfer(content, style[:, :2])
    with pytest.raises(ValueError, match=r"Expected `style` to have the size of `content`"):
        udakit.fourier_transfer(content, style)
    with pytest.raises(ValueError, match="Expected `beta` to be in"):
        udakit.fourier_transfer(content, content, beta=0.7)
    with pytest.raises(ValueError, match="Expected `mean` to be three numbers"):
        udakit.color_transfer(content, style, mean=(0.5,))


@pytest.mark.parametrize("size", [(2, 1, 6, 7), (2, 4, 6, 7), (2, 3, 6), (2, 3, 4, 6, 7)])
def test_color_transfer_is_about_colour(size):
    with pytest.raises(
        ValueError, match=r"Expected `content` to be \(N, 3, H, W\), .* `color_transfer` works on colour"
    ):
        udakit.color_transfer(torch.rand(size), torch.rand(size))


def test_a_batch_of_no_image():
    """Of any number of channels, in any space."""
    for transfer in (udakit.fourier_transfer, udakit.histogram_transfer):
        for shape in ((0, 3, 6, 7), (0, 1, 9), (0, 2, 3, 4, 5)):
            assert transfer(torch.rand(shape), torch.rand(shape)).shape == shape
    assert udakit.color_transfer(torch.rand(0, 3, 6, 7), torch.rand(0, 3, 5, 5)).shape == (0, 3, 6, 7)


def test_check_images():
    images = torch.rand(2, 3, 4, 5)
    udakit.check_images(images)
    udakit.check_images(torch.rand(2, 13, 4, 5, 6) * 1.009)
    udakit.check_images(images[:0])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (images - per_channel(mean, images)) / per_channel(std, images)
    udakit.check_images(normalised, mean=mean, std=torch.tensor(std))
    for wrong, options, message in (
        (
            255 * images,
            {},
            r"Expected `images` to be in \[0, 1\], but got .*\. Convert byte images with \.float\(\) / 255\.",
        ),
        (normalised, {}, "If they are normalised, pass the `mean` and `std`"),
        (
            9 * images,
            {"mean": mean, "std": std, "name": "a.png"},
            "Expected `a.png` to be in .* by `mean` and `std`, but",
        ),
        (1.05 * images / images.max(), {}, "If they are normalised"),
        (images.log().log(), {}, "contain NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            udakit.check_images(wrong, **options)
    udakit.check_images(1.05 * images, tolerance=0.06)
    with pytest.raises(TypeError, match="Expected `images` to be a float tensor"):
        udakit.check_images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("transfer", [udakit.fourier_transfer, udakit.color_transfer, udakit.histogram_transfer])
@pytest.mark.parametrize("axes", [2, 3])
def test_style_follows_its_input(transfer, axes):
    if axes == 3 and transfer is udakit.color_transfer:
        pytest.skip("colour is two-dimensional")
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    content = torch.rand(2, 3, *(4, 6, 7)[-axes:]).half().contiguous(memory_format=last)
    style = torch.rand(content.shape, requires_grad=True)
    styled = transfer(content, style)
    assert styled.dtype == torch.float16
    assert styled.is_contiguous(memory_format=last)
    assert not styled.requires_grad


def test_a_single_image_is_said_to_be_a_batch_of_signals():
    image = torch.rand(3, 64, 72)
    with pytest.warns(
        UserWarning, match=r"`content` is \(3, 64, 72\), which is treated as a batch of signals .*unsqueeze"
    ) as seen:
        udakit.fourier_transfer(image, image)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("exact", [0, 2048])
@pytest.mark.parametrize("transfer", [udakit.fourier_transfer, udakit.histogram_transfer, udakit.color_transfer])
def test_a_nan_in_the_style_stays_with_its_image_and_is_not_hidden(
    transfer: Any, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udakit.mixing.histogram.EXACT", exact)
    generator = torch.Generator().manual_seed(0)
    content, style = torch.rand(2, 2, 3, 8, 8, generator=generator)
    clean = transfer(content, style)
    spoilt = style.clone()
    spoilt[0, 1, 2, 3] = float("nan")
    found = transfer(content, spoilt)
    assert torch.equal(found[1], clean[1])
    assert bool(found[0, 1].isnan().all())
    others = found[0, [0, 2]]
    if transfer is udakit.color_transfer:  # the channels of Lab are made of all three
        assert bool(others.isnan().all())
    else:
        torch.testing.assert_close(others, clean[0, [0, 2]])
    with pytest.raises(ValueError, match="contain NaN"):
        udakit.check_images(spoilt)
