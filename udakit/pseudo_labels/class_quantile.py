"""The most confident share of each class (class-balanced self-training)."""

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
from udakit._reduce import Kind, count_ids
from udakit._state import FullPrecisionState, sum_ranks
from udakit.pseudo_labels.selection import PseudoLabels, Selector

# Confidences are float32: the smallest 1 - p above 0 is 2^-24.
_BITS = 24.0


class ClassQuantileSelector(FullPrecisionState, Selector):
    r"""Keep the most confident `share` of each predicted class.

    $$\hat y_p = \arg\max_c p_c \quad\text{where}\quad \max_c p_c \ge \tau_{\hat y_p}, \qquad
    \tau_c = \text{the } (1 - \text{share}) \text{ quantile of the confidences predicted as } c$$

    The quantiles come from a histogram of each class's confidences with fixed bins, evenly spaced in -log2(1 - p): near
    1, where nets put most of their pixels, the bins are as fine as float32 tells confidences apart.

    **Convention.** Detached. In training mode a call first takes its batch into the histogram,
    h_c <- momentum h_c + (1 - momentum) counts_c, for the classes it predicts inside `valid` (others keep theirs), then
    selects; in eval mode the stored thresholds select. At least `share` of the averaged histogram is kept (of one batch
    it may be more or less), and a bin whole or not at all. A class without history keeps nothing. Counts of ranks add
    up: with `sync` the histograms of all ranks are equal, bit by bit, to those of one process on the global batch;
    without a process group there is one rank.

    **Source.** CBST ranks the whole data set between rounds; IAST averages a threshold per image. An averaged histogram
    weights every pixel alike.

    Args:
        num_classes: C.
        share: kept share of each class, in (0, 1].
        momentum: of the histogram, in [0, 1); 0 looks at the batch alone.
        bins: number of bins.
        sync: sum the counts over the ranks of the default process group.
        ignore_index: the label of what is rejected.
        exclude: ids of classes that are never predicted; arg-max and confidence are those of the others.

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
        """Confidence from which each class is kept, for logging; +inf for a class without history."""
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
        """Select pseudo-labels; the arguments are those of every selector (`ThresholdSelector.forward`)."""
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
        """Whether the confidence lies in the upper bins of its class; updates the histogram in training mode."""
        # Half a bin below 1 is inside the last one; NaN has no bin.
        rest = (1 - confidence).clamp_(2 ** (-_BITS * (self.bins - 0.5) / self.bins), 1)
        bin_of_pixel = rest.log2_().mul_(-self.bins / _BITS).nan_to_num_(nan=-1.0).long()
        if self.training:
            self._update(bin_of_pixel.clamp_min(0).add_(labels, alpha=self.bins), valid)
        kept = bin_of_pixel >= self._lowest_bin()[labels]
        return kept if valid is None else kept & valid

    def _update(self, cell: Tensor, valid: Tensor | None) -> None:
        size = self.histogram.numel()
        counts = count_ids(cell if valid is None else cell.where(valid, size), size + (valid is not None))
        counts = counts[:size].view_as(self.histogram)
        if self.sync:
            counts = sum_ranks(counts)
        moved = (counts.sum(1, keepdim=True) > 0) * (1 - self.momentum)  # a class that is not there keeps its own
        self.histogram.lerp_(counts.to(self.histogram.dtype), moved)

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
