"""Token masks and feature distillation (VFM-UDA, VFM-UDA++) against loops, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import udakit


def test_tokens_are_replaced_with_the_probability_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = udakit.draw_token_mask(50, 200, ratio=0.7, prefix=5, generator=generator)
    assert not mask[:, :5].any()
    assert float(mask[:, 5:].float().mean()) == pytest.approx(0.7, abs=0.02)
    assert bool((mask[0] != mask[1]).any())


def test_masked_tokens_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    token = torch.randn(1, 1, 3, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 5, generator=generator) < 0.5
    masked = udakit.mask_tokens(tokens, mask, token)
    for i in range(2):
        for k in range(5):
            assert torch.equal(masked[i, k], token[0, 0] if mask[i, k] else tokens[i, k])
    masked.sum().backward()
    assert torch.equal(tokens.grad, (~mask).double().unsqueeze(2).expand_as(tokens))
    assert torch.equal(token.grad, torch.full_like(token, float(mask.sum())))


def oracle(f: Tensor, r: Tensor, valid: Tensor, w: float) -> Tensor:
    total, count = 0.0, 0
    for x, y, v in zip(f.movedim(1, -1).flatten(0, -2), r.movedim(1, -1).flatten(0, -2), valid.flatten(), strict=True):
        if not v:
            continue
        smooth = sum(0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(x, y, strict=True))
        cosine = (x * y).sum() / (math.sqrt(float((x.detach() ** 2).sum())) and x.norm() * y.norm())
        total = total + (1 - w) * smooth / len(x) + w * (1 - cosine)
        count += 1
    return total / count


@pytest.mark.parametrize("space", [(5,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("weight", [0.9, 0.3])
def test_distillation_value_and_gradient(space: tuple[int, ...], weight: float) -> None:
    generator = torch.Generator().manual_seed(2)
    f = (2 * torch.randn(2, 4, *space, generator=generator, dtype=torch.float64)).requires_grad_()
    r = torch.randn(2, 4, *space, generator=generator, dtype=torch.float64).requires_grad_()
    valid = torch.rand(2, *space, generator=generator) < 0.8
    ours = udakit.feature_distillation_loss(f, r, cosine_weight=weight, valid=valid)
    theirs = oracle(f, r.detach(), valid, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (mine,) = torch.autograd.grad(ours, f)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, f)[0], rtol=1e-10, atol=1e-12)
    assert r.grad is None


def test_errors() -> None:
    tokens, mask = torch.zeros(2, 5, 3), torch.zeros(2, 5).bool()
    with pytest.raises(ValueError, match=r"Expected `mask` to be \(N, L\) matching `tokens`"):
        udakit.mask_tokens(tokens, mask[:, :4], torch.zeros(3))
    with pytest.raises(ValueError, match=r"Expected `mask_token` to have D = 3 numbers"):
        udakit.mask_tokens(tokens, mask, torch.zeros(4))
    with pytest.raises(ValueError, match=r"Expected `ratio` to be in \[0, 1\]"):
        udakit.draw_token_mask(1, 4, ratio=2.0)
    with pytest.raises(ValueError, match=r"Expected `prefix` to be at most `tokens` 4, .* but got 5"):
        udakit.draw_token_mask(1, 4, prefix=5)
    assert not udakit.draw_token_mask(1, 4, ratio=1.0, prefix=4).any()
    with pytest.raises(ValueError, match=r"Expected `cosine_weight` to be in \[0, 1\]"):
        udakit.FeatureDistillationLoss(cosine_weight=-0.1)
