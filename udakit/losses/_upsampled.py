"""Losses of bilinearly upsampled logits, one band of rows at a time, as operators that compilers treat as one node.

A band is `F.interpolate` of those rows alone: bilinear upsampling is separable, so the few rows below the band are
widened to W columns and then mixed. The backward pass recomputes the bands and applies the transpose. On a GPU, a map
that fits a single band is left to `F.interpolate` itself: one launch instead of some thirty. So are the bands of a map
whose rows are enlarged by a whole number, with a spare input row on either side: `index_add_` needs an atomic addition
for each number there, and took ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit._reduce import Kind, full_precision, plain, refuse_tangents, upcast, zero_where_not_
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
    refuse_tangents(logits)
    options = align_corners, chunk_rows or 0, ignore_index, temperature, divergence, teacher_kind
    loss: Tensor = torch.ops.udakit.upsampled_loss(plain(logits), plain(target), *size, *options)
    return loss


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
    student, teacher = (_Upsampling(x, height, width, align_corners, loss.dtype) for x in (logits, target))
    with full_precision(logits):
        for start, stop in _bands(logits, height, width, rows):
            z = student.band(start, stop)
            if target.is_floating_point():
                t = teacher.band(start, stop)
                options: dict[str, Any] = {"divergence": divergence, "teacher_kind": teacher_kind}
                band = kd_loss(z, t, temperature=temperature, reduction="none", **options)
            else:
                band = labelled_cross_entropy(z, target[:, start:stop].long(), ignore_index)
            if stop - start == height:
                return band.contiguous()
            loss[:, start:stop] = band
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
    student, teacher = (_Upsampling(x, height, width, align_corners, grad.dtype) for x in (logits, target))
    result: Tensor | None = None
    with full_precision(logits):
        for start, stop in _bands(logits, height, width, rows):
            g = grad[:, None, start:stop]
            p = student.band(start, stop)
            if target.is_floating_point():
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


def _bands(logits: Tensor, height: int, width: int, rows: int) -> Iterator[tuple[int, int]]:
    n, c = logits.shape[:2]
    if not rows:
        rows = max(BAND.get(logits.device.type, BAND["other"]) // max(n * c * width, 1), 1)
        if logits.device.type != "cpu":
            rows = -(-height // -(-height // rows)) if height else 1  # bands of one size hold less memory
    for start in range(0, height if width else 0, rows):
        yield start, min(start + rows, height)


class _Upsampling:
    """`F.interpolate(x, (height, width), mode="bilinear")` by rows, and its transpose."""

    def __init__(self, x: Tensor, height: int, width: int, align_corners: bool, dtype: torch.dtype) -> None:
        self.x, self.height, self.width, self.align_corners, self.dtype = x, height, width, align_corners, dtype
        self.identity = x.shape[-2:] == (height, width)
        self.at_once = _at_once(x)
        # By how much each row is enlarged, where `F.interpolate` can take a band; 0 elsewhere.
        whole = self.at_once and not align_corners and x.shape[2] > 0 and height % x.shape[2] == 0
        self.factor = height // x.shape[2] if whole else 0
        self._tables: list[tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def tables(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`_neighbours` of all rows and of all columns, made once for all bands."""
        if self._tables is None:
            rows = self._neighbours(self.x.shape[2], self.height)
            square = self.x.shape[2] == self.x.shape[3] and self.height == self.width
            self._tables = [rows, rows if square else self._neighbours(self.x.shape[3], self.width)]
        return self._tables

    def band(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the upsampled map, in new memory."""
        if self.identity:
            return self.x[:, :, start:stop].to(self.dtype, copy=True)
        if self.at_once and stop - start == self.height:
            x = self.x.to(self.dtype)
            return F.interpolate(x, (stop, self.width), mode="bilinear", align_corners=self.align_corners)
        if self.factor:
            first, last = self._spared_rows(start, stop)
            wide = (last - first) * self.factor
            x = F.interpolate(self.x[:, :, first:last].to(self.dtype), (wide, self.width), mode="bilinear")
            return x[:, :, start - first * self.factor : stop - first * self.factor]
        first, last = self._source_rows(start, stop)
        x = self.x[:, :, first:last].to(self.dtype)
        x = F.interpolate(x.flatten(0, 1), self.width, mode="linear", align_corners=self.align_corners)
        x = x.view(*self.x.shape[:2], last - first, self.width)
        low, high, weight = (table[start:stop] for table in self.tables[0])
        weight = weight[:, None]
        x, above = x.index_select(2, low - first), x.index_select(2, high - first)
        return x.mul_(1 - weight).addcmul_(above, weight)

    def add_transposed(self, result: Tensor | None, grad: Tensor, start: int, stop: int) -> Tensor:
        """Add the gradient of x that comes from rows start..stop. For the first band `result` is None."""
        whole = stop - start == self.height
        if self.identity and whole:
            return grad
        if self.at_once and whole:
            corners = self.align_corners
            back: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
                grad, [self.height, self.width], list(self.x.shape), corners
            )
            return back
        if result is None:
            result = torch.zeros_like(self.x, dtype=grad.dtype, memory_format=torch.contiguous_format)
        if self.identity:
            result[:, :, start:stop] = grad
            return result
        if self.factor:
            first, last = self._spared_rows(start, stop)
            part, top = result[:, :, first:last], start - first * self.factor
            size = [(last - first) * self.factor, self.width]
            wide = F.pad(grad, (0, 0, top, size[0] - top - (stop - start)))
            part.add_(torch.ops.aten.upsample_bilinear2d_backward(wide, size, list(part.shape), False))
            return result
        first, last = self._source_rows(start, stop)
        low, high, weight = (table[start:stop] for table in self.tables[0])
        weight = weight[:, None]
        wide = grad.new_zeros(*grad.shape[:2], last - first, self.width)
        wide.index_add_(2, low - first, grad * (1 - weight)).index_add_(2, high - first, grad * weight)
        low, high, weight = self.tables[1]
        result[:, :, first:last].index_add_(3, low, wide * (1 - weight)).index_add_(3, high, wide * weight)
        return result

    def _neighbours(self, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """For the output pixels of one axis, the input pixels before and after, and the weight of the latter."""
        at = torch.arange(size, dtype=self.dtype, device=self.x.device)
        scale = _scale(count, size, self.align_corners)
        source = at * scale if self.align_corners else ((at + 0.5) * scale - 0.5).clamp_(min=0)
        low = source.long().clamp_(max=count - 1)
        return low, (low + 1).clamp_(max=count - 1), (source - low).clamp_(0, 1)

    def _source_rows(self, start: int, stop: int) -> tuple[int, int]:
        """Input rows that output rows start..stop touch, with one to spare for the rounding of `_neighbours`."""
        count = self.x.shape[2]
        scale, shift = _scale(count, self.height, self.align_corners), 0.0 if self.align_corners else 0.5
        first, last = ((y + shift) * scale - shift for y in (start, stop - 1))
        return max(int(first) - 1, 0), min(int(last) + 3, count)

    def _spared_rows(self, start: int, stop: int) -> tuple[int, int]:
        """Input rows whose enlargement holds output rows start..stop, and one before and after to interpolate with."""
        return max(start // self.factor - 1, 0), min(-(-stop // self.factor) + 1, self.x.shape[2])


def _at_once(x: Tensor) -> bool:
    """Whether `F.interpolate` takes a whole map, or a band.

    On a CPU it is slower than our own arithmetic. On a GPU its transpose adds in any order, so torch refuses it while
    deterministic algorithms are turned on.
    """
    return x.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled()


def _scale(count: int, size: int, align_corners: bool) -> float:
    return (count - 1) / max(size - 1, 1) if align_corners else count / size


def _fake(logits: Tensor, target: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return upcast(logits.new_empty((0,))).new_empty((logits.shape[0], height, width))


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, _, _, align_corners, rows, ignore_index, temperature, _, teacher_kind = inputs
    ctx.options = align_corners, rows, ignore_index, temperature, teacher_kind
    ctx.save_for_backward(logits, target)


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
