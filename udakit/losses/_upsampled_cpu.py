"""Losses of upsampled logits on the CPU: bands that share their memory, with the softmax spelled out.

`exp2` takes a third of the time of `exp`, and the division by the sum waits for the next product, where it is a pass
over a map without classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from udakit._reduce import LOG_2, Kind, zero_where_not_
from udakit.losses._upsampling import Upsampling
from udakit.losses.cross_entropy import unknown_id
from udakit.losses.kd import Divergence, soften

Formula = tuple[int, float, Divergence, Kind]  # ignore_index, temperature, divergence, teacher_kind


class CachedUpsampling(Upsampling):
    """The same for a CPU, in memory that the bands share.

    Where rows are enlarged by a whole number F, each weight serves every F-th row, and these rows are mixed at once.
    """

    def __init__(self, x: Tensor, height: int, width: int, align_corners: bool, dtype: torch.dtype, rows: int) -> None:
        super().__init__(x, height, width, align_corners, dtype)
        whole = not align_corners and x.shape[2] > 0 and height % x.shape[2] == 0
        self.factor = height // x.shape[2] if whole else 0
        self._memory = x.new_empty((2, x.shape[0] * x.shape[1] * min(rows, height) * width), dtype=dtype)

    def _buffer(self, k: int, rows: int) -> Tensor:
        shape = (*self.x.shape[:2], rows, self.width)
        return self._memory[k, : shape[0] * shape[1] * rows * self.width].view(shape)

    def band(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the upsampled map. The next band overwrites them."""
        band = self._buffer(0, stop - start)
        if self.identity:
            return band.copy_(self.x[:, :, start:stop])
        if not self.factor:
            first, last = self._source_rows(start, stop)
            x = self._widened(first, last)
            low, high, share = (table[start:stop] for table in self.tables[0])
            torch.index_select(x, 2, low - first, out=band)
            above = torch.index_select(x, 2, high - first, out=self._buffer(1, stop - start))
            return band.mul_(1 - share[:, None]).addcmul_(above, share[:, None])
        first, last = self._low(start), self._low(stop - 1) + 2
        x = self._widened(max(first, 0), min(last, self.x.shape[2]))
        edges = [x[:, :, :1]] * (first < 0), [x[:, :, -1:]] * (last > self.x.shape[2])
        if any(edges):
            x = torch.cat([*edges[0], x, *edges[1]], 2)
        for place, at, below, weight in self._phases(start, stop):
            own = torch.mul(x[:, :, at:below], 1 - weight, out=band[:, :, place :: self.factor])
            if weight:
                own.add_(x[:, :, at + 1 : below + 1], alpha=weight)
        return band

    def exponentials(self, start: int, stop: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of a band x: d = x - max, exp(d / T) and its sum over the classes. The next band overwrites the first two.

        The quotient of the last two is softmax(x / T).
        """
        d = self.band(start, stop)
        d.sub_(d.amax(1, keepdim=True))
        powers = torch.mul(d, 1 / (temperature * LOG_2), out=self._buffer(1, stop - start)).exp2_()
        return d, powers, powers.sum(1, keepdim=True)

    def add_transposed(self, result: Tensor | None, grad: Tensor, start: int, stop: int) -> Tensor:
        """Add the gradient of x that comes from rows start..stop. For the first band `result` is None."""
        if result is None:
            result = torch.zeros_like(self.x, dtype=grad.dtype, memory_format=torch.contiguous_format)
        if self.identity:
            result[:, :, start:stop] = grad
            return result
        if not self.factor:
            return super().add_transposed(result, grad, start, stop)
        count = self.x.shape[2]
        first, last = self._low(start), self._low(stop - 1) + 2
        wide = grad.new_zeros(*grad.shape[:2], last - first, self.width)
        for place, at, below, weight in self._phases(start, stop):
            own = grad[:, :, place :: self.factor]
            wide[:, :, at:below].add_(own, alpha=1 - weight)
            if weight:
                wide[:, :, at + 1 : below + 1].add_(own, alpha=weight)
        if first < 0:  # the first row stands for the one above it
            wide[:, :, 1].add_(wide[:, :, 0])
        if last > count:
            wide[:, :, -2].add_(wide[:, :, -1])
        wide = wide[:, :, max(first, 0) - first : min(last, count) - first]
        part = result[:, :, max(first, 0) : min(last, count)]
        if self.x.shape[3] == self.width:
            part.add_(wide)
        else:
            n, c, h, w = part.shape
            narrow = torch.ops.aten.upsample_linear1d_backward(wide.flatten(0, 1), [self.width], [n * c, h, w], False)
            part.add_(narrow.view(part.shape))
        return result

    def _low(self, row: int) -> int:
        """The input row before an output row; -1 before the first one."""
        return (2 * row + 1 - self.factor) // (2 * self.factor)

    def _phases(self, start: int, stop: int) -> Iterator[tuple[int, int, int, float]]:
        """For every F-th row from start + place on: their input rows at..below, counted from the first, and a weight.

        The weight is that of the row after each of them.
        """
        for place in range(min(self.factor, stop - start)):
            row = start + place
            at = self._low(row) - self._low(start)
            weight = (2 * row + 1 - self.factor) % (2 * self.factor) / (2 * self.factor)
            yield place, at, at + len(range(row, stop, self.factor)), weight


class HardBand:
    """Cross-entropy of a band of rows and its gradient. Ask for the loss first: both use the same memory."""

    def __init__(self, student: CachedUpsampling, labels: Tensor, start: int, stop: int, ignore_index: int) -> None:
        self.parts = student.exponentials(start, stop, 1.0)
        labels = labels[:, None, start:stop].long()
        self.valid = labels != ignore_index
        self.labels = labels.where(self.valid, 0)
        self.ignore_index = ignore_index

    def loss(self) -> Tensor:
        """(N, rows, W); exactly 0 at ignored pixels."""
        d, _, total = self.parts
        try:
            own = d.gather(1, self.labels)
        except RuntimeError as error:
            raise unknown_id(d, self.ignore_index) from error
        return zero_where_not_(self.valid, total.log().sub_(own)).squeeze(1)

    def gradient(self, grad: Tensor | None) -> Tensor:
        """Gradient (N, C, rows, W) times `grad` (N, 1, rows, W), or 1."""
        _, p, total = self.parts
        own = total.new_ones(()) if grad is None else grad
        p.mul_(own / total).scatter_add_(1, self.labels, -own.expand_as(total))
        return zero_where_not_(self.valid, p)


class SoftBand:
    """`kd_loss` of a band of rows and its gradient. Ask for the loss first: both use the same memory."""

    def __init__(
        self,
        student: CachedUpsampling,
        teacher: CachedUpsampling,
        start: int,
        stop: int,
        temperature: float,
        divergence: Divergence,
        teacher_kind: Kind,
    ) -> None:
        self.temperature, self.divergence = temperature, divergence
        self.parts = student.exponentials(start, stop, temperature)
        self.log_q: Tensor | None = None
        self.share: Tensor | None = None
        if teacher_kind == "logits":
            self.log_q, self.q, self.share = teacher.exponentials(start, stop, temperature)
        else:
            self.q = soften(teacher.band(start, stop), temperature, teacher_kind)

    def loss(self) -> Tensor:
        """(N, rows, W): log sum exp - sum q z, and with "kl" the teacher's entropy subtracted."""
        (d, _, total), q, kl = self.parts, self.q, self.divergence == "kl"
        loss = total.log()
        if self.log_q is not None and self.share is not None:
            if kl:
                d.sub_(self.log_q.clamp_min_(torch.finfo(d.dtype).min))  # 0 log 0 is 0
                loss -= self.share.log()
            loss.addcdiv_(d.mul_(q).sum(1, keepdim=True), self.share, value=-1 / self.temperature)
        else:
            loss.mul_(q.sum(1, keepdim=True)).sub_(d.mul_(q).sum(1, keepdim=True), alpha=1 / self.temperature)
            if kl:
                loss += torch.special.xlogy(q, q).sum(1, keepdim=True)
        return loss.mul_(self.temperature**2).squeeze(1)

    def gradient(self, grad: Tensor | None) -> Tensor:
        """Gradient (N, C, rows, W) times `grad` (N, 1, rows, W), or 1; "kl" has the same."""
        (_, p, total), q = self.parts, self.q
        scaled = total.new_full((), self.temperature) if grad is None else grad * self.temperature
        if self.share is not None:
            p.mul_(scaled / total).addcmul_(q, scaled / self.share, value=-1)
        else:
            p.mul_(scaled * q.sum(1, keepdim=True) / total).addcmul_(q, scaled, value=-1)
        return p if grad is None else zero_where_not_(grad != 0, p)


def band_of(
    student: CachedUpsampling,
    teacher: Upsampling | None,
    target: Tensor,
    start: int,
    stop: int,
    kind: Formula,
) -> HardBand | SoftBand:
    """Loss and gradient of a band on a CPU, against labels or a teacher."""
    ignore_index, temperature, divergence, teacher_kind = kind
    if isinstance(teacher, CachedUpsampling):
        return SoftBand(student, teacher, start, stop, temperature, divergence, teacher_kind)
    return HardBand(student, target, start, stop, ignore_index)
