"""Shared code of the selectors that compare features with class prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import check_device, check_option, kind_of
from udakit._reduce import KINDS, Kind, interpolate, plain
from udakit.prototypes import ClassPrototypes
from udakit.pseudo_labels.adaptive_threshold import check_class_scores
from udakit.pseudo_labels.selection import (
    PseudoLabels,
    Selector,
    check_features,
    check_not_all,
    with_excluded,
    without,
)


class PrototypeSelector(Selector):
    """Base class of the selectors that need features and refer to a `ClassPrototypes` without owning it."""

    def __init__(self, prototypes: ClassPrototypes, *, ignore_index: int, exclude: Sequence[int]) -> None:
        super().__init__(ignore_index=ignore_index, exclude=exclude)
        if not isinstance(prototypes, ClassPrototypes):
            raise TypeError(
                f"Expected `prototypes` to be a ClassPrototypes, but got {kind_of(prototypes)}. "
                "Make one from a tensor (C, D) with ClassPrototypes(C, D).set_(tensor)."
            )
        check_not_all(self.exclude, prototypes.num_classes)
        self._reference = (prototypes,)  # a tuple keeps nn.Module from registering it

    @property
    def prototypes(self) -> ClassPrototypes:
        """The prototypes to compare with."""
        return self._reference[0]

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels. `features` of any stride are required; all selectors share the other arguments.

        Raises:
            TypeError: `features` are missing or not float.
            ValueError: the shapes, the numbers of classes or the batch sizes do not match.
        """
        features = self.needed(logits, features, kind)
        with torch.no_grad():
            scores, kind = self.scores(logits, features, kind)
        return super().forward(scores, features, kind=kind, valid=valid)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def scores(self, logits: Tensor, features: Tensor, kind: Kind) -> tuple[Tensor, Kind]:
        """The scores whose arg-max is the label, and their kind; by default those that were given."""
        return logits, kind

    def needed(self, logits: Tensor, features: Tensor | None, kind: Kind) -> Tensor:
        """The features, checked together with the logits; raise if there are none."""
        if features is None:
            raise TypeError(
                "Expected `features` to be a float tensor (N, D, *space), but got None. "
                "Pass them after the logits, for example those of udakit.FeatureTap."
            )
        check_option("kind", kind, KINDS)
        check_class_scores(logits, kind, self.prototypes.num_classes)
        check_features(features, logits)
        check_device("features", features, logits, "logits")
        return features

    def nearness(
        self,
        features: Tensor,
        size: Sequence[int],
        *,
        temperature: float = 1.0,
        exclude: tuple[int, ...] = (),
        include_unseen: bool = False,
        align_corners: bool = False,
    ) -> Tensor:
        """Softmax of the negative distances to the prototypes, upsampled after the softmax to (N, C, *size)."""
        distance = self.prototypes.distances(plain(features), include_unseen=include_unseen)
        if exclude:
            distance = with_excluded(without(distance, exclude), exclude, float("inf"))
        # A finite maximum instead of +inf keeps the softmax finite while no class has been seen.
        distance = distance.clamp_max(torch.finfo(distance.dtype).max)
        near = F.softmax(-distance if temperature == 1 else -distance / temperature, dim=1)
        if near.shape[2:] == tuple(size):
            return near
        return interpolate(near, size, align_corners=align_corners, name="features")
