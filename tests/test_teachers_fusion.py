"""Several teachers made one, against loops over pixels."""

from __future__ import annotations

import math
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from udakit import fuse_teachers, kd_loss, teacher_agreement


def textbook_fusion(logits: list[Tensor], weights: list[float], mode: str) -> Tensor:
    out = torch.zeros_like(logits[0], dtype=torch.float64)
    n, c, height, width = out.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                rows = []
                for z in logits:
                    scores = [math.exp(v) for v in z[i, :, y, x].double().tolist()]
                    rows.append([s / sum(scores) for s in scores])
                if mode == "max_confidence":
                    best = max(range(len(rows)), key=lambda k: weights[k] * max(rows[k]))
                    fused = rows[best]
                else:
                    fused = [sum(a * r[k] for a, r in zip(weights, rows, strict=True)) / sum(weights) for k in range(c)]
                    votes = {max(range(c), key=r.__getitem__) for r in rows}
                    if mode == "agreement" and len(votes) > 1:
                        fused = [1 / c] * c
                out[i, :, y, x] = torch.tensor(fused, dtype=torch.float64)
    return out


@given(
    seed=st.integers(0, 2**31),
    teachers=st.integers(1, 3),
    classes=st.integers(2, 4),
    mode=st.sampled_from(["mean", "max_confidence", "agreement"]),
    weighted=st.booleans(),
)
def test_fusion_is_the_loop(seed: int, teachers: int, classes: int, mode: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, classes, 2, 3, generator=generator, dtype=torch.float64) for _ in range(teachers)]
    weights = torch.rand(teachers, generator=generator).add(0.1).tolist() if weighted else None
    expected = textbook_fusion(logits, weights or [1.0] * teachers, mode)
    out = fuse_teachers(logits, weights=weights, mode=mode)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out.sum(1), torch.ones(2, 2, 3, dtype=torch.float64))
    if weights:
        as_tensor = fuse_teachers(logits, weights=torch.tensor(weights, dtype=torch.float64), mode=mode)
        torch.testing.assert_close(as_tensor, expected)
    of_probabilities = fuse_teachers([z.softmax(1) for z in logits], weights=weights, mode=mode, kind="probabilities")
    torch.testing.assert_close(of_probabilities, expected)
    votes = torch.stack([z.argmax(1) for z in logits])
    assert torch.equal(teacher_agreement(logits), (votes == votes[0]).all(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_mean_of_large_maps(dtype: torch.dtype, as_tensor: bool) -> None:
    """These are processed in pieces. Logits of any magnitude, and of other dtypes, count alike."""
    logits = [(s * torch.randn(2, 19, 90, 100)).to(dtype) for s in (1.0, 1e3)] + [torch.randn(2, 19, 90, 100).half()]
    weights = [2.0, 1.0, 0.5]
    expected = sum(a * z.double().softmax(1) for a, z in zip(weights, logits, strict=True)) / sum(weights)
    fused = fuse_teachers(logits, weights=torch.tensor(weights) if as_tensor else weights)
    torch.testing.assert_close(fused, expected.float(), rtol=1e-5, atol=1e-6)


def test_order_and_scale_of_the_weights_play_no_part() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fuse_teachers([a, b], weights=[1, 3]), fuse_teachers([b, a], weights=[6, 2]))
    torch.testing.assert_close(fuse_teachers([a, b], weights=[1, 0]), a.softmax(1))
    torch.testing.assert_close(fuse_teachers([a]), a.softmax(1))


def test_size_interpolates_logits_before_the_softmax() -> None:
    a, b = torch.randn(1, 3, 8, 6), torch.randn(1, 3, 4, 3)
    up = F.interpolate(b, (8, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(fuse_teachers([a, b], size=(8, 6)), (a.softmax(1) + up.softmax(1)) / 2)
    assert teacher_agreement([a, b], size=(2, 2)).shape == (1, 2, 2)


@pytest.mark.parametrize("mode", ["mean", "max_confidence", "agreement"])
def test_volumes_and_signals_are_fused_at_one_size(mode: str) -> None:
    """Three dimensions against the loop over slices of a volume that does not change along its first axis."""
    a, b = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3)
    flat = fuse_teachers([a, b], size=(8, 6), mode=mode)
    volumes = [x[:, :, None].expand(-1, -1, depth, -1, -1) for x, depth in ((a, 4), (b, 2))]
    solid = fuse_teachers(volumes, size=(4, 8, 6), mode=mode)
    torch.testing.assert_close(solid, flat[:, :, None].expand(-1, -1, 4, -1, -1))
    rows = [x[:, :, 0] for x in (a, b)]
    up = F.interpolate(rows[1], 6, mode="linear", align_corners=False)
    torch.testing.assert_close(fuse_teachers(rows, size=(6,), mode=mode), fuse_teachers([rows[0], up], mode=mode))


def test_outputs_of_nets_are_unwrapped() -> None:
    a = torch.randn(1, 3, 4, 4)
    named = types.SimpleNamespace(logits=a)
    torch.testing.assert_close(fuse_teachers([{"out": a}, named, a]), fuse_teachers([a, a, a]))  # type: ignore[list-item]


def test_of_equally_confident_teachers_the_first_is_taken() -> None:
    a, b = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(fuse_teachers([a, b], mode="max_confidence"), a.softmax(1))
    torch.testing.assert_close(fuse_teachers([a, b], mode="max_confidence", weights=[1, 1.01]), b.softmax(1))


def test_teachers_are_detached_and_a_student_learns_from_them() -> None:
    teachers = [torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2)]
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    fused = fuse_teachers(teachers)
    assert not fused.requires_grad
    kd_loss(student, fused, teacher_kind="probabilities", valid=teacher_agreement(teachers)).backward()
    assert student.grad is not None
    agree = teacher_agreement(teachers)[:, None].expand_as(student)
    assert bool((student.grad[~agree] == 0).all())


def test_half_precision_and_large_logits() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        out = fuse_teachers([torch.full((1, 2, 1, 1), 1e4, dtype=dtype), torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)])
        assert out.dtype == torch.float32
        assert out.flatten().tolist() == [0.75, 0.25]
    assert fuse_teachers([torch.zeros(1, 2, 1, 1)], weights=torch.zeros(1)).isfinite().all()


def test_fusion_errors() -> None:
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"`logits\[1\]` to match `logits\[0\]` \(1, 3, 4, 4\), but got \(1, 3, 2, 2\)\. P"
    ):
        fuse_teachers([a, b])
    with pytest.raises(ValueError, match=r"`logits\[1\]` to match .* but got \(1, 2, 4, 4\)\.$"):
        fuse_teachers([a, a[:, :2]], size=(4, 4))
    for nothing in ([], a):
        with pytest.raises(ValueError, match="`logits` to be a non-empty sequence"):
            fuse_teachers(nothing)  # type: ignore[arg-type]
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match=r"`weights` to be (2 numbers >= 0|finite|at least 0)"):
            fuse_teachers([a, a], weights=weights)
    with pytest.raises(ValueError, match=r"`weights` to be \(K,\) with K = 2, but got \(3,\)"):
        fuse_teachers([a, a], weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"`mode` to be one of .* but got 'median'"):
        fuse_teachers([a], mode="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`kind` to be one of .* but got 'scores'"):
        fuse_teachers([a], kind="scores")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`logits\[0\]` to be a float tensor"):
        fuse_teachers([a.long()])
