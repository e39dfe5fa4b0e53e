"""Symmetric distillation against the textbook formula: value, gradient, memory."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit.losses import _soft_cross_entropy


def textbook(
    student_clean: Tensor, student_mixed: Tensor, teacher_clean: Tensor, teacher_mixed: Tensor, weight: float, t: float
) -> Tensor:
    """Loss of each pixel."""

    def term(teacher: Tensor, student: Tensor) -> Tensor:
        return -t * t * ((teacher / t).softmax(1) * (student / t).log_softmax(1)).sum(1)

    return term(teacher_clean, student_mixed) + weight * term(teacher_mixed, student_clean)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(4)]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 2),
    c=st.integers(2, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    weight=st.sampled_from([0.0, 0.25, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_value_and_gradient_of_the_valid_pixels(
    seed: int, n: int, c: int, h: int, w: int, weight: float, temperature: float
) -> None:
    maps = draw(seed, n, c, h, w)
    valid = torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed)) < 0.6
    loss = udakit.symmetric_kd_loss(*maps, reverse_weight=weight, temperature=temperature, valid=valid)
    expected = textbook(*maps, weight, temperature)[valid].sum() / max(int(valid.sum()), 1)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, maps, allow_unused=True)
    assert actual[2] is None
    assert actual[3] is None
    for a, e in zip(actual[:2], torch.autograd.grad(expected, maps[:2]), strict=True):
        torch.testing.assert_close(a, e)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are computed like large ones."""
    monkeypatch.setattr(sys.modules["udakit.losses.symmetric_kd"], "LARGE", 0)


@pytest.mark.usefixtures("in_blocks")
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = draw(0, 2, 3, 5, 7)
    weights = torch.rand(2, 5, 7, dtype=torch.float64)
    expected = (textbook(*maps, 0.5, 1.0) * weights).sum()
    gradients = torch.autograd.grad(expected, maps[:2])
    for block in (1, 12, 10_000):
        monkeypatch.setattr(_soft_cross_entropy, "BLOCK", block)
        loss = (udakit.symmetric_kd_loss(*maps, reduction="none") * weights).sum()
        torch.testing.assert_close(loss, expected)
        for a, e in zip(torch.autograd.grad(loss, maps[:2]), gradients, strict=True):
            torch.testing.assert_close(a, e)


def test_it_is_two_kd_losses() -> None:
    clean, mixed, teacher_clean, teacher_mixed = draw(1, 2, 4, 3, 3, dtype=torch.float32)
    expected = udakit.kd_loss(mixed, teacher_clean) + 0.25 * udakit.kd_loss(clean, teacher_mixed)
    loss = udakit.symmetric_kd_loss(clean, mixed, teacher_clean, teacher_mixed, reverse_weight=0.25)
    torch.testing.assert_close(loss, expected)


@pytest.mark.usefixtures("in_blocks")
def test_two_class_maps_are_kept_for_the_backward_pass() -> None:
    maps = [x.detach() for x in draw(2, 2, 5, 8, 8, dtype=torch.float32)]
    maps[0].requires_grad_()
    maps[1].requires_grad_()
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        udakit.symmetric_kd_loss(*maps)
    for x in maps[:2]:  # the logits are the caller's
        saved.pop(x.untyped_storage().data_ptr())
    assert sum(saved.values()) <= 2 * maps[0].nbytes + 16


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_second_derivative(temperature: float) -> None:
    maps = draw(3, 1, 3, 2, 2)
    assert torch.autograd.gradgradcheck(
        lambda a, b: udakit.symmetric_kd_loss(a, b, *maps[2:], temperature=temperature, reduction="none"), maps[:2]
    )


@pytest.mark.usefixtures("in_blocks")
def test_one_student_may_be_frozen_and_backward_may_run_twice() -> None:
    maps = draw(4, 1, 3, 2, 2)
    loss = udakit.symmetric_kd_loss(maps[0].detach(), *maps[1:])
    first = torch.autograd.grad(loss, maps[1], retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, maps[1])[0], first)
    assert not udakit.symmetric_kd_loss(*[x.detach() for x in maps]).requires_grad


def test_errors_name_the_argument() -> None:
    maps = [x.detach() for x in draw(5, 1, 3, 2, 2)]
    with pytest.raises(ValueError, match="`teacher_mixed` to have the shape of `student_clean`"):
        udakit.symmetric_kd_loss(*maps[:3], maps[3][:, :2])
    with pytest.raises(ValueError, match=r"`reverse_weight` to be at least 0"):
        udakit.SymmetricKDLoss(reverse_weight=-1.0)
    with pytest.raises(TypeError, match="`valid` to be a bool tensor"):
        udakit.symmetric_kd_loss(*maps, valid=torch.ones(1, 2, 2))
