"""Pseudo-labels that two views of the same pixel agree on (DiGA's bilateral consensus)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from udakit._checks import (
    check_device,
    check_flag,
    check_ignore_index,
    check_label_map,
    check_same_shape,
    kind_of,
    shape_of,
)
from udakit._reduce import Kind, interpolate, plain, top_class
from udakit.prototypes import ClassPrototypes
from udakit.pseudo_labels.selection import PseudoLabels, Selector


def bilateral_consensus(
    labels_a: Integer[Tensor, "n *space"], labels_b: Integer[Tensor, "n *space"], *, ignore_index: int = 255
) -> Int64[Tensor, "n *space"]:
    r"""Keep a label where two label maps agree.

    $$\hat y_p = \begin{cases} a_p & a_p = b_p \\ \text{ignore} & \text{otherwise} \end{cases}$$

    **Convention.** No threshold. A pixel that either map ignores is ignored.

    **Source.** DiGA: the classifier's labels and those of the nearest class centroid.

    Args:
        labels_a: class ids or `ignore_index`, int64 or uint8.
        labels_b: the other view of the same pixels.
        ignore_index: the label of what is rejected.

    Returns:
        int64 (N, *space).

    Raises:
        TypeError: `labels` is neither int64 nor uint8.
        ValueError: the shapes do not match.

    Example:
        >>> import torch
        >>> bilateral_consensus(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0, 2, 255]]]))
        tensor([[[  0, 255, 255]]])
    """
    check_ignore_index(ignore_index)
    check_label_map(labels_a, name="labels_a")
    check_label_map(labels_b, name="labels_b")
    check_same_shape(labels_b, labels_a, name="labels_b", reference_name="labels_a")
    labels = labels_a.long()
    return labels.where(labels == labels_b, ignore_index)


class BilateralConsensus(Selector):
    r"""Keep the arg-max of the classifier where the nearest class prototype agrees.

    $$\hat y_p = \arg\max_c p_c \quad\text{where it equals}\quad
    \arg\max_c \operatorname{upsample}\!\left(\operatorname{softmax}_c(-\lVert f - \eta_c \rVert_2)\right)_p$$

    **Convention.** Detached; no threshold. The similarities, not the features, are upsampled (linearly) to the logits'
    size, then the arg-max is taken. Rejected pixels, and those that are not `valid`, have label `ignore_index` and
    weight 0. `accepted` is the consensus rate: the share of the pixels classified as c whose prototype says c. A class
    without a prototype is never agreed on.

    **Source.** DiGA; its released code interpolates with `align_corners=True` and lets the zero vectors of classes
    never seen compete: `include_unseen=True`.

    Args:
        prototypes: referred to, not owned: it is no submodule, so it appears in no second `state_dict`.
        align_corners: of the linear upsampling.
        include_unseen: let classes never seen compete as zero vectors.
        ignore_index: the label of what is rejected.
        exclude: ids of classes that are never predicted; arg-max and confidence are those of the others.

    Example:
        >>> import torch
        >>> prototypes = ClassPrototypes(2, 1).set_(torch.tensor([[-1.0], [1.0]]))
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
        >>> BilateralConsensus(prototypes)(logits, torch.tensor([-1.0, -1.0]).view(1, 1, 1, 2)).labels
        tensor([[[  0, 255]]])
    """

    def __init__(
        self,
        prototypes: ClassPrototypes,
        align_corners: bool = False,
        *,
        include_unseen: bool = False,
        ignore_index: int = 255,
        exclude: Sequence[int] = (),
    ) -> None:
        super().__init__(ignore_index=ignore_index, exclude=exclude)
        check_flag("align_corners", align_corners)
        check_flag("include_unseen", include_unseen)
        if not isinstance(prototypes, ClassPrototypes):
            raise TypeError(
                f"Expected `prototypes` to be a ClassPrototypes, but got {kind_of(prototypes)}. "
                "ClassPrototypes(C, D).set_(tensor) makes one of a tensor (C, D)."
            )
        self._reference = (prototypes,)  # a tuple keeps nn.Module from registering it
        self.align_corners, self.include_unseen = align_corners, include_unseen

    @property
    def prototypes(self) -> ClassPrototypes:
        """The prototypes it compares with."""
        return self._reference[0]

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels; `features` of any stride are needed, the rest is that of every selector.

        Raises:
            TypeError: `features` that are missing or not float.
            ValueError: shapes, class numbers or batch sizes that do not match.
        """
        if features is None:
            raise TypeError(
                "Expected `features` to be a float tensor (N, D, *space), but got None. "
                "Pass them beside the logits, for example those of udakit.FeatureTap."
            )
        return super().forward(logits, features, kind=kind, valid=valid)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the label is that of the nearest prototype."""
        assert features is not None
        if num_classes != self.prototypes.num_classes:
            raise ValueError(
                f"Expected `logits` to be (N, C, *space) with C = {self.prototypes.num_classes}, as the prototypes, "
                f"but got C = {num_classes}."
            )
        nearest = self._nearest(features, labels)
        kept = (labels == nearest) if self.include_unseen else (labels == nearest) & self.prototypes.seen[labels]
        return kept if valid is None else kept & valid

    def _nearest(self, features: Tensor, labels: Tensor) -> Tensor:
        distance = self.prototypes.distances(plain(features), include_unseen=self.include_unseen)
        check_device("features", features, labels, "logits")
        if len(features) != len(labels):
            raise ValueError(
                f"Expected `features` to hold the {len(labels)} images of `logits`, but got {shape_of(features)}."
            )
        # A finite maximum in place of +inf keeps the softmax finite while no class at all is seen.
        similarity = F.softmax(-distance.clamp_max(torch.finfo(distance.dtype).max), dim=1)
        return top_class(interpolate(similarity, labels.shape[1:], align_corners=self.align_corners))

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"align_corners={self.align_corners}, include_unseen={self.include_unseen}, {super().extra_repr()}"
