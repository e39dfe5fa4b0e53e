"""Adaptive thresholds and distribution alignment against loops over pixels, and over several steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import udakit


def _steps(number: int = 4, space: tuple[int, ...] = (3, 4), c: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, c, *space), (2, *space))
    return [
        (3 * torch.randn(shapes[0], generator=generator), torch.rand(shapes[1], generator=generator) < 0.7)
        for _ in range(number)
    ]


def _pixels(logits: Tensor, valid: Tensor) -> list[list[float]]:
    """Softmax of the valid pixels, in Python's floats."""
    rows = logits.movedim(1, -1)[valid].double().tolist()
    return [[math.exp(z - max(row)) / sum(math.exp(y - max(row)) for y in row) for z in row] for row in rows]


@pytest.mark.parametrize("space", [(12,), (3, 4), (2, 3, 2)])
def test_thresholds_over_steps(space: tuple[int, ...]) -> None:
    m, c = 0.6, 3
    selector = udakit.AdaptiveThresholdSelector(c, m)
    threshold, share, all_kept = 1 / c, [1 / c] * c, []
    for logits, valid in _steps(space=space):
        pixels = _pixels(logits, valid)
        threshold = m * threshold + (1 - m) * sum(max(p) for p in pixels) / len(pixels)
        share = [m * q + (1 - m) * sum(p[k] for p in pixels) / len(pixels) for k, q in enumerate(share)]
        expected = [threshold * q / max(share) for q in share]
        pseudo = selector(logits, valid=valid)
        assert selector.thresholds.tolist() == pytest.approx(expected, abs=1e-6)
        kept = [max(p) >= expected[p.index(max(p))] for p in pixels]
        assert (pseudo.weight[valid] > 0).tolist() == kept
        assert bool((pseudo.labels[~valid] == 255).all())
        all_kept += kept
    assert 0 < sum(all_kept) < len(all_kept)


def test_evaluation_and_empty_batches_change_nothing() -> None:
    selector = udakit.AdaptiveThresholdSelector(3, 0.5)
    (logits, valid), (other, _) = _steps(2)
    selector(logits, valid=valid)
    before = {k: v.clone() for k, v in selector.state_dict().items()}
    selector(other, valid=torch.zeros_like(valid))
    selector(torch.where(torch.rand(other.shape) < 0.1, torch.nan, other))  # it would stay for good
    selector.eval()(other)
    assert all(torch.equal(v, before[k]) for k, v in selector.state_dict().items())
    assert not torch.equal(selector.thresholds, torch.full((3,), 1 / 3))


def test_limit_of_the_global_threshold() -> None:
    logits = torch.tensor([8.0, -8.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 2)
    selector = udakit.AdaptiveThresholdSelector(2, 0.0, max_threshold=0.95)
    selector(logits)
    assert selector.thresholds[0] == pytest.approx(0.95)
    assert selector.threshold > 0.99


def test_rare_classes_have_lower_thresholds() -> None:
    logits = torch.tensor([[3.0, -3.0], [3.0, -3.0], [3.0, -3.0], [-0.5, 0.5]]).T.reshape(1, 2, 1, 4)
    pseudo = udakit.AdaptiveThresholdSelector(2, 0.0)(logits)
    assert pseudo.labels.flatten().tolist() == [0, 0, 0, 1]
    assert udakit.ThresholdSelector(0.75)(logits).labels.flatten().tolist() == [0, 0, 0, 255]


def test_alignment_by_hand() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64).T.reshape(1, 3, 2).requires_grad_()
    s, t = [0.2, 0.5, 0.3], [0.5, 0.25, 0.25]
    aligned = udakit.align_distribution(p, *(torch.tensor(v, dtype=torch.float64) for v in (s, t)))
    for x in range(2):
        weighted = [p[0, k, x].item() * s[k] / t[k] for k in range(3)]
        assert aligned[0, :, x].tolist() == pytest.approx([w / sum(weighted) for w in weighted], abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: udakit.align_distribution(x, torch.tensor(s).double(), torch.tensor(t).double()), (p,)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("side", [4, 220])
def test_alignment_of_small_and_large_maps(side: int, dtype: torch.dtype) -> None:
    """Large maps are processed in pieces; half types are read as they are. One pixel has only a class of share 0."""
    p = torch.randn(2, 3, side, side).softmax(1)
    p[0, :, 1, 2] = torch.tensor([1.0, 0.0, 0.0])
    p = p.to(dtype).requires_grad_()
    source, target = torch.tensor([0.0, 0.7, 0.3]), torch.tensor([0.2, 0.3, 0.5])
    aligned = udakit.align_distribution(p, source, target)
    assert aligned.dtype == torch.promote_types(dtype, torch.float32)
    exact = p.detach().double().requires_grad_()
    product = exact * (source.to(aligned.dtype) / target.to(aligned.dtype)).double()[:, None, None]
    total = product.sum(1, keepdim=True)
    expected = torch.where(total > 0, product / torch.where(total > 0, total, 1), exact)
    torch.testing.assert_close(aligned.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(2, *aligned.shape, dtype=aligned.dtype)
    slopes = torch.autograd.grad(aligned, p, upstream, is_grads_batched=True, retain_graph=True)[0]
    for slope, g in zip(slopes, upstream, strict=True):
        (wanted,) = torch.autograd.grad(expected, exact, g.double(), retain_graph=True)
        (alone,) = torch.autograd.grad(aligned, p, g, retain_graph=True)
        tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-6}[dtype]
        torch.testing.assert_close(alone, wanted.to(dtype), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(slope, alone, rtol=tolerance, atol=tolerance)


def test_alignment_of_impossible_pixels() -> None:
    """A class without a share anywhere: no division by 0, and a pixel that has only it keeps its probabilities."""
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).T.reshape(1, 2, 2).requires_grad_()
    aligned = udakit.align_distribution(p, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    aligned.square().sum().backward()
    assert aligned.detach().tolist() == [[[1.0, 0.0], [0.0, 1.0]]]
    assert bool(p.grad.isfinite().all())


def test_running_shares() -> None:
    """Plain means first, then a decaying average; a batch without valid pixels or labels does not count."""
    alignment = udakit.DistributionAlignment(3, 0.5)
    target, source = None, None
    labels = [torch.tensor([[0, 0, 1, 255]]), torch.tensor([[255, 255]]), torch.tensor([[2, 1]])]
    for step, (logits, valid) in enumerate(_steps(3)):
        alignment.update_source(labels[step])
        if step == 0:
            source = torch.tensor([2 / 3, 1 / 3, 0.0])
        elif step == 2:
            source = source + 0.5 * (torch.tensor([0.0, 0.5, 0.5]) - source)
        pixels = torch.tensor(_pixels(logits, valid))
        target = pixels.mean(0) if target is None else target + 0.5 * (pixels.mean(0) - target)
        aligned = alignment(logits, valid=valid)
        torch.testing.assert_close(alignment.source_share, source)
        torch.testing.assert_close(alignment.target_share, target)
        torch.testing.assert_close(aligned, udakit.align_distribution(logits.softmax(1), source, target))
        alignment(logits, valid=torch.zeros_like(valid))
        alignment(torch.where(torch.rand(logits.shape) < 0.1, torch.nan, logits))
        torch.testing.assert_close(alignment.target_share, target)
    assert (int(alignment.source_batches), int(alignment.target_batches)) == (2, 3)


def test_nothing_is_aligned_before_source_is_known() -> None:
    logits, valid = _steps(1)[0]
    torch.testing.assert_close(udakit.DistributionAlignment(3)(logits, valid=valid), logits.softmax(1))
    prior = udakit.DistributionAlignment(3, source_share=torch.tensor([0.1, 0.1, 0.8]))
    assert prior(logits).mean((0, 2, 3))[2] > logits.softmax(1).mean((0, 2, 3))[2]
    with pytest.raises(ValueError, match="Expected `source_share` to be None"):
        prior.update_source(torch.zeros(1, 2).long())


def test_errors() -> None:
    p, share = torch.full((1, 3, 2, 2), 1 / 3), torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match=r"Expected `target_share` to be \(C,\) matching `probabilities`"):
        udakit.align_distribution(p, share, share[:2])
    with pytest.raises(ValueError, match=r"Expected `logits` to be .* C = 4, but got \(1, 3, 2, 2\)"):
        udakit.AdaptiveThresholdSelector(4)(p)
    with pytest.raises(ValueError, match=r"Expected `source_share` to be \(3,\)"):
        udakit.DistributionAlignment(3, source_share=share[:2])
    with pytest.raises(ValueError, match=r"Expected `momentum` to be in \[0, 1\)"):
        udakit.DistributionAlignment(3, 1.0)
    with pytest.raises(TypeError, match=r"Expected `labels` to be an int64 or uint8 tensor"):
        udakit.DistributionAlignment(3).update_source(p)
