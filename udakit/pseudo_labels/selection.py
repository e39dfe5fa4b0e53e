"""What every selector returns, and the frame that all of them share."""

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
from udakit._reduce import KINDS, Kind, by_blocks, count_ids, exp_, plain, top_by_blocks, upcast


class PseudoLabels(NamedTuple):
    """Pseudo-labels of a batch, all detached.

    Attributes:
        labels: int64 class ids, `ignore_index` where a selector rejects.
        confidence: float32 probability of the arg-max class, also where rejected.
        weight: float32 factor for a per-pixel loss (`pixel_weight`), 0 where rejected or not `valid`.
        accepted: float32 share of each predicted class's valid pixels that are used, at a weight above 0. 0 also for a
            class that is predicted nowhere: a class that stays at 0 is dying.
    """

    labels: Int64[Tensor, "n *space"]
    confidence: Float[Tensor, "n *space"]
    weight: Float[Tensor, "n *space"]
    accepted: Float[Tensor, "c"]

    @property
    def kept_pixels(self) -> Int64[Tensor, "c"]:
        """Pixels per class of positive weight, int64: adds up over steps and ranks."""
        return count_classes_where(self.labels, self.weight > 0, self.accepted.shape[0])


def predict(
    logits: Float[Tensor, "n c *space"], kind: Kind = "logits", exclude: tuple[int, ...] = ()
) -> tuple[Int64[Tensor, "n *space"], Float[Tensor, "n *space"]]:
    """Arg-max class and its probability, of logits or of probabilities, among the classes that are not excluded."""
    check_option("kind", kind, KINDS)
    check_scores("logits", logits, kind)
    logits = plain(logits.detach())
    if exclude:
        logits = without(logits, exclude)
    labels, confidence = _top(logits, kind)
    confidence = confidence.float()
    for class_id in exclude:  # in ascending order: back to the ids of all classes
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
    # The softmax at its largest entry: exact at any magnitude, where exp(max - logsumexp) rounds at the logits' size.
    return labels, exp_(upcast(logits) - upcast(score).unsqueeze(1)).sum(dim=1).reciprocal()


def without(logits: Tensor, exclude: tuple[int, ...]) -> Tensor:
    """The other classes alone."""
    c = logits.shape[1]
    if exclude[-1] >= c or len(exclude) == c:
        raise ValueError(
            f"Expected `exclude` to be some of the ids 0..{c - 1} of `logits` {shape_of(logits)}, but got {exclude}."
        )
    starts, stops = (0, *(i + 1 for i in exclude)), (*exclude, c)
    return torch.cat([logits[:, a:b] for a, b in zip(starts, stops, strict=True)], dim=1)


def others(scores: Tensor, kind: Kind, exclude: tuple[int, ...]) -> Tensor:
    """Probabilities, in float32 at least: those of the excluded classes are 0, the others sum to 1 without them."""
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
    """Put the excluded classes back, filled with `value`, along `dim`; `left` has the others alone."""
    total = left.shape[dim] + len(exclude)
    starts, stops = (0, *(i + 1 for i in exclude)), (*exclude, total)
    filled = torch.full_like(left.narrow(dim, 0, 1), value)
    parts: list[Tensor] = []
    for before, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        parts += [left.narrow(dim, start - before, stop - start), filled]
    return torch.cat(parts[:-1], dim)


def check_exclude(exclude: Sequence[int]) -> tuple[int, ...]:
    """Ascending ids of the classes that are never predicted; raise for what is none."""
    if not is_sequence(exclude) or not all(is_integer(i) and i >= 0 for i in exclude):
        raise TypeError(f"Expected `exclude` to be class ids, such as (0,), but got {exclude!r}.")
    return tuple(sorted({int(i) for i in exclude}))


def check_not_all(exclude: tuple[int, ...], num_classes: int) -> None:
    """Raise where no class is left, or where one that is excluded is none."""
    if exclude and (exclude[-1] >= num_classes or len(exclude) == num_classes):
        raise ValueError(f"Expected `exclude` to be some of the ids 0..{num_classes - 1}, but got {exclude}.")


def check_features(features: Tensor | None, logits: Tensor) -> None:
    """Raise for `features` that are none: a selector that takes no notice of them would not notice a mask there."""
    if features is None:
        return
    check_maps("features", features, "N, D", hint=" A mask goes by keyword: valid=mask.")
    if features.ndim != logits.ndim or len(features) != len(logits):
        raise ValueError(
            f"Expected `features` to be {space_form('N, D', logits.ndim - 2)} for `logits` {shape_of(logits)}, "
            f"but got {shape_of(features)}. Masks and weights go by keyword."
        )


def expand_valid(valid: Bool[Tensor, "n *space"] | Bool[Tensor, "h w"], logits: Float[Tensor, "n c *space"]) -> Tensor:
    """Check a `valid` mask and give one for all images, as `row_mask` makes it, to every image."""
    if isinstance(valid, Tensor) and valid.ndim == logits.ndim - 2:
        valid = valid.unsqueeze(0).expand(logits.shape[0], *valid.shape)
    check_mask_like(valid, logits)
    return valid


def count_classes_where(labels: Tensor, where: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class inside a mask, int64; other ids take no part (`bincount` would make a GPU wait)."""
    inside = where & (labels >= 0) & (labels < num_classes)
    return count_ids(labels.where(inside, num_classes), num_classes + 1)[:-1]


def is_predicted(labels: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Bool (C,): whether a class occurs among the valid pixels, where all `labels` are classes 0..C-1."""
    ids = labels if valid is None else labels.where(valid, num_classes)
    found = torch.zeros(num_classes + (valid is not None), dtype=torch.bool, device=labels.device)
    return found.index_fill_(0, ids.flatten(), True)[:num_classes]


def share_per_class(labels: Tensor, kept: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Share of each class's valid pixels that are kept, float32; 0 for a class without pixels.

    `labels` are all classes 0..C-1, and `kept` lies inside `valid`.
    """
    cell = torch.add(labels, kept, alpha=num_classes)  # a class has two cells, so that one pass counts both
    if valid is not None:
        cell = cell.where(valid, 2 * num_classes)
    counts = count_ids(cell, 2 * num_classes + (valid is not None))[: 2 * num_classes].view(2, num_classes)
    return counts[1] / counts.sum(0).clamp_min(1)


class Selector(nn.Module):
    """Frame of the selectors: `selector(logits, features=None, *, kind="logits", valid=None) -> PseudoLabels`.

    A subclass says in `keep` which pixels stay. What is not kept has label `ignore_index` and weight 0.
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
            logits: class scores, or probabilities by `kind`.
            features: what a prototype-based selector compares; the others take no notice.
            kind: "logits" | "probabilities".
            valid: False where a pixel takes no part, for example outside `row_mask`.

        Returns:
            `PseudoLabels`, detached.

        Raises:
            TypeError: `logits` that are not float, `valid` that is not bool.
            ValueError: shapes that do not match, or an unknown `kind`.
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
        """Bool (N, *space), False wherever `valid` is."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"ignore_index={self.ignore_index}" + (f", exclude={self.exclude}" if self.exclude else "")
