"""Feature distance: keep a net's features close to those of a reference net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_maps, check_mask_like, check_same_shape
from udakit._reduce import Reduction, check_reduction, reduce_pixels, upcast
from udakit.losses._unit import lengths


def feature_distance_loss(
    features: Float[Tensor, "n d *space"],
    reference_features: Float[Tensor, "n d *space"],
    *,
    valid: Bool[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""L2 distance between two feature maps at each pixel, over the channels.

    $$\ell_p = \lVert f_p - r_p \rVert_2$$

    **Convention.** The distance is not squared and the features are not normalised. The reference is detached. "mean"
    divides by the number of `valid` feature pixels in the batch, "mean_all" by the number of all feature pixels. The
    gradient is the unit vector of the difference, and exactly 0 where the features are equal. Without any valid pixel
    the loss is 0, not NaN.

    **Source.** DAFormer (Hoyer et al. 2022). It compares with frozen ImageNet features at the pixels where the majority
    label (`udakit.downscale_labels`, ratio 0.75) is a thing class. Its released code returns NaN when no pixel is
    selected.

    Args:
        features: features of the net that learns, at any stride.
        reference_features: features of the reference net, of the same shape.
        valid: True where a feature pixel counts, at the size of the features.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 features), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or `reduction` is unknown.

    Example:
        >>> import torch
        >>> features = torch.zeros(1, 2, 1, 1, requires_grad=True)
        >>> loss = feature_distance_loss(features, torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1))
        >>> loss.backward()
        >>> loss.item(), features.grad.flatten().tolist()
        (5.0, [-0.6000000238418579, -0.800000011920929])
    """
    check_reduction(reduction)
    check_maps("features", features, "N, D")
    check_maps("reference_features", reference_features, "N, D")
    check_same_shape(reference_features, features, name="reference_features", reference_name="features")
    if valid is not None:
        check_mask_like(valid, features, reference_name="features")
    difference = upcast(features) - upcast(reference_features.detach())
    return reduce_pixels(lengths(difference, valid).squeeze(1), valid, reduction=reduction)


class FeatureDistanceLoss(nn.Module):
    """Module version of [`feature_distance_loss`][udakit.losses.feature_distance_loss].

    Example:
        >>> import torch
        >>> FeatureDistanceLoss()(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
        tensor(2.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "n d *space"],
        reference_features: Float[Tensor, "n d *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return feature_distance_loss(features, reference_features, valid=valid, reduction=self.reduction)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"reduction={self.reduction!r}"
