"""What the recipes compute late or at few pixels is what they would have computed at once, at all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gta2cs.nets import SegOutput
from gta2cs.recipes import Selection
from gta2cs.recipes.rectified import classes_at_features
from udakit import resize_labels


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
