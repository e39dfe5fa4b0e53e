"""Pseudo-labels above a fixed confidence threshold."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from udakit._checks import check_range
from udakit.pseudo_labels.selection import Selector


class ThresholdSelector(Selector):
    r"""Keep the pixels with a confidence of at least a threshold.

    $$\hat y_p = \begin{cases} \arg\max_c p_c & \max_c p_c \ge \tau \\ \text{ignore} & \text{otherwise}\end{cases}$$

    **Convention.** The results are detached. Rejected pixels and pixels that are not `valid` have the label
    `ignore_index` and weight 0; kept pixels have weight 1. The comparison is in float32.

    Args:
        threshold: lowest confidence that is kept, in [0, 1].
        ignore_index: the label of rejected pixels.
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).view(1, 2, 1, 2)
        >>> ThresholdSelector(0.8)(probabilities, kind="probabilities").labels
        tensor([[[  0, 255]]])
    """

    def __init__(self, threshold: float, *, ignore_index: int = 255, exclude: Sequence[int] = ()) -> None:
        super().__init__(ignore_index=ignore_index, exclude=exclude)
        check_range("threshold", threshold, 0.0, 1.0)
        self.threshold = threshold

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the confidence reaches the threshold."""
        kept = confidence >= self.threshold
        return kept if valid is None else kept & valid

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"threshold={self.threshold:g}, {super().extra_repr()}"
