"""Class statistics against all pixels at once, and the contrast with them against loops, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import udakit


def _batches(number: int = 4, space: tuple[int, ...] = (3, 4), d: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Class 3 comes late, class 1 is not in every batch; offsets large against the spread."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(number):
        labels = torch.randint(4 if k else 3, (2, *space), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
        if k == 1:
            labels[labels == 1] = 0
        features = torch.randn(2, d, *space, generator=generator, dtype=torch.float64)
        found.append((features + 10.0 * (k + 1), labels))
    return found


def _pixels(features: Tensor, labels: Tensor, c: int) -> Tensor:
    return features.movedim(1, -1)[labels == c]


@pytest.mark.parametrize("space", [(12,), (3, 4), (2, 3, 2)])
def test_cumulative_statistics_are_those_of_all_pixels(space: tuple[int, ...]) -> None:
    distributions = udakit.ClassDistributions(5, 3)
    batches = _batches(space=space)
    for features, labels in batches:
        distributions.update(features, labels)
    for c in range(4):
        pixels = torch.cat([_pixels(*batch, c) for batch in batches])
        torch.testing.assert_close(distributions.means[c].double(), pixels.mean(0), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(
            distributions.variances[c].double(), pixels.var(0, correction=0), rtol=2e-5, atol=1e-6
        )
        assert distributions.counts[c] == len(pixels)
    assert not distributions.seen[4]
    assert not distributions.means[4].any()


def test_momentum_weighs_the_new_batch() -> None:
    m = 0.3
    distributions = udakit.ClassDistributions(4, 3, m)
    mean: dict[int, Tensor] = {}
    variance: dict[int, Tensor] = {}
    for features, labels in _batches():
        distributions.update(features, labels)
        for c in range(4):
            pixels = _pixels(features, labels, c)
            if not len(pixels):
                continue
            new, spread = pixels.mean(0), pixels.var(0, correction=0)
            w = m if c in mean else 1.0
            old, kept = mean.get(c, new), variance.get(c, spread)
            variance[c] = (1 - w) * kept + w * spread + w * (1 - w) * (old - new) ** 2
            mean[c] = (1 - w) * old + w * new
    for c in range(4):
        torch.testing.assert_close(distributions.means[c].double(), mean[c], rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(distributions.variances[c].double(), variance[c], rtol=2e-5, atol=1e-6)


def test_counts_beyond_float32_still_grow_and_weigh() -> None:
    distributions = udakit.ClassDistributions(1, 1)
    distributions.set_(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([2**24 + 1]))
    distributions.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).long())
    assert distributions.counts.tolist() == [2**24 + 5]
    assert distributions.means.item() < 1.0
    copied = udakit.ClassDistributions(1, 1).half()
    copied.load_state_dict(distributions.state_dict())
    assert copied.means.dtype == torch.float32
    assert copied.counts.tolist() == [2**24 + 5]


def test_a_narrow_class_far_from_zero_keeps_its_variance() -> None:
    features = 1e4 + 0.1 * torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    distributions = udakit.ClassDistributions(1, 2)
    distributions.update(features, torch.zeros(1, 64, 64).long())
    torch.testing.assert_close(
        distributions.variances[0], features.double().flatten(2)[0].var(1, correction=0).float(), rtol=1e-3, atol=0
    )


def contrast_oracle(
    f: Tensor, y: Tensor, mu: Tensor, var: Tensor, t: float, ratio: float, normalize: bool, weight: Tensor
) -> Tensor:
    """Pixel by pixel, class by class."""
    total, count = 0.0, 0
    pixels, ids, weights = f.movedim(1, -1).flatten(0, -2), y.flatten().tolist(), weight.flatten()
    for x, c, w in zip(pixels, ids, weights, strict=True):
        if c == 255:
            continue
        x = x / x.norm() if normalize else x
        seen = [k for k in range(len(mu)) if bool((mu[k] != 0).any())]
        if c not in seen:
            continue
        bonus = {k: (x**2 * (var[k] * ratio / t)).sum() / 2 for k in seen}
        z = {k: ((x * mu[k]).sum() + bonus[k]) / t for k in seen}
        total = total + w * (torch.logsumexp(torch.stack(list(z.values())), 0) - z[c] + bonus[c] / t)
        count += 1
    return total / count


@pytest.mark.parametrize("space", [(6,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "ratio": 0.3, "normalize": False}])
def test_contrast_value_and_gradient(space: tuple[int, ...], options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(2)
    f = torch.randn(2, 3, *space, generator=generator, dtype=torch.float64).requires_grad_()
    mu = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    mu[1] = 0  # never seen
    mu.requires_grad_()
    var = torch.rand(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(4, (2, *space), generator=generator)
    y[0].view(-1)[0] = 255
    weight = torch.rand(2, *space, generator=generator, dtype=torch.float64)
    ours = udakit.distribution_contrast_loss(f, y, mu, var, pixel_weight=weight, **options)
    t, ratio, normalize = (options.get(k, v) for k, v in (("temperature", 100.0), ("ratio", 1.0), ("normalize", True)))
    theirs = contrast_oracle(f, y, mu, var, t, ratio, bool(normalize), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (f, mu, var)), torch.autograd.grad(theirs, (f, mu, var)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_contrast_masking_equals_removing() -> None:
    generator = torch.Generator().manual_seed(3)
    f = torch.randn(1, 3, 4, 4, generator=generator)
    y = torch.randint(3, (1, 4, 4), generator=generator)
    mu, var = torch.randn(3, 3, generator=generator), torch.rand(3, 3, generator=generator)
    masked = y.clone()
    masked[:, 2:] = 255
    torch.testing.assert_close(
        udakit.distribution_contrast_loss(f, masked, mu, var, temperature=0.5),
        udakit.distribution_contrast_loss(f[:, :, :2], y[:, :2], mu, var, temperature=0.5),
    )


def test_contrast_without_variance_is_the_contrast_with_prototypes() -> None:
    generator = torch.Generator().manual_seed(4)
    f, mu = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(3, 3, generator=generator)
    mu = mu / mu.norm(dim=1, keepdim=True)
    y = torch.randint(3, (2, 4, 4), generator=generator)
    torch.testing.assert_close(
        udakit.distribution_contrast_loss(f, y, mu, torch.ones(3, 3), temperature=0.1, ratio=0.0),
        udakit.pixel_prototype_contrast_loss(f, y, mu, temperature=0.1),
    )


def test_the_released_temperature_gives_nearly_equal_logits() -> None:
    mu = torch.eye(4)
    loss = udakit.distribution_contrast_loss(mu.T.reshape(1, 4, 4), torch.arange(4)[None], mu, torch.zeros(4, 4))
    assert loss.item() == pytest.approx(math.log(4), abs=0.02)


def test_errors() -> None:
    f, y, mu = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"Expected `means` to be \(C, D\) matching `features`"):
        udakit.distribution_contrast_loss(f, y, mu[:, :2], mu[:, :2])
    with pytest.raises(ValueError, match=r"Expected `variances` to have the shape of `means`"):
        udakit.distribution_contrast_loss(f, y, mu, mu[:2])
    with pytest.raises(ValueError, match=r"Expected `ratio` to be at least 0"):
        udakit.DistributionContrastLoss(ratio=-1.0)
    with pytest.raises(ValueError, match=r"Expected `features` to be .* D = 2, but got"):
        udakit.ClassDistributions(4, 2).update(f, y)
    with pytest.raises(ValueError, match=r"Expected `momentum` to be in \[0, 1\]"):
        udakit.ClassDistributions(4, 2, 1.5)
    with pytest.raises(ValueError, match=r"Expected `counts` to be \(C,\) = \(4,\)"):
        udakit.ClassDistributions(4, 3).set_(mu, mu, torch.zeros(3).long())
