"""What the recipes compute late or at few pixels is what they would have computed at once, at all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gta2cs.nets import SegOutput
from gta2cs.recipes import Selection
from gta2cs.recipes.rectified import classes_at_features
from udakit import cross_entropy, resize_labels, symmetric_kd_loss


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_selection_counts_each_predicted_class() -> None:
    logits = draws(2, 5, 9, 7)
    predicted = logits.argmax(1)
    labels = predicted.where(draws(2, 9, 7) > 0, 255)
    weight = draws(2, 9, 7).abs()
    selection = Selection(logits, labels, weight)
    for c in range(5):
        mine = predicted == c
        assert selection.predicted[c] == mine.sum()
        torch.testing.assert_close(selection.kept[c], weight[mine & (labels == c)].sum())
    everything = Selection(logits)
    assert torch.equal(everything.kept, everything.predicted)


@pytest.mark.parametrize("size", [(8, 16), (7, 5), (32, 64)])
def test_diga_takes_the_arg_max_of_few_pixels(size: tuple[int, int]) -> None:
    output = SegOutput(draws(2, 6, 32, 64), draws(2, 3, *size), draws(2, 3, 2, 4))
    assert torch.equal(classes_at_features(output), resize_labels(output.logits.argmax(1), size))


@pytest.mark.parametrize(("head", "full", "size"), [((8, 16), (32, 64), (8, 16)), ((5, 7), (33, 50), (6, 9))])
def test_few_pixels_of_enlarged_logits_need_no_enlarged_logits(head, full, size):
    head_logits, features = draws(2, 6, *head), draws(2, 3, *size)
    output, enlarged = (SegOutput(head_logits, features, features, full) for _ in range(2))
    expected = F.interpolate(enlarged.logits, size, mode="nearest")
    torch.testing.assert_close(output.sampled(size), expected)
    assert torch.equal(classes_at_features(output), resize_labels(enlarged.logits.argmax(1), size))
    assert "logits" not in vars(output)


def test_the_losses_of_a_head_are_those_of_enlarged_logits():
    """Value and gradient of DiGA's distillation, and of EHTDI's cross-entropy with its boundary term."""
    clean, mixed, *teachers = (draws(4, 2, 5, 4, 6)[k].double().requires_grad_() for k in range(4))
    labels, mask = draws(2, 16, 24).mul(3).long() % 5, draws(2, 16, 24) > 0.5
    labels[:, :3] = 255
    made = [SegOutput(x, x, x, (16, 24)) for x in (clean, mixed, *teachers)]
    ours = made[1].distillation(made[2]) + 0.25 * made[0].distillation(made[3])
    theirs = symmetric_kd_loss(*(x.logits for x in made), reverse_weight=0.25)
    both = SegOutput(clean, clean, clean, (16, 24)).cross_entropy_and_band(labels, mask)
    full = made[0].logits
    apart = cross_entropy(full, labels), cross_entropy(full, labels.where(mask, 255))
    for found, expected in [(ours, theirs), *zip(both, apart, strict=True)]:
        torch.testing.assert_close(found, expected)
        slopes = [
            torch.autograd.grad(x, (clean, mixed), allow_unused=True, retain_graph=True) for x in (found, expected)
        ]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(("head", "size", "stride"), [((8, 12), (32, 48), 8), ((5, 7), (33, 50), 8), ((3, 4), None, 2)])
def test_averages_of_enlarged_logits_need_no_enlarged_logits(head, size, stride):
    logits = torch.randn(2, 3, *head, dtype=torch.float64, requires_grad=True)
    output = SegOutput(logits, logits, logits, size)
    expected = F.avg_pool2d(output.logits, stride, ceil_mode=True)
    weight = torch.randn_like(expected)
    (slope,) = torch.autograd.grad(expected, logits, weight)
    found = SegOutput(logits, logits, logits, size)
    averaged = found.averaged(stride)
    torch.testing.assert_close(averaged, expected)
    torch.testing.assert_close(torch.autograd.grad(averaged, logits, weight)[0], slope)
    assert "logits" not in vars(found)
    half = SegOutput(logits.bfloat16(), logits, logits, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half.averaged(stride).dtype == torch.float32
