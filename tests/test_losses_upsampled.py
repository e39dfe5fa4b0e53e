"""Losses of upsampled logits against `F.interpolate` and the plain loss: value, gradient, memory."""

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import udakit
from udakit.losses import _upsampled, _upsampling

side = st.integers(1, 9)
sizes = st.tuples(side, side)
rows = st.sampled_from([None, 1, 2, 5])


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype) for shape in shapes]


def upsample(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def assert_same(loss: Tensor, expected: Tensor, x: Tensor, tolerance: float = 1e-10) -> None:
    """The values, and the gradients of an uneven combination."""
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    weight = torch.arange(loss.numel(), dtype=loss.dtype).cos().view_as(loss)
    ours, plain = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (loss, expected))
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 2), c=st.integers(2, 4), low=sizes, high=sizes, align=st.booleans(),
    chunk_rows=rows, reduction=st.sampled_from(["mean", "mean_all", "sum", "none"]),
    ignored=st.sampled_from([0, 0.4, 1]),
)  # fmt: skip
def test_cross_entropy_is_that_of_interpolated_logits(
    seed: int, n: int, c: int, low: Any, high: Any, align: bool, chunk_rows: int | None, reduction: str, ignored: float
) -> None:
    (x,) = draw(seed, (n, c, *low))
    x.requires_grad_()
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n, *high), generator=g)
    labels[torch.rand(labels.shape, generator=g) < ignored] = 7
    options: dict[str, Any] = {
        "pixel_weight": torch.rand(n, *high, generator=g, dtype=torch.float64),
        "class_weight": torch.rand(c, generator=g, dtype=torch.float64),
        "ignore_index": 7,
        "reduction": reduction,
    }
    loss = udakit.upsampled_cross_entropy(x, labels, align_corners=align, chunk_rows=chunk_rows, **options)
    assert_same(loss, udakit.cross_entropy(upsample(x, high, align), labels, **options), x)
    if ignored == 1:
        assert not loss.any()


@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 2), c=st.integers(2, 4), low=sizes, high=sizes, teacher_size=sizes,
    align=st.booleans(), chunk_rows=rows, temperature=st.sampled_from([1.0, 2.5]),
    divergence=st.sampled_from(["cross_entropy", "kl"]), kind=st.sampled_from(["logits", "probabilities"]),
    reduction=st.sampled_from(["mean", "mean_all", "sum", "none"]),
)  # fmt: skip
def test_distillation_is_that_of_interpolated_logits(
    seed: int, n: int, c: int, low: Any, high: Any, teacher_size: Any, align: bool, chunk_rows: int | None,
    temperature: float, divergence: Any, kind: Any, reduction: str,
) -> None:  # fmt: skip
    x, teacher = draw(seed, (n, c, *low), (n, c, *teacher_size))
    x.requires_grad_()
    teacher = teacher.softmax(1) if kind == "probabilities" else teacher
    g = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "temperature": temperature, "divergence": divergence, "teacher_kind": kind, "reduction": reduction,
        "valid": torch.rand(n, *high, generator=g) < 0.6,
        "pixel_weight": torch.rand(n, *high, generator=g, dtype=torch.float64),
    }  # fmt: skip
    loss = udakit.upsampled_kd_loss(x, teacher, size=high, align_corners=align, chunk_rows=chunk_rows, **options)
    assert_same(loss, udakit.kd_loss(upsample(x, high, align), upsample(teacher, high, align), **options), x)


@given(
    seed=st.integers(0, 10_000), low=sizes, high=sizes, factor=st.integers(0, 4), align=st.booleans(), chunk_rows=rows,
    ignored=st.sampled_from([0, 0.4, 1]),
)  # fmt: skip
def test_what_a_gpu_does_at_once_is_what_bands_do(
    seed: int, low: Any, high: Any, factor: int, align: bool, chunk_rows: int | None, ignored: float
) -> None:
    """A whole map, and a band of rows that are enlarged by a whole number."""
    high = (factor * low[0] or high[0], high[1])
    x, teacher = draw(seed, (2, 3, *low), (2, 3, *high))
    x.requires_grad_()
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (2, *high), generator=g)
    labels[torch.rand(labels.shape, generator=g) < ignored] = 255
    options: dict[str, Any] = {"align_corners": align, "chunk_rows": chunk_rows, "reduction": "none"}
    with (
        mock.patch.object(_upsampled, "at_once", return_value=True),
        mock.patch.object(_upsampling, "at_once", return_value=True),
    ):
        ours = udakit.upsampled_cross_entropy(x, labels, **options), udakit.upsampled_kd_loss(x, teacher, **options)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in ours]
    expected = udakit.upsampled_cross_entropy(x, labels, **options), udakit.upsampled_kd_loss(x, teacher, **options)
    for y, e, gradient in zip(ours, expected, gradients, strict=True):
        torch.testing.assert_close(y, e, rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad(e.square().sum(), x)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("height", "bands"), [(0, []), (3, [(0, 3)]), (5, [(0, 3), (3, 5)])])
def test_the_bands_of_another_device_have_one_size(
    height: int, bands: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_upsampled.BAND, "other", 4 * 2 * 3 * 5)
    assert list(_upsampled._bands(torch.empty(2, 3, 4, 5, device="meta"), height, 5, 0)) == bands


def test_an_ignored_pixel_of_a_nan_gives_no_gradient() -> None:
    """The pixel above the NaN is ignored, and nothing of it comes back."""
    x = torch.zeros(1, 3, 2, 2)
    x[0, :, 0, 0] = torch.nan
    x.requires_grad_()
    labels = torch.tensor([[[255, 1], [2, 0]]])
    loss = udakit.upsampled_cross_entropy(x, labels)
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad[0, :, 0, 0].eq(0).all()
    assert x.grad[0, :, 1:].ne(0).all()


@pytest.mark.parametrize(("low", "high"), [((65, 129), (512, 1024)), ((33, 47), (200, 331)), ((40, 40), (25, 61))])
def test_float32_differs_by_the_rounding_of_a_position(low: tuple[int, int], high: tuple[int, int]) -> None:
    """Kernels round a position like 129 * 0.3 up or down (with or without a fused product): 8e-6 of a pixel there."""
    (x,) = draw(0, (1, 3, *low), dtype=torch.float32)
    x.requires_grad_()
    labels = torch.randint(3, (1, *high), generator=torch.Generator().manual_seed(0))
    for align in (False, True):
        loss = udakit.upsampled_cross_entropy(x, labels, align_corners=align, reduction="none")
        assert_same(loss, udakit.cross_entropy(upsample(x, high, align), labels, reduction="none"), x, 5e-5)


def test_the_teachers_size_is_the_default_and_the_teacher_gets_no_gradient() -> None:
    x, teacher = (y.requires_grad_() for y in draw(1, (2, 3, 4, 5), (2, 3, 9, 11)))
    loss = udakit.upsampled_kd_loss(x, teacher, chunk_rows=4)
    torch.testing.assert_close(loss, udakit.kd_loss(x, teacher, resize="teacher"))
    assert torch.autograd.grad(loss, (x, teacher), allow_unused=True)[1] is None


def test_labels_may_be_bytes() -> None:
    (x,) = draw(2, (1, 3, 2, 2))
    labels = torch.tensor([[[0, 1, 2, 255]] * 4])
    options = {"class_weight": torch.tensor([1.0, 2.0, 3.0])}
    expected = udakit.upsampled_cross_entropy(x, labels, **options)
    assert udakit.upsampled_cross_entropy(x, labels.to(torch.uint8), **options) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_upsampled_in_float32(dtype: torch.dtype) -> None:
    (x,) = draw(3, (1, 3, 5, 6), dtype=dtype)
    labels = torch.randint(3, (1, 20, 24), generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = udakit.upsampled_cross_entropy(x, labels)
        loss.backward()
    up = x.detach().float().requires_grad_()
    expected = udakit.cross_entropy(upsample(up, (20, 24), False), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, up.grad.to(dtype))


def test_everything_ignored_is_zero_with_zero_gradient() -> None:
    (x,) = draw(4, (1, 3, 2, 2))
    x.requires_grad_()
    loss = udakit.upsampled_cross_entropy(x, torch.full((1, 7, 5), 255))
    loss = loss + udakit.upsampled_kd_loss(x, x, size=(7, 5), valid=torch.zeros(1, 7, 5, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_a_map_without_pixels_is_zero_with_zero_gradient(size: tuple[int, int]) -> None:
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    empty = torch.zeros(2, *size, dtype=torch.int64)
    for loss in (
        udakit.upsampled_cross_entropy(logits, empty),
        udakit.upsampled_kd_loss(logits, torch.zeros(2, 3, *size)),
    ):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros_like(logits))


def test_backward_may_run_twice_and_a_second_derivative_is_refused() -> None:
    (x,) = draw(5, (1, 3, 2, 3))
    x.requires_grad_()
    loss = udakit.upsampled_cross_entropy(x, torch.zeros(1, 5, 7, dtype=torch.int64))
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, create_graph=True)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match=r"second derivative .* of `upsampled_cross_entropy`"):
        second.sum().backward()


def peak_bytes(call: Callable[[], None]) -> int:
    """Most bytes the call held at once, by the events of the allocator."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("loss", ["upsampled_cross_entropy", "upsampled_kd_loss"])
def test_memory_is_a_few_bands_not_the_upsampled_map(loss: str) -> None:
    n, c, h, w, factor = 1, 16, 32, 32, 8
    x, teacher = draw(6, (n, c, h, w), (n, c, h, w), dtype=torch.float32)
    x.requires_grad_()
    size = (h * factor, w * factor)
    labels = torch.randint(c, (n, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def ours() -> None:
        if loss == "upsampled_kd_loss":
            udakit.upsampled_kd_loss(x, teacher, size=size, chunk_rows=16).backward()
        else:
            udakit.upsampled_cross_entropy(x, labels, chunk_rows=16).backward()
        x.grad = None

    def plain() -> None:
        up = upsample(x, size, False)
        if loss == "upsampled_kd_loss":
            udakit.kd_loss(up, upsample(teacher, size, False)).backward()
        else:
            udakit.cross_entropy(up, labels).backward()
        x.grad = None

    pixels = 4 * n * size[0] * size[1]
    band = 4 * n * c * 16 * size[1]
    ours(), plain()  # what is allocated once is not of the call
    assert peak_bytes(ours) < 2 * x.nbytes + 8 * band + 6 * pixels
    assert peak_bytes(plain) > 2 * c * pixels  # the meter sees what it should


def test_errors_name_the_argument() -> None:
    x, teacher = draw(7, (2, 3, 4, 4), (2, 3, 8, 8))
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`labels` to have the N of `logits` \(2, 3, 4, 4\), but got \(1, 8, 8\)"):
        udakit.upsampled_cross_entropy(x, labels[:1])
    with pytest.raises(ValueError, match=r"`pixel_weight` to be \(N, H, W\) matching `labels` \(2, 8, 8\)"):
        udakit.upsampled_cross_entropy(x, labels, pixel_weight=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"`class_weight` to be \(C,\)"):
        udakit.upsampled_cross_entropy(x, labels, class_weight=torch.ones(4))
    with pytest.raises(ValueError, match="`chunk_rows` to be at least 1"):
        udakit.UpsampledCrossEntropyLoss(chunk_rows=0)
    with pytest.raises(ValueError, match=r"`size` to be \(height, width\)"):
        udakit.UpsampledKDLoss(size=(0, 4))
    with pytest.raises(ValueError, match=r"`valid` to be \(N, H, W\) matching `size` \(2, 8, 8\)"):
        udakit.upsampled_kd_loss(x, teacher, valid=torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="`teacher_logits` to have the N and C"):
        udakit.upsampled_kd_loss(x, teacher[:, :2])
    with pytest.raises(ValueError, match=r"`labels` to hold ids 0\.\.2"):
        udakit.upsampled_cross_entropy(x, labels + 3)
    with pytest.raises(ValueError, match=r"`labels` to hold ids 0\.\.2"):
        udakit.upsampled_cross_entropy(x.requires_grad_(), labels + 3, class_weight=torch.ones(3))


def test_a_pixel_weight_may_learn() -> None:
    """A sum that takes its gradient at once has none for a weight."""
    (x,) = draw(6, (2, 3, 2, 3))
    x.requires_grad_()
    labels = torch.randint(3, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    weight = torch.rand(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours = udakit.upsampled_cross_entropy(x, labels, pixel_weight=weight)
    theirs = udakit.cross_entropy(upsample(x, (5, 7), False), labels, pixel_weight=weight)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [udakit.cross_entropy, udakit.upsampled_cross_entropy])
def test_class_weights_are_constants(loss: Callable[..., Tensor], reduction: str) -> None:
    (x,) = draw(7, (1, 3, 4, 5))
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    value = loss(x.requires_grad_(), torch.ones(1, 4, 5).long(), class_weight=weight, reduction=reduction)
    slopes = torch.autograd.grad(value.sum(), (x, weight), allow_unused=True)
    assert slopes[0] is not None
    assert slopes[1] is None
