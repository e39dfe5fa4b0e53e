"""Symmetric knowledge distillation between two renderings of one image (DiGA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_float, check_mask_like, check_range, check_same_shape, check_scores
from udakit._reduce import Reduction, check_reduction, is_transformed, reduce_pixels, upcast
from udakit._reduce.eager import LARGE
from udakit.losses._soft_cross_entropy import soft_cross_entropy
from udakit.losses.kd import whole_soft_cross_entropy


def symmetric_kd_loss(
    student_clean: Float[Tensor, "n c *space"],
    student_mixed: Float[Tensor, "n c *space"],
    teacher_clean: Float[Tensor, "n c *space"],
    teacher_mixed: Float[Tensor, "n c *space"],
    *,
    reverse_weight: float = 0.5,
    temperature: float = 1.0,
    valid: Bool[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Distil the teacher's prediction on one rendering into the student's prediction on the other, both ways.

    $$\ell_p = T^2 H(t^{\text{clean}}_p, s^{\text{mixed}}_p) + \lambda T^2 H(t^{\text{mixed}}_p, s^{\text{clean}}_p)$$

    where H(t, s) is the cross-entropy of softmax(t / T) and softmax(s / T), as in `kd_loss`.

    **Convention.** The teacher is detached. "mean" divides by the number of `valid` pixels (all pixels if there is no
    mask), "mean_all" by the number of all pixels. Both renderings have the same layout, so one `valid` applies to both
    terms.

    **Source.** DiGA (Shen et al. 2023). Its released code uses T = 1 and all pixels. The term in which the teacher saw
    the mixed rendering has lambda = 0.5 (GTA5) or 0.25 (SYNTHIA). The sum has the weight 0.5 or 0.25 in the total loss.

    **Cost.** Each term is computed block by block and keeps one class map for the backward pass, besides the student's
    logits; the plain formula keeps two. Under `torch.compile`, the CPU keeps these blocks and other devices fuse the
    plain formula. Small maps on the CPU are computed by the plain formula. Maps of any size have a second derivative.

    Args:
        student_clean: the student's logits on the clean rendering.
        student_mixed: the student's logits on the mixed (augmented or target-styled) rendering.
        teacher_clean: the teacher's logits on the clean rendering.
        teacher_mixed: the teacher's logits on the mixed rendering.
        reverse_weight: lambda, the weight of the term that trains the student on the clean rendering.
        temperature: T > 0.
        valid: True where a pixel counts.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> clean, mixed = torch.zeros(2, 1, 3, 4, 4, requires_grad=True)
        >>> loss = symmetric_kd_loss(clean, mixed, clean.detach(), mixed.detach())
        >>> loss.backward()
        >>> round(loss.item(), 4)  # 1.5 log 3
        1.6479
    """
    _check_options(reverse_weight, temperature, reduction)
    check_scores("student_clean", student_clean)
    for name, x in {
        "student_mixed": student_mixed,
        "teacher_clean": teacher_clean,
        "teacher_mixed": teacher_mixed,
    }.items():
        check_float(name, x)
        check_same_shape(x, student_clean, name=name, reference_name="student_clean")
    if valid is not None:
        check_mask_like(valid, student_clean, reference_name="student_clean")
    forward, zeroed = _soft_cross_entropy(student_mixed, teacher_clean, temperature, valid)
    reverse, both = _soft_cross_entropy(student_clean, teacher_mixed, temperature, valid)
    return reduce_pixels(forward + reverse_weight * reverse, valid, reduction=reduction, zeroed=zeroed and both)


def _check_options(reverse_weight: float, temperature: float, reduction: str) -> None:
    check_range("reverse_weight", reverse_weight, 0.0)
    check_range("temperature", temperature, 0.0, open_low=True)
    check_reduction(reduction)


def _soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None
) -> tuple[Tensor, bool]:
    """`kd_loss` at each pixel, (N, *space), and whether it is 0 where not `valid`."""
    compiling, on_cpu = torch.compiler.is_compiling(), student.device.type == "cpu"
    few = on_cpu and not compiling and student.numel() < 2 * LARGE  # where the operator costs more than it saves
    if few or is_transformed() or (compiling and not on_cpu):
        student = upcast(student)
        return whole_soft_cross_entropy(student, upcast(teacher.detach()).to(student.dtype), temperature, valid)
    return soft_cross_entropy(student, teacher, temperature, valid), True


class SymmetricKDLoss(nn.Module):
    """Module version of [`symmetric_kd_loss`][udakit.losses.symmetric_kd_loss].

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 2, 2)
        >>> SymmetricKDLoss(reverse_weight=0.25)(logits, logits, logits, logits)
        tensor(0.8664)
    """

    def __init__(self, *, reverse_weight: float = 0.5, temperature: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(reverse_weight, temperature, reduction)
        self.reverse_weight = reverse_weight
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(
        self,
        student_clean: Float[Tensor, "n c *space"],
        student_mixed: Float[Tensor, "n c *space"],
        teacher_clean: Float[Tensor, "n c *space"],
        teacher_mixed: Float[Tensor, "n c *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return symmetric_kd_loss(
            student_clean,
            student_mixed,
            teacher_clean,
            teacher_mixed,
            reverse_weight=self.reverse_weight,
            temperature=self.temperature,
            valid=valid,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"reverse_weight={self.reverse_weight}, temperature={self.temperature}, reduction={self.reduction!r}"
