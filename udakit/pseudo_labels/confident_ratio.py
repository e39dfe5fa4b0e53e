"""The fraction of confident pixels as the weight of all pixels (DACS, DAFormer)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_confidence, check_mask_like, check_option, check_range
from udakit._reduce import Kind, fraction, upcast
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
    r"""Fraction of pixels with a confidence of at least a threshold, over the batch or per image.

    $$q = \frac{\#\{p : \max_c p_c \ge \tau\}}{\#\{p\}}$$

    **Convention.** Both counts are over the `valid` pixels (all pixels if there is no mask). The result is 0 if there
    are none, and has no gradient.

    **Source.** DACS and DAFormer use one fraction for the whole batch, over all of its pixels, with the threshold
    0.968.

    Args:
        confidence: largest class probability of each pixel.
        threshold: confidence in [0, 1] from which a pixel counts as confident.
        scope: "batch" | "image", for one fraction per batch or per image.
        valid: True where a pixel counts.

    Returns:
        The fraction, float32, () for "batch" or (N,) for "image".

    Raises:
        TypeError: `confidence` is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, `threshold` is outside [0, 1], or `scope` is unknown.

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


def _number(where: Tensor, axes: tuple[int, ...]) -> Tensor:
    """How many are true, in float32; a CPU adds int32 fastest, and a GPU needs a launch to convert them."""
    if not where.is_cpu:
        return where.sum(axes, dtype=torch.float32)
    return where.sum(axes, dtype=torch.int32 if where.numel() < 2**31 else torch.int64).float()


def _ratio(confident: Tensor, scope: Scope, valid: Tensor | None) -> Tensor:
    axes = tuple(range(0 if scope == "batch" else 1, confident.ndim))
    if valid is None:
        return _number(confident, axes) / max(math.prod([confident.shape[axis] for axis in axes]), 1)
    return fraction(_number(confident & valid, axes), _number(valid, axes))


class ConfidentRatioSelector(nn.Module):
    """Keep the arg-max of every pixel and use the fraction of confident pixels as weight.

    The fraction is [`confident_ratio`][udakit.pseudo_labels.confident_ratio].

    **Convention.** The results are detached. Pixels that are not `valid` keep their label and have weight 0. With
    `ratio_over="all"`, the fraction is over all pixels nevertheless; with "valid", it is over the valid ones.
    `accepted` is the fraction of the valid pixels of each class with a weight above 0. This is all of them, or none if
    no pixel (of the image) is confident.

    **Source.** DACS and DAFormer use `scope="batch"`. DAFormer gives weight 0 to 15 rows at the top and 120 at the
    bottom but counts them in the denominator: `ratio_over="all"` with `valid=row_mask(...)`.

    Args:
        threshold: confidence in [0, 1] from which a pixel counts as confident.
        scope: "batch" | "image", for one weight per batch or per image.
        ratio_over: "all" | "valid", the pixels that the fraction is taken over.
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

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
        """Select pseudo-labels. All selectors share these arguments; `ThresholdSelector.forward` explains them."""
        with torch.no_grad():
            labels, confidence = predict(logits, kind, self.exclude)
            check_features(features, logits)
            valid = None if valid is None else expand_valid(valid, logits)
            within = valid if self.ratio_over == "valid" else None
            ratio = _ratio(confidence >= self.threshold, self.scope, within)
            per_image = ratio.view(-1, *[1] * (labels.ndim - 1))
            weight = per_image.expand_as(labels).contiguous() if valid is None else valid * per_image
            if self.scope == "batch":  # all pixels have the same weight: a class is used as a whole or not at all
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
