"""The score around true boundaries against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gta2cs.evaluation import evaluate, near_boundary
from gta2cs.loading import normalise
from gta2cs.nets import SegOutput
from gta2cs.samples import ClassSet, Labelled

IGNORE = 255
NAMES = ("a", "b", "c")
CLASSES = ClassSet(NAMES, np.zeros((3, 3), np.uint8), {"all": (0, 1, 2), "first": (0, 1)})


def near_by_loops(labels: Tensor, distance: int) -> Tensor:
    """A pixel is near a boundary when a labelled pixel of another class is at most `distance` rows and columns away."""
    near = torch.zeros(labels.shape, dtype=torch.bool)
    n, h, w = labels.shape
    for i in range(n):
        for y in range(h):
            for x in range(w):
                own = labels[i, y, x]
                window = labels[i, max(y - distance, 0) : y + distance + 1, max(x - distance, 0) : x + distance + 1]
                others = [v for v in window.flatten().tolist() if v not in (IGNORE, int(own))]
                near[i, y, x] = own != IGNORE and bool(others)
    return near


def draw_labels(seed: int, n: int, h: int, w: int, ignored: float, *, side: int = 3) -> Tensor:
    """Regions of `side` x `side` pixels, and ignored pixels among them."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(3, (n, h, w), generator=generator)
    labels = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < ignored, IGNORE)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 2),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    distance=st.integers(1, 4),
)
def test_near_boundary_is_what_the_loops_find(seed: int, n: int, h: int, w: int, ignored: float, distance: int) -> None:
    labels = draw_labels(seed, n, h, w, ignored)
    assert torch.equal(near_boundary(labels, distance), near_by_loops(labels, distance))


def test_the_border_and_ignored_pixels_make_no_boundary() -> None:
    labels = torch.tensor([[[1, 1, IGNORE, 1, 1, 1, 0]]])
    assert near_boundary(labels, 1).tolist() == [[[False, False, False, False, False, True, True]]]
    assert near_boundary(labels, 4).tolist() == [[[False, False, False, True, True, True, True]]]
    assert not near_boundary(torch.full((1, 4, 5), 2), 3).any()
    assert near_boundary(torch.tensor([[[0, IGNORE, 2]]]), 2).tolist() == [[[True, False, True]]]  # across it


class Reads(nn.Module):
    """Predicts the class that the red channel names."""

    def forward(self, images: Tensor) -> SegOutput:
        shades = images[:, :1]
        centres = torch.tensor([shade(c) for c in range(3)]).view(1, 3, 1, 1)
        logits = -(shades - centres).abs()
        return SegOutput(logits, logits, logits)


def shade(value: int) -> float:
    """The normalised red of a pixel of 100 times the class."""
    return float(normalise(torch.full((1, 3, 1, 1), 100 * value, dtype=torch.uint8))[0, 0, 0, 0])


def data_of(labels: list[Tensor], predictions: list[Tensor]) -> Labelled:
    images = [(100 * p).to(torch.uint8).expand(3, -1, -1) for p in predictions]
    return Labelled([str(i) for i in range(len(labels))], images, [y.to(torch.uint8) for y in labels])


def iou_by_loops(pairs: list[tuple[int, int]]) -> list[float]:
    """IoU of each class in percent over (truth, prediction) of the pixels that count; NaN where there is neither."""
    found = []
    for c in range(3):
        hit = sum(t == c and p == c for t, p in pairs)
        union = sum(t == c or p == c for t, p in pairs)
        found.append(100 * hit / union if union else float("nan"))
    return found


@pytest.mark.parametrize("distance", [1, 3])
def test_score_counts_the_pixels_near_a_true_boundary_of_all_images(distance: int) -> None:
    truth = [draw_labels(1, 1, 4, 5, 0.2, side=9)[0], draw_labels(2, 1, 3, 3, 0.2, side=9)[0]]  # of two sizes
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randint(3, y.shape, generator=generator).where(y == IGNORE, y) for y in truth]
    for p in predictions:
        p[::2] = p[::2].roll(1, 1)  # some right, some wrong
    score = evaluate(Reads(), data_of(truth, predictions), CLASSES, trimap=distance)

    near, every = [], []
    for labels, predicted in zip(truth, predictions, strict=True):
        chosen = near_by_loops(labels[None], distance)[0]
        labelled = labels != IGNORE
        every += list(zip(labels[labelled].tolist(), predicted[labelled].tolist(), strict=True))
        near += list(zip(labels[chosen].tolist(), predicted[chosen].tolist(), strict=True))
    assert 0 < len(near) < len(every)
    assert list(score.means) == ["all", "first", "boundary"]
    assert score.miou == pytest.approx(np.nanmean(iou_by_loops(every)))
    assert score.means["boundary"] == pytest.approx(np.nanmean(iou_by_loops(near)))
    assert score.means["boundary"] != pytest.approx(score.miou)


def test_without_a_trimap_there_is_no_such_score() -> None:
    labels = draw_labels(0, 1, 3, 3, 0.0)[0]
    score = evaluate(Reads(), data_of([labels], [labels]), CLASSES)
    assert score.means == {"all": 100.0, "first": 100.0}


def test_a_truth_of_one_class_has_no_boundary() -> None:
    labels = torch.zeros(6, 6, dtype=torch.long)
    score = evaluate(Reads(), data_of([labels], [labels]), CLASSES, trimap=3)
    assert np.isnan(score.means["boundary"])
    assert score.miou == 100.0
    assert score.to_json()["means"]["boundary"] is None
