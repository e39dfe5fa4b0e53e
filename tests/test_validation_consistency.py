"""Consistency of two predictions and of views, agreement with an ensemble, expected accuracy: loops a formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit

seeds = st.integers(0, 2**31 - 1)
spaces = st.sampled_from([(9,), (3, 4), (2, 3, 2)])


def maps(seed: int, n: int, c: int, space: tuple[int, ...]) -> Tensor:
    return torch.randn(n, c, *space, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- two predictions ------------------------------------------------------------------------------


def textbook_score(a: list[int], b: list[int], background: int | None) -> float:
    if background is not None:
        union = [(x, y) for x, y in zip(a, b, strict=True) if x != background or y != background]
        return 1 - sum(x != y for x, y in union) / len(union) if union else math.nan
    ratios = []
    for c in {*a, *b}:
        both = sum(x == c and y == c for x, y in zip(a, b, strict=True))
        ratios.append(both / sum(x == c or y == c for x, y in zip(a, b, strict=True)))
    return sum(ratios) / len(ratios) if ratios else math.nan


@given(seed=seeds, space=spaces, background=st.sampled_from([None, 0, 2]), masked=st.booleans())
def test_consistency_against_the_definition(
    seed: int, space: tuple[int, ...], background: int | None, masked: bool
) -> None:
    first, second = maps(seed, 3, 4, space), maps(seed + 1, 3, 4, space)
    second = torch.where(torch.rand(3, 1, *space, generator=torch.Generator().manual_seed(seed)) < 0.5, first, second)
    valid = torch.rand(3, *space, generator=torch.Generator().manual_seed(seed)) < 0.6
    a, b = first.argmax(1).flatten(1), second.argmax(1).flatten(1)
    kept = valid.flatten(1) if masked else torch.ones_like(a, dtype=torch.bool)
    pairs = [(x[k].tolist(), y[k].tolist()) for x, y, k in zip(a, b, kept, strict=True)]
    expected = [textbook_score(x, y, background) for x, y in pairs]
    mask = valid if masked else None
    found = udakit.consistency_score(first, second, background=background, valid=mask)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, nan_ok=True)
    whole = textbook_score(a[kept].tolist(), b[kept].tolist(), background)
    batch = udakit.consistency_score(first, second, background=background, valid=mask, scope="batch")
    module = udakit.ConsistencyScore(4, background=background)
    for part in (slice(0, 1), slice(1, 3)):
        own = module(first[part], second[part], valid=None if mask is None else mask[part])
        assert own.tolist() == pytest.approx(expected[part], nan_ok=True)
    assert float(batch) == pytest.approx(whole, nan_ok=True)
    assert float(module.compute()) == pytest.approx(whole, nan_ok=True)
    module.reset()
    assert math.isnan(float(module.compute()))


def test_class_iou_of_a_data_set() -> None:
    module = udakit.ConsistencyScore(3)
    a = torch.eye(3)[[0, 0, 1]].T.view(1, 3, 3)
    module(a, a.roll(1, 2))  # [0, 0, 1] and [1, 0, 0]
    assert module.class_iou.tolist() == pytest.approx([1 / 3, 0, math.nan], nan_ok=True)
    with pytest.raises(ValueError, match="`background` to be None for scores of single classes"):
        _ = udakit.ConsistencyScore(3, background=0).class_iou


@pytest.mark.parametrize("background", [None, 0])
def test_a_nan_agrees_with_nothing(background: int | None) -> None:
    a = torch.eye(2)[[0, 1, 1, 1]].T.reshape(1, 2, 4).clone()
    a[0, :, 1] = math.nan
    score = float(udakit.consistency_score(a, a, background=background))
    assert score == pytest.approx(3 / 4 if background is None else 2 / 3)
    assert math.isnan(float(udakit.consistency_score(a, a, valid=torch.zeros(1, 4, dtype=torch.bool))))


@pytest.mark.parametrize("background", [-1, 3])
def test_background_is_a_class(background: int) -> None:
    with pytest.raises(ValueError, match="Expected `background` to be"):
        udakit.consistency_score(torch.rand(1, 3, 4), torch.rand(1, 3, 4), background=background)


# --- views ----------------------------------------------------------------------------------------


def ramp(images: Tensor) -> Tensor:
    """Two classes, told apart by the sign of the first channel; no view can change its mind about a pixel."""
    return torch.cat([images[:, :1], -images[:, :1]], 1)


VIEWS = {
    "mirror": udakit.mirror_view(),
    "mirror along the height": udakit.mirror_view(2),
    "shift": udakit.shift_view((3, -2)),
    "shift beyond the image": udakit.shift_view((30, 0)),
    "crop": udakit.crop_view(((4, 0), (2, 6))),
    "rotation by a quarter": udakit.rotation_view(90.0),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_net_of_single_pixels_is_consistent(view: udakit.View) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = udakit.view_consistency(ramp, images, *view)
    lost = view is VIEWS["shift beyond the image"]
    assert found.tolist() == pytest.approx([math.nan if lost else 1.0] * 2, nan_ok=True)


@pytest.mark.parametrize("view", [v for k, v in VIEWS.items() if "mirror" not in k and "beyond" not in k])
def test_views_come_back_to_their_place(view: udakit.View) -> None:
    """Where a pixel is kept it is the one that was there, and something is kept."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear")
    back, kept = view.inverse(view.transform(images))  # type: ignore[misc]
    assert kept.float().mean() > 0.3
    assert ((back - images).abs() * kept.unsqueeze(1)).max() < 1e-4
    assert not torch.equal(view.transform(images), images)


def test_a_small_rotation_keeps_smooth_images() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 36), indexing="ij")
    images = torch.stack([x, y, x + y])[None]  # linear: interpolation is exact
    view = udakit.rotation_view(7.0)
    back, kept = view.inverse(view.transform(images))  # type: ignore[misc]
    inner = kept.clone()
    inner[:, :5], inner[:, -5:], inner[..., :5], inner[..., -5:] = False, False, False, False
    assert inner.float().mean() > 0.3
    assert ((back - images).abs() * inner.unsqueeze(1)).max() < 1e-5


def test_a_net_that_prefers_one_side_contradicts_itself() -> None:
    def left(images: Tensor) -> Tensor:
        sides = torch.linspace(1, -1, images.shape[-1]).expand(images.shape[0], 1, images.shape[-2], -1)
        return torch.cat([sides, -sides], 1)

    images = torch.rand(2, 3, 4, 8)
    assert udakit.mirror_consistency(left, images).tolist() == [0.0, 0.0]
    assert udakit.mirror_consistency(left, images, axis=2).tolist() == [1.0, 1.0]
    assert float(udakit.mirror_consistency(left, images, scope="batch")) == 0.0


def test_logits_of_another_size_come_to_the_images() -> None:
    def coarse(images: Tensor) -> dict[str, Tensor]:
        return {"out": torch.nn.functional.avg_pool2d(ramp(images), 4)}

    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    valid = torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(2)) < 0.5
    assert udakit.mirror_consistency(coarse, images, valid=valid).tolist() == [1.0, 1.0]
    on_grid, off_grid = (
        float(udakit.view_consistency(coarse, images, *udakit.shift_view(by), scope="batch")) for by in ((4, 8), (2, 2))
    )
    assert on_grid > off_grid + 0.2


def test_volumes_and_signals() -> None:
    for space in [(16,), (4, 6, 8)]:
        images = torch.randn(2, 1, *space, generator=torch.Generator().manual_seed(1))
        for view in (
            udakit.mirror_view(),
            udakit.shift_view([1] * len(space)),
            udakit.crop_view([(0, 1)] * len(space)),
        ):
            assert udakit.view_consistency(ramp, images, *view).tolist() == [1.0, 1.0]


def test_errors_of_views() -> None:
    images = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`axis` to be a spatial axis of \(1, 3, 4, 4\), but got 1"):
        udakit.mirror_consistency(ramp, images, axis=1)
    with pytest.raises(ValueError, match=r"`offset` to have one entry for each spatial axis .* but got 1"):
        udakit.shift_view((1,)).transform(images)
    with pytest.raises(ValueError, match=r"`margin` to leave something of \(1, 3, 4, 4\)"):
        udakit.crop_view(((2, 2), (0, 0))).transform(images)
    with pytest.raises(ValueError, match=r"`images` to be \(N, K, H, W\), since a rotation is two-dimensional"):
        udakit.rotation_view(3.0).transform(images[0])
    with pytest.raises(ValueError, match=r"`inverse` to return logits of the size of the images"):
        udakit.view_consistency(ramp, images, lambda x: x[..., :2], lambda x: x)
    with pytest.raises(TypeError, match=r"`inverse` to return logits or \(logits, valid\), but got None"):
        udakit.view_consistency(ramp, images, lambda x: x, lambda x: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"`model\(images\)` to be .* with C of at least 2"):
        udakit.mirror_consistency(lambda x: x[:, :1], images)


# --- an ensemble ----------------------------------------------------------------------------------


@given(seed=seeds, space=spaces, masked=st.booleans())
def test_agreement_against_the_definition(seed: int, space: tuple[int, ...], masked: bool) -> None:
    logits = torch.stack([maps(seed + k, 2, 4, space) for k in range(3)])
    p = logits.softmax(2)
    valid = torch.rand(2, *space, generator=torch.Generator().manual_seed(seed)) < 0.7
    leader = p.mean(0).argmax(1)
    kept = valid if masked else torch.ones_like(valid)
    expected = []
    for candidate in p:
        same = [bool(a == b) for a, b in zip(candidate.argmax(1)[kept], leader[kept], strict=True)]
        expected.append(sum(same) / max(len(same), 1))
    mask = valid if masked else None
    assert udakit.ensemble_agreement(p, valid=mask).tolist() == pytest.approx(expected)
    assert udakit.ensemble_agreement([*logits], kind="logits", valid=mask).tolist() == pytest.approx(expected)
    module = udakit.EnsembleAgreement(3)
    for image in range(2):
        part = slice(image, image + 1)
        module(p[:, part], valid=None if mask is None else mask[part])
    assert module.compute().tolist() == pytest.approx(expected)
    module.reset()
    assert module.compute().tolist() == [0, 0, 0]


def test_a_broken_candidate_does_not_lead() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [math.nan, 0.7]]).view(3, 1, 2, 1).expand(-1, -1, -1, 4)
    assert udakit.ensemble_agreement(p).tolist() == [1, 1, 0]
    assert udakit.ensemble_agreement(p, valid=torch.zeros(1, 4, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_errors_of_agreement() -> None:
    with pytest.raises(ValueError, match="at least one candidate, but got none"):
        udakit.ensemble_agreement([])
    with pytest.raises(ValueError, match="to have 2 candidates, but got 3"):
        udakit.EnsembleAgreement(2)(torch.rand(3, 1, 2, 4))
    with pytest.raises(TypeError, match=r"`probabilities` to be a tensor .* but got None"):
        udakit.ensemble_agreement(None)  # type: ignore[arg-type]


# --- expected accuracy ----------------------------------------------------------------------------


def source(seed: int, pixels: int = 4000) -> tuple[Tensor, Tensor]:
    logits = 2 * maps(seed, 2, 3, (pixels,))
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return logits, (logits - noise.log().neg().log()).argmax(1)  # drawn from the softmax


def test_threshold_against_the_definition() -> None:
    """Sorted confidences: as many above the threshold as there are right pixels."""
    logits, labels = source(0)
    labels[:, ::5] = 255
    known = labels != 255
    target, _ = source(5)
    target = 0.7 * target
    confidence = logits.softmax(1).amax(1)
    right = int((logits.argmax(1) == labels)[known].sum())
    exact = float(confidence[known].sort(descending=True).values[right - 1 : right + 1].mean())
    module = udakit.ConfidenceThreshold(bins=2**15)
    for image in range(2):
        module.fit(logits[image : image + 1], labels[image : image + 1])
    assert float(module.accuracy) == pytest.approx(right / int(known.sum()))
    assert float(module.threshold) == pytest.approx(exact, abs=1e-3)
    expected = float((target.softmax(1).amax(1) > exact).double().mean())
    assert float(module.estimate(target)) == pytest.approx(expected, abs=2e-3)
    assert float(module.estimate(logits, valid=known)) == pytest.approx(float(module.accuracy), abs=1e-6)


def test_ties_split_in_proportion() -> None:
    """All confidences are 1, three of four pixels right: three quarters of the target's count."""
    logits = torch.tensor([1e4, 0.0]).view(1, 2, 1).expand(1, 2, 4)
    module = udakit.ConfidenceThreshold()
    assert math.isnan(float(module.estimate(logits)))
    module.fit(logits, torch.tensor([[0, 0, 0, 1]]))
    assert float(module.estimate(logits)) == 0.75
    assert float(module.estimate(torch.zeros(1, 2, 4))) == 0.0
    assert math.isnan(float(module.estimate(logits, valid=torch.zeros(1, 4, dtype=torch.bool))))
    module.reset()
    assert math.isnan(float(module.accuracy))


def test_a_nan_counts_as_wrong() -> None:
    logits = torch.tensor([[1e4, 0.0], [math.nan, 0.0]]).T.view(1, 2, 2)
    module = udakit.ConfidenceThreshold()
    module.fit(logits, torch.zeros(1, 2, dtype=torch.uint8))
    assert float(module.accuracy) == 0.5
    assert float(module.estimate(logits)) == 0.5


def test_temperature_of_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match="`temperature` to be 1 for probabilities, but got 2"):
        udakit.ConfidenceThreshold(kind="probabilities", temperature=2)
    with pytest.raises(ValueError, match=r"`labels` to be \(N, L\) matching `logits`"):
        udakit.ConfidenceThreshold().fit(torch.rand(1, 2, 4), torch.zeros(1, 3).long())


def test_temperature_is_where_the_loss_is_least() -> None:
    logits, labels = source(0, 500)
    logits, known = 2.5 * logits, torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    labels = labels.where(known, 255)
    found = float(udakit.fit_temperature(logits, labels))

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / temperature, labels, ignore_index=255))

    grid = [found * (1 + 0.01 * k) for k in range(-40, 41)]
    assert min(grid, key=loss) == found
    assert 2 < found < 3
    assert float(udakit.fit_temperature(logits, logits.argmax(1))) == pytest.approx(0.05, rel=1e-4)
    nothing = torch.full_like(logits.argmax(1), 255)
    assert float(udakit.fit_temperature(logits, nothing)) == 1
    assert float(udakit.fit_temperature(logits, nothing, temperature_range=(2.0, 3.0))) == 2


def test_calibration_helps_the_estimate() -> None:
    """Nets that are too sure on target: the calibrated confidence estimates as well as the net's own."""
    logits, labels = source(0)
    module = udakit.ConfidenceThreshold(temperature=float(udakit.fit_temperature(3 * logits, labels)))
    module.fit(3 * logits, labels)
    assert float(module.estimate(3 * logits)) == pytest.approx(float(module.accuracy), abs=1e-6)
