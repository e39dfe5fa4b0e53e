"""What every selector returns, and the frame that all of them share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from udakit._checks import check_mask_like, check_option, check_scores
from udakit._reduce import KINDS, Kind, exp_, upcast


class PseudoLabels(NamedTuple):
    """Pseudo-labels of a batch, all detached.

    Attributes:
        labels: int64 class ids, `ignore_index` where a selector rejects.
        confidence: float32 probability of the arg-max class, also where rejected.
        weight: float32 factor for a per-pixel loss (`pixel_weight`), 0 where rejected or not `valid`.
        accepted: float32 share of each predicted class's valid pixels that were kept. 0 also for a class that is
            predicted nowhere: a class that stays at 0 is dying.
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
    logits: Float[Tensor, "n c *space"], kind: Kind = "logits"
) -> tuple[Int64[Tensor, "n *space"], Float[Tensor, "n *space"]]:
    """Arg-max class and its probability, of logits or of probabilities."""
    check_option("kind", kind, KINDS)
    check_scores("logits", logits, kind)
    score, labels = logits.detach().max(dim=1)
    if kind == "probabilities":
        return labels, score.float()
    # The softmax at its largest entry: exact at any magnitude, where exp(max - logsumexp) rounds at the logits' size.
    scores = upcast(logits.detach())
    return labels, exp_(scores - upcast(score).unsqueeze(1)).sum(dim=1).reciprocal().float()


def expand_valid(valid: Bool[Tensor, "n *space"] | Bool[Tensor, "h w"], logits: Float[Tensor, "n c *space"]) -> Tensor:
    """Check a `valid` mask and give one for all images, as `row_mask` makes it, to every image."""
    if isinstance(valid, Tensor) and valid.ndim == logits.ndim - 2:
        valid = valid.unsqueeze(0).expand(logits.shape[0], *valid.shape)
    check_mask_like(valid, logits)
    return valid


def count_classes_where(labels: Tensor, where: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class inside a mask, int64; other ids take no part (`bincount` would make a GPU wait)."""
    inside = where & (labels >= 0) & (labels < num_classes)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    return counts.index_add(0, labels.where(inside, 0).flatten(), inside.flatten().long())


def share_per_class(labels: Tensor, kept: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Share of each class's valid pixels that are kept, float32; 0 for a class without pixels."""
    within = torch.ones_like(kept) if valid is None else valid
    predicted = count_classes_where(labels, within, num_classes)
    return count_classes_where(labels, kept, num_classes) / predicted.clamp_min(1)


class Selector(nn.Module):
    """Frame of the selectors: `selector(logits, features=None, *, kind="logits", valid=None) -> PseudoLabels`.

    A subclass says in `keep` which pixels stay. What is not kept has label `ignore_index` and weight 0.
    """

    def __init__(self, *, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

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
            labels, confidence = predict(logits, kind)
            valid = None if valid is None else expand_valid(valid, logits)
            kept = self.keep(labels, confidence, valid, logits.shape[1], features)
            return PseudoLabels(
                labels=labels.where(kept, self.ignore_index),
                confidence=confidence,
                weight=kept.float(),
                accepted=share_per_class(labels, kept, valid, logits.shape[1]),
            )

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Bool (N, *space), False wherever `valid` is."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"ignore_index={self.ignore_index}"
