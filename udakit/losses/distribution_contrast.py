"""Contrast between feature pixels and the distribution of each class (SePiCo)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from udakit._checks import check_float, check_range, check_same_shape
from udakit._reduce import Reduction, reduce_pixels, select, upcast
from udakit.losses._class_contrast import (
    check_contrast,
    check_contrast_options,
    counted_ids,
    seen_cross_entropy,
    seen_rows,
)
from udakit.losses._matmul import matmul
from udakit.losses._unit import unit_vectors


def distribution_contrast_loss(
    features: Float[Tensor, "n d *space"],
    labels: Integer[Tensor, "n *space"],
    means: Float[Tensor, "c d"],
    variances: Float[Tensor, "c d"],
    *,
    temperature: float = 100.0,
    ratio: float = 1.0,
    normalize: bool = True,
    seen: Bool[Tensor, "c"] | None = None,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Contrast each feature with infinitely many samples of the Gaussian of every class, in closed form.

    $$z_c = \frac{1}{T} \left(f \cdot \mu_c + \tfrac12 f^2 \cdot s_c\right), \quad
    s_c = \frac{\lambda}{T}\, \sigma_c^2, \quad
    \ell = -\log \frac{\exp z_y}{\sum_c \exp z_c} + \frac{1}{2T} f^2 \cdot s_y$$

    where $f^2$ is taken channel by channel.

    **Convention.** `normalize` scales the features to unit length. Means and variances are used as given and should be
    statistics of unit vectors. The variance is divided by T twice, as in the moment-generating function of the
    Gaussian. A class that has not been seen is not a candidate, and its pixels are ignored, like pixels with
    `ignore_index` or with an id outside 0..C-1. "mean" divides by the number of pixels that count, "mean_all" by the
    number of all pixels. Gradients flow to the features, and to means and variances if they require gradients (buffers
    do not). With `normalize=False`, finite values are guaranteed only for |f| <= 1e3.

    **Source.** SePiCo (Xie et al., TPAMI 2023), DistCL. Its T is 100. With unit features this makes the logits nearly
    equal and the gradients of the order of 1/100, so give the loss a large weight or a temperature of 0.1. In SePiCo,
    unseen classes compete with statistics of 0. Its regulariser is not included here: the sign with which it is added
    rewards predicting one class everywhere.

    Args:
        features: embeddings, at any stride.
        labels: class ids at the size of the features (`udakit.downscale_labels`), or `ignore_index`.
        means: mean feature of each class, (C, D), for example `ClassDistributions.means`.
        variances: variance of each channel and class, (C, D), for example `ClassDistributions.variances`. That none is
            negative is not checked.
        temperature: T > 0.
        ratio: lambda >= 0, the weight of the variances; 0 contrasts with the means alone.
        normalize: scale the features to unit length; a zero vector stays zero.
        seen: classes that have statistics, for example `ClassDistributions.seen`; None means the rows of `means` that
            are not all zero.
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
        >>> means, variances = torch.randn(3, 8), torch.rand(3, 8)
        >>> distribution_contrast_loss(features, labels, means, variances).backward()
        >>> distribution_contrast_loss(features, labels, torch.zeros(3, 8), variances).item()  # no class seen
        0.0
    """
    _check_options(temperature, ratio, normalize, ignore_index, reduction)
    check_contrast(features, labels, means, "means", seen=seen, pixel_weight=pixel_weight, ignore_index=ignore_index)
    check_float("variances", variances, 2, "(C, D)")
    check_same_shape(variances, means, name="variances", reference_name="means")
    n, _, *space = features.shape
    ids, counted, seen = counted_ids(labels, means, seen, ignore_index)
    ids, valid = ids.flatten(1), counted.flatten(1)
    # Ignored pixels must not enter the products, since a NaN there would reach the gradient's sum over pixels.
    x = upcast(features)
    x = (unit_vectors(x, counted) if normalize else select(counted.unsqueeze(1), x)).flatten(2)
    mean, spread = (seen_rows(upcast(y).to(x.dtype), seen) for y in (means, variances))
    spread = spread * (ratio / (2 * temperature))
    linear = matmul((mean / temperature).expand(n, -1, -1), x)
    square = matmul((spread / temperature).expand(n, -1, -1), x.square())
    loss = seen_cross_entropy(linear + square, ids, valid, seen)
    loss = loss + square.gather(1, ids.unsqueeze(1)).squeeze(1)
    return reduce_pixels(loss.view(n, *space), counted, pixel_weight=pixel_weight, reduction=reduction)


def _check_options(temperature: float, ratio: float, normalize: bool, ignore_index: int, reduction: str) -> None:
    check_contrast_options(temperature, normalize, ignore_index, reduction)
    check_range("ratio", ratio, 0.0)


class DistributionContrastLoss(nn.Module):
    """Module version of [`distribution_contrast_loss`][udakit.losses.distribution_contrast_loss].

    The statistics are arguments of the call, because a `ClassDistributions` holds them.

    Example:
        >>> import torch
        >>> criterion = DistributionContrastLoss(temperature=1.0, ratio=0.0, normalize=False)
        >>> labels = torch.zeros(1, 2, 2, dtype=torch.long)
        >>> criterion(torch.zeros(1, 4, 2, 2), labels, torch.eye(4), torch.ones(4, 4))  # log 4
        tensor(1.3863)
    """

    def __init__(
        self,
        *,
        temperature: float = 100.0,
        ratio: float = 1.0,
        normalize: bool = True,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(temperature, ratio, normalize, ignore_index, reduction)
        self.temperature = temperature
        self.ratio = ratio
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "n d *space"],
        labels: Integer[Tensor, "n *space"],
        means: Float[Tensor, "c d"],
        variances: Float[Tensor, "c d"],
        *,
        seen: Bool[Tensor, "c"] | None = None,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return distribution_contrast_loss(
            features,
            labels,
            means,
            variances,
            temperature=self.temperature,
            ratio=self.ratio,
            normalize=self.normalize,
            seen=seen,
            pixel_weight=pixel_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"temperature={self.temperature}, ratio={self.ratio}, normalize={self.normalize}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )
