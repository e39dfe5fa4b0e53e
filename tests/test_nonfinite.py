"""What is not finite, too sharp or never meant: cases that were silent once."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import udakit
from udakit import ClassDistributions, ClassPrototypes, distribution_contrast_loss, pixel_prototype_contrast_loss
from udakit._checks import options
from udakit._reduce import guard
from udakit._reduce.masks import _zeroed

NAN = float("nan")


@pytest.mark.parametrize("large", [0, 10_000])
def test_guard_lets_no_gradient_back_from_invalid_pixels(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udakit._reduce.eager.LARGE", large)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    spoilt = x.where(valid.unsqueeze(1), NAN).requires_grad_()
    clean = x.clone().requires_grad_()
    for create_graph in (False, True):
        found, expected = (
            torch.autograd.grad(
                torch.where(valid, guard(y, valid).softmax(1).square().sum(1), 0).sum(), y, create_graph=create_graph
            )[0]
            for y in (spoilt, clean)
        )
        torch.testing.assert_close(found, torch.where(valid.unsqueeze(1), expected, 0))
        assert (found.isfinite()).all()


@pytest.mark.parametrize("large", [0, 10_000])
def test_guard_of_an_expanded_gradient(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udakit._reduce.eager.LARGE", large)
    x, valid = torch.zeros(1, 2, 3, requires_grad=True), torch.tensor([[True, False, True]])
    guard(x, valid).sum(dim=1).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[1.0, 0.0, 1.0]] * 2]


def test_guard_of_a_result_without_a_gradient() -> None:
    """torch 2.5 calls a hook with None where a branch of the graph has no gradient."""
    assert _zeroed(torch.tensor([[True, False]]), None) is None
    x = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: guard(x, torch.tensor([[True, True]])).clone(), x)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("large", [0, 10_000])
def test_cross_entropy_has_second_derivatives(weighted: bool, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udakit._reduce.eager.LARGE", large)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 255, 1], [255, 2, 0, 0, 1]])
    weight = torch.rand(3, dtype=torch.float64, generator=g) if weighted else None
    assert torch.autograd.gradgradcheck(lambda x: udakit.cross_entropy(x, labels, class_weight=weight), (x,))


def test_cross_entropy_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udakit._reduce.eager.LARGE", 0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.where(torch.rand(2, 4, 5, generator=g) < 0.3, 255, torch.randint(3, (2, 4, 5), generator=g))
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(x, labels, ignore_index=255), x)[0]
    for block in (1, 12, 10_000):
        monkeypatch.setattr(sys.modules["udakit.losses.cross_entropy"], "BLOCK", block)
        torch.testing.assert_close(torch.autograd.grad(udakit.cross_entropy(x, labels), x)[0], expected)


@pytest.mark.parametrize("valid", [None, torch.tensor([[True, False]])])
def test_sharp_inconsistency_weights(valid: Tensor | None) -> None:
    """Of a class that the softmax leaves nothing the weights stay finite; where no class weighs all weigh alike."""
    student = torch.zeros(1, 2, 2, requires_grad=True)
    teacher = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])
    d = torch.tensor([0.0, 1.0])
    loss = udakit.inconsistency_loss(student, teacher, d, weight_range=(0, 2), weight_temperature=1e-3, valid=valid)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert loss.item() == pytest.approx(math.log(2))
    assert udakit.kd_loss(student, teacher, valid=valid).item() == pytest.approx(math.log(2))


def test_a_nan_logit_has_no_bin() -> None:
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[..., 0] = False
    clean, spoilt = (udakit.ClassQuantileSelector(3, share=0.5) for _ in range(2))
    bad = logits.clone()
    bad[..., 0] = NAN
    assert torch.equal(spoilt(bad, valid=valid).labels, clean(logits, valid=valid).labels)
    assert torch.equal(spoilt.histogram, clean.histogram)
    spoilt(bad)  # at a valid pixel: not kept, and no error
    assert spoilt.histogram.isfinite().all()
    assert (spoilt(bad).weight[..., 0] == 0).all()


def test_class_255_is_warned_of_once() -> None:
    logits, labels = torch.randn(1, 300, 2), torch.full((1, 2), 255)
    options._warn_of_class_255.cache_clear()
    with pytest.warns(UserWarning, match="more than 255 classes and `ignore_index` is 255") as seen:
        assert udakit.cross_entropy(logits, labels).item() == 0
    assert seen[0].filename == __file__, "the line of the user, not of the library"
    options._warn_of_class_255.cache_clear()
    with pytest.warns(UserWarning, match="more than 255 classes") as seen:
        udakit.CrossEntropyLoss()(logits, labels)
    assert seen[0].filename == __file__, "nor of torch, whose Module calls it"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        udakit.cross_entropy(logits, labels)
    options._warn_of_class_255.cache_clear()
    with pytest.warns(UserWarning, match="also where 255 is passed by name"):
        udakit.cross_entropy(logits, labels, ignore_index=255)
    options._warn_of_class_255.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "There are more than 255")  # as the message says
        udakit.cross_entropy(logits, labels)
    options._warn_of_class_255.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert udakit.cross_entropy(logits, labels, ignore_index=-100).item() > 0
        udakit.cross_entropy(logits[:, :255], labels)


def test_a_mask_in_place_of_features_is_refused() -> None:
    logits, mask = torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    for selector in (udakit.ArgmaxSelector(), udakit.ThresholdSelector(0.5), udakit.ConfidentRatioSelector()):
        with pytest.raises(TypeError, match=r"`features` .* but got torch.bool .* keyword: valid=mask"):
            selector(logits, mask)
        with pytest.raises(ValueError, match=r"`features` to be \(N, D, H, W\) .* by keyword"):
            selector(logits, mask.float())


def test_accepted_is_what_is_used() -> None:
    probabilities = torch.tensor([[0.6, 0.9], [0.4, 0.1]]).view(1, 2, 1, 2)
    used = udakit.ConfidentRatioSelector(0.95)(probabilities, kind="probabilities")
    assert used.weight.sum() == 0
    assert used.accepted.tolist() == [0.0, 0.0]
    used = udakit.ConfidentRatioSelector(0.8)(probabilities, kind="probabilities")
    assert used.accepted.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("exclude", [(0,), (2, 0), (1, 3)])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_excluded_classes_are_never_predicted(exclude: tuple[int, ...], kind: str) -> None:
    logits = 2 * torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    left = logits.clone()
    left[:, list(exclude)] = -torch.inf
    x = logits if kind == "logits" else logits.softmax(1)
    features = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    for make in (
        udakit.ArgmaxSelector,
        lambda **o: udakit.ThresholdSelector(0.5, **o),
        lambda **o: udakit.ConfidentRatioSelector(0.5, **o),
        lambda **o: udakit.ClassQuantileSelector(4, **o),
        lambda **o: udakit.AdaptiveThresholdSelector(4, **o),
        lambda **o: udakit.RectifiedSelector(udakit.ClassPrototypes(4, 3), threshold=0.5, **o),  # none seen
    ):
        found, expected = make(exclude=exclude)(x, features, kind=kind), make()(left, features)
        assert torch.equal(found.labels, expected.labels)
        torch.testing.assert_close(found.confidence, expected.confidence)
        torch.testing.assert_close(found.weight, expected.weight)
        assert not any((found.labels == i).any() for i in exclude)


def test_all_classes_cannot_be_excluded() -> None:
    for exclude in ((0, 1), (2,)):
        with pytest.raises(ValueError, match=r"`exclude` to be some of the ids 0\.\.1"):
            udakit.ArgmaxSelector(exclude=exclude)(torch.zeros(1, 2, 3))
        with pytest.raises(ValueError, match=r"`exclude` to be some of the ids 0\.\.1"):
            udakit.AdaptiveThresholdSelector(2, exclude=exclude)
        with pytest.raises(ValueError, match=r"`exclude` to be some of the ids 0\.\.1"):
            udakit.RectifiedSelector(udakit.ClassPrototypes(2, 3), exclude=exclude)


def test_a_selector_with_state_works_as_one_of_fewer_classes() -> None:
    """Excluding a class equals a net without that output, over several steps."""
    whole = udakit.AdaptiveThresholdSelector(4, 0.5, exclude=(1,))
    fewer = udakit.AdaptiveThresholdSelector(3, 0.5)
    left, ids = [0, 2, 3], torch.tensor([0, 2, 3])
    for step in range(3):
        logits = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(step))
        found, expected = whole(logits), fewer(logits[:, left])
        kept = expected.weight > 0
        assert torch.equal(found.labels[kept], ids[expected.labels[kept]])
        assert torch.equal(found.weight, expected.weight)
        torch.testing.assert_close(whole.thresholds[left], fewer.thresholds)
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(9))
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(8))
    features = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(7))
    one = udakit.RectifiedSelector(udakit.ClassPrototypes(4, 3).set_(rows), exclude=(1,))(x, features)
    other = udakit.RectifiedSelector(udakit.ClassPrototypes(3, 3).set_(rows[left]))(x[:, left], features)
    assert torch.equal(one.labels, ids[other.labels])
    torch.testing.assert_close(one.confidence, other.confidence)


@pytest.mark.parametrize("table", [{0: 1, 2**33: 2}, {-(2**40): 5, 3: 7, 2**62: 9}, {2**62: 1}])
def test_ids_far_apart_are_mapped_without_a_table_of_all_between(table: dict[int, int]) -> None:
    ids = torch.tensor([*table, 0, 1, -1, 2**33 + 1, 2**63 - 1])
    expected = [table.get(int(i), 255) for i in ids]
    assert udakit.map_ids(ids, table).tolist() == expected
    assert udakit.map_ids(ids.numpy(), table).tolist() == expected
    small = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert udakit.map_ids(small, table, default=6).tolist() == [table.get(i, 6) for i in (0, 3, 7)]


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_large_maps_under_transforms_of_functions(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is faster on large maps has no rules for `torch.func`, and stays out of its way."""
    monkeypatch.setattr("udakit._reduce.eager.LARGE", 1)
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, 3, 4, 5, generator=g), torch.randint(3, (2, 4, 5), generator=g)
    valid = labels > 0

    def loss(x: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        x, labels, valid = x[None], labels[None], valid[None]
        return (
            udakit.cross_entropy(x, labels) + udakit.entropy_loss(x, valid=valid) + udakit.kd_loss(x, -x, valid=valid)
        )

    if transform == "jvp":
        step = torch.randn(3, 4, 5, generator=g)
        slope = torch.func.jvp(lambda y: loss(y, labels[0], valid[0]), (x[0],), (step,))[1]
        y = x[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(y, labels[0], valid[0]), y)
        torch.testing.assert_close(slope, (gradient * step).sum())
        return
    derivative = torch.func.grad(loss)
    found = torch.vmap(derivative)(x, labels, valid) if transform == "vmap" else derivative(x[0], labels[0], valid[0])
    for one, y, label, mask in zip(found if transform == "vmap" else [found], x, labels, valid, strict=False):
        y = y.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(y, label, mask), y)
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "state",
    [
        ClassPrototypes(3, 4, momentum=0.5, min_pixels=1),
        ClassPrototypes(3, 4, mode="mean", min_pixels=1, per_image=False),
        ClassDistributions(3, 4),
        ClassDistributions(3, 4, momentum=0.5),
    ],
    ids=["vectors", "mean", "exact", "momentum"],
)
def test_running_statistics_survive_a_batch_that_is_not_finite(state, value):
    state = copy.deepcopy(state)
    labels = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    state.update(features, labels)
    broken = features.clone()
    broken[:, 1, labels[0] == 1] = value
    broken[1] = broken[0]
    before = {key: x.clone() for key, x in state.state_dict().items()}
    state.update(broken, labels[:1].expand(2, -1, -1))
    after = state.state_dict()
    assert all(torch.isfinite(x).all() for x in after.values())
    for key, x in before.items():
        if x.ndim:
            assert torch.equal(after[key][1], x[1]), "the class with the broken pixels keeps its statistics"
    state.update(features, labels)
    assert state.counts[1] > before["counts"][1], "a later batch counts again"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["prototypes", "distributions"])
def test_the_vector_of_an_unseen_class_may_be_anything(kind, normalize):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64)
    vectors = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 3, 3), generator=generator)
    seen = torch.tensor([True, False, True])

    def found(unseen):
        x, bank = features.clone().requires_grad_(), vectors.clone()
        bank[1] = unseen
        if kind == "prototypes":
            loss = pixel_prototype_contrast_loss(x, labels, bank, seen=seen, normalize=normalize)
        else:
            loss = distribution_contrast_loss(x, labels, bank, bank.square(), seen=seen, normalize=normalize)
        loss.backward()
        return loss.detach(), x.grad

    (loss, grad), (expected, expected_grad) = found(float("nan")), found(0.0)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, labels: udakit.cross_entropy(x, labels),
        lambda x, labels: udakit.symmetric_cross_entropy(x, labels),
        lambda x, labels: udakit.entropy_loss(x, valid=labels != 255),
        lambda x, labels: udakit.max_square_loss(x, valid=labels != 255),
        lambda x, labels: udakit.kd_loss(x, torch.zeros_like(x), valid=labels != 255),
    ],
    ids=["cross_entropy", "symmetric_cross_entropy", "entropy", "max_square", "kd"],
)
def test_what_hooks_save_as_a_copy_has_no_nan_at_ignored_pixels(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = torch.nan
    labels = torch.ones(1, 4, 4, dtype=torch.int64)
    labels[0, 0, 0] = 255
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, labels), x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        (actual,) = torch.autograd.grad(loss(x, labels), x)
    assert (actual[0, :, 0, 0] == 0).all()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("weight", [NAN, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "upsampled_cross_entropy", "pixel_prototype_contrast_loss"])
def test_the_weight_of_an_absent_class_does_not_matter(name: str, reduction: str, weight: float) -> None:
    """1 / frequency is infinite for a class without pixels; an ignored pixel must not be taken for one of class 0."""
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([1, 2, 255, 1]).view(1, 4, 1).repeat(2, 1, 5)
    bank = (torch.eye(3) + 0.1,) if name == "pixel_prototype_contrast_loss" else ()
    results = []
    for first in (weight, 1.0):
        options = {"class_weight": torch.tensor([first, 2.0, 3.0]), "reduction": reduction}
        loss = getattr(udakit, name)(x, labels, *bank, **options)
        results.append((loss, torch.autograd.grad(loss.sum(), x)[0]))
    assert bool(results[0][0].isfinite().all())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_weight_of_an_unseen_class_does_not_matter() -> None:
    x = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bank, weight = torch.eye(3) * torch.tensor([0.0, 1.0, 1.0]), torch.tensor([math.inf, 2.0, 3.0])
    loss = pixel_prototype_contrast_loss(x, torch.tensor([[0, 1, 2, 0, 1, 2]]), bank, class_weight=weight)
    assert bool(loss.isfinite() & torch.autograd.grad(loss, x)[0].isfinite().all())


@pytest.mark.parametrize("side", [8, 70])
@pytest.mark.parametrize("spoilt", [{}, {0: float("nan")}, {2: float("nan")}, {1: float("inf")}, {0: -float("inf")}])
@pytest.mark.parametrize("of", ["student", "teacher", "weight"])
def test_what_a_look_spares_is_done_where_it_is_needed(of: str, spoilt: dict[int, float], side: int) -> None:
    """Pixels that do not count, on both sides of the size from which a CPU looks whether they must be removed."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, side, side, generator=generator)
    weight, valid = torch.rand(2, 1, side, side, generator=generator)
    labels = torch.where(valid < 0.7, torch.randint(3, valid.shape, generator=generator), 255)

    def losses(*maps: torch.Tensor) -> list[torch.Tensor]:
        a, b, w = maps
        leaf, mask = a.clone().requires_grad_(), labels != 255
        found = [
            udakit.cross_entropy(leaf, labels, pixel_weight=w),
            udakit.kd_loss(leaf, b, valid=mask, pixel_weight=w, temperature=2.0),
            udakit.kd_loss(leaf, b, valid=mask, divergence="kl"),
            udakit.symmetric_kd_loss(leaf, leaf, b, b, valid=mask, temperature=2.0),
        ]
        return [*found, *(torch.autograd.grad(x, leaf)[0] for x in found)]

    expected = losses(student, teacher, weight)
    for channel, value in spoilt.items():
        if of == "weight":
            weight = torch.where(labels == 255, value, weight)
        else:
            x = student if of == "student" else teacher
            x[:, channel] = torch.where(labels == 255, value, x[:, channel])
    found = losses(student, teacher, weight)
    torch.testing.assert_close(found, expected)
    assert all(bool((g[:, :, (labels == 255)[0]] == 0).all()) for g in found[4:])
