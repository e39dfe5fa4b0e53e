"""Knowledge distillation between segmentation nets of the same or of different architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import (
    check_device,
    check_mask_like,
    check_option,
    check_range,
    check_scores,
    check_weight_like,
    shape_of,
)
from udakit._reduce import (
    KINDS,
    Kind,
    Reduction,
    check_reduction,
    has_nan,
    interpolate,
    is_large,
    learns,
    may_look,
    reduce_pixels,
    select,
    softmax_where,
    upcast,
    zero_where_not_,
)
from udakit.losses._soft_cross_entropy import soft_cross_entropy

Divergence = Literal["cross_entropy", "kl"]
Resize = Literal["error", "student", "teacher"]
DIVERGENCES = get_args(Divergence)
RESIZES = get_args(Resize)


def check_options(temperature: float, divergence: str, teacher_kind: str, resize: str, reduction: str) -> None:
    """Raise for an option that `kd_loss` does not have."""
    check_range("temperature", temperature, 0.0, open_low=True)
    check_option("divergence", divergence, DIVERGENCES)
    check_option("teacher_kind", teacher_kind, KINDS)
    check_option("resize", resize, RESIZES)
    check_reduction(reduction)


def kd_loss(
    student_logits: Float[Tensor, "n c *space"],
    teacher_logits: Float[Tensor, "n c *space2"],
    *,
    temperature: float = 1.0,
    divergence: Divergence = "cross_entropy",
    teacher_kind: Kind = "logits",
    resize: Resize = "error",
    valid: Bool[Tensor, "n *space"] | None = None,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Distil a teacher's class probabilities into a student, pixel by pixel.

    $$\ell_p = T^2\, H\!\left(\operatorname{softmax}(t_p / T),\ \operatorname{softmax}(s_p / T)\right),
    \qquad H(q, p) = -\sum_c q_c \log p_c$$

    **Convention.** The teacher is detached. "mean" divides by the number of `valid` pixels (all pixels if there is no
    mask), "mean_all" by the number of all pixels. `divergence="kl"` subtracts the teacher's entropy, which changes the
    value but not the gradient. With `teacher_kind="probabilities"` the teacher's softmax is skipped; for T != 1 it is
    replaced by the normalised power p^(1/T), which equals softmax(log p / T).

    **Cost.** On the CPU, large maps of logits are processed block by block. Maps of any size have a second derivative.

    **Source.** Hinton et al. 2015 for the factor T^2. DiGA's released code uses the soft cross-entropy with T = 1 over
    all pixels.

    Args:
        student_logits: the student's logits, before the softmax.
        teacher_logits: the teacher's logits, or its probabilities with `teacher_kind="probabilities"`; C must agree.
        temperature: T > 0.
        divergence: "cross_entropy" | "kl".
        teacher_kind: "logits" | "probabilities".
        resize: what to do when the sizes differ: "error" raises, "student" or "teacher" resizes the other map to that
            net's size by linear interpolation.
        valid: True where a pixel counts, at the size after `resize`.
        pixel_weight: weight of each pixel's loss, at the size after `resize`; the divisor does not include it.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is unknown.

    Example:
        >>> import torch
        >>> student = torch.randn(2, 5, 8, 8, requires_grad=True)
        >>> teacher = torch.randn(2, 5, 4, 4)
        >>> kd_loss(student, teacher, temperature=2.0, resize="student").backward()
        >>> student.grad.shape
        torch.Size([2, 5, 8, 8])
    """
    check_options(temperature, divergence, teacher_kind, resize, reduction)
    student, teacher = match_logits(student_logits, teacher_logits, resize, teacher_kind)
    if valid is not None:
        check_mask_like(valid, student, reference_name="student_logits")
    if pixel_weight is not None:
        check_weight_like(pixel_weight, student, reference_name="student_logits")
    return matched_kd_loss(student, teacher, temperature, divergence, teacher_kind, valid, pixel_weight, reduction)


def matched_kd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: Divergence,
    teacher_kind: Kind,
    valid: Tensor | None,
    pixel_weight: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """`kd_loss` of two maps from `match_logits`; nothing is checked."""
    # One node for a compiler: what it would make of the operators takes three times as long on a CPU.
    in_pieces = is_large(student) or (torch.compiler.is_compiling() and student.device.type == "cpu")
    if teacher_kind == "logits" and in_pieces:
        loss = soft_cross_entropy(student, teacher, temperature, valid, kl=divergence == "kl")
        return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=True)
    loss, zeroed = whole_soft_cross_entropy(student, teacher, temperature, valid, divergence, teacher_kind)
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=zeroed)


def whole_soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    valid: Tensor | None,
    divergence: str = "cross_entropy",
    teacher_kind: Kind = "logits",
) -> tuple[Tensor, bool]:
    """`kd_loss` at each pixel, by operators that have a derivative; and whether it is 0 where not `valid`."""
    target = soften(teacher, temperature, teacher_kind).to(student.dtype)
    recorded = learns(student)
    # Where nothing is NaN, the mean hides the pixels that are not valid, and their gradient is a product with 0.
    plain = recorded and valid is not None and teacher_kind == "logits" and may_look(target) and not has_nan(target)
    log_p, zeroed = softmax_where(
        valid, student if temperature == 1 else student / temperature, log=True, only_nan=plain
    )
    if zeroed and valid is not None:  # of the teacher, too, or its NaN would be a factor of the gradient
        own = teacher_kind == "logits" or temperature != 1
        target = (zero_where_not_ if own else select)(valid.unsqueeze(1), target)
    product = target * log_p if recorded or not may_look(log_p) else log_p.mul_(target)
    loss = product.sum(dim=1)
    if divergence == "kl":
        loss = loss - torch.special.xlogy(target, target).sum(dim=1)
    return loss * -(temperature**2), zeroed


def match_logits(
    student_logits: Tensor, teacher_logits: Tensor, resize: str, teacher_kind: str = "logits"
) -> tuple[Tensor, Tensor]:
    """Both maps, checked, in at least float32 and of one size; the teacher is detached."""
    check_logits_pair(student_logits, teacher_logits, teacher_kind)
    student, teacher = upcast(student_logits), upcast(teacher_logits.detach())
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if resize == "error":
        raise ValueError(
            f"Expected `teacher_logits` to have the size of `student_logits` {shape_of(student_logits)}, "
            f'but got {shape_of(teacher_logits)}. Pass resize="student" or resize="teacher" to interpolate.'
        )
    if resize == "student":
        return student, interpolate(teacher, student.shape[2:], name="teacher_logits")
    return interpolate(student, teacher.shape[2:], name="student_logits"), teacher


def check_logits_pair(student_logits: Tensor, teacher_logits: Tensor, teacher_kind: str = "logits") -> None:
    """Raise unless both are logits with the same N and C; their sizes are not compared."""
    check_scores("student_logits", student_logits)
    check_scores("teacher_logits", teacher_logits, teacher_kind)
    if student_logits.ndim != teacher_logits.ndim or student_logits.shape[:2] != teacher_logits.shape[:2]:
        hint = ""
        if teacher_logits.movedim(-1, 1).shape[:2] == student_logits.shape[:2]:
            hint = " Its channels are last: move them to axis 1 with .movedim(-1, 1)."
        raise ValueError(
            f"Expected `teacher_logits` to have the N and C of `student_logits` {shape_of(student_logits)}, "
            f"and the same number of axes, but got {shape_of(teacher_logits)}.{hint}"
        )
    check_device("teacher_logits", teacher_logits, student_logits, "student_logits")


def soften(teacher: Tensor, temperature: float, kind: str) -> Tensor:
    """Class probabilities at a temperature, from logits or probabilities."""
    if kind == "logits":
        return F.softmax(teacher if temperature == 1 else teacher / temperature, dim=1)
    if temperature == 1.0:
        return teacher
    teacher = teacher.clamp_min(0)
    top = teacher.amax(dim=1, keepdim=True).clamp_min(torch.finfo(teacher.dtype).tiny)
    power = (teacher / top) ** (1 / temperature)  # 1 / C alone would underflow at a low temperature
    return power / power.sum(dim=1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)


class KDLoss(nn.Module):
    """Module version of [`kd_loss`][udakit.losses.kd_loss].

    Example:
        >>> import torch
        >>> criterion = KDLoss(temperature=2.0, divergence="kl")
        >>> logits = torch.randn(1, 3, 2, 2)
        >>> bool(criterion(logits, logits) < 1e-6)
        True
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: Divergence = "cross_entropy",
        teacher_kind: Kind = "logits",
        resize: Resize = "error",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_options(temperature, divergence, teacher_kind, resize, reduction)
        self.temperature = temperature
        self.divergence: Divergence = divergence
        self.teacher_kind: Kind = teacher_kind
        self.resize: Resize = resize
        self.reduction: Reduction = reduction

    def forward(
        self,
        student_logits: Float[Tensor, "n c *space"],
        teacher_logits: Float[Tensor, "n c *space2"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return kd_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            divergence=self.divergence,
            teacher_kind=self.teacher_kind,
            resize=self.resize,
            valid=valid,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"temperature={self.temperature}, divergence={self.divergence!r}, teacher_kind={self.teacher_kind!r}, "
            f"resize={self.resize!r}, reduction={self.reduction!r}"
        )
