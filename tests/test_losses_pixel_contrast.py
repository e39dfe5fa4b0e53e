"""Pixel contrast against the dense formula in float64: value, gradient, memory, embeddings of any size."""

import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit.losses import _infonce_short


def dense(a: Tensor, b: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Loss of each anchor, (N, 2, h, w), with the whole matrix; 0 at invalid anchors."""
    n, d, h, w = a.shape
    m = h * w
    images = []
    for k in range(n):
        z = torch.cat([a[k].reshape(d, m), b[k].reshape(d, m)], 1)
        ok = torch.ones(2 * m, dtype=torch.bool) if valid is None else valid[k].flatten().repeat(2)
        rows = []
        for i in range(2 * m):
            if not ok[i]:
                rows.append(z.new_zeros(()))
                continue
            s = (z[:, i] @ z) / temperature
            others = ok.clone()
            others[i] = False
            rows.append(torch.logsumexp(s[others], 0) - s[(i + m) % (2 * m)])
        images.append(torch.stack(rows).reshape(2, h, w))
    return torch.stack(images)


def draw(seed: int, n: int, d: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, d, h, w, generator=g, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_(), torch.rand(n, h, w, generator=g) < 0.6


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 2),
    d=st.integers(1, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    chunk=st.sampled_from([None, 1, 2, 3, 7]),
    temperature=st.sampled_from([0.05, 1.0]),
    masked=st.booleans(),
)
def test_value_and_gradient_for_any_block_size(
    seed: int, n: int, d: int, h: int, w: int, chunk: int | None, temperature: float, masked: bool
) -> None:
    a, b, valid = draw(seed, n, d, h, w)
    mask = valid if masked else None
    weights = torch.randn(n, 2, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = udakit.pixel_contrast_loss(a, b, temperature=temperature, valid=mask, chunk_size=chunk, reduction="none")
    expected = dense(a, b, temperature, mask)
    torch.testing.assert_close(loss, expected)
    assert (loss >= 0).all()
    actual = torch.autograd.grad((loss * weights).sum(), (a, b))
    if not expected.requires_grad:
        assert all((x == 0).all() for x in actual)
        return
    for x, e in zip(actual, torch.autograd.grad((expected * weights).sum(), (a, b)), strict=True):
        torch.testing.assert_close(x, e)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 2),
    d=st.integers(1, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    chunk=st.sampled_from([None, 1, 3, 7]),
    longest=st.sampled_from([0.1, 5.0, _infonce_short.LONGEST]),
    masked=st.booleans(),
)
def test_short_embeddings_share_their_exponentials(
    seed: int, n: int, d: int, h: int, w: int, chunk: int | None, longest: float, masked: bool
) -> None:
    """In float64, and in float32 at the largest length that is allowed."""
    a, b, valid = draw(seed, n, d, h, w)
    mask, temperature = valid if masked else None, 0.1
    longest_now = max(float(x.detach().square().sum(1).amax()) for x in (a, b))
    scale = math.sqrt(0.999 * longest * 2 * temperature * math.log(2) / longest_now)
    weights = torch.randn(n, 2, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = dense(a * scale, b * scale, temperature, mask)
    options = {"temperature": temperature, "valid": mask, "chunk_size": chunk, "reduction": "none"}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
        views = (a * scale).to(dtype), (b * scale).to(dtype)
        with mock.patch.object(_infonce_short, "FEWEST", 1):
            assert _infonce_short.is_short(torch.cat(views).flatten(2), temperature)
            loss = udakit.pixel_contrast_loss(*views, **options)
            ours = torch.autograd.grad((loss * weights.to(dtype)).sum(), (a, b))
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
        assert (loss >= 0).all()
        if expected.requires_grad:
            theirs = torch.autograd.grad((expected * weights).sum(), (a, b), retain_graph=True)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=30 * tolerance)
        else:
            assert not any(x.any() for x in ours)


def test_long_embeddings_do_not_share_them() -> None:
    z = torch.randn(2, 4, 256)
    assert _infonce_short.is_short(torch.nn.functional.normalize(z), 0.05)
    assert not _infonce_short.is_short(z * 10, 0.05)
    assert not _infonce_short.is_short(z * torch.nan, 0.05)
    assert not _infonce_short.is_short(z[:, :, :64] / 100, 0.05)


def test_reductions_count_anchors() -> None:
    a, b, valid = draw(0, 2, 3, 3, 4)
    none = dense(a, b, 0.05, valid)
    for reduction, divisor in {"sum": 1, "mean": 2 * int(valid.sum()), "mean_all": none.numel()}.items():
        loss = udakit.pixel_contrast_loss(a, b, valid=valid, reduction=reduction)
        torch.testing.assert_close(loss, none.sum() / divisor)


def test_masking_equals_removing() -> None:
    a, b, valid = draw(1, 1, 3, 3, 4)
    keep = valid.flatten()
    small_a, small_b = (x.reshape(1, 3, -1)[..., keep].unsqueeze(2) for x in (a, b))
    loss = udakit.pixel_contrast_loss(a, b, valid=valid)
    torch.testing.assert_close(loss, udakit.pixel_contrast_loss(small_a, small_b))


def test_images_do_not_see_each_other() -> None:
    a, b, _ = draw(2, 3, 4, 2, 3)
    together = udakit.pixel_contrast_loss(a, b, reduction="none")
    for k in range(3):
        alone = udakit.pixel_contrast_loss(a[k : k + 1], b[k : k + 1], reduction="none")
        torch.testing.assert_close(together[k : k + 1], alone)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e2, 1e8, 1e15])
@pytest.mark.parametrize("chunk", [None, 3])
def test_embeddings_of_any_size(scale: float, chunk: int | None) -> None:
    a, b, valid = draw(3, 2, 8, 3, 3)
    a, b = (x.detach().float().mul(scale).requires_grad_() for x in (a, b))
    loss = udakit.pixel_contrast_loss(a, b, valid=valid, chunk_size=chunk, reduction="none")
    loss.sum().backward()
    expected = dense(a.detach().double(), b.detach().double(), 0.05, valid)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, scale * scale * 20))
    for x in (a, b):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_norms_far_apart_do_not_underflow() -> None:
    # One pixel a thousand times longer than the rest: a shift shared by rows would lose the others' sums.
    a, b, _ = draw(4, 1, 3, 2, 3)
    with torch.no_grad():
        a[..., 0, 0] *= 1000
    for chunk in (None, 2):
        loss = udakit.pixel_contrast_loss(a.detach().float(), b.detach().float(), chunk_size=chunk, reduction="none")
        torch.testing.assert_close(loss.double(), dense(a, b, 0.05).detach(), rtol=1e-5, atol=1e-4)


def test_identical_pixels_give_the_logarithm_of_their_number() -> None:
    z = torch.ones(1, 3, 4, 4)
    assert udakit.pixel_contrast_loss(z, z).item() == pytest.approx(math.log(31), rel=1e-6)
    one = torch.ones(1, 3, 1, 1, requires_grad=True)
    loss = udakit.pixel_contrast_loss(one, one.detach())
    loss.backward()
    assert loss.item() == 0
    assert one.grad is not None
    assert (one.grad == 0).all()


def test_library_rules_of_the_operator() -> None:
    z, valid = torch.randn(2, 3, 12, requires_grad=True), torch.rand(2, 12) < 0.7
    for mask in (None, valid):
        torch.library.opcheck(torch.ops.udakit.infonce.default, (z, mask, 0.1, 4))


def test_errors_name_the_argument() -> None:
    a, b, valid = draw(5, 2, 3, 4, 4)
    with pytest.raises(ValueError, match="`view_b` to have the shape of `view_a`"):
        udakit.pixel_contrast_loss(a, b[:1])
    with pytest.raises(ValueError, match=r"`valid` to be \(N, H, W\) matching `view_a`"):
        udakit.pixel_contrast_loss(a, b, valid=valid[:, :2])
    with pytest.raises(ValueError, match=r"`temperature` to be above 0"):
        udakit.PixelContrastLoss(temperature=0.0)
    with pytest.raises(ValueError, match=r"`chunk_size` to be at least 1"):
        udakit.PixelContrastLoss(chunk_size=0)


MEMORY = """
import re, sys, torch, udakit
torch.set_num_threads(1)
def peak():  # of this process since its start; getrusage would hand down the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
def run(side):
    a, b = torch.randn(2, 1, 19, side, side).softmax(2).requires_grad_()
    udakit.pixel_contrast_loss(a, b).backward()
run(8)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("side", "limit"), [(64, 64), (128, 256)])
def test_memory_in_mib_of_the_whole_process(side: int, limit: float) -> None:
    out = subprocess.run([sys.executable, "-c", MEMORY, str(side)], capture_output=True, text=True, check=True)
    assert 0 < float(out.stdout) <= limit
