"""Contrast between the class means of two views of an image (EHTDI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from udakit._checks import (
    check_ignore_index,
    check_integer,
    check_labels_like,
    check_range,
    check_same_shape,
    check_scores,
)
from udakit._reduce import Reduction, check_reduction, reduce_pixels
from udakit.losses._matmul import matmul
from udakit.prototypes import class_means


def prototype_contrast_loss(
    view_a: Float[Tensor, "n d *space"],
    view_b: Float[Tensor, "n d *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    num_classes: int,
    temperature: float = 1 / 7,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n"]:
    r"""InfoNCE between the mean predictions of each class in two views of an image.

    $$q_c = \operatorname{softmax}\!\Big(\frac{1}{|P_c|} \sum_{p \in P_c} z_p\Big), \qquad \ell = -\frac{1}{2K}
    \sum_{i=1}^{2K} \log \frac{\exp(q_i \cdot q_{i'} / \tau)}{\sum_{j \ne i} \exp(q_i \cdot q_j / \tau)}$$

    Here i and j run over 2K rows (two views, and the K classes that the labels of the image contain), and i' is the row
    of the same class in the other view.

    **Convention.** "mean" is over the images that have at least one class, "mean_all" over all images. An image with a
    single class gives 0 and counts. Ignored pixels and ids outside 0..C-1 are left out of the class means. Both views
    get gradients.

    **Source.** EHTDI (Li et al. 2022), with 1/tau = 7, over confident or pasted pixels. Its released code uses only the
    first image of the batch and divides by the batch size. Here all images count.

    Args:
        view_a: logits of one view (D is usually C).
        view_b: logits of the other view, with the same geometry.
        labels: labels or pseudo-labels at the size of the logits; `ignore_index` where there is none.
        num_classes: C, the number of classes in `labels`.
        temperature: tau > 0; the similarities are divided by it.
        ignore_index: the label of the pixels to ignore.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N,) for "none".

    Raises:
        TypeError: a view is not a float tensor, or `labels` is neither int64 nor uint8.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> weak, strong = torch.randn(2, 2, 19, 8, 8).requires_grad_()
        >>> labels = torch.randint(19, (2, 8, 8))
        >>> prototype_contrast_loss(weak, strong, labels, num_classes=19).backward()
        >>> prototype_contrast_loss(weak, strong, torch.zeros_like(labels), num_classes=19).item()
        0.0
    """
    _check_options(num_classes, temperature, ignore_index, reduction)
    check_scores("view_a", view_a)
    check_scores("view_b", view_b)
    check_same_shape(view_b, view_a, name="view_b", reference_name="view_a")
    check_labels_like(labels, view_a, reference_name="view_a")
    a, counts = class_means(view_a, labels, num_classes=num_classes, per_image=True, ignore_index=ignore_index)
    b, _ = class_means(view_b, labels, num_classes=num_classes, per_image=True, ignore_index=ignore_index)
    q = torch.cat([a, b], dim=1).softmax(dim=2)
    similarity = matmul(q, q.mT) / temperature
    present = (counts > 0).repeat(1, 2)
    candidates = present.unsqueeze(1) & ~torch.eye(2 * num_classes, dtype=torch.bool, device=q.device)
    # Rows of absent classes are set to 0 before the log-sum-exp, which would have a NaN gradient over -inf alone.
    similarity = torch.where(present.unsqueeze(2), similarity.where(candidates, float("-inf")), 0)
    partner = torch.cat([similarity.diagonal(num_classes, 1, 2), similarity.diagonal(-num_classes, 1, 2)], dim=1)
    rows = torch.where(present, similarity.logsumexp(dim=2) - partner, 0)
    loss = rows.sum(dim=1) / present.sum(dim=1).clamp_min(1)
    return reduce_pixels(loss, present.any(dim=1), reduction=reduction)


def _check_options(num_classes: int, temperature: float, ignore_index: int, reduction: str) -> None:
    check_integer("num_classes", num_classes)
    check_range("temperature", temperature, 0.0, open_low=True)
    check_ignore_index(ignore_index, num_classes)
    check_reduction(reduction)


class PrototypeContrastLoss(nn.Module):
    """Module version of [`prototype_contrast_loss`][udakit.losses.prototype_contrast_loss].

    Example:
        >>> import torch
        >>> criterion = PrototypeContrastLoss(2)
        >>> view = torch.tensor([[100.0, -100.0], [-100.0, 100.0]]).reshape(1, 2, 1, 2)
        >>> criterion(view, view, torch.tensor([[[0, 1]]]))  # log(1 + 2 exp(-7))
        tensor(0.0018)
    """

    def __init__(
        self, num_classes: int, *, temperature: float = 1 / 7, ignore_index: int = 255, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_options(num_classes, temperature, ignore_index, reduction)
        self.num_classes = num_classes
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        view_a: Float[Tensor, "n d *space"],
        view_b: Float[Tensor, "n d *space"],
        labels: Integer[Tensor, "n *space"],
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return prototype_contrast_loss(
            view_a,
            view_b,
            labels,
            num_classes=self.num_classes,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, temperature={self.temperature}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )
