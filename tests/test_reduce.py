"""What is quicker on the CPU against what it replaces: `select`, the largest class, counts."""

from __future__ import annotations

import pytest
import torch

import udakit
from udakit import _reduce
from udakit._reduce import classes, eager, select

SPECIAL = [0.0, -0.0, 1.5, -2.25, float("inf"), float("-inf"), float("nan"), 1e-40]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@pytest.fixture(autouse=True)
def _by_bits_at_every_size(monkeypatch):
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "SMALL", 0)


def bits(x):
    return x.contiguous().view(torch.uint8)


def pair(dtype):
    values = torch.tensor(SPECIAL) if dtype.is_floating_point else torch.tensor([0, 1, 5, 7, 100, 200, 254, 255])
    x = values.to(dtype).repeat(2, 3, 4, 1)
    return x, x.flip(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_select_is_where_to_the_last_bit(dtype, layout):
    mask = torch.rand(2, 1, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    x, other = pair(dtype)
    x = x.contiguous(memory_format=layout)
    assert torch.equal(bits(select(mask, x, other)), bits(torch.where(mask, x, other)))
    assert torch.equal(bits(select(mask, x)), bits(torch.where(mask, x, 0)))


@pytest.mark.parametrize("sides", [(torch.float32, torch.bfloat16), (torch.uint8, torch.int64)], ids=str)
def test_select_takes_the_wider_dtype(sides):
    mask = torch.tensor([True, False])
    x, other = torch.tensor([3, 4], dtype=sides[0]), torch.tensor([5, 6], dtype=sides[1])
    found = select(mask, x, other)
    assert found.dtype == torch.promote_types(*sides)
    assert found.tolist() == [3, 6]


def test_gradients_of_select_flow_to_the_side_that_was_taken():
    mask = torch.tensor([[True, False, True]])
    x, other = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    nan = other.detach().where(~mask, float("nan")).requires_grad_()  # NaN where it is not taken
    grads = torch.autograd.grad(select(mask, x, nan).sum(), (x, nan))
    assert torch.equal(grads[0], mask.double().expand(2, 3))
    assert torch.equal(grads[1], (~mask).double().expand(2, 3))
    assert torch.autograd.gradcheck(lambda a, b: select(mask, a, b), (x, other))
    assert torch.autograd.gradgradcheck(lambda a, b: select(mask, a * a, b * b), (x, other))


def test_select_takes_many_gradients_at_once_and_negated_views():
    """Both are not in memory as they are."""
    mask = torch.tensor([[True, False, True]])
    x, other = torch.randn(2, 2, 3, requires_grad=True)
    slopes = torch.randn(4, 2, 3)
    for y in (select(mask, x, other), select(mask, x), udakit.paste(mask.expand(2, 3), x, other)):
        (found,) = torch.autograd.grad(y, x, slopes, is_grads_batched=True)
        assert torch.equal(found, torch.where(mask, slopes, 0))
    negated = torch.randn(2, 3, dtype=torch.cfloat).conj().imag
    assert negated.is_neg()
    assert torch.equal(select(mask, negated, other), torch.where(mask, negated, other))
    assert torch.equal(select(mask, other, negated), torch.where(mask, other, negated))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 12, 10_000])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_largest_class_by_blocks_is_that_of_max(dtype, block, layout, monkeypatch):
    """Ties and infinities included: the first of equal classes, and the softmax there."""
    monkeypatch.setattr(classes, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 5, 4, 3), generator=generator).to(dtype).contiguous(memory_format=layout)
    x[0, 1, 0, 0], x[0, :, 1, 1], x[1, :, 2, 2] = float("-inf"), 1e4, 0.0
    score, expected = x.max(dim=1)
    labels, top = _reduce.top_by_blocks(x, confidence=False)
    assert torch.equal(labels, expected)
    assert torch.equal(top.to(dtype), score)
    labels, confidence = _reduce.top_by_blocks(x, confidence=True)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(confidence, _reduce.upcast(x).softmax(1).amax(1))


def test_a_pixel_of_nan_still_has_a_class(monkeypatch):
    x = torch.zeros(1, 3, 2, 2)
    x[0, :, 0, 0], x[0, 1, 0, 1] = float("nan"), float("nan")
    labels, confidence = _reduce.top_by_blocks(x, confidence=True)
    assert labels.min() >= 0
    assert labels.max() < 3
    assert confidence.isnan().tolist() == [[[True, True], [False, False]]]


@pytest.mark.parametrize("classes", [2, 255, 256])
def test_top_class_is_argmax_whatever_the_number_of_classes(classes):
    x = torch.randn(1, classes, 3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.equal(_reduce.top_class(x), x.argmax(1))


def test_count_ids_is_bincount():
    ids = torch.randint(7, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_reduce.count_ids(ids, 9), torch.bincount(ids.flatten(), minlength=9))
    assert torch.equal(_reduce.count_ids(ids[:0], 9), torch.zeros(9, dtype=torch.int64))


def test_full_precision_takes_a_device_without_autocast():
    with _reduce.full_precision(torch.empty(0, device="meta")):
        pass
    x, labels = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 4, 5, dtype=torch.int64, device="meta")
    assert udakit.class_means(x, labels, num_classes=3)[0].shape == (3, 3)


def test_full_precision_follows_the_autocast_of_each_call():
    """Also compiled: one that was traced without autocast must not run as such under it."""
    torch._dynamo.reset()
    a = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def product(x):
        with _reduce.full_precision(x):
            return x @ x

    for function in (product, torch.compile(product, fullgraph=True, backend="eager")):
        for enabled in (False, True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                assert torch.equal(function(a), product(a))
                assert function(a).dtype == torch.float32
                assert (a @ a).dtype == (torch.bfloat16 if enabled else torch.float32)
                with torch.autocast("cpu", enabled=False):
                    assert torch.equal(function(a), a @ a)
