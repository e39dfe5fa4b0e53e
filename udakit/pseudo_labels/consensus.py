"""Pseudo-labels on which two predictions for the same pixel agree (DiGA's bilateral consensus)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int64, Integer
from torch import Tensor

from udakit._checks import check_flag, check_ignore_index, check_label_map, check_same_shape
from udakit._reduce import look_up, top_class
from udakit.prototypes import ClassPrototypes
from udakit.pseudo_labels._by_prototypes import PrototypeSelector


def bilateral_consensus(
    labels_a: Integer[Tensor, "n *space"], labels_b: Integer[Tensor, "n *space"], *, ignore_index: int = 255
) -> Int64[Tensor, "n *space"]:
    r"""Keep the label of a pixel where two label maps agree.

    $$\hat y_p = \begin{cases} a_p & a_p = b_p \\ \text{ignore} & \text{otherwise} \end{cases}$$

    **Convention.** There is no threshold. A pixel that either map ignores is ignored.

    **Source.** DiGA, which compares the labels of the classifier with those of the nearest class centroid.

    Args:
        labels_a: class ids or `ignore_index`, int64 or uint8.
        labels_b: the other label map of the same pixels.
        ignore_index: the label of rejected pixels.

    Returns:
        The labels, int64 (N, *space).

    Raises:
        TypeError: a label map is neither int64 nor uint8.
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


class BilateralConsensus(PrototypeSelector):
    r"""Keep the arg-max of the classifier where the nearest class prototype agrees with it.

    $$\hat y_p = \arg\max_c p_c \quad\text{where it equals}\quad
    \arg\max_c \operatorname{upsample}\!\left(\operatorname{softmax}_c(-\lVert f - \eta_c \rVert_2)\right)_p$$

    **Convention.** The results are detached, and there is no threshold. The similarities (not the features) are
    upsampled linearly to the size of the logits before the arg-max is taken. Rejected pixels and pixels that are not
    `valid` have the label `ignore_index` and weight 0. `accepted` is the consensus rate: the fraction of the pixels
    classified as c at which the nearest prototype is also c. A class without a prototype is never accepted.

    **Source.** DiGA. Its released code interpolates with `align_corners=True`, and classes that were never seen compete
    as zero vectors (`include_unseen=True`).

    Args:
        prototypes: the prototypes to compare with. They do not become a submodule, so save their state separately.
        align_corners: option of the linear upsampling.
        include_unseen: whether classes that were never seen compete as zero vectors.
        ignore_index: the label of rejected pixels.
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

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
        super().__init__(prototypes, ignore_index=ignore_index, exclude=exclude)
        check_flag("align_corners", align_corners)
        check_flag("include_unseen", include_unseen)
        self.align_corners, self.include_unseen = align_corners, include_unseen

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the label is that of the nearest prototype."""
        assert features is not None
        near = self.nearness(
            features, labels.shape[1:], include_unseen=self.include_unseen, align_corners=self.align_corners
        )
        kept = labels == top_class(near)
        if not self.include_unseen:
            kept = kept & look_up(self.prototypes.seen, labels)
        return kept if valid is None else kept & valid

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"align_corners={self.align_corners}, include_unseen={self.include_unseen}, {super().extra_repr()}"
