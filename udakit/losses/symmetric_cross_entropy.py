"""Cross-entropy that tolerates wrong pseudo-labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from udakit._checks import check_ignore_index, check_labels_like, check_range, check_scores, check_weight_like
from udakit._reduce import Reduction, check_reduction, reduce_pixels, softmax_where, upcast
from udakit.losses.cross_entropy import labelled_cross_entropy


def symmetric_cross_entropy(
    logits: Float[Tensor, "n c *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    ce_weight: float = 0.1,
    rce_weight: float = 1.0,
    min_probability: float = 1e-7,
    min_label: float = 1e-4,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Cross-entropy plus reverse cross-entropy, which swaps the roles of labels and predictions.

    $$\ell_p = -\alpha \log p_y \;-\; \beta \sum_c \max(p_c, \epsilon_p)\, \log \max(\mathbb{1}[c = y], \epsilon_y)$$

    **Convention.** Ignored pixels have loss 0 and get no gradient. "mean" divides by the number of labelled pixels in
    the batch, "mean_all" by the number of all pixels. The reverse term is bounded by -log(`min_label`), which limits
    the effect of a wrong label.

    **Source.** Wang et al. 2019, with the weights and clamps of ProDA's released code, which ignores label 250 and
    modifies the label map in place.

    Args:
        logits: class scores before the softmax.
        labels: class ids 0..C-1 or `ignore_index`, int64 or uint8.
        ce_weight: alpha, the weight of the cross-entropy.
        rce_weight: beta, the weight of the reverse cross-entropy.
        min_probability: lower bound of a predicted probability in the reverse term.
        min_label: value that replaces the zeros of the one-hot label under the logarithm.
        pixel_weight: weight of each pixel's loss; the divisor does not include it.
        ignore_index: the label of the pixels to ignore.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 logits), or (N, *space) for "none".

    Raises:
        TypeError: `logits` is not a float tensor, or `labels` is neither int64 nor uint8.
        ValueError: the shapes do not match, a lower bound is outside (0, 1], or `reduction` is unknown.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 1, 2, requires_grad=True)
        >>> loss = symmetric_cross_entropy(logits, torch.tensor([[[1, 255]]]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        4.6745
    """
    _check_options(ce_weight, rce_weight, min_probability, min_label, ignore_index, reduction)
    check_scores("logits", logits)
    check_ignore_index(ignore_index, logits.shape[1])
    check_labels_like(labels, logits)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, logits)
    labels = labels.long()
    valid = labels != ignore_index
    x = upcast(logits)
    ce = labelled_cross_entropy(x, labels, ignore_index, valid=valid)
    # The log of the label is 0 at the labelled class. What remains is the probability of all other classes. It is
    # summed directly, because 1 - p_y would lose it to rounding.
    other = torch.arange(x.shape[1], device=x.device).view(-1, *[1] * (x.ndim - 2)) != labels.unsqueeze(1)
    rce = -math.log(min_label) * (softmax_where(valid, x)[0].clamp(min=min_probability) * other).sum(dim=1)
    return reduce_pixels(ce_weight * ce + rce_weight * rce, valid, pixel_weight=pixel_weight, reduction=reduction)


def _check_options(
    ce_weight: float, rce_weight: float, min_probability: float, min_label: float, ignore_index: int, reduction: str
) -> None:
    check_range("ce_weight", ce_weight, 0.0)
    check_range("rce_weight", rce_weight, 0.0)
    check_range("min_probability", min_probability, 0.0, 1.0, open_low=True)
    check_range("min_label", min_label, 0.0, 1.0, open_low=True)
    check_ignore_index(ignore_index)
    check_reduction(reduction)


class SymmetricCrossEntropyLoss(nn.Module):
    """Module version of [`symmetric_cross_entropy`][udakit.losses.symmetric_cross_entropy].

    Example:
        >>> import torch
        >>> SymmetricCrossEntropyLoss(rce_weight=0.0)(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.uint8))
        tensor(0.0693)
    """

    def __init__(
        self,
        *,
        ce_weight: float = 0.1,
        rce_weight: float = 1.0,
        min_probability: float = 1e-7,
        min_label: float = 1e-4,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(ce_weight, rce_weight, min_probability, min_label, ignore_index, reduction)
        self.ce_weight = ce_weight
        self.rce_weight = rce_weight
        self.min_probability = min_probability
        self.min_label = min_label
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        labels: Integer[Tensor, "n *space"],
        *,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return symmetric_cross_entropy(
            logits,
            labels,
            ce_weight=self.ce_weight,
            rce_weight=self.rce_weight,
            min_probability=self.min_probability,
            min_label=self.min_label,
            pixel_weight=pixel_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"ce_weight={self.ce_weight}, rce_weight={self.rce_weight}, min_probability={self.min_probability}, "
            f"min_label={self.min_label}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )
