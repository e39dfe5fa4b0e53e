"""Contrast between feature pixels and a bank of class prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from udakit._checks import (
    check_device,
    check_flag,
    check_float,
    check_ignore_index,
    check_labels_like,
    check_maps,
    check_per_class,
    check_range,
    check_weight_like,
    check_weight_option,
    kind_of,
    shape_of,
)
from udakit._reduce import Reduction, check_reduction, class_ids, reduce_pixels, select, upcast
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
        class_weight: weight of each class.
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
    _check_options(temperature, normalize, ignore_index, reduction)
    check_maps("features", features, "N, D")
    check_labels_like(labels, features, reference_name="features")
    check_float("prototypes", prototypes, 2, "(C, D)")
    if prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"Expected `prototypes` to be (C, D) matching `features` {shape_of(features)}, "
            f"but got {shape_of(prototypes)}."
        )
    check_device("prototypes", prototypes, features, "features")
    for name, x in (("seen", seen), ("class_weight", class_weight)):
        if x is not None:
            check_per_class(name, x, prototypes.shape[0], reference=prototypes, reference_name="prototypes")
    if seen is not None and seen.dtype != torch.bool:
        raise TypeError(f"Expected `seen` to be a bool tensor, but got {kind_of(seen)}. ClassPrototypes.seen is one.")
    if pixel_weight is not None:
        check_weight_like(pixel_weight, features, reference_name="features")
    c = prototypes.shape[0]
    check_ignore_index(ignore_index, c)
    seen = prototypes.detach().ne(0).any(dim=1) if seen is None else seen
    ids = class_ids(labels, c, ignore_index)
    inside = ids < c
    ids = torch.where(inside, ids, 0)
    valid = inside & seen[ids]
    # Ignored pixels must not enter the products, since a NaN there would reach the gradient's sum over pixels.
    x = upcast(features)
    bank = upcast(prototypes).to(x.dtype)
    if normalize:
        x, bank = unit_vectors(x, valid), unit_vectors(bank)
    else:
        x = select(valid.unsqueeze(1), x)
    logits = matmul((bank / temperature).expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape[0], c, *x.shape[2:])
    # Finite, because a pixel without any candidate would otherwise give NaN. Such a pixel is ignored.
    logits = torch.where(seen.view(-1, *[1] * (logits.ndim - 2)), logits, torch.finfo(logits.dtype).min / 4)
    loss = F.cross_entropy(logits, torch.where(valid, ids, -100), reduction="none")
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)[ids]
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction)


def _check_options(temperature: float, normalize: bool, ignore_index: int, reduction: str) -> None:
    check_range("temperature", temperature, 0.0, open_low=True)
    check_flag("normalize", normalize)
    check_ignore_index(ignore_index)
    check_reduction(reduction)


class PixelPrototypeContrastLoss(nn.Module):
    """Module version of [`pixel_prototype_contrast_loss`][udakit.losses.pixel_prototype_contrast_loss].

    `class_weight` is a buffer. The prototypes are an argument of the call, because a `ClassPrototypes` holds them.

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
        _check_options(temperature, normalize, ignore_index, reduction)
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
