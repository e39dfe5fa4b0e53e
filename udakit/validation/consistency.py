"""Agreement between two predictions of a net for the same scene, measured as IoU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_classes,
    check_device,
    check_flag,
    check_integer,
    check_mask_like,
    check_option,
    check_range,
    check_same_shape,
    check_scores,
    shape_of,
)
from udakit._state import FullPrecisionState, sum_ranks

Scope = Literal["image", "batch"]
SCOPES = get_args(Scope)


def consistency_score(
    logits: Float[Tensor, "n c *space"],
    perturbed_logits: Float[Tensor, "n c *space"],
    *,
    background: int | None = None,
    scope: Scope = "image",
    valid: Bool[Tensor, "n *space"] | None = None,
) -> Float[Tensor, "n"] | Float[Tensor, ""]:
    r"""Agreement of two predictions: the mean IoU of their label maps, or the agreement inside their foregrounds.

    $$\frac{1}{|K|} \sum_{c \in K} \frac{|A_c \cap B_c|}{|A_c \cup B_c|}, \qquad
    1 - \frac{\#\{p \in F : a_p \ne b_p\}}{\#F}, \quad F = \{p : a_p \ne \text{background or } b_p \ne
    \text{background}\}$$

    The first formula is without a `background` and the second with one. Here a and b are the two arg-max maps, $A_c$
    and $B_c$ are their pixels of class c, and K is the set of classes in either map.

    **Convention.** The result is detached. The counts are over the `valid` pixels of each image or of the whole batch.
    If the union is empty, there is nothing to compare and the result is NaN; use `nanmean` for a mean over images. A
    pixel with a NaN prediction agrees with nothing.

    **Source.** With a background, this is the consistency score of CMR (Kutra et al. 2026), which takes the median over
    images. Without one, the score is ours.

    Args:
        logits: one prediction, as logits or probabilities; only the arg-max matters.
        perturbed_logits: the other prediction, for the same pixels.
        background: the class that counts only where the other map has another class; None treats all classes equally.
        scope: "image" | "batch".
        valid: True where a pixel counts.

    Returns:
        The agreement in [0, 1], higher is more consistent, float32: (N,) for "image" or () for "batch".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, `scope` is unknown, or `background` is not a class.

    Example:
        >>> import torch
        >>> a = torch.eye(2)[[0, 0, 1, 1]].T.view(1, 2, 4)
        >>> b = torch.eye(2)[[0, 1, 1, 1]].T.view(1, 2, 4)
        >>> consistency_score(a, b), consistency_score(a, b, background=0)
        (tensor([0.5833]), tensor([0.6667]))
    """
    check_option("scope", scope, SCOPES)
    check_scores("logits", logits)
    _check_background(background, logits.shape[1])
    counts = _overlap(logits, perturbed_logits, valid, background)
    if scope == "batch":
        counts = counts.sum(0)
    return _score(counts, background is not None)


class ConsistencyScore(FullPrecisionState):
    """[`consistency_score`][udakit.validation.consistency_score] of a whole data set, accumulated over its batches.

    **Convention.** Intersections and unions (int64) add up over batches and, with `sync`, over ranks; the result is
    bit-equal to that of one process. A call adds a batch and returns the scores of that batch, like the function.

    Attributes:
        overlap: int64 buffer (2, C), the pixels in the intersection and in the union of each class. With a background,
            the first column holds the number of agreeing pixels inside the foregrounds and the size of the foregrounds.

    Args:
        num_classes: C, at least 2.
        background: see the function.
        scope: "image" | "batch", for the result of a call.

    Example:
        >>> import torch
        >>> score = ConsistencyScore(3)
        >>> logits = torch.eye(3).view(1, 3, 3)
        >>> for shift in (0, 1):
        ...     _ = score(logits, logits.roll(shift, 2))
        >>> score.compute(), score.class_iou
        (tensor(0.3333), tensor([0.3333, 0.3333, 0.3333]))
    """

    overlap: Tensor

    def __init__(self, num_classes: int, *, background: int | None = None, scope: Scope = "image") -> None:
        super().__init__()
        check_classes(num_classes)
        check_option("scope", scope, SCOPES)
        _check_background(background, num_classes)
        self.num_classes, self.background = num_classes, background
        self.scope: Scope = scope
        self.register_buffer("overlap", torch.zeros(2, num_classes, dtype=torch.int64))

    @property
    def class_iou(self) -> Float[Tensor, "c"]:
        """IoU of each class between the two predictions, (C,); NaN for a class that is in neither."""
        if self.background is not None:
            raise ValueError("Expected `background` to be None for scores of single classes, but got a background.")
        return _ratio(self.overlap[0], self.overlap[1])

    def reset(self) -> None:
        """Reset to the initial state."""
        self.overlap.zero_()

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        perturbed_logits: Float[Tensor, "n c *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Float[Tensor, "n"] | Float[Tensor, ""]:
        """Add a batch and return its scores. The arguments are those of the function."""
        check_scores("logits", logits)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"Expected `logits` to have {self.num_classes} classes, but got {shape_of(logits)}.")
        check_device("overlap", self.overlap, logits, "logits")
        counts = _overlap(logits, perturbed_logits, valid, self.background)
        self.overlap.add_(counts.sum(0))
        return _score(counts if self.scope == "image" else counts.sum(0), self.background is not None)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def compute(self, *, sync: bool = False) -> Float[Tensor, ""]:
        """Return the score of all pixels so far, with `sync` those of all ranks; NaN before the first batch."""
        check_flag("sync", sync)
        return _score(sum_ranks(self.overlap) if sync else self.overlap, self.background is not None)

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"num_classes={self.num_classes}, background={self.background}, scope={self.scope!r}"


def _check_background(background: int | None, classes: int) -> None:
    if background is not None:
        check_integer("background", background, 0)
        check_range("background", background, 0, classes - 1)


def _overlap(logits: Tensor, perturbed: Tensor, valid: Tensor | None, background: int | None) -> Tensor:
    """Pixels in the intersection and in the union of each class, or of the foregrounds, (N, 2, C) int64."""
    check_scores("perturbed_logits", perturbed)
    check_same_shape(perturbed, logits, name="perturbed_logits", reference_name="logits")
    if valid is not None:
        check_mask_like(valid, logits)
    n, c = logits.shape[:2]
    scores, a = logits.detach().flatten(2).max(1)
    others, b = perturbed.detach().flatten(2).max(1)
    agree = (a == b) & ~scores.isnan() & ~others.isnan()
    inside = torch.ones_like(agree) if valid is None else valid.flatten(1)
    if background is not None:
        inside = inside & ((a != background) | (b != background) | ~agree)
        pixels = torch.stack([(agree & inside).sum(1), inside.sum(1)], 1)
        return torch.nn.functional.pad(pixels.unsqueeze(2), (0, c - 1))
    counts = torch.zeros(n, 3, c, dtype=torch.int64, device=logits.device)
    for row, (ids, where) in enumerate(((a, inside & agree), (a, inside), (b, inside & (a != b)))):
        counts[:, row].scatter_add_(1, ids, where.long())
    return torch.stack([counts[:, 0], counts[:, 1] + counts[:, 2]], 1)


def _score(counts: Tensor, foreground: bool) -> Tensor:
    both, union = counts.unbind(-2)
    ratio = _ratio(both, union)
    return ratio[..., 0] if foreground else ratio.nanmean(-1)


def _ratio(both: Tensor, union: Tensor) -> Tensor:
    return (both.double() / union).float()  # 0 / 0 is NaN: nothing to compare
