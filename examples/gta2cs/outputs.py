"""The output of a segmentation net: logits, features, and the losses on them at the size of the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit import (
    DetailBox,
    crop_detail,
    cross_entropy,
    kd_loss,
    symmetric_cross_entropy,
    upsampled_cross_entropy,
    upsampled_kd_loss,
)

DETAIL_WEIGHT = 0.1  # HRDA's share of the detail crop in a loss
Reduction = Literal["mean", "mean_all", "sum", "none"]


@dataclass(frozen=True, eq=False)
class SegOutput:
    """The output of a net for images (N, K, H, W).

    `head_logits` (N, C, h, w) are the output of the head, `features` (N, D, h, w) its input, and `encoded` is the
    output of the encoder. `logits` (N, C, H, W) are upsampled on first use, so a loss on `head_logits` never holds
    them.
    """

    head_logits: Tensor
    features: Tensor
    encoded: Tensor
    size: tuple[int, int] | None = None  # H, W; None if the head's logits have this size
    detail: tuple[Tensor, DetailBox] | None = None  # HRDA: the logits of the detail crop, and its position

    @cached_property
    def logits(self) -> Tensor:
        """The logits of the head at the size of the images."""
        return self.head_logits if self.size is None else enlarge(self.head_logits, self.size)

    def averaged(self, stride: int) -> Tensor:
        """Means of `logits` over cells of `stride` x `stride` pixels, without logits of that size, in at least float32.

        Enlarging and averaging are linear and act along one axis at a time: together they are a matrix for each axis.
        """
        x = self.head_logits if self.head_logits.dtype == torch.float64 else self.head_logits.float()
        if self.size is None:
            return F.avg_pool2d(x, stride, ceil_mode=True)
        rows, columns = (_averages(old, new, stride, x) for old, new in zip(x.shape[2:], self.size, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            return rows.mT @ x @ columns

    def sampled(self, size: tuple[int, int]) -> Tensor:
        """The pixels of `logits` that nearest interpolation to `size` takes, without logits of full size."""
        if self.size is None or "logits" in vars(self):
            return F.interpolate(self.logits, size, mode="nearest")
        x = self.head_logits if self.head_logits.dtype == torch.float64 else self.head_logits.float()
        axes = zip(x.shape[2:], self.size, size, strict=True)
        rows, columns = (F.interpolate(_enlarging(old, full, x), new, mode="nearest")[0] for old, full, new in axes)
        with torch.autocast(x.device.type, enabled=False):
            return rows.mT @ x @ columns

    def split(self, *counts: int) -> tuple[SegOutput, ...]:
        """Split the output into those of the first images, of the next ones, ..."""
        parts = zip(*(x.split(counts) for x in (self.head_logits, self.features, self.encoded)), strict=True)
        details: Iterable[Any] = [None] * len(counts)
        if self.detail is not None:
            logits, box = self.detail
            places = box.start.split(counts)
            details = [(x, box._replace(start=k)) for x, k in zip(logits.split(counts), places, strict=True)]
        return tuple(SegOutput(*part, self.size, detail) for part, detail in zip(parts, details, strict=True))

    def cross_entropy(
        self, labels: Tensor, *, pixel_weight: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Cross-entropy at the size of the labels, without logits of that size; a detail crop (HRDA) gives a tenth."""
        options: dict[str, Any] = {"pixel_weight": pixel_weight, "reduction": reduction}
        if "logits" in vars(self):  # they are there already
            return self._with_detail(
                cross_entropy(self.logits, labels, **options), upsampled_cross_entropy, labels, **options
            )
        return self.pixel_loss(upsampled_cross_entropy, labels, **options)

    def cross_entropy_and_band(self, labels: Tensor, band: Tensor, *, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
        """`cross_entropy`, and the mean over the labelled pixels of a mask: one pass over the classes for both.

        A detail crop (HRDA) enters the first.
        """
        each = upsampled_cross_entropy(self.head_logits, labels, ignore_index=ignore_index, reduction="none")
        valid = labels != ignore_index
        band = band & valid
        whole, inside = (torch.where(mask, each, 0).sum() / mask.sum().clamp_min(1) for mask in (valid, band))
        return self._with_detail(whole, upsampled_cross_entropy, labels, pixel_weight=None, reduction="mean"), inside

    def distillation(self, teacher: SegOutput) -> Tensor:
        """`kd_loss` of a teacher's output at the size of the images; on a CPU from the logits of the heads.

        Elsewhere the second look at the bands would cost more than enlarging once.
        """
        if self.head_logits.device.type != "cpu":
            return kd_loss(self.logits, teacher.logits)
        size = self.size or (self.head_logits.shape[-2], self.head_logits.shape[-1])
        return upsampled_kd_loss(self.head_logits, teacher.head_logits, size=size)

    def symmetric_cross_entropy(
        self, labels: Tensor, *, pixel_weight: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Symmetric cross-entropy (ProDA) at the size of the labels, with a detail crop as in `cross_entropy`."""

        def loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
            size = (labels.shape[-2], labels.shape[-1])
            return symmetric_cross_entropy(
                logits if logits.shape[-2:] == size else enlarge(logits, size), labels, **options
            )

        return self.pixel_loss(loss, labels, pixel_weight=pixel_weight, reduction=reduction)

    def pixel_loss(
        self, loss: Callable[..., Tensor], labels: Tensor, *, pixel_weight: Tensor | None, reduction: Reduction
    ) -> Tensor:
        """`loss(head_logits, labels, ...)`; a detail crop (HRDA) gives a tenth of it."""
        options: dict[str, Any] = {"pixel_weight": pixel_weight, "reduction": reduction}
        return self._with_detail(loss(self.head_logits, labels, **options), loss, labels, **options)

    def _with_detail(
        self,
        whole: Tensor,
        loss: Callable[..., Tensor],
        labels: Tensor,
        *,
        pixel_weight: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        if self.detail is None:
            return whole
        logits, box = self.detail
        weight = None if pixel_weight is None else crop_detail(pixel_weight, box)
        own = loss(logits, crop_detail(labels, box), pixel_weight=weight, reduction=reduction)
        return (1 - DETAIL_WEIGHT) * whole + DETAIL_WEIGHT * own


def _averages(old: int, new: int, stride: int, like: Tensor) -> Tensor:
    """(old, cells): the share of each of `old` positions in the mean of each cell of the enlarged axis."""
    return F.avg_pool1d(_enlarging(old, new, like), stride, ceil_mode=True).squeeze(0)


def _enlarging(old: int, new: int, like: Tensor) -> Tensor:
    """(1, old, new): the share of each of `old` positions in each position of the enlarged axis."""
    each = torch.eye(old, dtype=like.dtype, device=like.device).unsqueeze(0)
    return F.interpolate(each, new, mode="linear", align_corners=False)


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits bilinearly, as for the scores of the nets.

    The result has its classes one after another, even if those of the net (channels last) alternate: on a CPU a softmax
    over its classes then takes a third of the time, and a copy of the small map costs nothing.
    """
    return F.interpolate(logits.contiguous(), size, mode="bilinear", align_corners=False)
