"""Maximum squares: like entropy minimisation, but easy pixels do not dominate the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_mask_like, check_option, check_range, check_scores, check_weight_like
from udakit._reduce import (
    KINDS,
    Kind,
    Reduction,
    check_reduction,
    guard,
    reduce_pixels,
    softmax_where,
    top_class,
    upcast,
)


def max_square_loss(
    logits: Float[Tensor, "n c *space"],
    *,
    balance: float = 0.0,
    kind: Kind = "logits",
    valid: Bool[Tensor, "n *space"] | None = None,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Half the negative sum of squared class probabilities.

    $$\ell_p = -\tfrac12\, b_p \sum_c p_c^2, \qquad b_p = \left(N / N_{k(p)}\right)^{\alpha}$$

    N is the number of valid pixels of the image, N_k the number of those with the arg-max k(p), and alpha is `balance`.

    **Convention.** With `balance=0` the value of a pixel is in [-1/2, -1/(2C)]. "mean" divides by the number of `valid`
    pixels, "mean_all" by the number of all pixels. The balancing factor is detached and does not change the divisor.

    **Source.** MaxSquare (Chen et al. 2019): alpha = 0 is its plain loss and alpha = 0.2 its loss balanced by the
    classes of each image. The released plain loss also averages over the classes (this value / C). The released
    balanced loss divides by C and omits the factor 1/2 (this value * 2 / C).

    Args:
        logits: class scores before the softmax, or class probabilities with `kind="probabilities"`.
        balance: alpha in [0, 1]; 0 gives all pixels the same weight, 1 gives all predicted classes of an image the same
            weight.
        kind: "logits" | "probabilities".
        valid: True where a pixel counts.
        pixel_weight: weight of each pixel's loss; the divisor does not include it.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is unknown.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4, 2, 2, requires_grad=True)
        >>> loss = max_square_loss(logits)
        >>> loss.backward()
        >>> loss.item()
        -0.125
    """
    _check_options(balance, kind, reduction)
    check_scores("logits", logits, kind)
    if valid is not None:
        check_mask_like(valid, logits)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, logits)
    x = upcast(logits)
    p, zeroed = softmax_where(valid, x) if kind == "logits" else (guard(x, valid), False)
    loss = -0.5 * p.square().sum(dim=1)
    if balance:
        loss = loss * _balancing(x.detach(), valid, balance)
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=zeroed)


def _balancing(scores: Tensor, valid: Tensor | None, balance: float) -> Tensor:
    """(N / N_k)^alpha at each pixel, from integer counts of each image; no shape depends on the data."""
    n, c = scores.shape[:2]
    predicted = top_class(scores).flatten(1)
    counted = torch.ones_like(predicted) if valid is None else valid.flatten(1).long()
    counts = torch.zeros(n, c, dtype=torch.int64, device=scores.device).scatter_add(1, predicted, counted)
    share = counts.to(scores.dtype) / counts.sum(dim=1, keepdim=True).clamp_min(1)
    # The class of an invalid pixel may have no valid pixel. Any finite factor will do: the reduction drops it.
    factor = torch.where(counts > 0, share, 1) ** -balance
    return factor.gather(1, predicted).view(n, *scores.shape[2:])


def _check_options(balance: float, kind: str, reduction: str) -> None:
    check_range("balance", balance, 0.0, 1.0)
    check_option("kind", kind, KINDS)
    check_reduction(reduction)


class MaxSquareLoss(nn.Module):
    """Module version of [`max_square_loss`][udakit.losses.max_square_loss].

    Example:
        >>> import torch
        >>> MaxSquareLoss(balance=0.2)(torch.zeros(1, 2, 1, 1))
        tensor(-0.2500)
    """

    def __init__(self, *, balance: float = 0.0, kind: Kind = "logits", reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(balance, kind, reduction)
        self.balance = balance
        self.kind: Kind = kind
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return max_square_loss(
            logits,
            balance=self.balance,
            kind=self.kind,
            valid=valid,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"balance={self.balance}, kind={self.kind!r}, reduction={self.reduction!r}"
