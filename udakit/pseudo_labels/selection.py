"""The result of every selector, and the code that all selectors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from udakit._checks import (
    check_ignore_index,
    check_maps,
    check_mask_like,
    check_option,
    check_scores,
    is_integer,
    is_sequence,
    shape_of,
    space_form,
)
from udakit._reduce import KINDS, Kind, by_blocks, count_ids, exp_, fraction, plain, top_by_blocks, upcast


class PseudoLabels(NamedTuple):
    """Pseudo-labels of a batch. All tensors are detached.

    Attributes:
        labels: int64 class ids, (N, *space); `ignore_index` where the selector rejects a pixel.
        confidence: float32 probability of the arg-max class, (N, *space), also where the pixel is rejected.
        weight: float32 weight of each pixel's loss, (N, *space), to be passed as `pixel_weight`. It is 0 where a pixel
            is rejected or not `valid`.
        accepted: float32 fraction of the valid pixels predicted as each class that have a weight above 0, (C,). It is 0
            for a class that is not predicted at all. If a class stays at 0, the net is losing it.
    """

    labels: Int64[Tensor, "n *space"]
    confidence: Float[Tensor, "n *space"]
    weight: Float[Tensor, "n *space"]
    accepted: Float[Tensor, "c"]

    @property
    def kept_pixels(self) -> Int64[Tensor, "c"]:
        """Number of pixels of each class with a positive weight, int64 (C,); it can be summed over steps and ranks."""
        return count_classes_where(self.labels, self.weight > 0, self.accepted.shape[0])


def predict(
    logits: Float[Tensor, "n c *space"], kind: Kind = "logits", exclude: tuple[int, ...] = ()
) -> tuple[Int64[Tensor, "n *space"], Float[Tensor, "n *space"]]:
    """The arg-max class and its probability, from logits or probabilities, among the classes that are not excluded."""
    check_option("kind", kind, KINDS)
    check_scores("logits", logits, kind)
    logits = plain(logits.detach())
    if exclude:
        logits = without(logits, exclude)
    labels, confidence = _top(logits, kind)
    confidence = confidence.float()
    for class_id in exclude:  # in ascending order, to restore the ids of all classes
        labels = labels + (labels >= class_id)
    if exclude and kind == "probabilities":
        confidence = confidence / logits.float().sum(dim=1).clamp_min(torch.finfo(confidence.dtype).tiny)
    return labels, confidence


def _top(logits: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """The largest probability and its class, in as few passes over the map as the device allows."""
    if by_blocks(logits):
        return top_by_blocks(logits, confidence=kind == "logits")
    if kind == "logits" and logits.device.type != "cpu":
        confidence, labels = upcast(logits).softmax(dim=1).max(dim=1)  # two launches
        return labels, confidence
    score, labels = logits.max(dim=1)
    if kind == "probabilities":
        return labels, score
    # The softmax at its largest entry. It is exact at any magnitude, while exp(max - logsumexp) loses precision.
    return labels, exp_(upcast(logits) - upcast(score).unsqueeze(1)).sum(dim=1).reciprocal()


def without(logits: Tensor, exclude: tuple[int, ...]) -> Tensor:
    """The logits of the classes that are not excluded."""
    c = logits.shape[1]
    if exclude[-1] >= c or len(exclude) == c:
        raise ValueError(
            f"Expected `exclude` to be some of the ids 0..{c - 1} of `logits` {shape_of(logits)}, but got {exclude}."
        )
    starts, stops = (0, *(i + 1 for i in exclude)), (*exclude, c)
    return torch.cat([logits[:, a:b] for a, b in zip(starts, stops, strict=True)], dim=1)


def others(scores: Tensor, kind: Kind, exclude: tuple[int, ...]) -> Tensor:
    """Probabilities in at least float32; excluded classes have 0, and the other classes sum to 1."""
    if not exclude:
        x = upcast(scores)
        return x.softmax(1) if kind == "logits" else x
    left = upcast(without(scores, exclude))
    if kind == "logits":
        left = left.softmax(1)
    else:
        left = left / left.sum(1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
    return with_excluded(left, exclude)


def with_excluded(left: Tensor, exclude: tuple[int, ...], value: float = 0.0, dim: int = 1) -> Tensor:
    """Insert the excluded classes, filled with `value`, along `dim` of `left`, which has the other classes."""
    total = left.shape[dim] + len(exclude)
    starts, stops = (0, *(i + 1 for i in exclude)), (*exclude, total)
    filled = torch.full_like(left.narrow(dim, 0, 1), value)
    parts: list[Tensor] = []
    for before, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        parts += [left.narrow(dim, start - before, stop - start), filled]
    return torch.cat(parts[:-1], dim)


def check_exclude(exclude: Sequence[int]) -> tuple[int, ...]:
    """Ascending ids of the classes that are never predicted; raise if they are not class ids."""
    if not is_sequence(exclude) or not all(is_integer(i) and i >= 0 for i in exclude):
        raise TypeError(f"Expected `exclude` to be class ids, such as (0,), but got {exclude!r}.")
    return tuple(sorted({int(i) for i in exclude}))


def check_not_all(exclude: tuple[int, ...], num_classes: int) -> None:
    """Raise if no class is left, or if an excluded id is not a class."""
    if exclude and (exclude[-1] >= num_classes or len(exclude) == num_classes):
        raise ValueError(f"Expected `exclude` to be some of the ids 0..{num_classes - 1}, but got {exclude}.")


def check_features(features: Tensor | None, logits: Tensor) -> None:
    """Raise unless `features` are features. Most selectors ignore them, so a mask passed there would go unnoticed."""
    if features is None:
        return
    check_maps("features", features, "N, D", hint=" Pass a mask by keyword: valid=mask.")
    if features.ndim != logits.ndim or len(features) != len(logits):
        raise ValueError(
            f"Expected `features` to be {space_form('N, D', logits.ndim - 2)} for `logits` {shape_of(logits)}, "
            f"but got {shape_of(features)}. Pass masks and weights by keyword."
        )


def expand_valid(valid: Bool[Tensor, "n *space"] | Bool[Tensor, "h w"], logits: Float[Tensor, "n c *space"]) -> Tensor:
    """Check a `valid` mask, and expand a mask without batch axis, such as that of `row_mask`, to all images."""
    if isinstance(valid, Tensor) and valid.ndim == logits.ndim - 2:
        valid = valid.unsqueeze(0).expand(logits.shape[0], *valid.shape)
    check_mask_like(valid, logits)
    return valid


def count_classes_where(labels: Tensor, where: Tensor, num_classes: int) -> Tensor:
    """Number of pixels of each class inside a mask, int64; other ids are ignored. `bincount` would block a GPU."""
    inside = where & (labels >= 0) & (labels < num_classes)
    return count_ids(labels.where(inside, num_classes), num_classes + 1)[:-1]


def is_predicted(labels: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Whether each class occurs among the valid pixels, bool (C,); all `labels` must be classes 0..C-1."""
    ids = labels if valid is None else labels.where(valid, num_classes)
    found = torch.zeros(num_classes + (valid is not None), dtype=torch.bool, device=labels.device)
    return found.index_fill_(0, ids.flatten(), True)[:num_classes]


def share_per_class(labels: Tensor, kept: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Fraction of the valid pixels of each class that are kept, float32 (C,); 0 for a class without pixels.

    All `labels` must be classes 0..C-1, and `kept` must be inside `valid`.
    """
    cell = torch.add(labels, kept, alpha=num_classes)  # two cells per class, so that one pass counts both
    if valid is not None:
        cell = cell.where(valid, 2 * num_classes)
    counts = count_ids(cell, 2 * num_classes + (valid is not None))[: 2 * num_classes].view(2, num_classes)
    return fraction(counts[1], counts.sum(0))


class Selector(nn.Module):
    """Base class of the selectors: `selector(logits, features=None, *, kind="logits", valid=None) -> PseudoLabels`.

    A subclass implements `keep`, which says which pixels are kept. Other pixels get the label `ignore_index` and weight
    0.
    """

    def __init__(self, *, ignore_index: int = 255, exclude: Sequence[int] = ()) -> None:
        super().__init__()
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        self.exclude = check_exclude(exclude)

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels.

        Args:
            logits: class scores before the softmax, (N, C, *space), or class probabilities with `kind="probabilities"`.
            features: features for the selectors that compare with prototypes; the others do not use them.
            kind: "logits" | "probabilities".
            valid: False where a pixel is left out, for example outside `row_mask`.

        Returns:
            `PseudoLabels`, detached.

        Raises:
            TypeError: `logits` is not a float tensor, or `valid` is not bool.
            ValueError: the shapes do not match, or `kind` is unknown.
        """
        with torch.no_grad():
            labels, confidence = predict(logits, kind, self.exclude)
            check_ignore_index(self.ignore_index, logits.shape[1])
            check_features(features, logits)
            valid = None if valid is None else expand_valid(valid, logits)
            kept = self.keep(labels, confidence, valid, logits.shape[1], features)
            return PseudoLabels(
                labels=labels.where(kept, self.ignore_index),
                confidence=confidence,
                weight=kept.float(),
                accepted=share_per_class(labels, kept, valid, logits.shape[1]),
            )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """The pixels to keep, bool (N, *space); False wherever `valid` is False."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"ignore_index={self.ignore_index}" + (f", exclude={self.exclude}" if self.exclude else "")
