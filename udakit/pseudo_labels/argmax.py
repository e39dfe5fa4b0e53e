"""The arg-max of every pixel as its pseudo-label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._reduce import Kind
from udakit.pseudo_labels.selection import (
    PseudoLabels,
    check_exclude,
    check_features,
    expand_valid,
    is_predicted,
    predict,
)


class ArgmaxSelector(nn.Module):
    """Keep the arg-max class of every pixel, with weight 1.

    **Convention.** The results are detached. A pixel that is not `valid` keeps its label and has weight 0. `accepted`
    is 1 for a class that is predicted at a valid pixel, and 0 for other classes.

    **Source.** EHTDI trains on all pixels of its pseudo-labels.

    Args:
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

    Example:
        >>> import torch
        >>> logits = torch.tensor([2.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
        >>> labels, confidence, weight, accepted = ArgmaxSelector()(logits)
        >>> labels.tolist(), weight.tolist(), accepted.tolist()
        ([[[0, 0]]], [[[1.0, 1.0]]], [1.0, 0.0, 0.0])
    """

    def __init__(self, *, exclude: Sequence[int] = ()) -> None:
        super().__init__()
        self.exclude = check_exclude(exclude)

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels. All selectors share these arguments; `ThresholdSelector.forward` explains them."""
        with torch.no_grad():
            labels, confidence = predict(logits, kind, self.exclude)
            check_features(features, logits)
            valid = None if valid is None else expand_valid(valid, logits)
            weight = torch.ones_like(confidence) if valid is None else valid.float()
            return PseudoLabels(labels, confidence, weight, is_predicted(labels, valid, logits.shape[1]).float())

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"exclude={self.exclude}" if self.exclude else ""
