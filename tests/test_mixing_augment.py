"""Strong augmentation against the operations one image at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia.enhance import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, sharpness
from torch import Tensor

import udakit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def textbook_blur(x: Tensor, sigma: float) -> Tensor:
    """Two-dimensional weighted mean over the pixels of the image, a loop over shifts."""
    reach = math.ceil(4 * 1.15)
    h, w = x.shape[-2:]
    total, weights = torch.zeros_like(x), torch.zeros_like(x)
    for dy in range(-min(reach, h - 1), min(reach, h - 1) + 1):
        for dx in range(-min(reach, w - 1), min(reach, w - 1) + 1):
            g = math.exp(-0.5 * (dx * dx + dy * dy) / sigma**2)
            to = (..., slice(max(-dy, 0), h - max(dy, 0)), slice(max(-dx, 0), w - max(dx, 0)))
            come = (..., slice(max(dy, 0), h - max(-dy, 0)), slice(max(dx, 0), w - max(-dx, 0)))
            total[to] += g * x[come]
            weights[to] += g
    return total / weights


def textbook(images: Tensor, draw: udakit.StrongAugmentDraw) -> Tensor:
    mean, std = (torch.tensor(v, dtype=images.dtype).view(3, 1, 1) for v in (MEAN, STD))
    result = []
    for i, image in enumerate(images):
        x = (image * std + mean).clamp(0, 1)
        if draw.jitter is not None and draw.jitter[i]:
            x = adjust_brightness(x, draw.brightness[i].item())
            x = adjust_contrast(x, draw.contrast[i].item())
            x = adjust_saturation(x, draw.saturation[i].item())
            x = adjust_hue(x, draw.hue[i].item())
        if draw.greyscale is not None and draw.greyscale[i]:
            x = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, -1, -1)
        if draw.sharpness is not None:
            x = sharpness(x, draw.sharpness[i].item())
        if draw.blur is not None and draw.blur[i]:
            x = textbook_blur(x, draw.sigma[i].item())
        result.append((x - mean) / std)
    return torch.stack(result)


def normalised(seed: int, n: int, h: int, w: int) -> Tensor:
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 4), h=st.integers(3, 14), w=st.integers(3, 14),
    grey=st.sampled_from([0.0, 0.5]), sharp=st.sampled_from([0.0, 0.5]), blur=st.sampled_from([0.0, 0.5, 1.0]),
    jitter=st.sampled_from([0.0, 0.8]),
)  # fmt: skip
def test_strong_augment(seed, n, h, w, grey, sharp, blur, jitter):
    images = normalised(seed, n, h, w)
    draw = udakit.draw_strong_augment(
        n, jitter_probability=jitter, greyscale_probability=grey, sharpness_probability=sharp, blur_probability=blur,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    got = udakit.strong_augment(images, draw, mean=MEAN, std=STD)
    torch.testing.assert_close(got, textbook(images, draw), atol=1e-5, rtol=1e-5)


def colours(dtype: torch.dtype) -> Tensor:
    """Greys, primaries and every other tie between channels, then random colours; as one image a hue angle."""
    levels = torch.tensor([0.0, 1e-9, 0.25, 0.5, 1.0])
    ties = torch.cartesian_prod(levels, levels, levels)
    some = torch.rand(900, 3, generator=torch.Generator().manual_seed(0))
    return torch.cat([ties, some]).T.reshape(1, 3, 25, 41).to(dtype).expand(13, -1, -1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("saturation", [None, 0.0, 0.6, 1.9])
def test_saturation_and_hue_are_those_of_kornia(dtype, saturation):
    """Without the way through HSV and back: at every angle, at every tie, and for colours without a hue."""
    images, angles = colours(dtype), torch.linspace(-math.pi, math.pi, 13, dtype=dtype)
    factors = None if saturation is None else torch.full((13,), saturation, dtype=dtype)
    draw = udakit.StrongAugmentDraw(jitter=torch.ones(13, dtype=torch.bool), saturation=factors, hue=angles)
    got = udakit.strong_augment(images, draw, mean=None, std=None)
    want = adjust_hue(images if factors is None else adjust_saturation(images, factors), angles)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def textbook_of_values(image: Tensor, draw: udakit.StrongAugmentDraw, i: int) -> Tensor:
    """What any number of channels and any space can have: an operation at a time, one image (K, *space) in [0, 1]."""
    x = image.clamp(0, 1)
    if draw.jitter[i]:
        x = (x + draw.brightness[i].item()).clamp(0, 1)
        x = (x * draw.contrast[i].item()).clamp(0, 1)
        gamma = draw.gamma[i].item()
        x = torch.where(x > 1e-3, x**gamma, x * 1e-3 ** (gamma - 1))
    smooth = x.clone()
    axes = range(1, x.ndim)
    for place in torch.cartesian_prod(*(torch.arange(1, side - 1) for side in x.shape[1:])).view(-1, x.ndim - 1):
        here = (slice(None), *place.tolist())
        window = x[(slice(None), *(slice(p - 1, p + 2) for p in place.tolist()))]
        smooth[here] = (window.flatten(1).sum(1) + 4 * x[here]) / (3 ** len(axes) + 4)
    x = (smooth + (x - smooth) * draw.sharpness[i].item()).clamp(0, 1)
    if draw.blur[i]:
        for axis in axes:
            place = torch.arange(x.shape[axis], dtype=x.dtype)
            distance = place - place.unsqueeze(1)
            kernel = torch.exp(-0.5 * (distance / draw.sigma[i].item()) ** 2) * (distance.abs() <= math.ceil(4 * 1.15))
            x = torch.tensordot(kernel / kernel.sum(1, keepdim=True), x, dims=([1], [axis])).movedim(0, axis)
    return x


@pytest.mark.parametrize("size", [(13,), (9, 7), (5, 6, 4)])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_images_of_any_channels_in_any_space(size, channels):
    """Saturation and hue, which nobody asked for, are left out; the rest is the same in every channel."""
    g = torch.Generator().manual_seed(channels)
    images = torch.rand(5, channels, *size, generator=g, dtype=torch.float64)
    draw = udakit.draw_strong_augment(
        5, gamma=(0.4, 2.5), sharpness_probability=0.7, blur_probability=0.7, brightness=0.5, contrast=0.7, generator=g
    )
    assert draw.default_colours == ("saturation", "hue")
    mean, std = torch.rand(channels, generator=g), 0.1 + torch.rand(channels, generator=g)
    shape = (1, channels, *(1 for _ in size))
    normalised = (images - mean.view(shape)) / std.view(shape)
    got = udakit.strong_augment(normalised, draw, mean=mean, std=std)
    want = torch.stack([textbook_of_values(x, draw, i) for i, x in enumerate(images)])
    torch.testing.assert_close(got, (want - mean.view(shape)) / std.view(shape), atol=1e-5, rtol=1e-5)
    assert (got - normalised).abs().max() > 0.1


@pytest.mark.parametrize("size", [(2, 1, 8, 8), (2, 4, 8, 8), (2, 3, 8), (2, 3, 4, 8, 8)])
@pytest.mark.parametrize("option", [{"saturation": 0.2}, {"hue": 0.1}, {"greyscale_probability": 0.1}])
def test_colour_that_was_asked_for_needs_colour_images(size, option):
    name = next(iter(option)).removesuffix("_probability")
    message = rf"Expected `images` to be \(N, 3, H, W\), but got .*`{name}` works on colour"
    with pytest.raises(ValueError, match=message):
        udakit.StrongAugment(mean=None, std=None, **option)(torch.rand(size))
    assert udakit.StrongAugment(mean=None, std=None)(torch.rand(size)).shape == size


def test_defaults_of_colour_are_those_of_before():
    """None means 0.2 for RGB images, and the draws of a seed are what they were before gamma and noise came."""
    draws = [
        udakit.draw_strong_augment(4, generator=torch.Generator().manual_seed(0), **options)
        for options in ({}, {"saturation": 0.2, "hue": 0.2}, {"gamma": (0.5, 2.0), "noise_probability": 1.0})
    ]
    u = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    for draw in draws:
        torch.testing.assert_close(draw.saturation, 1 + 0.2 * (2 * u[3] - 1))
        torch.testing.assert_close(draw.hue, 2 * math.pi * 0.2 * (2 * u[4] - 1))
        torch.testing.assert_close(draw.sigma, 0.15 + (1.15 - 0.15) * u[7])
    assert [d.default_colours for d in draws] == [("saturation", "hue"), (), ("saturation", "hue")]
    g = torch.Generator().manual_seed(0)
    udakit.draw_strong_augment(4, generator=g)
    after = torch.Generator().manual_seed(0)
    torch.rand(10, 4, generator=after)
    assert torch.equal(g.get_state(), after.get_state())


def test_gamma_and_noise_are_drawn_as_said():
    draw = udakit.draw_strong_augment(
        20_000, gamma=(0.5, 2.0), noise=0.1, noise_probability=0.3, generator=torch.Generator().manual_seed(0)
    )
    logs = draw.gamma.log2()
    assert -1 <= logs.min() < -0.98
    assert 0.98 < logs.max() <= 1.0001
    assert abs(logs.mean()) < 0.02
    noisy = draw.noise > 0
    assert abs(noisy.float().mean().item() - 0.3) < 0.02
    assert draw.noise.max() <= 0.1
    assert abs(draw.noise[noisy].mean().item() - 0.05) < 0.002
    assert len(draw.noise_seed.unique()) > 19_900
    for options in ({}, {"jitter_probability": 0.0, "gamma": (0.5, 2.0)}):
        assert udakit.draw_strong_augment(2, **options).gamma is None


def test_noise_is_normal_and_of_its_seed():
    """One draw, one noise, whatever the image; another seed, another noise; neither place nor seed shows in it."""
    n, side = 6, 128
    seeds = torch.tensor([0, 1, 2, 3, 2**24 - 1, 12345])
    draw = udakit.StrongAugmentDraw(noise=torch.full((n,), 0.05), noise_seed=seeds)
    grey, other = torch.full((n, 2, side, side), 0.5), torch.full((n, 2, side, side), 0.4)
    noise = (udakit.strong_augment(grey, draw, mean=None, std=None) - grey) / 0.05
    again = (udakit.strong_augment(other, draw, mean=None, std=None) - other) / 0.05
    torch.testing.assert_close(noise, again, atol=1e-5, rtol=0)
    flat = noise.flatten(1)
    tail = 1 / math.sqrt(flat.shape[1])
    assert flat.mean(1).abs().max() < 4 * tail
    assert (flat.std(1) - 1).abs().max() < 4 * tail
    assert (flat.pow(4).mean(1) - 3).abs().max() < 4 * math.sqrt(96) * tail
    assert (flat.abs() > 1.96).float().mean() == pytest.approx(0.05, abs=0.003)
    correlation = flat @ flat.T / flat.shape[1] - torch.eye(n)
    assert correlation.abs().max() < 5 * tail
    for shift in (1, 2, side, side * side):
        assert (flat[:, shift:] * flat[:, :-shift]).mean(1).abs().max() < 5 * tail


def test_a_batch_of_no_image():
    for shape in ((0, 3, 8, 8), (0, 1, 9), (0, 2, 3, 4, 5)):
        augment = udakit.StrongAugment(
            mean=None, std=None, blur_probability=1.0, sharpness_probability=1.0, noise_probability=1.0
        )
        assert augment(torch.rand(shape)).shape == shape


def test_gradient_is_finite_for_every_colour():
    images = colours(torch.float32).clone().requires_grad_()
    draw = udakit.draw_strong_augment(
        13, jitter_probability=1.0, gamma=(0.2, 3.0), noise_probability=0.5, generator=torch.Generator().manual_seed(0)
    )
    udakit.strong_augment(images, draw, mean=None, std=None).square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("block", [1, 700, 10**9])
def test_blocks_of_rows_change_nothing(block, monkeypatch):
    images = normalised(0, 3, 13, 17).float()
    draw = udakit.draw_strong_augment(3, greyscale_probability=0.3, generator=torch.Generator().manual_seed(1))
    whole = udakit.strong_augment(images, draw, mean=MEAN, std=STD)
    monkeypatch.setattr("udakit.mixing.images.BLOCK", block)
    torch.testing.assert_close(udakit.strong_augment(images, draw, mean=MEAN, std=STD), whole, atol=1e-6, rtol=0)


def test_draw_statistics():
    """DAFormer's setting: ranges, and how often each is applied."""
    draw = udakit.draw_strong_augment(
        20_000, greyscale_probability=0.2, sharpness_probability=0.3, generator=torch.Generator().manual_seed(0)
    )
    for flags, probability in ((draw.jitter, 0.8), (draw.blur, 0.5), (draw.greyscale, 0.2), (draw.sharpness != 1, 0.3)):
        assert abs(flags.float().mean().item() - probability) < 0.02
    for values, low, high in (
        (draw.brightness, -0.2, 0.2),
        (draw.contrast, 0.8, 1.2),
        (draw.saturation, 0.8, 1.2),
        (draw.hue, -0.4 * math.pi, 0.4 * math.pi),
        (draw.sigma, 0.15, 1.15),
        (draw.sharpness, 0.5, 1.5),
    ):
        margin = 0.01 * (high - low)
        assert low <= values.min() < low + margin
        assert high - margin < values.max() <= high


def test_every_image_its_own_draw():
    """The released code draws once for the whole batch."""
    image = normalised(0, 1, 8, 8).expand(6, -1, -1, -1)
    augmented = udakit.StrongAugment(mean=MEAN, std=STD)(image, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(augmented.flatten(1), augmented.flatten(1))
    assert (distances + 10 * torch.eye(6)).min() > 0.1


def test_what_is_not_drawn_comes_back_bit_for_bit():
    images = normalised(0, 40, 6, 6).float()
    draw = udakit.draw_strong_augment(40, jitter_probability=0.3, blur_probability=0.3, generator=torch.Generator())
    augmented = udakit.strong_augment(images, draw, mean=MEAN, std=STD)
    touched = draw.jitter | draw.blur
    assert 0 < touched.sum() < 40
    same = (augmented == images).flatten(1).all(1)
    assert torch.equal(same, ~touched)
    nothing = udakit.draw_strong_augment(40, jitter_probability=0, blur_probability=0)
    assert torch.equal(udakit.strong_augment(images, nothing, mean=MEAN, std=STD), images)


def test_one_draw_whatever_is_switched_off():
    """Ablations stay comparable: greyscale off leaves jitter and blur as they were."""
    with_grey, without = (
        udakit.draw_strong_augment(5, greyscale_probability=p, generator=torch.Generator().manual_seed(1))
        for p in (0.5, 0.0)
    )
    assert torch.equal(with_grey.hue, without.hue)
    assert torch.equal(with_grey.sigma, without.sigma)
    assert without.greyscale is None


def test_follows_its_input():
    images = normalised(0, 2, 8, 8).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    augmented = udakit.StrongAugment(mean=MEAN, std=STD, blur_probability=1.0)(images)
    assert augmented.dtype == torch.bfloat16
    assert augmented.is_contiguous(memory_format=torch.channels_last)


def test_errors():
    images = torch.rand(2, 3, 8, 8)
    draw = udakit.draw_strong_augment(3)
    with pytest.raises(ValueError, match=r"Expected `draw` to hold tensors of shape \(N,\) matching `images`"):
        udakit.strong_augment(images, draw, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"Expected `mean` to be one number, one for each channel, but got \(0.485"):
        udakit.strong_augment(images[:, :1], draw, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"`images` is \(3, 8, 8\): if it is a single image, .* \.unsqueeze\(0\)"):
        udakit.StrongAugment(mean=MEAN, std=STD)(images[0])
    with pytest.raises(ValueError, match=r"but got \(1, 3, 1, 1\)\. Make it .* \.flatten\(\)"):
        udakit.StrongAugment(mean=torch.zeros(1, 3, 1, 1), std=None)
    with pytest.raises(TypeError, match="Expected `images` to be a float tensor"):
        udakit.strong_augment(images.byte(), draw, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="Expected `std` to be three numbers"):
        udakit.StrongAugment(mean=MEAN, std=(1.0,))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hue", 0.6),
        ("brightness", -0.1),
        ("blur_probability", 1.2),
        ("blur_sigma", (0.0, 1.0)),
        ("blur_sigma", (2, 1)),
        ("gamma", (0.0, 1.0)),
        ("gamma", (2.0, 0.5)),
        ("gamma", (1.0, math.nan)),
        ("noise", -0.1),
        ("noise_probability", 2),
    ],
)
def test_options_are_checked(option, value):
    for make in (
        lambda **o: udakit.draw_strong_augment(2, **o),
        lambda **o: udakit.StrongAugment(mean=None, std=None, **o),
    ):
        with pytest.raises(ValueError, match=f"Expected `{option}` to be"):
            make(**{option: value})


@pytest.mark.parametrize("std", [(0.2, 0.0, 0.2), (0.2, -0.1, 0.2), (0.2, math.inf, 0.2), (math.nan,) * 3])
def test_deviations_are_positive(std):
    images = torch.rand(1, 3, 8, 8)
    for use in (
        lambda: udakit.StrongAugment(mean=None, std=std),
        lambda: udakit.color_transfer(images, images, std=std),
        lambda: udakit.check_images(images, std=std),
    ):
        with pytest.raises(ValueError, match=r"Expected `std` to be .*(above 0|a number)"):
            use()


@pytest.mark.parametrize("n", [0, 2])
def test_where_nothing_is_drawn_the_images_come_back_in_memory_of_their_own(n):
    images = torch.rand(n, 3, 4, 4)
    nothing = udakit.StrongAugmentDraw(*[None] * len(udakit.StrongAugmentDraw._fields))
    for draw in (nothing, udakit.draw_strong_augment(n)):
        if n == 0 or draw is nothing:
            same = udakit.strong_augment(images, draw, mean=None, std=None)
            assert torch.equal(same, images)
            same.add_(1)
            assert n == 0 or images.max() <= 1
            assert same is not images
