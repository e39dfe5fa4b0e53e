"""Distillation weighted by a class inconsistency that is measured during training (after DUDA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import check_classes, check_device, check_flag, check_mask_like, check_range, shape_of
from udakit._reduce import Kind, Reduction, top_class
from udakit._state import FullPrecisionState, sum_ranks
from udakit.losses.inconsistency import (
    WeightFn,
    check_options,
    class_overlap,
    count_teacher_classes,
    default_weight,
    inconsistency_of,
    normalised_weight,
)
from udakit.losses.kd import Resize, match_logits, matched_kd_loss

_FADED = 1e-20  # average pixels of a class


class InconsistencyLoss(FullPrecisionState):
    """[`inconsistency_loss`][udakit.losses.inconsistency_loss] that measures the inconsistency during training.

    **Convention.** In training mode, every call first updates `intersection` and `union` (C,), which are moving
    averages of pixel counts, and then weights the pixels by the inconsistency from their ratio. In eval mode nothing is
    updated. Both averages start at 0, which cancels in their ratio. A class that is missing from a batch keeps its
    inconsistency.

    Attributes:
        intersection: float32 buffer (C,), average number of pixels that both nets predict as each class.
        union: float32 buffer (C,), average number of pixels that at least one of the nets predicts as each class.

    Args:
        num_classes: C, the number of classes.
        momentum: fraction of the old average that is kept at each call, in [0, 1).
        sync: add up the (integer) pixel counts of all ranks; every rank must make the call.
        weight_range: lowest and highest weight of a class; this and the options below are those of the function.
        weight_temperature: tau.
        temperature: T.
        weight_fn: function that replaces the formula of the weight.
        teacher_kind: "logits" | "probabilities".
        resize: "error" | "student" | "teacher".
        reduction: "mean" | "mean_all" | "sum" | "none".

    Example:
        >>> import torch
        >>> criterion = InconsistencyLoss(3)
        >>> student = torch.randn(1, 3, 4, 4, requires_grad=True)
        >>> criterion(student, student.detach()).backward()
        >>> criterion.inconsistency
        tensor([0., 0., 0.])
    """

    intersection: Tensor
    union: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        momentum: float = 0.99,
        sync: bool = False,
        weight_range: tuple[float, float] = (0.5, 2.0),
        weight_temperature: float = 1.0,
        temperature: float = 1.0,
        weight_fn: WeightFn | None = None,
        teacher_kind: Kind = "logits",
        resize: Resize = "error",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_classes(num_classes)
        check_range("momentum", momentum, 0.0, 1.0, open_high=True)
        check_flag("sync", sync)
        check_options(weight_range, weight_temperature, temperature, weight_fn, teacher_kind, resize, reduction)
        self.register_buffer("intersection", torch.zeros(num_classes, dtype=torch.float32))
        self.register_buffer("union", torch.zeros(num_classes, dtype=torch.float32))
        self.momentum = momentum
        self.sync = sync
        self.weight_range = weight_range
        self.weight_temperature = weight_temperature
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.teacher_kind: Kind = teacher_kind
        self.resize: Resize = resize
        self.reduction: Reduction = reduction

    @property
    def inconsistency(self) -> Float[Tensor, "c"]:
        """The current inconsistency of each class, (C,), in [0, 1]."""
        return inconsistency_of(self.intersection, self.union)

    @property
    def class_weight(self) -> Float[Tensor, "c"]:
        """The current weight w of each class, (C,), before it is divided by its mean over the pixels of a batch."""
        weigh = self.weight_fn or default_weight(self.weight_range, self.weight_temperature)
        return weigh(self.inconsistency).detach()

    @torch.no_grad()
    def update(
        self,
        student_logits: Float[Tensor, "n c *space"],
        teacher_logits: Float[Tensor, "n c *space2"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> None:
        """Update the averages with one batch. In training mode every call of the Module does this."""
        student, teacher = match_logits(student_logits, teacher_logits, self.resize, self.teacher_kind)
        self._check(student_logits, student, valid)
        self._move(top_class(student), top_class(teacher), valid)

    def _check(self, student_logits: Tensor, student: Tensor, valid: Tensor | None) -> None:
        if student.shape[1] != self.union.shape[0]:
            raise ValueError(
                f"Expected `student_logits` to have {self.union.shape[0]} classes, the "
                f"`num_classes` of the loss, but got {shape_of(student_logits)}."
            )
        if valid is not None:
            check_mask_like(valid, student, reference_name="student_logits")
        check_device("union", self.union, student, "student_logits")

    def _move(self, ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
        """Update the averages with two label maps; return this rank's pixel count of each class in the second."""
        counts = class_overlap(ours, theirs, valid, self.union.shape[0])
        theirs = counts[2]
        if self.sync:
            counts = sum_ranks(counts[:2])
        # The averages of an absent class shrink together, so their ratio stays. Stop before they underflow.
        moved = ((self.union >= _FADED) | (counts[1] > 0)).to(self.union.dtype) * (1.0 - self.momentum)
        both, union = counts[:2].to(self.union.dtype)
        self.intersection.lerp_(both, moved)
        self.union.lerp_(union, moved)
        return theirs

    def forward(
        self,
        student_logits: Float[Tensor, "n c *space"],
        teacher_logits: Float[Tensor, "n c *space2"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Update the averages (in training mode only), then apply the function with them."""
        student, teacher = match_logits(student_logits, teacher_logits, self.resize, self.teacher_kind)
        self._check(student_logits, student, valid)
        labels = top_class(teacher)
        with torch.no_grad():
            if self.training:
                counts = self._move(top_class(student), labels, valid)
            else:
                counts = count_teacher_classes(labels, valid, student.shape[1])
        weigh = self.weight_fn or default_weight(self.weight_range, self.weight_temperature)
        pixel_weight = normalised_weight(
            labels,
            counts,
            self.inconsistency,
            weigh,
            keep_zero=self.weight_fn is not None,
            whole=valid is None,
        )
        return matched_kd_loss(
            student,
            teacher,
            self.temperature,
            "cross_entropy",
            self.teacher_kind,
            valid,
            pixel_weight,
            self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        weight = "" if self.weight_fn is None else f"weight_fn={getattr(self.weight_fn, '__name__', 'custom')}, "
        return (
            f"num_classes={self.union.shape[0]}, momentum={self.momentum}, sync={self.sync}, "
            f"weight_range={self.weight_range}, weight_temperature={self.weight_temperature}, "
            f"temperature={self.temperature}, {weight}teacher_kind={self.teacher_kind!r}, resize={self.resize!r}, "
            f"reduction={self.reduction!r}"
        )
