"""Estimate the accuracy on target images with a confidence threshold from labelled source images (ATC)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from udakit._checks import (
    check_device,
    check_flag,
    check_ignore_index,
    check_integer,
    check_labels_like,
    check_mask_like,
    check_option,
    check_pair,
    check_range,
    check_scores,
)
from udakit._reduce import (
    BLOCK,
    KINDS,
    LOG_2,
    Kind,
    class_ids,
    exp_,
    is_large,
    plain,
    top_class,
    upcast,
    zero_where_not_,
)
from udakit._state import FullPrecisionState, sum_ranks
from udakit.pseudo_labels.class_quantile import _BITS


class ConfidenceThreshold(FullPrecisionState):
    r"""Estimate the accuracy on unlabelled target images with a threshold that fits labelled source images.

    $$t: \ \frac1N \#\{p \in \text{source} : s_p > t\} = \text{accuracy on source}, \qquad
    \text{estimate} = \frac1M \#\{p \in \text{target} : s_p > t\}$$

    where the confidence is $s = \max_c \operatorname{softmax}(z / T)_c$.

    **Convention.** The results are detached. `fit` counts confidences in a histogram with fixed bins, evenly spaced in
    -log2(1 - s) like those of `ClassQuantileSelector`. From the bin with the threshold, the same fraction counts on
    target images as on source images. The accuracy on source is therefore exact despite ties, which are common at 1.0.
    Counts add up over batches and ranks. The estimate is NaN before the first `fit` and for a batch without a valid
    pixel. A NaN confidence counts as wrong, with confidence 0.

    **Source.** ATC (Garg et al. 2022), with the maximum confidence. It estimates the accuracy and does not select
    anything. It works if confidence and accuracy change together, which training on pseudo-labels can destroy.

    Attributes:
        histogram: int64 buffer (bins,), number of source pixels by confidence.
        correct: int64 buffer (), number of source pixels that are predicted correctly.

    Args:
        kind: "logits" | "probabilities".
        temperature: T > 0, which calibrates the confidence (see `fit_temperature`); for logits only.
        bins: number of bins of the histogram.
        ignore_index: the label of the pixels to ignore.

    Example:
        >>> import torch
        >>> threshold = ConfidenceThreshold(kind="probabilities")
        >>> p = torch.linspace(0.5, 0.9, 10).view(1, 1, 10)
        >>> source = torch.cat([p, 1 - p], 1)
        >>> threshold.fit(source, (p[:, 0] < 0.6).long())  # wrong where unsure: 7 of 10 are right
        >>> threshold.estimate(source), threshold.estimate(source[..., :5])
        (tensor(0.7000), tensor(0.4000))
    """

    histogram: Tensor
    correct: Tensor

    def __init__(
        self, *, kind: Kind = "logits", temperature: float = 1.0, bins: int = 4096, ignore_index: int = 255
    ) -> None:
        super().__init__()
        check_option("kind", kind, KINDS)
        check_range("temperature", temperature, 0.0, open_low=True)
        check_integer("bins", bins, 2)
        check_ignore_index(ignore_index)
        if kind == "probabilities" and temperature != 1:
            raise ValueError(f"Expected `temperature` to be 1 for probabilities, but got {temperature!r}.")
        self.kind: Kind = kind
        self.temperature, self.bins, self.ignore_index = float(temperature), bins, ignore_index
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("correct", torch.zeros((), dtype=torch.int64))

    @property
    def accuracy(self) -> Float[Tensor, ""]:
        """Accuracy on the source images; NaN before the first `fit`."""
        return (self.correct.double() / self.histogram.sum()).float()

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """Lower edge of the bin that contains the threshold."""
        share = self._share()
        counted = (share > 0).sum()
        return 1 - torch.exp2((counted - self.bins).float() * (_BITS / self.bins))

    def reset(self) -> None:
        """Forget the source images."""
        self.histogram.zero_()
        self.correct.zero_()

    @torch.no_grad()
    def fit(
        self, logits: Float[Tensor, "n c *space"], labels: Integer[Tensor, "n *space"], *, sync: bool = False
    ) -> None:
        """Update the histogram with a labelled batch of source images.

        Args:
            logits: logits (N, C, *space), or probabilities with `kind="probabilities"`.
            labels: class ids or `ignore_index`, (N, *space); other ids are ignored, too.
            sync: whether to add up the counts of all ranks; every rank must make the call. Without a process group
                there is one rank.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: the shapes or devices do not match.
        """
        check_flag("sync", sync)
        bins, sound = self._bins(logits)
        check_labels_like(labels, logits)
        predicted = top_class(logits.detach()).where(sound, -1)
        ids = class_ids(labels, logits.shape[1], self.ignore_index)
        counts = torch.cat([self._count(bins, ids < logits.shape[1]), (predicted == ids).sum().view(1)])
        counts = sum_ranks(counts) if sync else counts
        self.histogram.add_(counts[:-1])
        self.correct.add_(counts[-1])

    @torch.no_grad()
    def estimate(
        self, logits: Float[Tensor, "n c *space"], *, valid: Bool[Tensor, "n *space"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the expected accuracy on a batch. For batches of the same size, take the mean over the batches.

        Args:
            logits: logits (N, C, *space), or probabilities with `kind="probabilities"`.
            valid: True where a pixel counts.

        Returns:
            The expected accuracy in [0, 1], float32.

        Raises:
            TypeError: `logits` is not a float tensor, or `valid` is not bool.
            ValueError: the shapes or devices do not match.
        """
        bins, _ = self._bins(logits)
        if valid is not None:
            check_mask_like(valid, logits)
        counts = self._count(bins, torch.ones_like(bins, dtype=torch.bool) if valid is None else valid).double()
        return ((counts * self._share()).sum() / counts.sum()).float()

    def _bins(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each pixel, and whether its confidence is a number."""
        check_scores("logits", logits, self.kind)
        check_device("histogram", self.histogram, logits, "logits")
        if self.kind == "probabilities":
            doubt = 1 - upcast(logits.detach()).amax(1)
        else:
            scores = upcast(logits.detach()).mul(1 / self.temperature)
            total = exp_(scores.sub_(scores.amax(1, keepdim=True))).sum(1)
            doubt = (total - 1).clamp_min(0) / total  # 1 - s, without the rounding of s to 1
        depth = -torch.log2(doubt.clamp(0, 1)) * (self.bins / _BITS)
        sound = ~depth.isnan()
        return depth.nan_to_num(0.0).clamp(0, self.bins - 1).long(), sound

    def _count(self, bins: Tensor, where: Tensor) -> Tensor:
        counts = torch.zeros(self.bins, dtype=torch.int64, device=bins.device)
        return counts.index_add(0, bins.flatten(), where.flatten().long())

    def _share(self) -> Tensor:
        """Fraction of each bin that counts as correct: 1 above the bin of the threshold, 0 below, a fraction in it."""
        above = self.histogram.flip(0).cumsum(0).flip(0) - self.histogram
        share = ((self.correct - above).double() / self.histogram.clamp_min(1)).clamp(0, 1)
        return share.where(self.histogram.sum() > 0, torch.nan)

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"kind={self.kind!r}, temperature={self.temperature:g}, bins={self.bins}, ignore_index={self.ignore_index}"
        )


@torch.no_grad()
def fit_temperature(
    logits: Float[Tensor, "n c *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    temperature_range: tuple[float, float] = (0.05, 20.0),
    ignore_index: int = 255,
) -> Float[Tensor, ""]:
    r"""Find the temperature that calibrates a net on labelled pixels.

    $$\arg\min_T \ \frac1N \sum_p \operatorname{CE}(z_p / T,\ y_p)$$

    **Convention.** The result is detached. The loss is convex in 1 / T, and its slope is bisected in log T. A net that
    makes no error gives one end of the range. If all pixels are ignored, the result is 1, or the end of the range that
    is nearest to 1.

    **Source.** Guo et al. 2017.

    Args:
        logits: logits (N, C, *space) of labelled source images that the net was not trained on.
        labels: class ids or `ignore_index`, (N, *space); other ids are ignored, too.
        temperature_range: lowest and highest T.
        ignore_index: the label of the pixels to ignore.

    Returns:
        The temperature, (), float32.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: the shapes do not match, or the range is invalid.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(1)
        >>> logits = torch.randn(1, 3, 64, 64, generator=generator)
        >>> labels = torch.distributions.Gumbel(0.0, 1.0).sample(logits.shape).add(logits).argmax(1)  # drawn from it
        >>> abs(float(fit_temperature(3 * logits, labels)) - 3) < 0.3
        True
    """
    check_pair("temperature_range", temperature_range, "(lowest, highest), both above 0")
    low, high = temperature_range
    check_range("temperature_range", low, 0.0, open_low=True)
    check_range("temperature_range", high, low)
    check_ignore_index(ignore_index)
    check_scores("logits", logits)
    check_labels_like(labels, logits)
    ids = class_ids(labels, logits.shape[1], ignore_index)
    known = ids < logits.shape[1]
    scores = upcast(logits.detach())
    scores = (scores - scores.amax(1, keepdim=True)).clamp_min_(-1e30)  # 0 * -inf is NaN
    scores = zero_where_not_(known.unsqueeze(1), scores)  # such a pixel has no slope
    target = scores.gather(1, ids.where(known, 0).unsqueeze(1)).squeeze(1)
    slope_at = _slope(scores, target)
    shortest, longest = (torch.full((), end, dtype=scores.dtype, device=scores.device).log() for end in (low, high))
    for _ in range(24):
        middle = shortest.lerp(longest, 0.5)
        slope = slope_at(middle.exp())
        shortest, longest = middle.where(slope > 0, shortest), middle.where(slope <= 0, longest)
    return torch.where(known.any(), shortest.lerp(longest, 0.5).exp(), min(max(1.0, low), high)).float()


def _slope(scores: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The derivative with respect to 1 / T as a function of T, which is positive if T is too small.

    A large map on the CPU is in pieces that stay in the cache. The largest score of a pixel is 0.
    """
    if not is_large(scores):
        return lambda temperature: ((scores / temperature).softmax(1) * scores).sum(1).sub(target).sum()
    maps, targets = plain(scores).flatten(2), plain(target).flatten(1)
    n, c, size = maps.shape
    pixels = max(BLOCK // c, 1)
    images = max(pixels // size, 1)
    buffers = maps.new_empty(2, c * min(pixels, n * size))
    pieces = []
    for i in range(0, n, images):
        for j in range(0, size, pixels):
            z = maps[i : i + images, :, j : j + pixels]
            weight, product = (x[: z.numel()].view(z.shape) for x in buffers)
            pieces.append((z, targets[i : i + images, j : j + pixels], weight, product))

    def slope(temperature: Tensor) -> Tensor:
        factor, total = 1 / (temperature * LOG_2), temperature.new_zeros(())
        for z, aim, weight, product in pieces:
            torch.mul(z, factor, out=weight).exp2_()
            mean = torch.mul(weight, z, out=product).sum(1).div_(weight.sum(1))
            total += mean.sub_(aim).sum()
        return total

    return slope
