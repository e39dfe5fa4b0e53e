"""Predictions whose class shares are brought to those of source, or to a known prior (distribution alignment)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from udakit._checks import (
    check_classes,
    check_device,
    check_flag,
    check_float,
    check_ignore_index,
    check_option,
    check_per_class,
    check_range,
    check_scores,
    check_tensor,
    kind_of,
    shape_of,
)
from udakit._reduce import KINDS, Kind, class_ids, upcast
from udakit._state import FullPrecisionState, sum_ranks
from udakit.pseudo_labels.adaptive_threshold import batch_shares, check_class_scores
from udakit.pseudo_labels.selection import expand_valid

SMALLEST = 1e-6  # share below which a class of target counts as this much


def align_distribution(
    probabilities: Float[Tensor, "n c *space"],
    source_share: Float[Tensor, "c"],
    target_share: Float[Tensor, "c"],
) -> Float[Tensor, "n c *space"]:
    r"""Multiply each class by how much rarer target's predictions have it than source, and renormalise.

    $$\tilde p_c = \frac{p_c\, s_c / t_c}{\sum_k p_k\, s_k / t_k}$$

    **Convention.** Every pixel sums to 1. A target share below 1e-6 counts as 1e-6. A pixel at which every class comes
    to 0 keeps its probabilities. The shares are detached, gradients flow to the probabilities. The arithmetic is in
    float32 at least.

    **Source.** ReMixMatch (Berthelot et al., ICLR 2020) and AdaMatch (Berthelot et al., ICLR 2022); their released code
    adds 1e-6 to both shares.

    Args:
        probabilities: class probabilities, such as a teacher's softmax on target.
        source_share: share of each class: the running one of source, or a known prior of target.
        target_share: mean predicted probability of each class on target.

    Returns:
        Probabilities, float32 (float64 for float64 input).

    Raises:
        TypeError: tensors that are not float.
        ValueError: the shapes do not match.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1).requires_grad_()
        >>> aligned = align_distribution(p, torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]))
        >>> aligned[:, 1].sum().backward()
        >>> aligned.flatten().tolist()
        [0.5, 0.5]
    """
    check_scores("probabilities", probabilities, "probabilities")
    for name, share in (("source_share", source_share), ("target_share", target_share)):
        check_float(name, share)
        check_per_class(name, share, probabilities.shape[1], reference=probabilities, reference_name="probabilities")
    p = upcast(probabilities)
    ratio = source_share.detach().to(p.dtype) / target_share.detach().to(p.dtype).clamp_min(SMALLEST)
    weighted = p * ratio.view(-1, *[1] * (p.ndim - 2))
    total = weighted.sum(1, keepdim=True)
    empty = total <= 0
    return torch.where(empty, p, weighted / torch.where(empty, 1, total))


class DistributionAlignment(FullPrecisionState):
    """Align a net's predictions on target, with class shares that are followed while training.

    The alignment is [`align_distribution`][udakit.pseudo_labels.align_distribution].

    **Convention.** The result is detached probabilities. In training mode a call first takes the mean probability of
    its batch into `target_share`, then aligns; in eval mode the stored shares align. Both shares are plain means over
    the first 1 / (1 - momentum) batches, and decay afterwards: no starting value lingers. While source has not been
    seen the predictions come back as they are. `momentum` weighs the *old* value. With `sync` the ranks' sums are
    merged, within 1e-6 of one process on the global batch.

    **Source.** ReMixMatch keeps the shares of the last 128 batches; AdaMatch takes source's from predictions, we take
    them from labels. A prior that is known for target needs no source: pass `source_share`.

    Attributes:
        source_share: float32 buffer (C,), of source's labels or as given.
        target_share: float32 buffer (C,), mean probability on target.
        source_batches: int64 buffer (), batches behind `source_share`.
        target_batches: int64 buffer (), batches behind `target_share`.

    Args:
        num_classes: C.
        momentum: in [0, 1).
        source_share: (C,), a known share of each class on target; then `update_source` is not needed.
        sync: merge the sums of the ranks of the default process group.
        ignore_index: the label that takes no part in `update_source`.

    Example:
        >>> import torch
        >>> alignment = DistributionAlignment(2)
        >>> alignment.update_source(torch.tensor([[[0, 1, 255]]]))
        >>> p = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1)
        >>> alignment(p, kind="probabilities").flatten()
        tensor([0.5000, 0.5000])
    """

    source_share: Tensor
    target_share: Tensor
    source_batches: Tensor
    target_batches: Tensor

    def __init__(
        self,
        num_classes: int,
        momentum: float = 0.99,
        *,
        source_share: Float[Tensor, "c"] | None = None,
        sync: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_classes(num_classes)
        check_range("momentum", momentum, 0.0, 1.0, open_high=True)
        check_flag("sync", sync)
        check_ignore_index(ignore_index, num_classes)
        uniform = torch.full((num_classes,), 1 / num_classes, dtype=torch.float32)
        if source_share is not None:
            check_float("source_share", source_share)
            if source_share.ndim != 1 or len(source_share) != num_classes:
                raise ValueError(f"Expected `source_share` to be ({num_classes},), but got {shape_of(source_share)}.")
        self.num_classes, self.momentum, self.sync, self.ignore_index = num_classes, momentum, sync, ignore_index
        self.known = source_share is not None
        self.register_buffer("source_share", uniform.clone() if source_share is None else source_share.float().clone())
        self.register_buffer("target_share", uniform)
        self.register_buffer("source_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("target_batches", torch.zeros((), dtype=torch.int64))

    def update_source(self, labels: Integer[Tensor, "n *space"]) -> None:
        """Take in the class shares of a batch of source labels; one without a class changes nothing.

        Args:
            labels: class ids or `ignore_index`, of any shape.

        Raises:
            TypeError: `labels` is neither int64 nor uint8.
            ValueError: a Module that was given `source_share`.
        """
        if self.known:
            raise ValueError("Expected `source_share` not to be given where it is to follow source, but it was.")
        check_tensor("labels", labels, "an int64 or uint8 tensor")
        if labels.dtype not in (torch.int64, torch.uint8):
            raise TypeError(f"Expected `labels` to be an int64 or uint8 tensor, but got {kind_of(labels)}.")
        check_device("source_share", self.source_share, labels, "labels")
        ids = class_ids(labels, self.num_classes, self.ignore_index).flatten()
        counts = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=ids.device)
        counts = counts.index_add(0, ids, torch.ones_like(ids))[:-1]
        if self.sync:
            counts = sum_ranks(counts)
        total = counts.sum()
        self._follow(self.source_share, self.source_batches, counts / total.clamp_min(1), total > 0)

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> Float[Tensor, "n c *space"]:
        """Align the predictions of a target batch.

        Args:
            logits: class scores, or probabilities by `kind`.
            kind: "logits" | "probabilities".
            valid: False where a pixel takes no part in `target_share`; it is aligned all the same.

        Returns:
            Probabilities for a selector's `kind="probabilities"`, float32 (float64 for float64 input).

        Raises:
            TypeError: `logits` that are not float, `valid` that is not bool.
            ValueError: shapes that do not match, or an unknown `kind`.
        """
        check_option("kind", kind, KINDS)
        check_class_scores(logits, kind, self.num_classes)
        check_device("target_share", self.target_share, logits, "logits")
        mask = None if valid is None else expand_valid(valid, logits)
        with torch.no_grad():
            p = upcast(logits.detach())
            p = p.softmax(1) if kind == "logits" else p
            if self.training:
                _, share, count = batch_shares(p, mask, sync=self.sync)
                self._follow(self.target_share, self.target_batches, share, count > 0)
            known = (self.source_batches > 0) | self.known
            return align_distribution(p, torch.where(known, self.source_share, self.target_share), self.target_share)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def _follow(self, share: Tensor, batches: Tensor, new: Tensor, present: Tensor) -> None:
        batches.add_(present)
        step = batches.float().clamp_min(1).reciprocal().clamp_min(1 - self.momentum)
        share.lerp_(new.float(), step * present.float())

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, momentum={self.momentum:g}, known={self.known}, sync={self.sync}, "
            f"ignore_index={self.ignore_index}"
        )
