"""The share of confident pixels as the weight of all of them (DACS, DAFormer)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_confidence, check_mask_like, check_option, check_range
from udakit._reduce import Kind, upcast
from udakit.pseudo_labels.selection import (
    PseudoLabels,
    check_exclude,
    check_features,
    expand_valid,
    is_predicted,
    predict,
    share_per_class,
)

Scope = Literal["batch", "image"]
RatioOver = Literal["all", "valid"]
SCOPES = get_args(Scope)
RATIOS = get_args(RatioOver)


def _check_options(threshold: float, scope: str) -> None:
    check_range("threshold", threshold, 0.0, 1.0)
    check_option("scope", scope, SCOPES)


def confident_ratio(
    confidence: Float[Tensor, "n *space"],
    *,
    threshold: float = 0.968,
    scope: Scope = "batch",
    valid: Bool[Tensor, "n *space"] | None = None,
) -> Float[Tensor, ""] | Float[Tensor, "n"]:
    r"""Share of pixels whose confidence reaches a threshold, over the batch or per image.

    $$q = \frac{\#\{p : \max_c p_c \ge \tau\}}{\#\{p\}}$$

    **Convention.** Both counts run over the `valid` pixels (all without a mask); 0 when there is none. No gradient.

    **Source.** DACS and DAFormer take one number for the whole batch (0.968), over all of its pixels.

    Args:
        confidence: largest class probability of each pixel.
        threshold: in [0, 1]; a confidence equal to it counts as confident.
        scope: "batch" | "image".
        valid: True where a pixel counts.

    Returns:
        Float32, () for "batch" or (N,) for "image".

    Raises:
        TypeError: `confidence` that is not float, `valid` that is not bool.
        ValueError: shapes that do not match, a `threshold` outside [0, 1], or an unknown `scope`.

    Example:
        >>> import torch
        >>> confident_ratio(torch.tensor([[[0.99, 0.5]], [[0.99, 0.98]]]), scope="image")
        tensor([0.5000, 1.0000])
    """
    _check_options(threshold, scope)
    check_confidence("confidence", confidence)
    confident = upcast(confidence.detach()) >= threshold
    if valid is not None:
        check_mask_like(valid, confidence, reference_name="confidence", channels=False)
    return _ratio(confident, scope, valid)


def _ratio(confident: Tensor, scope: Scope, valid: Tensor | None) -> Tensor:
    axes = tuple(range(0 if scope == "batch" else 1, confident.ndim))
    if valid is None:
        return confident.sum(axes) / max(math.prod(confident.shape[axis] for axis in axes), 1)
    return (confident & valid).sum(axes) / valid.sum(axes).clamp_min(1)


class ConfidentRatioSelector(nn.Module):
    """Keep every arg-max and weight it with the share of confident pixels.

    The share is [`confident_ratio`][udakit.pseudo_labels.confident_ratio].

    **Convention.** Detached. Pixels that are not `valid` keep their label and have weight 0. `ratio_over="all"` takes
    the share over all pixels even so, "valid" over the valid ones. `accepted` is the share of each class's valid pixels
    whose weight is above 0: all of them, or none where no pixel (of the image) is confident.

    **Source.** DACS, DAFormer: `scope="batch"`, and DAFormer's zeroed rows (15 at the top, 120 at the bottom) lie in
    the denominator: `ratio_over="all"` with `valid=row_mask(...)`.

    Args:
        threshold: in [0, 1].
        scope: "batch" | "image".
        ratio_over: "all" | "valid".
        exclude: ids of classes that are never predicted; arg-max and confidence are those of the others.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.99, 0.4], [0.01, 0.6]]).view(1, 2, 1, 2)
        >>> ConfidentRatioSelector()(probabilities, kind="probabilities").weight
        tensor([[[0.5000, 0.5000]]])
    """

    def __init__(
        self,
        threshold: float = 0.968,
        scope: Scope = "batch",
        *,
        ratio_over: RatioOver = "all",
        exclude: Sequence[int] = (),
    ) -> None:
        super().__init__()
        _check_options(threshold, scope)
        check_option("ratio_over", ratio_over, RATIOS)
        self.threshold = threshold
        self.scope: Scope = scope
        self.ratio_over: RatioOver = ratio_over
        self.exclude = check_exclude(exclude)

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels; the arguments are those of every selector (`ThresholdSelector.forward`)."""
        with torch.no_grad():
            labels, confidence = predict(logits, kind, self.exclude)
            check_features(features, logits)
            valid = None if valid is None else expand_valid(valid, logits)
            within = valid if self.ratio_over == "valid" else None
            ratio = _ratio(confidence >= self.threshold, self.scope, within)
            per_image = ratio.view(-1, *[1] * (labels.ndim - 1))
            weight = per_image.expand_as(labels).contiguous() if valid is None else valid * per_image
            if self.scope == "batch":  # all pixels have one weight: a class is used whole, or not at all
                used = is_predicted(labels, valid, logits.shape[1]) & (ratio > 0)
                return PseudoLabels(labels, confidence, weight, used.float())
            accepted = share_per_class(labels, weight > 0, valid, logits.shape[1])
            return PseudoLabels(labels, confidence, weight, accepted)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        excluded = f", exclude={self.exclude}" if self.exclude else ""
        return f"threshold={self.threshold:g}, scope={self.scope!r}, ratio_over={self.ratio_over!r}{excluded}"
