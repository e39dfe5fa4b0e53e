"""Knowledge distillation at full size from low-resolution logits, without storing the upsampled logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from udakit._reduce import Kind, Reduction, divided, plain, reduce_pixels
from udakit.losses._upsampled import sums_at_once, upsampled_loss, upsampled_sum
from udakit.losses.kd import Divergence, check_logits_pair
from udakit.losses.kd import check_options as check_kd_options

# For signals and volumes: the same value, with the whole maps in memory.
ELSEWHERE = " For other numbers of dimensions, use udakit.kd_loss with `resize=`."


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
    r"""`kd_loss` of two nets' logits that are bilinearly upsampled to one size, one band of rows at a time.

    $$\ell_p = T^2\, H\big(\operatorname{softmax}((U t)_p / T),\ \operatorname{softmax}((U s)_p / T)\big), \qquad
    U \text{ bilinear, to } (H, W)$$

    **Convention.** Value and gradient equal those of `F.interpolate(..., size, mode="bilinear")` of both maps followed
    by [`kd_loss`][udakit.losses.kd_loss]. The teacher is detached, and "mean" divides by the number of `valid` pixels.
    Logits are upsampled before the softmax; with `teacher_kind="probabilities"`, the teacher's probabilities are
    upsampled.

    **Source.** The same as `kd_loss`.

    **Two-dimensional maps only**: the bands are rows of (N, C, H, W).

    **Cost.** Besides the inputs, the student's gradient and a few (N, H, W) maps, it holds a few bands of N C
    `chunk_rows` W numbers. The plain way holds several maps of N C H W numbers. The backward pass recomputes the bands
    from the inputs, so nothing else is stored; on a CPU, a sum or mean takes its gradient together with its value. The
    loss cannot be differentiated twice, nor in forward mode or by `torch.func.grad`.

    Args:
        student_logits: the student's logits, before the softmax, of any size.
        teacher_logits: the teacher's logits, or its probabilities with `teacher_kind="probabilities"`, of any size; C
            must agree.
        size: (H, W) of the loss; None takes the size of the teacher's map, which is then not resampled.
        temperature: T > 0.
        divergence: "cross_entropy" | "kl".
        teacher_kind: "logits" | "probabilities".
        align_corners: option of the upsampling, as in `F.interpolate`.
        valid: True where a pixel counts, at `size`.
        pixel_weight: weight of each pixel's loss, at `size`; the divisor does not include it.
        chunk_rows: number of rows in a band, at `size`; None takes as many rows as fit in 2 MiB of float32 (64 MiB on a
            GPU).
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, H, W) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> student = torch.randn(2, 19, 8, 16, requires_grad=True)
        >>> teacher = torch.randn(2, 19, 16, 32)
        >>> upsampled_kd_loss(student, teacher, size=(64, 128), temperature=2.0).backward()
        >>> student.grad.shape
        torch.Size([2, 19, 8, 16])
    """
    check_logits_pair(student_logits, teacher_logits, teacher_kind)
    check_two_dimensional("student_logits", student_logits, "`upsampled_kd_loss`", hint=ELSEWHERE)
    _check_options(size, temperature, divergence, teacher_kind, align_corners, chunk_rows, reduction)
    height, width = size or teacher_logits.shape[2:]
    at_size = plain(student_logits).new_empty((len(student_logits), 1, 1)).expand(-1, height, width)  # for its shape
    if valid is not None:
        check_mask_like(valid, at_size, reference_name="size", channels=False)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, at_size, reference_name="size", channels=False)
    options: dict[str, Any] = {
        "align_corners": align_corners,
        "chunk_rows": chunk_rows,
        "temperature": temperature,
        "divergence": divergence,
        "teacher_kind": teacher_kind,
    }
    maps = student_logits, teacher_logits.detach(), (height, width)
    if sums_at_once(student_logits, reduction, pixel_weight):
        total = upsampled_sum(*maps, pixel_weight, valid, **options)
        return divided(total, (len(student_logits), height, width), valid, reduction)
    loss = upsampled_loss(*maps, **options)
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
    """Module version of [`upsampled_kd_loss`][udakit.losses.upsampled_kd_loss].

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
