"""Class inconsistency between a student and a teacher, and distillation that is weighted by it (after DUDA)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_callable,
    check_float,
    check_mask_like,
    check_option,
    check_pair,
    check_per_class,
    check_range,
    kind_of,
    shape_of,
)
from udakit._reduce import KINDS, Kind, Reduction, check_reduction, count_ids, look_up, top_class, upcast
from udakit.losses.kd import RESIZES, Resize, match_logits, matched_kd_loss

WeightFn = Callable[[Tensor], Tensor]


def class_inconsistency(
    student_logits: Float[Tensor, "n c *space"],
    teacher_logits: Float[Tensor, "n c *space2"],
    *,
    resize: Resize = "error",
    valid: Bool[Tensor, "n *space"] | None = None,
) -> Float[Tensor, "c"]:
    r"""How much student and teacher disagree on each class.

    $$d_c = 1 - \frac{|\{\arg\max s = c\} \cap \{\arg\max t = c\}|}{|\{\arg\max s = c\} \cup \{\arg\max t = c\}|}$$

    **Convention.** Pixels are counted over the whole batch, `valid` ones only. A class that is in neither map gets 0.
    There is no gradient.

    **Source.** Our reading of DUDA (WACV 2026). Its exact definition was not available to us.

    Args:
        student_logits: the student's logits or probabilities; only their arg-max matters.
        teacher_logits: the teacher's logits or probabilities.
        resize: what to do when the sizes differ: "error" raises, "student" or "teacher" resizes the other map to that
            net's size by linear interpolation.
        valid: True where a pixel counts, at the size after `resize`.

    Returns:
        The inconsistency of each class, (C,), in [0, 1], float32.

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or `resize` is unknown.

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
    counts = class_overlap(top_class(student), top_class(teacher), valid, student.shape[1])
    return inconsistency_of(*counts[:2].float())


def class_overlap(ours: Tensor, theirs: Tensor, valid: Tensor | None, c: int) -> Tensor:
    """Pixels of each class in the intersection and in the union of two label maps, and in the second: (3, C) int64."""
    # A pixel counts for its pair of classes, or for one extra bin. Integers make the sum independent of the order.
    pairs = torch.add(theirs, ours, alpha=c)
    if valid is not None:
        pairs = torch.where(valid, pairs, c * c)
    confusion = count_ids(pairs, c * c + (valid is not None))[: c * c].view(c, c)
    both, second = confusion.diagonal(), confusion.sum(0)
    return torch.stack([both, second + confusion.sum(1) - both, second])


def inconsistency_of(intersection: Tensor, union: Tensor) -> Tensor:
    """1 - IoU of each class, (C,), from pixel counts or their averages."""
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
    r"""Distillation that weights each pixel by the inconsistency of the class that the teacher predicts there.

    $$\ell_p = \frac{w_{k(p)}}{\bar w}\, \mathrm{kd}_p, \qquad
    w = \operatorname{clip}\!\left(C \operatorname{softmax}(d / \tau),\ \text{weight range}\right), \qquad
    k(p) = \arg\max_c t_p$$

    **Convention.** This is `kd_loss` with pixel weights that average 1 over the valid pixels of the batch. If all
    classes are equally inconsistent, or if the formula gives weight 0 to every class in the batch, it equals plain
    `kd_loss`. Weights and teacher are detached. "mean" divides by the number of `valid` pixels.

    **Source.** The idea is from DUDA (WACV 2026): give more weight to the classes that the small net adapts worst. The
    formula is ours, because the paper's was not available to us; `weight_fn` replaces it.

    Args:
        student_logits: the student's logits, before the softmax.
        teacher_logits: the teacher's logits, or its probabilities with `teacher_kind="probabilities"`.
        inconsistency: d of each class, (C,), from `class_inconsistency` or its moving average.
        weight_range: lowest and highest w, before it is divided by its mean.
        weight_temperature: tau > 0; a smaller value increases the differences between the weights.
        temperature: T of `kd_loss`.
        weight_fn: function that replaces the formula: it takes d (C,) and returns w (C,), finite and not negative. Its
            result is divided by its mean, too.
        teacher_kind: "logits" | "probabilities".
        resize: what to do when the sizes differ: "error" raises, "student" or "teacher" resizes the other map to that
            net's size by linear interpolation.
        valid: True where a pixel counts, at the size after `resize`.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> from udakit.losses import kd_loss
        >>> student = torch.randn(2, 5, 8, 8, requires_grad=True)
        >>> teacher = torch.randn(2, 5, 8, 8)
        >>> d = class_inconsistency(student, teacher)
        >>> inconsistency_loss(student, teacher, d).backward()
        >>> plain = inconsistency_loss(student, teacher, torch.full((5,), 0.3))
        >>> bool((plain - kd_loss(student, teacher)).abs() < 1e-5)
        True
    """
    check_options(weight_range, weight_temperature, temperature, weight_fn, teacher_kind, resize, reduction)
    student, teacher = match_logits(student_logits, teacher_logits, resize, teacher_kind)
    check_float("inconsistency", inconsistency)
    check_per_class(
        "inconsistency", inconsistency, student.shape[1], reference=student_logits, reference_name="student_logits"
    )
    if valid is not None:
        check_mask_like(valid, student, reference_name="student_logits")
    labels = top_class(teacher)
    pixel_weight = normalised_weight(
        labels,
        count_teacher_classes(labels, valid, student.shape[1]),
        inconsistency,
        default_weight(weight_range, weight_temperature) if weight_fn is None else weight_fn,
        keep_zero=weight_fn is not None,
        whole=valid is None,
    )
    return matched_kd_loss(student, teacher, temperature, "cross_entropy", teacher_kind, valid, pixel_weight, reduction)


def count_teacher_classes(labels: Tensor, valid: Tensor | None, c: int) -> Tensor:
    """Valid pixels of each class in a label map, (C,) int64."""
    return count_ids(labels if valid is None else labels.where(valid, c), c + (valid is not None))[:c]


def normalised_weight(
    labels: Tensor, counts: Tensor, inconsistency: Tensor, weigh: WeightFn, *, keep_zero: bool, whole: bool
) -> Tensor:
    """The weight of the teacher's class at each pixel, with mean 1 over the pixels in `counts` (C,), all if `whole`.

    This is arithmetic on C numbers and one look-up at the end.
    """
    d = upcast(inconsistency.detach())
    w = weigh(d)
    if not isinstance(w, Tensor) or w.shape != d.shape:
        raise ValueError(f"Expected `weight_fn` to return a tensor (C,) = {shape_of(d)}, but got {kind_of(w)}.")
    w = w.detach() * (counts > 0)  # otherwise a weight that no valid pixel has would overflow below
    # Divide by the largest first: after a sharp softmax, what is left of a class may be too small to divide by.
    tiny = torch.finfo(w.dtype).tiny
    largest = w.amax()
    w = w / largest.clamp_min(tiny)
    mean = (w * counts).sum() / (max(labels.numel(), 1) if whole else counts.sum().clamp_min(1))
    w = w / mean.clamp_min(tiny)
    if not keep_zero:  # if the formula gives every valid pixel weight 0, use 1; a `weight_fn` may mean 0
        w = torch.where(largest > tiny, w, 1)
    return look_up(w, labels)


def default_weight(weight_range: tuple[float, float], weight_temperature: float) -> WeightFn:
    """Return the formula of the weight: inconsistency (C,) to weight (C,)."""

    def weigh(d: Tensor) -> Tensor:
        d = d if weight_temperature == 1 else d / weight_temperature
        return (d.shape[0] * torch.softmax(d, dim=0)).clamp(*weight_range)

    return weigh


def check_options(
    weight_range: tuple[float, float],
    weight_temperature: float,
    temperature: float,
    weight_fn: WeightFn | None,
    teacher_kind: str,
    resize: str,
    reduction: str,
) -> None:
    """Raise for an option that `inconsistency_loss` does not have."""
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
