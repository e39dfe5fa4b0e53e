"""Paste confident target regions onto source images, so that their boundaries are labelled on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_mask_like, check_range, check_weight_like
from udakit._reduce import upcast
from udakit.mixing.batch import SegBatch, check_batches, mix


def target_paste(
    source: SegBatch | tuple[Tensor, ...],
    target: SegBatch | tuple[Tensor, ...],
    confidence: Float[Tensor, "n *space"],
    *,
    threshold: float = 0.95,
    extra_mask: Bool[Tensor, "n *space"] | None = None,
) -> tuple[SegBatch, Bool[Tensor, "n *space"]]:
    r"""Paste the confident pixels of `target`, with their pseudo-labels, onto `source`.

    $$M_p = [\,c_p > \tau\,] \vee E_p, \qquad x = M x_t + (1 - M)\,x_s, \qquad y = M \hat y_t + (1 - M)\,y_s$$

    **Convention.** True takes the target. The comparison is strict, as in the released code, and NaN is not confident.
    A missing weight counts as 1 if the other side has one. `target` may be the result of a class mix, which already
    contains pasted source classes. Pass their mask as `extra_mask` to paste them whatever the confidence.

    **Source.** EHTDI (ACM MM 2022). Its released loss uses only the first image of the batch.

    Args:
        source: labelled batch to paste onto; a plain tuple (images, labels[, weight]) is accepted.
        target: batch with pseudo-labels, of the same size.
        confidence: largest class probability of the prediction on the target images, (N, *space).
        threshold: confidence in [0, 1] above which a pixel is pasted.
        extra_mask: True where a pixel is pasted whatever its confidence.

    Returns:
        The mixed batch and the mask.

    Raises:
        TypeError: `extra_mask` is not bool, or `confidence` is not float.
        ValueError: the sizes do not match, or `threshold` is outside [0, 1].

    Example:
        >>> import torch
        >>> source = SegBatch(torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 0]]]))
        >>> target = SegBatch(torch.ones(1, 3, 1, 2), torch.tensor([[[5, 6]]]))
        >>> mixed, mask = target_paste(source, target, torch.tensor([[[0.99, 0.95]]]))
        >>> mixed.labels
        tensor([[[5, 0]]])
    """
    check_range("threshold", threshold, 0.0, 1.0)
    source, target = check_batches(source, target)
    check_weight_like(confidence, source.images, name="confidence", reference_name="source.images")
    mask = upcast(confidence.detach()) > threshold
    if extra_mask is not None:
        check_mask_like(extra_mask, source.images, name="extra_mask", reference_name="source.images")
        mask = mask | extra_mask
    return mix(mask, target, source), mask


class TargetPaste(nn.Module):
    """Module version of [`target_paste`][udakit.mixing.target_paste].

    Example:
        >>> import torch
        >>> source = SegBatch(torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 0]]]))
        >>> target = SegBatch(torch.ones(1, 3, 1, 2), torch.tensor([[[5, 6]]]))
        >>> TargetPaste(threshold=0.9)(source, target, torch.tensor([[[0.99, 0.95]]]))[0].labels
        tensor([[[5, 6]]])
    """

    def __init__(self, *, threshold: float = 0.95) -> None:
        super().__init__()
        check_range("threshold", threshold, 0.0, 1.0)
        self.threshold = threshold

    def forward(
        self,
        source: SegBatch | tuple[Tensor, ...],
        target: SegBatch | tuple[Tensor, ...],
        confidence: Float[Tensor, "n *space"],
        *,
        extra_mask: Bool[Tensor, "n *space"] | None = None,
    ) -> tuple[SegBatch, Bool[Tensor, "n *space"]]:
        """Apply the function with the configuration given at construction."""
        return target_paste(source, target, confidence, threshold=self.threshold, extra_mask=extra_mask)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"threshold={self.threshold}"
