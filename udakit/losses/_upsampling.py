"""Bilinear upsampling by bands of rows, and its transpose.

A band is `F.interpolate` of those rows alone: bilinear upsampling is separable, so the few rows below the band are
widened to W columns and then mixed.

On a GPU, a map that fits a single band is left to `F.interpolate` itself: one launch instead of some thirty. So are the
bands of a map whose rows are enlarged by a whole number, with a spare input row on either side: `index_add_` needs an
atomic addition for each number there, and took ten times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Upsampling:
    """`F.interpolate(x, (height, width), mode="bilinear")` by rows, and its transpose."""

    def __init__(self, x: Tensor, height: int, width: int, align_corners: bool, dtype: torch.dtype) -> None:
        self.x, self.height, self.width, self.align_corners, self.dtype = x, height, width, align_corners, dtype
        self.identity = x.shape[-2:] == (height, width)
        self.at_once = at_once(x)
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
        x = self._widened(first, last)
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

    def _widened(self, first: int, last: int) -> Tensor:
        """Input rows first..last, upsampled to W columns."""
        x = self.x[:, :, first:last].to(self.dtype)
        x = F.interpolate(x.flatten(0, 1), self.width, mode="linear", align_corners=self.align_corners)
        return x.view(*self.x.shape[:2], last - first, self.width)

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


def at_once(x: Tensor) -> bool:
    """Whether `F.interpolate` takes a whole map, or a band.

    On a CPU it is slower than our own arithmetic. On a GPU its transpose adds in any order, so torch refuses it while
    deterministic algorithms are turned on.
    """
    return x.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled()


def _scale(count: int, size: int, align_corners: bool) -> float:
    return (count - 1) / max(size - 1, 1) if align_corners else count / size
