"""Mean and variance of the features of each class, exact or with a decay."""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from udakit._checks import check_flag, check_labels_like, check_range
from udakit._reduce import class_ids, upcast
from udakit._state import gather_ranks
from udakit.prototypes._class_state import ClassState, finite_rows
from udakit.prototypes.means import class_sums

__all__ = ["ClassDistributions"]


class ClassDistributions(ClassState):
    r"""A Gaussian with diagonal covariance for each class, fitted to all features seen so far.

    $$w = \frac{n_b}{n_b + n}, \qquad
    \sigma^2 \leftarrow (1 - w)\, \sigma^2 + w\, \sigma_b^2 + w (1 - w) (\mu - \mu_b)^2, \qquad
    \mu \leftarrow (1 - w)\, \mu + w\, \mu_b, \qquad n \leftarrow n + n_b$$

    where the subscript b marks the mean, the biased variance and the number of pixels of a class in the batch.

    **Convention.** Updates are detached. With `momentum=None`, the statistics are those of all pixels seen so far,
    however they were split into batches. A `momentum` replaces w, so that old batches are forgotten. It is the
    weight of the *new* batch, as in `ClassPrototypes`, and the first batch of a class is copied. A class that is
    not in the batch keeps its statistics, and so does one whose statistics are not finite. The state stays float32
    whatever dtype the Module is cast to; the counts are int64.

    **Source.** SePiCo (Xie et al., TPAMI 2023), which uses cumulative statistics of the teacher's features on labelled
    source images. Its counts are float32 and stop growing at 2^24 pixels, and its update needs an array of pixels x
    classes x channels.

    Attributes:
        means: float32 buffer (C, D), 0 for a class that has not been seen.
        variances: float32 buffer (C, D), the biased variance of each channel.
        counts: int64 buffer (C,), the number of pixels seen so far.

    Args:
        num_classes: C, the number of classes.
        dim: D, the number of channels of the features.
        momentum: weight of a new batch, in [0, 1]; None for the exact statistics.
        ignore_index: the label of the pixels to ignore.

    Example:
        >>> import torch
        >>> distributions = ClassDistributions(2, 1)
        >>> for value in (1.0, 3.0):
        ...     distributions.update(torch.full((1, 1, 1, 2), value), torch.tensor([[[0, 255]]]))
        >>> distributions.means.flatten(), distributions.variances.flatten(), distributions.counts
        (tensor([2., 0.]), tensor([1., 0.]), tensor([2, 0]))
    """

    means: Tensor
    variances: Tensor

    def __init__(self, num_classes: int, dim: int, momentum: float | None = None, *, ignore_index: int = 255) -> None:
        super().__init__(num_classes, dim, ignore_index, ("means", "variances"))
        if momentum is not None:
            check_range("momentum", momentum, 0.0, 1.0)
        self.momentum = momentum

    def update(
        self, features: Float[Tensor, "n d *space"], labels: Integer[Tensor, "n *space"], *, sync: bool = False
    ) -> None:
        """Update the statistics with the features of a batch.

        Args:
            features: features of the batch, (N, D, *space).
            labels: class ids or `ignore_index`, at the size of the features.
            sync: whether to merge the batches of all ranks. The counts are equal to those of one process on the
                concatenated batch, and the floats are within 1e-6. Every rank must make the call. Without a process
                group there is one rank.

        Raises:
            TypeError: `features` is not a float tensor, or `labels` is neither int64 nor uint8.
            ValueError: the shapes do not match.
        """
        check_flag("sync", sync)
        self._check(features)
        check_labels_like(labels, features, reference_name="features")
        with torch.no_grad():
            means, deviations, counts = self._of_batch(upcast(features.detach()), labels)
            if sync:
                means, deviations, counts = _pool(*gather_ranks(means, deviations, counts))
            # What is not finite in the means is not finite in the deviations from them.
            self._fold(means, _divide(deviations, counts), torch.where(finite_rows(deviations), counts, 0))

    def _of_batch(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means (C, D), sums of squared deviations from them (C, D), counts (C,)."""
        sums, per_image = class_sums(features, labels, self.num_classes, self.ignore_index)
        counts = per_image.sum(0)
        means = _divide(sums.sum(0), counts)
        # A second pass, because the mean of the squares minus the squared mean would lose all digits of a narrow class.
        ids = class_ids(labels, self.num_classes, self.ignore_index).flatten(1)
        centre = torch.cat([means, means.new_zeros(1, self.dim)])[ids].transpose(1, 2)
        square = (features.flatten(2) - centre).square_().view(features.shape)
        deviations, _ = class_sums(square, labels, self.num_classes, self.ignore_index)
        return means.float(), deviations.sum(0).float(), counts

    def _fold(self, means: Tensor, variances: Tensor, counts: Tensor) -> None:
        """Merge the batch's statistics into the buffers."""
        if self.momentum is None:
            weight = _ratio(counts, counts + self.counts)
        else:
            weight = torch.ones_like(means[:, 0]).masked_fill(self.seen, self.momentum) * (counts > 0)
        w = weight.unsqueeze(1)
        apart = means - self.means
        spread = self.variances + w * (variances - self.variances) + w * (1 - w) * apart.square()
        present = (counts > 0).unsqueeze(1)
        self.variances.copy_(torch.where(present, spread, self.variances))
        # lerp gives exactly the new mean at w = 1, and no change where both are equal.
        self.means.copy_(torch.where(present, torch.lerp(self.means, means, w), self.means))
        self.counts.add_(counts)

    def set_(
        self,
        means: Float[Tensor, "c d"],
        variances: Float[Tensor, "c d"],
        counts: Integer[Tensor, "c"] | None = None,
    ) -> Self:
        """Set the statistics.

        Args:
            means: mean of each class, (C, D); they are copied.
            variances: variance of each channel and class, (C, D), not negative; they are copied.
            counts: number of pixels of each class, from which cumulative statistics continue, not negative. By default
                it is 1 for every row with a non-zero mean.

        Raises:
            TypeError: `means` or `variances` are not float, or `counts` are not integers.
            ValueError: the shapes do not match, or a variance or count is negative (looked at on the CPU only).
        """
        self._take(counts, means=means, variances=variances)
        if counts is None:
            self.counts.copy_((self.means != 0).any(1))
        return self

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, momentum={self.momentum}, "
            f"ignore_index={self.ignore_index}"
        )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Quotient of counts in float32, divided in float64, because float32 holds exact counts only up to 2^24."""
    wide = torch.float32 if part.device.type == "mps" else torch.float64
    return (part.to(wide) / whole.clamp_min(1).to(wide)).float()


def _divide(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp_min(1).unsqueeze(-1)


def _pool(means: Tensor, deviations: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of ranks (R, ...) into common means and the deviations from them."""
    total = counts.sum(0)
    share = _ratio(counts, total).unsqueeze(-1)
    mean = (share * means).sum(0)
    between = (counts.unsqueeze(-1) * (means - mean).square()).sum(0)
    return mean, deviations.sum(0) + between, total
