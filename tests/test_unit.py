"""Lengths and directions in pieces of a CPU's cache, against the formula on the whole map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from udakit._reduce.eager import LARGE
from udakit.losses import _unit, pixel_prototype_contrast_loss

SHAPES = [(2, 96, 40, 60), (1, 700, 2000), (2, 3, 20, 40, 60)]


def _example(shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of any size, a zero vector, NaN and infinities where nothing counts; weights for the gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    assert x.numel() >= LARGE
    valid = torch.rand((shape[0], *shape[2:]), generator=generator) < 0.7
    x = x * 10 ** torch.randint(-12, 12, valid.shape, generator=generator).unsqueeze(1)
    x[0, :, 0] = 0
    spoilt = torch.tensor([float("nan"), float("inf"), -float("inf")])[torch.randint(3, shape, generator=generator)]
    x = torch.where(valid.unsqueeze(1), x, spoilt)
    if layout == "last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, valid, torch.randn(shape, generator=generator, dtype=torch.float64)


def _both(x: Tensor, valid: Tensor | None, weights: Tensor) -> list[Tensor]:
    found = []
    for function in (_unit.lengths, _unit.unit_vectors):
        leaf = x.clone().requires_grad_()
        out = function(leaf, valid)
        kept = out if valid is None else torch.where(valid.unsqueeze(1), out, 0)
        (kept * weights[:, : out.shape[1]]).sum().backward()
        assert leaf.grad is not None
        found += [kept.detach(), leaf.grad]
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 96, 40, 60), (2, 5, 3), (4, 7)])
def test_without_a_gradient_the_directions_are_the_same(shape: tuple[int, ...], masked: bool) -> None:
    """Bit for bit, although no function of autograd is called then."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    assert torch.equal(_unit.unit_vectors(x, valid), _unit.unit_vectors(x.clone().requires_grad_(), valid))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_equal_the_formula(shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, valid, weights = _example(shape, layout)
    pieces = _both(x, valid, weights)
    inside = torch.where(valid.unsqueeze(1), x, 0)
    length = inside.norm(dim=1, keepdim=True)
    unit = inside / torch.where(length > 0, length, 1)
    torch.testing.assert_close(pieces[0], length)
    torch.testing.assert_close(pieces[2], unit)
    assert all(bool((g.isfinite() & (valid.unsqueeze(1) | (g == 0))).all()) for g in pieces[1::2])
    monkeypatch.setattr(_unit, "_in_pieces", lambda x: False)
    for a, b in zip(pieces, _both(x, valid, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-21, 1e-11, 1.0, 1e15, 1e20, 1e30])
def test_plain_squares_are_taken_only_where_they_lose_nothing(
    magnitude: float, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One vector of another magnitude is enough, and what does not count has no say in it."""
    monkeypatch.setattr(_unit, "_in_pieces", lambda x: pieces)
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 2, 32, 400, generator=generator)
    x[0, :, 7] *= magnitude
    valid = torch.rand(2, 400, generator=generator) < 0.7
    valid[0, :8] = True
    exact = x.double()
    x[:, 3] = torch.where(valid, x[:, 3], torch.tensor([float("nan"), float("inf")])[:, None])
    found, wanted = _both(x, valid, weights), _both(torch.where(valid.unsqueeze(1), exact, 0), valid, weights.double())
    for name, a, b in zip(("length", "its gradient", "unit", "its gradient"), found, wanted, strict=True):
        if magnitude < 1e-38 and name == "its gradient":  # 1 / length is taken to be 0
            a, b = (torch.cat([g[:, :, :7], g[:, :, 8:]], 2) for g in (a, b))
        largest = b.abs().amax(1, keepdim=True)
        assert torch.equal(a.abs().amax(1, keepdim=True) == 0, largest == 0), name
        error = (a - b).abs() / torch.where(largest > 0, largest, 1)
        assert float(error.amax()) < (1e-3 if magnitude < 1e-38 else 1e-5), name  # subnormal numbers have few digits


def test_second_derivatives_of_large_maps() -> None:
    """They are made on the whole map; a piece of it must agree with a map of that piece alone."""
    x = torch.randn(1, 8, 150, 150, dtype=torch.float64)
    found = []
    for part in (x, x[:, :, :2, :2].clone()):
        leaf = part.clone().requires_grad_()
        for function in (_unit.lengths, _unit.unit_vectors):
            (first,) = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
            found.append(second[:, :, :2, :2])
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.parametrize("pieces", [False, True])
def test_vectors_without_a_normal_length_have_no_gradient(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / length would be infinite, and NaN where it meets the zeros of a projection."""
    monkeypatch.setattr(_unit, "_in_pieces", lambda x: pieces)
    x = torch.tensor([[1e-42, 0.0], [0.0, 1e-40], [0.0, 0.0], [3.0, 4.0]]).T.unsqueeze(0).requires_grad_()
    unit, length = _unit.unit_vectors(x), _unit.lengths(x)
    torch.testing.assert_close(unit[0].T, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.6, 0.8]]))
    factor = torch.tensor([[[5.0], [7.0]]])
    torch.testing.assert_close(
        [torch.autograd.grad(y.sum(), x)[0][0].T for y in (unit * factor, 6 * length)],
        [torch.tensor([[0.0, 0.0]] * 3 + [row]) for row in ([-0.032, 0.024], [3.6, 4.8])],
    )


def test_a_compiled_loss_takes_channels_last_after_other_images() -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return pixel_prototype_contrast_loss(x, labels, bank)

    bank = torch.eye(4)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (5, 9):
        x, labels = torch.randn(2, 4, side, side), torch.randint(1, 4, (2, side, side))
        if side == 9:
            x, labels = x.contiguous(memory_format=torch.channels_last), labels.transpose(1, 2)
        torch.testing.assert_close(compiled(x.requires_grad_(), labels), loss(x, labels))
