"""Knowledge distillation at full size from logits of a lower resolution, without the upsampled logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import (
    check_flag,
    check_integer,
    check_mask_like,
    check_size,
    check_two_dimensional,
    check_weight_like,
)
from udakit._reduce import Kind, Reduction, plain, reduce_pixels
from udakit.losses._upsampled import upsampled_loss
from udakit.losses.kd import Divergence, check_logits_pair
from udakit.losses.kd import check_options as check_kd_options

# Signals and volumes: the same value, with the whole maps in memory.
ELSEWHERE = " udakit.kd_loss with `resize=` does it in any number of dimensions."


def upsampled_kd_loss(
    student_logits: Float[Tensor, "n c h w"],
    teacher_logits: Float[Tensor, "n c h2 w2"],
    *,
    size: tuple[int, int] | None = None,
    temperature: float = 1.0,
    divergence: Divergence = "cross_entropy",
    teacher_kind: Kind = "logits",
    align_corners: bool = False,
    valid: Bool[Tensor, "n h3 w3"] | None = None,
    pixel_weight: Float[Tensor, "n h3 w3"] | None = None,
    chunk_rows: int | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n h3 w3"]:
    r"""`kd_loss` of both nets' logits bilinearly upsampled to one size, a band of rows at a time.

    $$\ell_p = T^2\, H\big(\operatorname{softmax}((U t)_p / T),\ \operatorname{softmax}((U s)_p / T)\big), \qquad
    U \text{ bilinear, to } (H, W)$$

    **Convention.** Value and gradient of `F.interpolate(..., size, mode="bilinear")` of both maps followed by
    [`kd_loss`][udakit.losses.kd_loss]: the teacher is detached, "mean" divides by the number of `valid` pixels. Logits
    are upsampled before the softmax; with `teacher_kind="probabilities"` the probabilities are.

    **Source.** As `kd_loss`.

    **Two-dimensional** by nature: the bands are rows of (N, C, H, W).

    **Cost.** Beyond the inputs, the student's gradient and a few (N, H, W) maps: a few bands of N C `chunk_rows` W
    numbers, where the plain path holds several of N C H W. The backward pass makes the bands again from the inputs:
    nothing else is kept. It cannot be differentiated twice.

    Args:
        student_logits: the net that learns, before the softmax, of any size.
        teacher_logits: the net that teaches, of any size: logits, or probabilities by `teacher_kind`. C must agree.
        size: (H, W) of the loss; None takes the teacher's, which is then not resampled.
        temperature: T > 0.
        divergence: "cross_entropy" | "kl".
        teacher_kind: "logits" | "probabilities".
        align_corners: of the upsampling, as in `F.interpolate`.
        valid: True where a pixel counts, at `size`.
        pixel_weight: factor of each pixel's loss, numerator only, at `size`.
        chunk_rows: rows of a band, at `size`; None takes as many as 2 MiB of float32 hold (64 MiB on a GPU).
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, H, W) for "none".

    Raises:
        TypeError: tensors that are not float, or a `valid` that is not bool.
        ValueError: unlike shapes, or an option out of range.

    Example:
        >>> import torch
        >>> student = torch.randn(2, 19, 8, 16, requires_grad=True)
        >>> teacher = torch.randn(2, 19, 16, 32)
        >>> upsampled_kd_loss(student, teacher, size=(64, 128), temperature=2.0).backward()
        >>> student.grad.shape
        torch.Size([2, 19, 8, 16])
    """
    _check_options(size, temperature, divergence, teacher_kind, align_corners, chunk_rows, reduction)
    check_logits_pair(student_logits, teacher_logits, teacher_kind)
    check_two_dimensional("student_logits", student_logits, "`upsampled_kd_loss`", hint=ELSEWHERE)
    height, width = size or teacher_logits.shape[2:]
    at_size = plain(student_logits).new_empty((len(student_logits), 1, 1)).expand(-1, height, width)  # for its shape
    if valid is not None:
        check_mask_like(valid, at_size, reference_name="size", channels=False)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, at_size, reference_name="size", channels=False)
    loss = upsampled_loss(
        student_logits,
        teacher_logits.detach(),
        (height, width),
        align_corners=align_corners,
        chunk_rows=chunk_rows,
        temperature=temperature,
        divergence=divergence,
        teacher_kind=teacher_kind,
    )
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction)


def _check_options(
    size: tuple[int, int] | None,
    temperature: float,
    divergence: str,
    teacher_kind: str,
    align_corners: bool,
    chunk_rows: int | None,
    reduction: str,
) -> None:
    if size is not None:
        check_size("size", size)
    check_kd_options(temperature, divergence, teacher_kind, "error", reduction)
    check_flag("align_corners", align_corners)
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows)


class UpsampledKDLoss(nn.Module):
    """Module of [`upsampled_kd_loss`][udakit.losses.upsampled_kd_loss].

    Example:
        >>> import torch
        >>> criterion = UpsampledKDLoss(size=(4, 4))
        >>> criterion(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 2, 2))
        tensor(0.6931)
    """

    def __init__(
        self,
        *,
        size: tuple[int, int] | None = None,
        temperature: float = 1.0,
        divergence: Divergence = "cross_entropy",
        teacher_kind: Kind = "logits",
        align_corners: bool = False,
        chunk_rows: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(size, temperature, divergence, teacher_kind, align_corners, chunk_rows, reduction)
        self.size = size
        self.temperature = temperature
        self.divergence: Divergence = divergence
        self.teacher_kind: Kind = teacher_kind
        self.align_corners = align_corners
        self.chunk_rows = chunk_rows
        self.reduction: Reduction = reduction

    def forward(
        self,
        student_logits: Float[Tensor, "n c h w"],
        teacher_logits: Float[Tensor, "n c h2 w2"],
        *,
        valid: Bool[Tensor, "n h3 w3"] | None = None,
        pixel_weight: Float[Tensor, "n h3 w3"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return upsampled_kd_loss(
            student_logits,
            teacher_logits,
            size=self.size,
            temperature=self.temperature,
            divergence=self.divergence,
            teacher_kind=self.teacher_kind,
            align_corners=self.align_corners,
            valid=valid,
            pixel_weight=pixel_weight,
            chunk_rows=self.chunk_rows,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"size={self.size}, temperature={self.temperature}, divergence={self.divergence!r}, "
            f"teacher_kind={self.teacher_kind!r}, align_corners={self.align_corners}, chunk_rows={self.chunk_rows}, "
            f"reduction={self.reduction!r}"
        )
