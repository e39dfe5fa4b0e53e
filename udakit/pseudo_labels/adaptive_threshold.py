"""Confidence thresholds that follow the net: one global threshold, scaled for each class (FreeMatch)."""

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
    check_option,
    check_range,
    check_scores,
    shape_of,
    space_form,
)
from udakit._reduce import KINDS, Kind, look_up, select, upcast
from udakit._state import FullPrecisionState, gather_ranks
from udakit.pseudo_labels.selection import (
    PseudoLabels,
    Selector,
    check_features,
    check_not_all,
    expand_valid,
    others,
    with_excluded,
)


def check_class_scores(logits: Tensor, kind: Kind, num_classes: int) -> None:
    """Raise unless `logits` has the number of classes of the Module's state."""
    check_scores("logits", logits, kind)
    if logits.shape[1] != num_classes:
        form = f"{space_form('N, C', logits.ndim - 2)} with C = {num_classes}"
        raise ValueError(f"Expected `logits` to be {form}, but got {shape_of(logits)}.")


def batch_shares(probabilities: Tensor, valid: Tensor | None, *, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the largest probability (), mean probability of each class (C,), and pixels (), over the valid pixels.

    A NaN would stay in a moving average forever, so a batch with a NaN at a valid pixel counts no pixel.
    """
    p = upcast(probabilities)
    spatial = (0, *range(2, p.ndim))
    if valid is None:
        sums, count = p.sum(spatial), torch.full((), p[:, 0].numel(), dtype=torch.int64, device=p.device)
        confidence = p.amax(1).sum()
    else:
        sums, count = select(valid.unsqueeze(1).expand_as(p), p).sum(spatial), valid.sum()
        confidence = select(valid, p.amax(1)).sum()
    sums = torch.cat([confidence.view(1), sums]).float()
    if sync:
        sums, count = (x.sum(0) for x in gather_ranks(sums, count.view(1)))
        count = count.squeeze(0)
    sound = sums[0] == sums[0]  # NaN if any probability is NaN
    mean = torch.where(sound, sums / count.clamp_min(1), 0)
    return mean[0], mean[1:], count * sound


class AdaptiveThresholdSelector(FullPrecisionState, Selector):
    r"""Keep pixels that reach a confidence threshold, which follows the net and is lower for rarely predicted classes.

    $$\tau \leftarrow m\,\tau + (1 - m)\,\operatorname{mean}(\max_c p_c), \qquad
    q_c \leftarrow m\,q_c + (1 - m)\,\operatorname{mean}(p_c), \qquad \tau_c = \tau\,\frac{q_c}{\max_k q_k}$$

    **Convention.** The results are detached. In training mode, a call first updates both averages with the `valid`
    pixels of its batch and then selects. In eval mode, the stored thresholds are used. A batch without valid pixels, or
    with a NaN at one of them, changes nothing.

    Both averages start at 1/C, so nearly everything is kept at first. m = 0.999 is meant for about 40k steps; a run of
    a few hundred steps needs 0.99 or less. Here `momentum` is the weight of the *old* value. With `sync`, the sums of
    all ranks are merged, and the result is within 1e-6 of one process on the global batch. Without a process group
    there is one rank.

    **Source.** FreeMatch (Wang et al., ICLR 2023). It can also limit the global threshold to 0.95 (`max_threshold`), or
    follow a quantile of the confidence instead of its mean (not included here).

    Attributes:
        threshold: float32 buffer (), the average confidence, which is the global threshold.
        class_share: float32 buffer (C,), the average probability of each class.

    Args:
        num_classes: C, the number of classes.
        momentum: m in [0, 1], for both averages.
        max_threshold: upper limit of the global threshold, in [0, 1]; 1 means no limit.
        sync: whether to merge the sums of all ranks of the default process group.
        ignore_index: the label of rejected pixels.
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.9, 0.4], [0.1, 0.1, 0.6]]).view(1, 2, 1, 3)
        >>> selector = AdaptiveThresholdSelector(2, momentum=0.0)
        >>> selector(probabilities, kind="probabilities").labels  # the mean confidence is 0.8
        tensor([[[0, 0, 1]]])
        >>> selector.thresholds  # class 1 has 0.8 / 2.2 of the mean probability of class 0
        tensor([0.8000, 0.2909])
    """

    threshold: Tensor
    class_share: Tensor

    def __init__(
        self,
        num_classes: int,
        momentum: float = 0.999,
        *,
        max_threshold: float = 1.0,
        sync: bool = False,
        ignore_index: int = 255,
        exclude: Sequence[int] = (),
    ) -> None:
        super().__init__(ignore_index=ignore_index, exclude=exclude)
        check_classes(num_classes)
        check_not_all(self.exclude, num_classes)
        check_range("momentum", momentum, 0.0, 1.0)
        check_range("max_threshold", max_threshold, 0.0, 1.0)
        check_flag("sync", sync)
        self.num_classes, self.momentum, self.max_threshold, self.sync = num_classes, momentum, max_threshold, sync
        start = torch.full((1,), 1 / (num_classes - len(self.exclude)), dtype=torch.float32)
        self.register_buffer("threshold", start[0].clone())
        share = start.repeat(num_classes - len(self.exclude))
        self.register_buffer("class_share", with_excluded(share, self.exclude, dim=0) if self.exclude else share)

    @property
    def thresholds(self) -> Float[Tensor, "c"]:
        """The lowest confidence at which each class is kept, (C,)."""
        largest = self.class_share.amax().clamp_min(torch.finfo(torch.float32).tiny)
        return self.threshold.clamp_max(self.max_threshold) * (self.class_share / largest)

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels. All selectors share these arguments; `ThresholdSelector.forward` explains them."""
        check_option("kind", kind, KINDS)
        check_class_scores(logits, kind, self.num_classes)
        check_device("threshold", self.threshold, logits, "logits")
        check_features(features, logits)  # before the update: a call that is refused changes nothing
        if self.training:
            with torch.no_grad():
                mask = None if valid is None else expand_valid(valid, logits)
                self._update(others(logits.detach(), kind, self.exclude), mask)
        return super().forward(logits, features, kind=kind, valid=valid)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the confidence reaches the threshold of its class."""
        kept = confidence >= look_up(self.thresholds, labels)
        return kept if valid is None else kept & valid

    def _update(self, probabilities: Tensor, valid: Tensor | None) -> None:
        confidence, share, count = batch_shares(probabilities, valid, sync=self.sync)
        moved = (count > 0).float() * (1 - self.momentum)
        self.threshold.lerp_(confidence, moved)
        self.class_share.lerp_(share, moved)

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, momentum={self.momentum:g}, max_threshold={self.max_threshold:g}, "
            f"sync={self.sync}, {super().extra_repr()}"
        )
