"""The most confident pixels of each class (class-balanced self-training)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_classes,
    check_device,
    check_flag,
    check_integer,
    check_range,
    check_scores,
    shape_of,
    space_form,
)
from udakit._reduce import Kind, count_ids, look_up
from udakit._state import FullPrecisionState, sum_ranks
from udakit.pseudo_labels.selection import PseudoLabels, Selector

# Confidences are float32: the smallest 1 - p above 0 is 2^-24.
_BITS = 24.0


class ClassQuantileSelector(FullPrecisionState, Selector):
    r"""Keep the most confident fraction `share` of the pixels of each predicted class.

    $$\hat y_p = \arg\max_c p_c \quad\text{where}\quad \max_c p_c \ge \tau_{\hat y_p}, \qquad
    \tau_c = \text{the } (1 - \text{share}) \text{ quantile of the confidences predicted as } c$$

    The quantiles come from a histogram of the confidences of each class. Its bins are fixed and evenly spaced in
    -log2(1 - p). Near 1, where most pixels are, they are as fine as the resolution of float32.

    **Convention.** The results are detached. In training mode, a call first updates the histogram, h_c <- momentum h_c
    + (1 - momentum) counts_c, for the classes that it predicts at `valid` pixels, and then selects. Other classes keep
    their histogram. In eval mode, the stored thresholds are used.

    At least the fraction `share` of the averaged histogram is kept; in a single batch it may be more or less. A bin is
    kept as a whole or not at all. A class without history keeps nothing. With `sync`, the counts of all ranks are
    added, and the histograms are bit-equal to those of one process on the global batch. Without a process group there
    is one rank.

    **Source.** CBST ranks the whole data set between rounds, and IAST averages a threshold per image. An averaged
    histogram gives every pixel the same weight.

    Attributes:
        histogram: float32 buffer (C, bins), the average number of pixels of each class by confidence.

    Args:
        num_classes: C, the number of classes.
        share: fraction of each class that is kept, in (0, 1].
        momentum: weight of the old histogram, in [0, 1); 0 uses the current batch only.
        bins: number of bins of the histogram.
        sync: whether to add up the counts of all ranks of the default process group.
        ignore_index: the label of rejected pixels.
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

    Example:
        >>> import torch
        >>> confidence = torch.linspace(0.5, 0.9, 10).view(1, 1, 1, 10)
        >>> probabilities = torch.cat([confidence, 1 - confidence], dim=1)
        >>> selector = ClassQuantileSelector(2, share=0.2)
        >>> selector(probabilities, kind="probabilities").weight.sum()
        tensor(2.)
    """

    histogram: Tensor

    def __init__(
        self,
        num_classes: int,
        share: float = 0.5,
        momentum: float = 0.99,
        *,
        bins: int = 4096,
        sync: bool = False,
        ignore_index: int = 255,
        exclude: Sequence[int] = (),
    ) -> None:
        super().__init__(ignore_index=ignore_index, exclude=exclude)
        check_classes(num_classes)
        check_range("share", share, 0.0, 1.0, open_low=True)
        check_range("momentum", momentum, 0.0, 1.0, open_high=True)
        check_flag("sync", sync)
        check_integer("bins", bins, 2)
        self.num_classes, self.share, self.momentum, self.bins, self.sync = num_classes, share, momentum, bins, sync
        self.register_buffer("histogram", torch.zeros(num_classes, bins, dtype=torch.float32))

    @property
    def thresholds(self) -> Float[Tensor, "c"]:
        """The lowest confidence at which each class is kept, (C,), for logging; +inf for a class without history."""
        lowest = self._lowest_bin()
        edge = 1 - torch.exp2(-lowest * (_BITS / self.bins))
        return edge.masked_fill(lowest == self.bins, float("inf"))

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels. All selectors share these arguments; `ThresholdSelector.forward` explains them."""
        check_scores("logits", logits, kind)
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Expected `logits` to be {space_form('N, C', logits.ndim - 2)} with C = {self.num_classes}, "
                f"but got {shape_of(logits)}."
            )
        check_device("histogram", self.histogram, logits, "logits")
        return super().forward(logits, features, kind=kind, valid=valid)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the confidence is in the upper bins of its class; updates the histogram in training mode."""
        # Half a bin below the last edge is inside the last bin. NaN has no bin.
        rest = (1 - confidence).clamp_(2 ** (-_BITS * (self.bins - 0.5) / self.bins), 1)
        bin_of_pixel = rest.log2_().mul_(-self.bins / _BITS).nan_to_num_(nan=-1.0).long()
        if self.training:
            self._update(bin_of_pixel.clamp_min(0).add_(labels, alpha=self.bins), valid)
        kept = bin_of_pixel >= look_up(self._lowest_bin(), labels)
        return kept if valid is None else kept & valid

    def _update(self, cell: Tensor, valid: Tensor | None) -> None:
        size = self.histogram.numel()
        counts = count_ids(cell if valid is None else cell.where(valid, size), size + (valid is not None))
        counts = counts[:size].view_as(self.histogram)
        if self.sync:
            counts = sum_ranks(counts)
        moved = (counts.sum(1, keepdim=True) > 0).to(self.histogram.dtype) * (1.0 - self.momentum)
        self.histogram.lerp_(counts.to(self.histogram.dtype), moved)  # an absent class keeps its histogram

    def _lowest_bin(self) -> Tensor:
        above = self.histogram.flip(1).cumsum(1)  # from the last bin down: all pixels above an edge
        total = above[:, -1:]
        lowest = (above[:, :-1] >= self.share * total).sum(1)
        return lowest.masked_fill_(total.squeeze(1) == 0, self.bins)

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, share={self.share:g}, momentum={self.momentum:g}, bins={self.bins}, "
            f"sync={self.sync}, {super().extra_repr()}"
        )
