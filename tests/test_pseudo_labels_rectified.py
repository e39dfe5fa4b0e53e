"""ProDA's rectification against a loop over pixels, in value and gradient; the selector at its edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import udakit

INF = float("inf")


def oracle(p: Tensor, d: Tensor, temperature: float) -> Tensor:
    """Pixel by pixel, differentiable, from the formula."""
    flat_p, flat_d = p.flatten(2), d.flatten(2)
    images = []
    for i in range(p.shape[0]):
        pixels = []
        for x in range(flat_p.shape[2]):
            nearest = flat_d[i, :, x].min()
            raw = [torch.exp(-(flat_d[i, c, x] - nearest) / temperature) for c in range(p.shape[1])]
            product = [flat_p[i, c, x] * raw[c] / sum(raw) for c in range(p.shape[1])]
            pixels.append(torch.stack([v / sum(product) for v in product]))
        images.append(torch.stack(pixels, 1))
    return torch.stack(images).view_as(p)


@pytest.mark.parametrize("space", [(5,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_value_and_gradient(space: tuple[int, ...], temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 4, *space, generator=generator, dtype=torch.float64).softmax(1).requires_grad_()
    d = (5 * torch.rand(2, 4, *space, generator=generator, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 4, *space, generator=generator, dtype=torch.float64)
    ours, theirs = udakit.rectify_probabilities(p, d, temperature=temperature), oracle(p, d, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (p, d)),
        torch.autograd.grad((theirs * weights).sum(), (p, d)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_infinite_distances() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]).T.reshape(1, 3, 3).requires_grad_()
    d = torch.tensor([[1.0, 1.0, INF], [INF, INF, INF], [INF, 0.0, 0.0]]).T.reshape(1, 3, 3).requires_grad_()
    rectified = udakit.rectify_probabilities(p, d)
    rectified.square().sum().backward()
    assert rectified[0, :, 0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert rectified[0, :, 1].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert rectified[0, :, 2].tolist() == [1.0, 0.0, 0.0]
    assert bool(p.grad.isfinite().all() & d.grad.isfinite().all())


def test_far_away_prototypes_still_decide() -> None:
    """Distances of 1e4 underflow every weight but are told apart all the same."""
    p = torch.full((1, 2, 1), 0.5)
    d = torch.tensor([10002.0, 10001.0]).view(1, 2, 1)
    assert udakit.rectify_probabilities(p, d)[0, 1, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-5)


def _prototypes() -> udakit.ClassPrototypes:
    return udakit.ClassPrototypes(3, 2).set_(torch.tensor([[0.1, 0.0], [3.0, 0.0], [0.0, 3.0]]))


def test_selector_upsamples_the_softmax_of_distances() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 8, 12, generator=generator)
    features = 3 * torch.rand(2, 2, 4, 6, generator=generator)
    prototypes = _prototypes()
    nearness = F.interpolate((-prototypes.distances(features) / 0.5).softmax(1), (8, 12), mode="bilinear")
    product = logits.softmax(1) * nearness
    expected = product / product.sum(1, keepdim=True)
    valid = torch.rand(2, 8, 12, generator=generator) < 0.8
    pseudo = udakit.RectifiedSelector(prototypes, 0.5, threshold=0.6)(logits, features, valid=valid)
    kept = (expected.amax(1) >= 0.6) & valid
    assert 0 < int(kept.sum()) < int(valid.sum())
    assert torch.equal(pseudo.labels, expected.argmax(1).where(kept, 255))
    torch.testing.assert_close(pseudo.confidence, expected.amax(1))
    assert torch.equal(pseudo.weight > 0, kept)
    assert bool((expected.argmax(1) != logits.argmax(1)).any())


def test_selector_without_a_seen_class_is_the_arg_max() -> None:
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    pseudo = udakit.RectifiedSelector(udakit.ClassPrototypes(3, 2))(logits, torch.zeros(1, 2, 2, 2))
    assert torch.equal(pseudo.labels, logits.argmax(1))


def test_the_prototypes_are_referred_to_and_not_owned() -> None:
    selector = udakit.RectifiedSelector(_prototypes())
    assert not selector.state_dict()
    assert selector.prototypes.seen.all()


def test_errors() -> None:
    p = torch.full((1, 3, 2, 2), 1 / 3)
    with pytest.raises(ValueError, match=r"Expected `distances` to have the shape of `probabilities`"):
        udakit.rectify_probabilities(p, p[..., :1])
    with pytest.raises(ValueError, match=r"Expected `temperature` to be above 0"):
        udakit.rectify_probabilities(p, p, temperature=0.0)
    with pytest.raises(TypeError, match=r"Expected `features` to be a float tensor .* None"):
        udakit.RectifiedSelector(_prototypes())(p)
    with pytest.raises(TypeError, match=r"Expected `prototypes` to be a ClassPrototypes"):
        udakit.RectifiedSelector(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"Expected `logits` to be .* C = 3, but got"):
        udakit.RectifiedSelector(_prototypes())(p[:, :2], torch.zeros(1, 2, 2, 2))
