"""What looks at neighbours, in one, two and three dimensions, against slow versions; and wrong dimensions by name."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import udakit

SPACES = [(12,), (4, 6), (4, 2, 6)]
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
each_space = pytest.mark.parametrize("space", SPACES, ids=["1-D", "2-D", "3-D"])


def draw_labels(space: tuple[int, ...], classes: int = 3, *, ignored: float = 0.3) -> Tensor:
    g = torch.Generator().manual_seed(len(space))
    labels = torch.randint(classes, (2, *space), generator=g)
    return torch.where(torch.rand(labels.shape, generator=g) < ignored, 255, labels)


@each_space
@pytest.mark.parametrize("min_ratio", [0.3, 0.75])
def test_downscale_labels_is_the_majority_of_each_cell(space: tuple[int, ...], min_ratio: float) -> None:
    labels = draw_labels(space)
    found = udakit.downscale_labels(labels, 2, num_classes=3, min_ratio=min_ratio)
    cells = [side // 2 for side in space]
    assert found.shape == (2, *cells)
    for n in range(2):
        for cell in itertools.product(*map(range, cells)):
            pixels = [labels[(n, *at)].item() for at in itertools.product(*((2 * i, 2 * i + 1) for i in cell))]
            votes = [pixels.count(c) for c in (0, 1, 2, 255)]
            winner = votes.index(max(votes))
            clear = max(votes) >= math.ceil(min_ratio * len(pixels))
            assert found[(n, *cell)] == (winner if winner < 3 and clear else 255)


@each_space
def test_no_image_has_no_labels(space: tuple[int, ...]) -> None:
    labels = torch.zeros(0, *space, dtype=torch.int64)
    cells = tuple(side // 2 for side in space)
    assert udakit.downscale_labels(labels, 2, num_classes=3).shape == (0, *cells)
    assert udakit.resize_labels(labels, cells).shape == (0, *cells)


@each_space
def test_resize_labels_is_nearest_interpolation(space: tuple[int, ...]) -> None:
    labels = draw_labels(space, ignored=0)
    for size in [tuple(2 * side for side in space), tuple(max(side - 1, 1) for side in space), (5,) * len(space)]:
        expected = F.interpolate(labels.unsqueeze(1).double(), size, mode="nearest").squeeze(1).long()
        assert torch.equal(udakit.resize_labels(labels, size), expected)


@each_space
@pytest.mark.parametrize("align_corners", [False, True])
def test_consensus_upsamples_the_similarities(space: tuple[int, ...], align_corners: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits, centres = torch.randn(2, 3, *space, generator=g), torch.randn(3, 4, generator=g)
    features = torch.randn(2, 4, *(side // 2 for side in space), generator=g)
    held = udakit.ClassPrototypes(3, 4).set_(centres)
    found = udakit.BilateralConsensus(held, align_corners)(logits, features)
    distance = torch.stack([(features - c.view(1, 4, *[1] * len(space))).norm(dim=1) for c in centres], dim=1)
    similarity = (-distance).softmax(1)
    up = F.interpolate(similarity, space, mode=LINEAR[len(space)], align_corners=align_corners)
    expected = torch.where(logits.argmax(1) == up.argmax(1), logits.argmax(1), 255)
    assert torch.equal(found.labels, expected)
    assert 0 < (expected == 255).float().mean() < 1


@each_space
def test_rectified_selector_upsamples_the_similarities(space: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    logits, centres = torch.randn(2, 3, *space, generator=g), torch.randn(3, 4, generator=g)
    features = torch.randn(2, 4, *(side // 2 for side in space), generator=g)
    held = udakit.ClassPrototypes(3, 4).set_(centres)
    found = udakit.RectifiedSelector(held)(logits, features)
    distance = torch.stack([(features - c.view(1, 4, *[1] * len(space))).norm(dim=1) for c in centres], dim=1)
    up = F.interpolate((-distance).softmax(1), space, mode=LINEAR[len(space)])
    product = logits.softmax(1) * up
    torch.testing.assert_close(found.confidence, (product / product.sum(1, keepdim=True)).amax(1))
    assert torch.equal(found.labels, product.argmax(1))


@each_space
def test_hflip_average_mirrors_the_last_axis(space: tuple[int, ...]) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(space)]
    torch.manual_seed(0)
    net, images = conv(2, 3, 3, padding=1), torch.randn(2, 2, *space)
    mirror = torch.arange(space[-1] - 1, -1, -1)
    with torch.no_grad():
        there, back = net(images).softmax(1), net(images[..., mirror]).softmax(1)[..., mirror]
    torch.testing.assert_close(udakit.hflip_average(net, images), (there + back) / 2)


@each_space
@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_distillation_resizes_linearly(space: tuple[int, ...], resize: str) -> None:
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, *space, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, *(side // 2 for side in space), generator=g, dtype=torch.float64)
    loss = udakit.kd_loss(student, teacher, resize=resize)  # type: ignore[arg-type]
    s, t = student, teacher
    if resize == "student":
        t = F.interpolate(teacher, space, mode=LINEAR[len(space)])
    else:
        s = F.interpolate(student, teacher.shape[2:], mode=LINEAR[len(space)])
    expected = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


@each_space
@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_projection_resizes_linearly(space: tuple[int, ...], resize: str) -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, *space, generator=g)
    reference = torch.randn(2, 6, *(side // 2 for side in space), generator=g)
    criterion = udakit.ProjectedFeatureLoss(4, 6, resize=resize)  # type: ignore[arg-type]
    weight, bias = criterion.projection.weight.flatten(1), criterion.projection.bias
    assert bias is not None
    x = torch.einsum("nd...,ed->ne...", features, weight) + bias.view(-1, *[1] * len(space))
    target = reference
    if resize == "student":
        target = F.interpolate(reference, space, mode=LINEAR[len(space)])
    else:
        x = F.interpolate(x, reference.shape[2:], mode=LINEAR[len(space)])
    expected = (F.normalize(x) - F.normalize(target)).norm(dim=1).mean()
    torch.testing.assert_close(criterion(features, reference), expected)


@each_space
def test_one_mask_of_a_space_serves_every_image(space: tuple[int, ...]) -> None:
    logits = torch.randn(2, 3, *space, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(math.prod(space)).view(space) % 3 > 0
    for selector in (udakit.ArgmaxSelector(), udakit.ThresholdSelector(0.4), udakit.ConfidentRatioSelector(0.4)):
        found = selector(logits, valid=valid)
        expected = selector(logits, valid=valid.expand(2, *space))
        assert torch.equal(found.weight, expected.weight)
        assert (found.weight[:, ~valid] == 0).all()
        assert (found.weight > 0).any()


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2, 2, 2, 2)])
def test_no_space_and_four_axes_of_it_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`logits` to be \(N, C, \*space\) with one to three spatial axes"):
        udakit.entropy_loss(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"`features` to be \(N, D, \*space\)"):
        udakit.feature_distance_loss(torch.zeros(shape), torch.zeros(shape))


def test_unlike_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="and the same number of axes"):
        udakit.kd_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4), resize="student")
    with pytest.raises(ValueError, match="the batch and size of `features`"):
        udakit.ProjectedFeatureLoss(3, 3, resize="student")(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4))


def inside(at: tuple[int, ...], space: tuple[int, ...]) -> bool:
    return all(0 <= i < side for i, side in zip(at, space, strict=True))


@each_space
def test_mirror_view(space: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, *space, generator=torch.Generator().manual_seed(0))
    for axis in range(len(space)):
        expected = torch.empty_like(images)
        for at in itertools.product(*map(range, space)):
            there = tuple(space[i] - 1 - x if i == axis else x for i, x in enumerate(at))
            expected[(..., *at)] = images[(..., *there)]
        for name in (axis + 2, axis - len(space)):
            view = udakit.mirror_view(name)
            assert torch.equal(view.transform(images), expected)
            assert torch.equal(view.inverse(expected), images)  # type: ignore[arg-type]


@each_space
def test_shift_view(space: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, *space, generator=torch.Generator().manual_seed(0))
    steps = (1, -2, 3)[: len(space)]
    view = udakit.shift_view(steps)
    moved = view.transform(images)
    back, kept = view.inverse(moved)  # type: ignore[misc]
    for at in itertools.product(*map(range, space)):
        source = tuple(min(max(x - s, 0), side - 1) for x, s, side in zip(at, steps, space, strict=True))
        assert torch.equal(moved[(..., *at)], images[(..., *source)])
        known = inside(tuple(x + s for x, s in zip(at, steps, strict=True)), space)
        assert bool(kept[(..., *at)].all()) == bool(kept[(..., *at)].any()) == known
        assert not known or torch.equal(back[(..., *at)], images[(..., *at)])


@each_space
def test_crop_view(space: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, *space, generator=torch.Generator().manual_seed(0))
    margin = ((1, 2), (0, 1), (2, 0))[: len(space)]
    left = [side - before - after for side, (before, after) in zip(space, margin, strict=True)]
    view = udakit.crop_view(margin)
    cut = view.transform(images)
    back, kept = view.inverse(cut)  # type: ignore[misc]
    assert cut.shape[2:] == tuple(left)
    for at in itertools.product(*map(range, space)):
        place = tuple(x - before for x, (before, _) in zip(at, margin, strict=True))
        known = inside(place, tuple(left))
        assert bool(kept[(..., *at)].all()) == bool(kept[(..., *at)].any()) == known
        assert not known or torch.equal(back[(..., *at)], images[(..., *at)])
        assert not known or torch.equal(cut[(..., *place)], images[(..., *at)])
