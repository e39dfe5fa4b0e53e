"""Losses of bilinearly upsampled logits, one band of rows at a time, as operators that compilers treat as one node.

The backward pass recomputes the bands and applies the transpose of the upsampling. Where a CPU has to sum the loss, it
takes value and gradient in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from udakit._reduce import (
    Kind,
    Reduction,
    first_derivative_only,
    full_precision,
    is_eager_on_cpu,
    learns,
    plain,
    refuse_transforms,
    select,
    upcast,
    zero_where_not_,
)
from udakit.losses._upsampled_cpu import CachedUpsampling, Formula, band_of
from udakit.losses._upsampling import Upsampling, at_once
from udakit.losses.cross_entropy import labelled_cross_entropy
from udakit.losses.kd import Divergence, kd_loss, soften

# Elements of a band: 2 MiB stay in the cache of a CPU; 64 MiB keep the launches of a GPU few.
BAND = {"cpu": 2**19, "other": 2**24}


def upsampled_loss(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool,
    chunk_rows: int | None,
    ignore_index: int = 255,
    temperature: float = 1.0,
    divergence: Divergence = "cross_entropy",
    teacher_kind: Kind = "logits",
) -> Tensor:
    """Loss (N, H, W) of `logits` at `size` against labels of that size, or against a teacher's map of any size."""
    refuse_transforms(logits)
    options = align_corners, chunk_rows or 0, ignore_index, temperature, divergence, teacher_kind
    loss: Tensor = torch.ops.udakit.upsampled_loss(plain(logits), plain(target), *size, *options)
    return loss


def sums_at_once(logits: Tensor, reduction: Reduction, pixel_weight: Tensor | None) -> bool:
    """Whether `upsampled_sum` applies: on a CPU, where the loss is summed and only the logits learn."""
    if reduction == "none" or not is_eager_on_cpu(logits):
        return False
    return learns(logits) and not at_once(logits) and not (pixel_weight is not None and pixel_weight.requires_grad)


def upsampled_sum(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int],
    weight: Tensor | None,
    valid: Tensor | None,
    *,
    align_corners: bool,
    chunk_rows: int | None,
    ignore_index: int = 255,
    temperature: float = 1.0,
    divergence: Divergence = "cross_entropy",
    teacher_kind: Kind = "logits",
) -> Tensor:
    """Sum of `upsampled_loss` times `weight` (N, H, W) over the `valid` pixels.

    It takes the gradient in the same pass: that of a sum is known up to a factor, and has the size of the logits.
    """
    options = align_corners, chunk_rows or 0, ignore_index, temperature, divergence, teacher_kind
    weight, valid = (None if x is None else plain(x) for x in (weight, valid))
    total: Tensor = _Sum.apply(plain(logits), plain(target), size, weight, valid, options)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        size: tuple[int, int],
        weight: Tensor | None,
        valid: Tensor | None,
        options: tuple[bool, int, int, float, Divergence, Kind],
    ) -> Tensor:
        (align_corners, rows), kind = options[:2], options[2:]
        loss = _fake(logits, target, *size)
        if weight is not None:
            weight = weight.to(loss.dtype) if valid is None else select(valid, weight.to(loss.dtype))
        elif valid is not None:
            weight = valid.to(loss.dtype)
        bands = _bands(logits, *size, rows)
        student, teacher = _upsamplings(logits, target, bands, *size, align_corners, loss.dtype)
        assert isinstance(student, CachedUpsampling)
        result: Tensor | None = None
        with full_precision(logits):
            for start, stop in bands:
                band = band_of(student, teacher, target, start, stop, kind)
                loss[:, start:stop] = band.loss()
                slope = band.gradient(None if weight is None else weight[:, None, start:stop])
                result = student.add_transposed(result, slope, start, stop)
        ctx.save_for_backward(torch.zeros_like(logits) if result is None else result, logits)
        ctx.dtype = logits.dtype
        loss = loss if weight is None else loss * weight
        return (loss if valid is None else select(valid, loss)).sum()

    @staticmethod
    @first_derivative_only("`upsampled_cross_entropy` and `upsampled_kd_loss`")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, _ = ctx.saved_tensors  # a second derivative that is refused leads back to the logits
        return (result * grad).to(ctx.dtype), *[None] * 5


def _upsampled_loss(
    logits: Tensor,
    target: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    rows: int,
    ignore_index: int,
    temperature: float,
    divergence: Divergence,
    teacher_kind: Kind,
) -> Tensor:
    loss = _fake(logits, target, height, width)
    bands = _bands(logits, height, width, rows)
    student, teacher = _upsamplings(logits, target, bands, height, width, align_corners, loss.dtype)
    with full_precision(logits):
        for start, stop in bands:
            at = slice(start, stop)
            if isinstance(student, CachedUpsampling):
                kind: Formula = ignore_index, temperature, divergence, teacher_kind
                loss[:, at] = band_of(student, teacher, target, start, stop, kind).loss()
                continue
            z = student.band(start, stop)
            if teacher is not None:
                t = teacher.band(start, stop)
                options: dict[str, Any] = {"divergence": divergence, "teacher_kind": teacher_kind}
                band = kd_loss(z, t, temperature=temperature, reduction="none", **options)
            else:
                band = labelled_cross_entropy(z, target[:, at].long(), ignore_index)
            if stop - start == height:
                return band.contiguous()
            loss[:, at] = band
    return loss


def _upsampled_loss_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    align_corners: bool,
    rows: int,
    ignore_index: int,
    temperature: float,
    teacher_kind: Kind,
) -> Tensor:
    _, height, width = grad.shape
    bands = _bands(logits, height, width, rows)
    student, teacher = _upsamplings(logits, target, bands, height, width, align_corners, grad.dtype)
    result: Tensor | None = None
    with full_precision(logits):
        for start, stop in bands:
            g = grad[:, None, start:stop]
            if isinstance(student, CachedUpsampling):
                kind: Formula = ignore_index, temperature, "cross_entropy", teacher_kind  # "kl" has the same gradient
                p = band_of(student, teacher, target, start, stop, kind).gradient(g)
                result = student.add_transposed(result, p, start, stop)
                continue
            p = student.band(start, stop)
            if teacher is not None:
                p = torch.softmax(p.div_(temperature), 1)
                q = soften(teacher.band(start, stop), temperature, teacher_kind)
                p.mul_(q.sum(1, keepdim=True)).sub_(q).mul_(g * temperature)
                counts = g != 0
            else:
                p = torch.softmax(p, 1)
                label = target[:, None, start:stop].long()
                counts = label != ignore_index
                label = label.clamp(0, p.shape[1] - 1)  # an ignored pixel may have any class
                p.scatter_(1, label, p.gather(1, label) - 1).mul_(g)
            # A pixel whose loss does not count must get no gradient, even where it is NaN: 0 times NaN is NaN.
            result = student.add_transposed(result, zero_where_not_(counts, p), start, stop)
    if result is None:  # no rows
        result = torch.zeros_like(logits)
    return result.to(logits.dtype).contiguous()


def _upsamplings(
    logits: Tensor,
    target: Tensor,
    bands: list[tuple[int, int]],
    height: int,
    width: int,
    align_corners: bool,
    dtype: torch.dtype,
) -> tuple[Upsampling, Upsampling | None]:
    """The upsampling of the logits, and of the teacher's map if the target is one; on a CPU, in shared memory."""
    maps = [logits, target] if target.is_floating_point() else [logits]
    options = height, width, align_corners, dtype
    made: list[Upsampling] = []
    for x in maps:
        if logits.device.type == "cpu" and not at_once(logits):
            made.append(CachedUpsampling(x, *options, rows=bands[0][1] if bands else 0))
        else:
            made.append(Upsampling(x, *options))
    return made[0], made[1] if len(made) > 1 else None


def _bands(logits: Tensor, height: int, width: int, rows: int) -> list[tuple[int, int]]:
    n, c = logits.shape[:2]
    if not rows:
        rows = max(BAND.get(logits.device.type, BAND["other"]) // max(n * c * width, 1), 1)
        if logits.device.type != "cpu":
            rows = -(-height // -(-height // rows)) if height else 1  # bands of one size hold less memory
    return [(start, min(start + rows, height)) for start in range(0, height if width else 0, rows)]


def _fake(logits: Tensor, target: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return upcast(logits.new_empty((0,))).new_empty((logits.shape[0], height, width))


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, _, _, align_corners, rows, ignore_index, temperature, _, teacher_kind = inputs
    ctx.options = align_corners, rows, ignore_index, temperature, teacher_kind
    ctx.save_for_backward(logits, target)


@first_derivative_only("`upsampled_cross_entropy` and `upsampled_kd_loss`")
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.udakit.upsampled_loss_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 9


_op = torch.library.custom_op(
    "udakit::upsampled_loss",
    _upsampled_loss,
    mutates_args=(),
    schema="(Tensor logits, Tensor target, SymInt height, SymInt width, bool align_corners, int rows, "
    "int ignore_index, float temperature, str divergence, str teacher_kind) -> Tensor",
)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup_context)
_op_backward = torch.library.custom_op(
    "udakit::upsampled_loss_backward",
    _upsampled_loss_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor target, bool align_corners, int rows, int ignore_index, "
    "float temperature, str teacher_kind) -> Tensor",
)
_op_backward.register_fake(_fake_backward)
