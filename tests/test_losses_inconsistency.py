"""Class inconsistency and the distillation weighted by it."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from distributed import run_ranks


def draw(seed: int, n: int = 2, c: int = 4, h: int = 4, w: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    teacher = student + torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    return student, teacher, torch.rand(n, h, w, generator=g) < 0.7


def overlaps(student: Tensor, teacher: Tensor, valid: Tensor) -> list[tuple[int, int]]:
    """Intersection and union of each class, by sets of pixels."""
    a, b = student.argmax(1).flatten().tolist(), teacher.argmax(1).flatten().tolist()
    pixels = [p for p, v in enumerate(valid.flatten().tolist()) if v]
    result = []
    for c in range(student.shape[1]):
        ours, theirs = {p for p in pixels if a[p] == c}, {p for p in pixels if b[p] == c}
        result.append((len(ours & theirs), len(ours | theirs)))
    return result


@given(seed=st.integers(0, 10_000), n=st.integers(1, 2), c=st.integers(2, 6), h=st.integers(1, 3), w=st.integers(1, 3))
def test_class_inconsistency_is_one_minus_iou(seed: int, n: int, c: int, h: int, w: int) -> None:
    student, teacher, valid = draw(seed, n, c, h, w)
    expected = [1 - i / u if u else 0.0 for i, u in overlaps(student, teacher, valid)]
    actual = udakit.class_inconsistency(student, teacher, valid=valid)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32))


def test_value_and_gradient_against_the_formula() -> None:
    student, teacher, valid = draw(0)
    student.requires_grad_()
    d = torch.tensor([0.1, 0.9, 0.4, 0.0], dtype=torch.float64)
    w = (4 * (d / 0.5).softmax(0)).clamp(0.5, 2.0)
    weights = w[teacher.argmax(1)][valid]
    per_pixel = -((teacher / 2).softmax(1) * (student / 2).log_softmax(1)).sum(1)[valid] * 4
    expected = (weights * per_pixel).sum() / weights.sum()
    loss = udakit.inconsistency_loss(student, teacher, d, weight_temperature=0.5, temperature=2.0, valid=valid)
    torch.testing.assert_close(loss, expected)
    actual, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(actual, wanted)


@given(seed=st.integers(0, 10_000), level=st.floats(0, 1))
def test_equal_inconsistency_is_plain_distillation(seed: int, level: float) -> None:
    student, teacher, valid = draw(seed)
    d = torch.full((4,), level)
    for reduction in ("mean", "mean_all", "sum", "none"):
        loss = udakit.inconsistency_loss(student, teacher, d, valid=valid, reduction=reduction)
        torch.testing.assert_close(loss, udakit.kd_loss(student, teacher, valid=valid, reduction=reduction))


def test_a_worse_class_weighs_more() -> None:
    student, teacher, _ = draw(1)
    d = torch.tensor([0.2, 0.8, 0.2, 0.2])
    worse = teacher.argmax(1) == 1
    share = udakit.inconsistency_loss(student, teacher, d, reduction="none") / udakit.kd_loss(
        student, teacher, reduction="none"
    )
    assert share[worse].min() > 1 > share[~worse].max()
    assert share.mean().item() == pytest.approx(1, rel=1e-6)
    # The range holds before the division by the mean.
    extreme = udakit.inconsistency_loss(
        student, teacher, d, weight_temperature=1e-3, weight_range=(0.5, 3.0), reduction="none"
    ) / udakit.kd_loss(student, teacher, reduction="none")
    assert (extreme[worse].mean() / extreme[~worse].mean()).item() == pytest.approx(6, rel=1e-6)


def test_weight_fn_replaces_the_formula_and_may_switch_classes_off() -> None:
    student, teacher, _ = draw(2)
    d = torch.tensor([0.0, 0.7, 0.0, 0.0])
    only = teacher.argmax(1) == 1
    loss = udakit.inconsistency_loss(student, teacher, d, weight_fn=lambda d: (d > 0.5).float())
    torch.testing.assert_close(loss, udakit.kd_loss(student, teacher, valid=only))
    assert udakit.inconsistency_loss(student, teacher, d, weight_fn=torch.zeros_like).item() == 0


def test_probabilities_of_another_size_teach() -> None:
    student, teacher, _ = draw(3)
    small = torch.nn.functional.avg_pool2d(teacher, 2).softmax(1)
    d = udakit.class_inconsistency(student, small, resize="student")
    loss = udakit.inconsistency_loss(student, small, d, teacher_kind="probabilities", resize="student")
    up = torch.nn.functional.interpolate(small, student.shape[2:], mode="bilinear")
    torch.testing.assert_close(loss, udakit.inconsistency_loss(student, up, d, teacher_kind="probabilities"))


def test_module_averages_counts_in_training_mode_and_before_weighting() -> None:
    criterion = udakit.InconsistencyLoss(4, momentum=0.9)
    intersection, union = torch.zeros(4), torch.zeros(4)
    for seed in range(3):
        student, teacher, valid = draw(seed)
        for c, (i, u) in enumerate(overlaps(student, teacher, valid)):
            intersection[c] = 0.9 * intersection[c] + 0.1 * i
            union[c] = 0.9 * union[c] + 0.1 * u
        loss = criterion(student, teacher, valid=valid)
        torch.testing.assert_close(criterion.intersection, intersection)
        torch.testing.assert_close(criterion.inconsistency, 1 - intersection / union)
        expected = udakit.inconsistency_loss(student, teacher, criterion.inconsistency, valid=valid)
        torch.testing.assert_close(loss, expected)
    before = copy.deepcopy(criterion.state_dict())
    assert set(before) == {"intersection", "union"}
    criterion.eval()
    criterion(*draw(9)[:2])
    for name, x in criterion.state_dict().items():
        assert torch.equal(x, before[name])


def test_first_batch_gives_its_own_inconsistency_and_an_absent_class_keeps_its_own() -> None:
    criterion = udakit.InconsistencyLoss(4)
    student, teacher, _ = draw(4)
    criterion(student, teacher)
    first = criterion.inconsistency
    torch.testing.assert_close(first, udakit.class_inconsistency(student, teacher))
    student[:, 2] = teacher[:, 2] = -100
    criterion(student, teacher)
    torch.testing.assert_close(criterion.inconsistency[2], first[2])


def test_a_class_that_stays_away_for_long_keeps_its_inconsistency() -> None:
    criterion = udakit.InconsistencyLoss(2, momentum=0.5)
    both = torch.eye(2).view(1, 2, 1, 2)
    criterion.update(both, both.flip(1))
    only_first = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    for _ in range(400):
        criterion.update(only_first, only_first)
    assert criterion.inconsistency.tolist() == [0.0, 1.0]


def test_errors_name_the_argument() -> None:
    student, teacher, _ = draw(5)
    with pytest.raises(ValueError, match=r"`inconsistency` to be \(C,\) matching `student_logits`"):
        udakit.inconsistency_loss(student, teacher, torch.zeros(3))
    with pytest.raises(ValueError, match="`weight_range` to be"):
        udakit.InconsistencyLoss(4, weight_range=(2.0, 0.5))
    with pytest.raises(ValueError, match=r"`momentum` to be in \[0, 1\)"):
        udakit.InconsistencyLoss(4, momentum=1.0)
    with pytest.raises(ValueError, match="to have 3 classes"):
        udakit.InconsistencyLoss(3)(student, teacher)
    with pytest.raises(ValueError, match="the size of `student_logits`"):
        udakit.class_inconsistency(student, teacher[..., :3])


def _rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    criterion = udakit.InconsistencyLoss(4, sync=True)
    for seed in range(3):
        student, teacher, valid = (x[2 * rank : 2 * rank + 2] for x in draw(seed, n=4))
        criterion(student, teacher, valid=valid)
    return criterion.state_dict()


@pytest.mark.slow
def test_two_ranks_equal_one_process_on_the_global_batch(tmp_path: Path) -> None:
    states = run_ranks(_rank, 2, tmp_path=tmp_path)
    single = udakit.InconsistencyLoss(4)
    for seed in range(3):
        student, teacher, valid = draw(seed, n=4)
        single(student, teacher, valid=valid)
    for state in states:
        for name, x in single.state_dict().items():
            assert torch.equal(state[name], x)
