"""Symmetric knowledge distillation between two renderings of one image (DiGA)."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_float, check_mask_like, check_range, check_same_shape, check_scores
from udakit._reduce import Reduction, check_reduction, exp_, first_derivative_only, guard, plain, reduce_pixels, upcast
from udakit.losses.kd import kd_loss

BLOCK = 2**18  # elements of a class map worked on at once on the CPU: small enough to stay in the cache


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
    r"""Distil the teacher's view of one rendering into the student's view of the other, both ways.

    $$\ell_p = T^2\, H(t^{clean}_p, s^{mixed}_p) + \lambda\, T^2\, H(t^{mixed}_p, s^{clean}_p)$$

    where H(t, s) is the cross-entropy of softmax(t / T) and softmax(s / T), as in `kd_loss`.

    **Convention.** The teacher is detached. "mean" divides by the number of `valid` pixels (all without a mask),
    "mean_all" by all. Both renderings share one layout, so one `valid` serves both terms.

    **Source.** DiGA (Shen et al. 2023). Its released code has T = 1, all pixels, lambda = 0.5 (GTA5) or 0.25 (SYNTHIA)
    on the term whose teacher saw the mixed rendering, and this sum times 0.5 or 0.25 in the total loss.

    **Cost.** Each term is computed block by block and keeps one class map for the backward pass, where the
    textbook keeps two; it cannot be differentiated twice. On the CPU `torch.compile` keeps these blocks; elsewhere it
    gets the textbook formula to fuse.

    Args:
        student_clean: the student's logits on the clean rendering.
        student_mixed: the student's logits on the mixed (augmented or target-styled) rendering.
        teacher_clean: the teacher's logits on the clean rendering.
        teacher_mixed: the teacher's logits on the mixed rendering.
        reverse_weight: lambda, of the term that teaches the clean view.
        temperature: T > 0.
        valid: True where a pixel counts.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: tensors that are not float, or a `valid` that is not bool.
        ValueError: unlike shapes, or an option out of range.

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
    forward = _soft_cross_entropy(guard(student_mixed, valid), teacher_clean, temperature)
    reverse = _soft_cross_entropy(guard(student_clean, valid), teacher_mixed, temperature)
    return reduce_pixels(forward + reverse_weight * reverse, valid, reduction=reduction)


def _check_options(reverse_weight: float, temperature: float, reduction: str) -> None:
    check_range("reverse_weight", reverse_weight, 0.0)
    check_range("temperature", temperature, 0.0, open_low=True)
    check_reduction(reduction)


def _soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`kd_loss` at each pixel, (N, *space)."""
    if torch.compiler.is_compiling() and student.device.type != "cpu":
        return kd_loss(student, teacher, temperature=temperature, reduction="none")
    student, teacher = plain(upcast(student)), plain(upcast(teacher.detach()).to(upcast(student).dtype))
    keep = student.requires_grad and torch.is_grad_enabled()
    loss: Tensor = torch.ops.udakit.soft_cross_entropy(student, teacher, temperature, keep)[0]
    return loss


def _forward(student: Tensor, teacher: Tensor, temperature: float, keep: bool) -> tuple[Tensor, Tensor]:
    """T^2 H(softmax(t / T), softmax(s / T)) per pixel, and softmax(s / T) - softmax(t / T), its gradient / T."""
    s, t = student.flatten(2), teacher.flatten(2)
    n, c, size = s.shape
    loss = s.new_empty((n, size))
    kept = torch.empty_like(s, memory_format=torch.contiguous_format) if keep else s.new_empty((0,))
    # A GPU takes the batch at once; the CPU takes pieces of an image, so that the steps between stay in its cache.
    images, pixels = (1, max(BLOCK // max(c, 1), 1)) if s.device.type == "cpu" else (max(n, 1), max(size, 1))
    buffers = s.new_empty((3, images * c * min(pixels, size)))  # fresh memory a block would cost more than the sums
    for i in range(0, n, images):
        for j in range(0, size, pixels):
            at = slice(i, i + images), slice(None), slice(j, j + pixels)
            x, q, log_p = buffers[:, : s[at].numel()].view(3, *s[at].shape)
            torch.softmax(_divided(t[at], temperature, x), dim=1, out=q)
            torch.log_softmax(_divided(s[at], temperature, x), dim=1, out=log_p)
            torch.sum(torch.mul(log_p, q, out=x), dim=1, out=loss[at[0], at[2]])
            if keep:
                torch.sub(exp_(log_p), q, out=kept[at])
    return loss.view(n, *student.shape[2:]).mul_(-(temperature**2)), kept


def _divided(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Logits / T, in `out` unless there is nothing to do."""
    return logits if temperature == 1 else torch.div(logits, temperature, out=out)


def _fake(student: Tensor, teacher: Tensor, temperature: float, keep: bool) -> tuple[Tensor, Tensor]:
    n, c, *space = student.shape
    return student.new_empty((n, *space)), student.new_empty((n, c, math.prod(space)) if keep else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes a class map of zeros for the second output
    ctx.save_for_backward(output[1])
    ctx.temperature = inputs[2]


@first_derivative_only
def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None
    (kept,) = ctx.saved_tensors
    grad = grad * ctx.temperature if ctx.temperature != 1 else grad
    return (kept * grad.flatten(1).unsqueeze(1)).unflatten(2, grad.shape[1:]), None, None, None


_op = torch.library.custom_op(
    "udakit::soft_cross_entropy",
    _forward,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, float temperature, bool keep) -> (Tensor, Tensor)",
)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup_context)


class SymmetricKDLoss(nn.Module):
    """Module of [`symmetric_kd_loss`][udakit.losses.symmetric_kd_loss].

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

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"reverse_weight={self.reverse_weight}, temperature={self.temperature}, reduction={self.reduction!r}"
