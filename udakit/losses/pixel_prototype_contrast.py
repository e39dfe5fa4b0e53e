"""Contrast between feature pixels and a bank of class prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Integer
from torch import Tensor

from udakit._checks import check_per_class, check_weight_option
from udakit._reduce import Reduction, look_up, reduce_pixels, select, upcast
from udakit._state import FullPrecisionState
from udakit.losses._class_contrast import (
    check_contrast,
    check_contrast_options,
    counted_ids,
    seen_cross_entropy,
    seen_rows,
)
from udakit.losses._matmul import matmul
from udakit.losses._unit import unit_vectors


def pixel_prototype_contrast_loss(
    features: Float[Tensor, "n d *space"],
    labels: Integer[Tensor, "n *space"],
    prototypes: Float[Tensor, "c d"],
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    seen: Bool[Tensor, "c"] | None = None,
    class_weight: Float[Tensor, "c"] | None = None,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Cross-entropy over the similarities of each feature pixel to the prototypes of the classes seen so far.

    $$\ell_p = -w_p\, w_{y_p} \log
    \frac{\exp(f_p \cdot \eta_{y_p} / \tau)}{\sum_{c\ \text{seen}} \exp(f_p \cdot \eta_c / \tau)}$$

    **Convention.** A class that has not been seen is not a candidate, and its pixels are ignored, like pixels with
    `ignore_index` or with an id outside 0..C-1. "mean" divides by the number of pixels that count, "mean_all" by the
    number of all pixels; weights do not change the divisor. Gradients flow to the features, and to `prototypes` if they
    require gradients (a buffer does not).

    **Source.** The pixel-to-prototype term of ProDA, SePiCo and the successors of ContrastiveSeg, in InfoNCE form.

    Args:
        features: embeddings, at any stride.
        labels: class ids at the size of the features (`udakit.downscale_labels`), or `ignore_index`.
        prototypes: one row for each class, for example `ClassPrototypes.prototypes`.
        temperature: tau > 0; the similarities are divided by it.
        normalize: scale features and prototypes to unit length; a zero vector stays zero.
        seen: classes that have a prototype, for example `ClassPrototypes.seen`; None means the rows that are not all
            zero.
        class_weight: weight of each class; detached.
        pixel_weight: weight of each pixel's loss; the divisor does not include it.
        ignore_index: the label of the pixels to ignore.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 features), or (N, *space) for "none".

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> features = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> labels = torch.randint(3, (2, 4, 4))
        >>> prototypes = torch.randn(3, 8)
        >>> pixel_prototype_contrast_loss(features, labels, prototypes).backward()
        >>> pixel_prototype_contrast_loss(features, labels, torch.zeros(3, 8)).item()  # no class seen
        0.0
    """
    check_contrast_options(temperature, normalize, ignore_index, reduction)
    check_contrast(
        features, labels, prototypes, "prototypes", seen=seen, pixel_weight=pixel_weight, ignore_index=ignore_index
    )
    c = prototypes.shape[0]
    if class_weight is not None:
        check_per_class("class_weight", class_weight, c, reference=prototypes, reference_name="prototypes")
    ids, valid, seen = counted_ids(labels, prototypes, seen, ignore_index)
    # Ignored pixels must not enter the products, since a NaN there would reach the gradient's sum over pixels.
    x = upcast(features)
    bank = seen_rows(upcast(prototypes).to(x.dtype), seen)
    if normalize:
        x, bank = unit_vectors(x, valid), unit_vectors(bank)
    else:
        x = select(valid.unsqueeze(1), x)
    logits = matmul((bank / temperature).expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape[0], c, *x.shape[2:])
    loss = seen_cross_entropy(logits, ids, valid, seen)
    if class_weight is not None:
        # A pixel that does not count may have the id of a class with an infinite weight.
        loss = loss * select(valid, look_up(class_weight.detach().to(loss.dtype), ids))
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=True)


class PixelPrototypeContrastLoss(FullPrecisionState):
    """Module version of [`pixel_prototype_contrast_loss`][udakit.losses.pixel_prototype_contrast_loss].

    `class_weight` is a buffer. The prototypes are an argument of the call, because a `ClassPrototypes` holds them.

    Attributes:
        class_weight: buffer (C,) of the dtype given, or None.

    Example:
        >>> import torch
        >>> criterion = PixelPrototypeContrastLoss(temperature=1.0)
        >>> criterion(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), torch.eye(4))  # log 4
        tensor(1.3863)
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        normalize: bool = True,
        class_weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_contrast_options(temperature, normalize, ignore_index, reduction)
        check_weight_option(class_weight)
        self.register_buffer("class_weight", class_weight)
        self.temperature = temperature
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "n d *space"],
        labels: Integer[Tensor, "n *space"],
        prototypes: Float[Tensor, "c d"],
        *,
        seen: Bool[Tensor, "c"] | None = None,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return pixel_prototype_contrast_loss(
            features,
            labels,
            prototypes,
            temperature=self.temperature,
            normalize=self.normalize,
            seen=seen,
            class_weight=self.class_weight,
            pixel_weight=pixel_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )
