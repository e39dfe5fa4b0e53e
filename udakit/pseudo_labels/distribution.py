"""Distribution alignment: shift predicted class shares to those of the source data or to a known prior."""

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
from udakit._reduce import KINDS, Kind, class_ids, fraction, upcast
from udakit._state import FullPrecisionState, sum_ranks
from udakit.pseudo_labels._renormalise import renormalised
from udakit.pseudo_labels.adaptive_threshold import batch_shares, check_class_scores
from udakit.pseudo_labels.selection import expand_valid

SMALLEST = 1e-6  # smallest share of a target class; lower ones are raised to it


def align_distribution(
    probabilities: Float[Tensor, "n c *space"],
    source_share: Float[Tensor, "c"],
    target_share: Float[Tensor, "c"],
) -> Float[Tensor, "n c *space"]:
    r"""Multiply the probability of each class by the ratio of its source share to its target share, and renormalise.

    $$\tilde p_c = \frac{p_c\, s_c / t_c}{\sum_k p_k\, s_k / t_k}$$

    **Convention.** The probabilities of each pixel sum to 1. A target share below 1e-6 counts as 1e-6. A pixel at which
    every class would become 0 keeps its probabilities. The shares are detached; gradients flow to the probabilities.
    Computations use at least float32.

    **Source.** ReMixMatch (Berthelot et al., ICLR 2020) and AdaMatch (Berthelot et al., ICLR 2022). Their released code
    adds 1e-6 to both shares.

    Args:
        probabilities: class probabilities, for example a teacher's softmax on target images.
        source_share: share of each class in the source data, (C,), or a known prior of the target data.
        target_share: mean predicted probability of each class on target images, (C,).

    Returns:
        The aligned probabilities, float32 (float64 for float64 input).

    Raises:
        TypeError: a tensor is not float.
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
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    ratio = source_share.detach().to(dtype) / target_share.detach().to(dtype).clamp_min(SMALLEST)
    return renormalised(probabilities, ratio.view(-1, *[1] * (probabilities.ndim - 2)))


class DistributionAlignment(FullPrecisionState):
    """Align a net's predictions on target images, with class shares that are averaged during training.

    The alignment is [`align_distribution`][udakit.pseudo_labels.align_distribution].

    **Convention.** The result is a map of detached probabilities. In training mode, a call first updates `target_share`
    with the mean probabilities of its batch and then aligns. In eval mode, the stored shares are used. Without a given
    `source_share`, predictions are returned unchanged until `update_source` has been called.

    Both shares are plain means over the first 1 / (1 - momentum) batches and moving averages afterwards, so no initial
    value remains. `momentum` is the weight of the *old* value. With `sync`, the sums of all ranks are merged, and the
    result is within 1e-6 of one process on the global batch.

    **Source.** ReMixMatch averages over the last 128 batches. AdaMatch computes the source share from predictions; here
    it comes from labels. If the class shares of the target data are known, pass them as `source_share`; no source data
    is needed then.

    Attributes:
        source_share: float32 buffer (C,), the share of each class in the source labels, or the given one.
        target_share: float32 buffer (C,), the mean probability of each class on target images.
        source_batches: int64 buffer (), the number of batches in `source_share`.
        target_batches: int64 buffer (), the number of batches in `target_share`.

    Args:
        num_classes: C, the number of classes.
        momentum: weight of the old shares, in [0, 1).
        source_share: known share of each class on target, (C,); `update_source` is not needed then.
        sync: whether to merge the sums of all ranks of the default process group.
        ignore_index: the label of the pixels that `update_source` ignores.

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
        """Update the source share with a batch of source labels. A batch without any class changes nothing.

        Args:
            labels: class ids or `ignore_index`, of any shape.

        Raises:
            TypeError: `labels` is neither int64 nor uint8.
            ValueError: the Module was made with a fixed `source_share`.
        """
        if self.known:
            raise ValueError("Expected `source_share` to be None if `update_source` is called, but got a fixed share.")
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
        self._follow(self.source_share, self.source_batches, fraction(counts, total), total > 0)

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> Float[Tensor, "n c *space"]:
        """Align the predictions of a target batch.

        Args:
            logits: class scores before the softmax, (N, C, *space), or class probabilities with `kind="probabilities"`.
            kind: "logits" | "probabilities".
            valid: False where a pixel does not count for `target_share`; it is still aligned.

        Returns:
            Probabilities, float32 (float64 for float64 input). Pass them to a selector with `kind="probabilities"`.

        Raises:
            TypeError: `logits` is not a float tensor, or `valid` is not bool.
            ValueError: the shapes do not match, or `kind` is unknown.
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
