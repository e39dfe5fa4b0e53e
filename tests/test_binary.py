"""One logit a pixel, as two classes."""

import pytest
import torch
import torch.nn.functional as F

import udakit

SPACES = [(7,), (3, 5), (2, 3, 4)]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cross_entropy_is_that_of_the_single_logit(space: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(2, 1, *space, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(2, (2, *space), generator=g)
    loss = udakit.cross_entropy(udakit.binary_logits(logits), labels, reduction="none")
    expected = F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.to(dtype), reduction="none")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(udakit.cross_entropy(udakit.binary_logits(logits), labels), loss.mean())
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_both_ways_are_one_prediction(space: tuple[int, ...]) -> None:
    logits = 4 * torch.randn(2, 1, *space, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probabilities = udakit.binary_probabilities(logits.sigmoid())
    torch.testing.assert_close(udakit.binary_logits(logits).softmax(1), probabilities)
    a = udakit.ThresholdSelector(0.9)(udakit.binary_logits(logits))
    b = udakit.ThresholdSelector(0.9)(probabilities, kind="probabilities")
    assert torch.equal(a.labels, b.labels)
    assert set(a.labels.unique().tolist()) == {0, 1, 255}


@pytest.mark.parametrize("name", ["binary_logits", "binary_probabilities"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4), r"to be \(N, 1, L\), one .* per pixel, but got \(2, 3, 4\)\. Add the channel axis with"),
        ((2, 2, 4, 4), r"but got \(2, 2, 4, 4\)\. Two channels are already two classes"),
        ((2, 4), r"to be \(N, 1, \*space\) with one to three spatial axes"),
    ],
)
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(udakit, name)(torch.zeros(shape))
