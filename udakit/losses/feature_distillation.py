"""Feature distillation from a frozen foundation model (VFM-UDA++)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_maps, check_mask_like, check_range, check_same_shape
from udakit._reduce import Reduction, check_reduction, guard, reduce_pixels, upcast
from udakit.losses._unit import unit_vectors


def feature_distillation_loss(
    features: Float[Tensor, "n d *space"],
    reference: Float[Tensor, "n d *space"],
    *,
    cosine_weight: float = 0.9,
    valid: Bool[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Smooth L1 and cosine distance to the features of a reference net.

    $$\ell_p = (1 - w)\, \frac{1}{D} \sum_d \text{smooth L1}(f_{pd} - r_{pd}) + w\, (1 - \cos(f_p, r_p))$$

    where smooth L1 is quadratic for differences below 1.

    **Convention.** The reference is detached. "mean" divides by the number of `valid` feature pixels in the batch,
    "mean_all" by the number of all feature pixels. A zero vector has cosine 0 with every vector, and gets no gradient
    from the cosine.

    **Source.** VFM-UDA++ (Englert et al., 2025), with w = 0.9 and a weight of 0.1 for source and for target, over all
    pixels. The reference is a frozen DINOv2-L at 406 px. The student's features pass a 1x1 projection and are enlarged
    to the reference's grid. This loss replaces DAFormer's feature distance, which harms a foundation model.

    Args:
        features: features of the net that learns, projected and resized to the shape of the reference.
        reference: features of the frozen net, of the same shape.
        cosine_weight: w in [0, 1], the weight of the cosine distance.
        valid: True where a feature pixel counts.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 features), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> features = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> feature_distillation_loss(features, torch.randn(2, 8, 4, 4)).backward()
        >>> round(feature_distillation_loss(features, features).item(), 6)
        0.0
    """
    _check_options(cosine_weight, reduction)
    check_maps("features", features, "N, D")
    check_maps("reference", reference, "N, D")
    check_same_shape(reference, features, name="reference", reference_name="features")
    if valid is not None:
        check_mask_like(valid, features, reference_name="features")
    x = guard(upcast(features), valid)
    r = guard(upcast(reference.detach()), valid).to(x.dtype)
    smooth = F.smooth_l1_loss(x, r, reduction="none").mean(1)
    cosine = (unit_vectors(x) * unit_vectors(r)).sum(1)
    loss = (1 - cosine_weight) * smooth + cosine_weight * (1 - cosine)
    return reduce_pixels(loss, valid, reduction=reduction)


def _check_options(cosine_weight: float, reduction: str) -> None:
    check_range("cosine_weight", cosine_weight, 0.0, 1.0)
    check_reduction(reduction)


class FeatureDistillationLoss(nn.Module):
    """Module version of [`feature_distillation_loss`][udakit.losses.feature_distillation_loss].

    Example:
        >>> import torch
        >>> FeatureDistillationLoss(cosine_weight=1.0)(torch.ones(1, 4, 2, 2), -torch.ones(1, 4, 2, 2))
        tensor(2.)
    """

    def __init__(self, *, cosine_weight: float = 0.9, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(cosine_weight, reduction)
        self.cosine_weight = cosine_weight
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "n d *space"],
        reference: Float[Tensor, "n d *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return feature_distillation_loss(
            features, reference, cosine_weight=self.cosine_weight, valid=valid, reduction=self.reduction
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"cosine_weight={self.cosine_weight}, reduction={self.reduction!r}"
