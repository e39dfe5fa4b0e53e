"""Class inconsistency between a student and a teacher, and distillation weighted by it (after DUDA)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_callable,
    check_device,
    check_flag,
    check_float,
    check_integer,
    check_mask_like,
    check_option,
    check_pair,
    check_per_class,
    check_range,
    kind_of,
    shape_of,
)
from udakit._reduce import KINDS, Kind, Reduction, check_reduction, count_ids, top_class, upcast
from udakit._state import FullPrecisionState, sum_ranks
from udakit.losses.kd import RESIZES, Resize, kd_loss, match_logits

WeightFn = Callable[[Tensor], Tensor]
_FADED = 1e-20  # average pixels of a class


def class_inconsistency(
    student_logits: Float[Tensor, "n c *space"],
    teacher_logits: Float[Tensor, "n c *space2"],
    *,
    resize: Resize = "error",
    valid: Bool[Tensor, "n *space"] | None = None,
) -> Float[Tensor, "c"]:
    r"""How much student and teacher disagree on each class.

    $$d_c = 1 - \frac{|\{\arg\max s = c\} \cap \{\arg\max t = c\}|}{|\{\arg\max s = c\} \cup \{\arg\max t = c\}|}$$

    **Convention.** Counted over the `valid` pixels of the whole batch; 0 for a class that neither map has. No gradient.

    **Source.** Our reading of DUDA (WACV 2026), whose exact definition is not public to us.

    Args:
        student_logits: logits or probabilities; only the arg-max matters.
        teacher_logits: likewise, of the teacher.
        resize: whose size both take, linearly, when they differ: "student", "teacher", or "error" to refuse.
        valid: True where a pixel counts, at the size after `resize`.

    Returns:
        (C,) in [0, 1], float32.

    Raises:
        TypeError: tensors that are not float, or a `valid` that is not bool.
        ValueError: unlike shapes, or an unknown `resize`.

    Example:
        >>> import torch
        >>> student = torch.eye(3)[[0, 0, 1]].T.reshape(1, 3, 1, 3)
        >>> teacher = torch.eye(3)[[0, 1, 1]].T.reshape(1, 3, 1, 3)
        >>> class_inconsistency(student, teacher)
        tensor([0.5000, 0.5000, 0.0000])
    """
    check_option("resize", resize, RESIZES)
    student, teacher = match_logits(student_logits, teacher_logits, resize)
    if valid is not None:
        check_mask_like(valid, student, reference_name="student_logits")
    counts = _overlap(top_class(student), top_class(teacher), valid, student.shape[1])
    return _ratio(*counts[:2].float())


def _overlap(ours: Tensor, theirs: Tensor, valid: Tensor | None, c: int) -> Tensor:
    """Pixels of each class in the intersection and in the union of two label maps, and in the second: (3, C) int64."""
    # A pixel counts for its pair of classes, or for one bin more; integers, so the order of the sum is no matter.
    pairs = torch.add(theirs, ours, alpha=c)
    if valid is not None:
        pairs = torch.where(valid, pairs, c * c)
    confusion = count_ids(pairs, c * c + (valid is not None))[: c * c].view(c, c)
    both, second = confusion.diagonal(), confusion.sum(0)
    return torch.stack([both, second + confusion.sum(1) - both, second])


def _ratio(intersection: Tensor, union: Tensor) -> Tensor:
    return (union - intersection) / union.clamp_min(torch.finfo(union.dtype).tiny)  # 0 where there is neither


def inconsistency_loss(
    student_logits: Float[Tensor, "n c *space"],
    teacher_logits: Float[Tensor, "n c *space2"],
    inconsistency: Float[Tensor, "c"],
    *,
    weight_range: tuple[float, float] = (0.5, 2.0),
    weight_temperature: float = 1.0,
    temperature: float = 1.0,
    weight_fn: WeightFn | None = None,
    teacher_kind: Kind = "logits",
    resize: Resize = "error",
    valid: Bool[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Distillation in which a pixel weighs by the inconsistency of the teacher's class there.

    $$\ell_p = \frac{w_{k(p)}}{\bar w}\, \mathrm{kd}_p, \qquad
    w = \operatorname{clip}\!\left(C \operatorname{softmax}(d / \tau),\ \text{weight\_range}\right), \qquad
    k(p) = \arg\max_c t_p$$

    **Convention.** `kd_loss` with a pixel weight of mean 1 over the valid pixels of the batch: equal inconsistency
    everywhere gives plain `kd_loss`, and so does a batch whose classes the
    formula gives no weight. Weights and teacher are detached. "mean" divides by the number of `valid` pixels.

    **Source.** The idea is DUDA's (WACV 2026): stress the classes that the small net adapts worst. The formula is
    ours, since the paper's is not public to us; `weight_fn` replaces it.

    Args:
        student_logits: the net that learns, before the softmax.
        teacher_logits: the net that teaches: logits, or probabilities by `teacher_kind`.
        inconsistency: d of each class, from `class_inconsistency` or its moving average.
        weight_range: lowest and highest w before it is divided by its mean.
        weight_temperature: tau > 0; a small one tells the classes further apart.
        temperature: T of `kd_loss`.
        weight_fn: d (C,) -> w (C,), finite and not negative, in place of the formula; divided by its mean likewise.
        teacher_kind: "logits" | "probabilities".
        resize: whose size both take, linearly, when they differ: "student", "teacher", or "error" to refuse.
        valid: True where a pixel counts, at the size after `resize`.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: tensors that are not float, or a `valid` that is not bool.
        ValueError: unlike shapes, or an option out of range.

    Example:
        >>> import torch
        >>> student = torch.randn(2, 5, 8, 8, requires_grad=True)
        >>> teacher = torch.randn(2, 5, 8, 8)
        >>> d = class_inconsistency(student, teacher)
        >>> inconsistency_loss(student, teacher, d).backward()
        >>> plain = inconsistency_loss(student, teacher, torch.full((5,), 0.3))
        >>> bool((plain - kd_loss(student, teacher)).abs() < 1e-5)
        True
    """
    _check_options(weight_range, weight_temperature, temperature, weight_fn, teacher_kind, resize, reduction)
    student, teacher = match_logits(student_logits, teacher_logits, resize, teacher_kind)
    check_float("inconsistency", inconsistency)
    check_per_class(
        "inconsistency", inconsistency, student.shape[1], reference=student_logits, reference_name="student_logits"
    )
    if valid is not None:
        check_mask_like(valid, student, reference_name="student_logits")
    labels = top_class(teacher)
    pixel_weight = _pixel_weight(
        labels,
        _count_classes(labels, valid, student.shape[1]),
        inconsistency,
        _default_weight(weight_range, weight_temperature) if weight_fn is None else weight_fn,
        keep_zero=weight_fn is not None,
        whole=valid is None,
    )
    return kd_loss(
        student,
        teacher,
        temperature=temperature,
        teacher_kind=teacher_kind,
        valid=valid,
        pixel_weight=pixel_weight,
        reduction=reduction,
    )


def _count_classes(labels: Tensor, valid: Tensor | None, c: int) -> Tensor:
    return count_ids(labels if valid is None else labels.where(valid, c), c + (valid is not None))[:c]


def _pixel_weight(
    labels: Tensor, counts: Tensor, inconsistency: Tensor, weigh: WeightFn, *, keep_zero: bool, whole: bool
) -> Tensor:
    """The weight of the teacher's class at each pixel, of mean 1 over the pixels of `counts` (C,), all if `whole`.

    All of it is arithmetic on C numbers, and one look-up at the end.
    """
    d = upcast(inconsistency.detach())
    w = weigh(d)
    if not isinstance(w, Tensor) or w.shape != d.shape:
        raise ValueError(f"Expected `weight_fn` to return a tensor (C,) = {shape_of(d)}, but got {kind_of(w)}.")
    w = w.detach() * (counts > 0)  # or a weight that no valid pixel has would overflow below
    # By the largest first: what is left of a class after a sharp softmax may be too small to divide by.
    tiny = torch.finfo(w.dtype).tiny
    largest = w.amax()
    w = w / largest.clamp_min(tiny)
    mean = (w * counts).sum() / (max(labels.numel(), 1) if whole else counts.sum().clamp_min(1))
    w = w / mean.clamp_min(tiny)
    if not keep_zero:  # where the formula leaves no valid pixel a weight all weigh alike; a `weight_fn` may mean it
        w = torch.where(largest > tiny, w, 1)
    return w[labels]


def _default_weight(weight_range: tuple[float, float], weight_temperature: float) -> WeightFn:
    def weigh(d: Tensor) -> Tensor:
        d = d if weight_temperature == 1 else d / weight_temperature
        return (d.shape[0] * torch.softmax(d, dim=0)).clamp(*weight_range)

    return weigh


def _check_options(
    weight_range: tuple[float, float],
    weight_temperature: float,
    temperature: float,
    weight_fn: WeightFn | None,
    teacher_kind: str,
    resize: str,
    reduction: str,
) -> None:
    check_pair("weight_range", weight_range, "(low, high) with 0 <= low <= high", finite=False)
    if not 0 <= weight_range[0] <= weight_range[1]:
        raise ValueError(f"Expected `weight_range` to be (low, high) with 0 <= low <= high, but got {weight_range!r}.")
    if weight_fn is not None:
        check_callable("weight_fn", weight_fn, "weight_fn(inconsistency)")
    check_range("weight_temperature", weight_temperature, 0.0, open_low=True)
    check_range("temperature", temperature, 0.0, open_low=True)
    check_option("teacher_kind", teacher_kind, KINDS)
    check_option("resize", resize, RESIZES)
    check_reduction(reduction)


class InconsistencyLoss(FullPrecisionState):
    """[`inconsistency_loss`][udakit.losses.inconsistency_loss] that measures the inconsistency itself.

    **Convention.** In training mode every call first moves `intersection` and `union` (C,), moving averages of the
    pixel counts of the batches, and then weighs by their ratio; in eval mode it weighs only. Both averages start at 0,
    which their ratio does not see. A class that no batch has keeps its inconsistency.

    Args:
        num_classes: C.
        momentum: share of the old average that is kept at each call, in [0, 1).
        sync: add the ranks' pixel counts, as integers; every rank must make the call.
        weight_range: as in the function, like all further options.
        weight_temperature: tau.
        temperature: T.
        weight_fn: in place of the formula of the weight.
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
        check_integer("num_classes", num_classes)
        check_range("momentum", momentum, 0.0, 1.0, open_high=True)
        check_flag("sync", sync)
        _check_options(weight_range, weight_temperature, temperature, weight_fn, teacher_kind, resize, reduction)
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
        """The inconsistency of each class so far, in [0, 1]."""
        return _ratio(self.intersection, self.union)

    @property
    def class_weight(self) -> Float[Tensor, "c"]:
        """The weight w of each class so far, before it is divided by its mean over the pixels of a batch."""
        weigh = self.weight_fn or _default_weight(self.weight_range, self.weight_temperature)
        return weigh(self.inconsistency).detach()

    @torch.no_grad()
    def update(
        self,
        student_logits: Float[Tensor, "n c *space"],
        teacher_logits: Float[Tensor, "n c *space2"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> None:
        """Move the averages by one batch; training mode does it at every call."""
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
        """Move the averages by two label maps; return the pixels of each class in the second, of this rank."""
        counts = _overlap(ours, theirs, valid, self.union.shape[0])
        theirs = counts[2]
        if self.sync:
            counts = sum_ranks(counts[:2])
        # A class that stays away fades in both averages, which their ratio does not see, but not until they underflow.
        moved = ((self.union >= _FADED) | (counts[1] > 0)) * (1 - self.momentum)
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
        """Move the averages (training mode), then apply the function with them."""
        student, teacher = match_logits(student_logits, teacher_logits, self.resize, self.teacher_kind)
        self._check(student_logits, student, valid)
        labels = top_class(teacher)
        with torch.no_grad():
            if self.training:
                counts = self._move(top_class(student), labels, valid)
            else:
                counts = _count_classes(labels, valid, student.shape[1])
        weigh = self.weight_fn or _default_weight(self.weight_range, self.weight_temperature)
        pixel_weight = _pixel_weight(
            labels,
            counts,
            self.inconsistency,
            weigh,
            keep_zero=self.weight_fn is not None,
            whole=valid is None,
        )
        return kd_loss(
            student,
            teacher,
            temperature=self.temperature,
            teacher_kind=self.teacher_kind,
            valid=valid,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        weight = "" if self.weight_fn is None else f"weight_fn={getattr(self.weight_fn, '__name__', 'custom')}, "
        return (
            f"num_classes={self.union.shape[0]}, momentum={self.momentum}, sync={self.sync}, "
            f"weight_range={self.weight_range}, weight_temperature={self.weight_temperature}, "
            f"temperature={self.temperature}, {weight}teacher_kind={self.teacher_kind!r}, resize={self.resize!r}, "
            f"reduction={self.reduction!r}"
        )
