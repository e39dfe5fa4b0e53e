"""Contrast against pytorch-metric-learning on the same pixels: equal where the definitions are, unlike as documented.

Its losses take rows and their classes, with cosine similarity unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import udakit

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning (the extra `bench`) is not there")
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

TEMPERATURE = 0.2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(counts: list[int], *, width: int = 6) -> tuple[Tensor, Tensor]:
    """Features (1, D, 1, w) with `counts[c]` pixels of each class c, in disorder, and their labels."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    return normal(1, width, 1, len(labels)).requires_grad_(), labels.view(1, 1, -1)


def rows(features: Tensor) -> Tensor:
    return features.movedim(1, -1).flatten(0, 2)


def ours(features: Tensor, labels: Tensor, **options: Any) -> Tensor:
    c = int(labels.max()) + 1
    return udakit.supervised_pixel_contrast_loss(
        features, labels, num_classes=c, max_anchors=labels.numel(), temperature=TEMPERATURE, **options
    )


def assert_same(a: Tensor, b: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(a, b)
    found = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (a, b))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- two views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [SupConLoss, NTXentLoss])
@pytest.mark.parametrize("embedding", ["unit vectors", "probabilities"])
def test_pixel_contrast_has_one_positive_a_pixel(peer: Callable[..., Any], embedding: str) -> None:
    """As classes: the pixels. The dot products of probabilities, as EHTDI has them, need their own distance."""
    views = [normal(1, 5, 4, 6, seed=s).requires_grad_() for s in (1, 2)]
    if embedding == "unit vectors":
        made, theirs = [F.normalize(x, dim=1) for x in views], peer(temperature=TEMPERATURE)
    else:
        distance = DotProductSimilarity(normalize_embeddings=False)
        made, theirs = [x.softmax(1) for x in views], peer(temperature=TEMPERATURE, distance=distance)
    loss = udakit.pixel_contrast_loss(*made, temperature=TEMPERATURE)
    pixels = torch.arange(24).repeat(2)
    assert_same(loss, theirs(torch.cat([rows(x) for x in made]), pixels), views)


def test_pixel_contrast_stays_within_an_image() -> None:
    """A batch is the mean over its images, not one large set of rows."""
    a, b = (F.normalize(normal(2, 5, 3, 4, seed=s), dim=1) for s in (1, 2))
    peer, pixels = NTXentLoss(temperature=TEMPERATURE), torch.arange(12).repeat(2)
    images = [peer(torch.cat([rows(a[i : i + 1]), rows(b[i : i + 1])]), pixels) for i in range(2)]
    loss = udakit.pixel_contrast_loss(a, b, temperature=TEMPERATURE)
    torch.testing.assert_close(loss, torch.stack(images).mean())
    together = peer(torch.cat([rows(a), rows(b)]), torch.arange(24).repeat(2))
    assert together > loss + 0.1  # twice the negatives


# --- labelled pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[4, 4, 4], [2, 5, 3], [1, 6, 4]])
def test_all_is_supcon(counts: list[int]) -> None:
    """Also with a pixel that is alone in its class: it has no positive and is in no mean."""
    features, labels = labelled(counts)
    theirs = SupConLoss(temperature=TEMPERATURE)(rows(features), labels.flatten())
    assert_same(ours(features, labels, denominator="all"), theirs, [features])


def test_negatives_is_ntxent_where_classes_are_of_one_size() -> None:
    features, labels = labelled([4, 4, 4])
    theirs = NTXentLoss(temperature=TEMPERATURE)(rows(features), labels.flatten())
    assert_same(ours(features, labels, denominator="negatives"), theirs, [features])


def test_ntxent_weighs_a_class_by_its_pairs() -> None:
    """Ours is a mean over anchors of means over positives; the same numbers, each pair alike, are NTXentLoss."""
    counts = [2, 5, 3]
    features, labels = labelled(counts)
    theirs = NTXentLoss(temperature=TEMPERATURE)(rows(features), labels.flatten())
    anchors = ours(features, labels, reduction="none")
    assert anchors.shape[0] == len(counts)
    positives = torch.tensor(counts, dtype=anchors.dtype).unsqueeze(1) - 1
    pairs = (anchors * positives).sum() / sum(k * (k - 1) for k in counts)
    torch.testing.assert_close(theirs, pairs)
    assert (theirs - ours(features, labels)).abs() > 1e-3


def test_supcon_of_one_class_alone() -> None:
    """Without a negative it is 0 there; ours is its formula: the positives are told from one another."""
    features, labels = labelled([6])
    assert SupConLoss(temperature=TEMPERATURE)(rows(features), labels.flatten()) == 0
    assert ours(features, labels, denominator="all") > 0
    assert ours(features, labels, denominator="negatives") == 0
    assert NTXentLoss(temperature=TEMPERATURE)(rows(features), labels.flatten()) == 0


def test_a_pair_that_is_far_apart() -> None:
    """NTXentLoss takes the exponential first: in float32 its loss ends at 87, and its gradient with it."""
    features = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [1.0, 0.2], [1.0, 0.3]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    one = torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 0]), torch.tensor([2, 3])  # the pair 0, 1 alone
    theirs = NTXentLoss(temperature=0.01)(features, labels, one)
    maps = features.T.reshape(1, 2, 1, 4)
    loss = udakit.supervised_pixel_contrast_loss(
        maps, labels.view(1, 1, 4), num_classes=2, temperature=0.01, reduction="none"
    )[0].max()
    assert theirs.item() == pytest.approx(87.3, abs=0.1)
    assert loss > 190
    assert not torch.autograd.grad(theirs, features)[0].any()
    assert torch.autograd.grad(loss, features)[0].any()
