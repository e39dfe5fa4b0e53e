"""SePiCo's contrast: student features against the distribution of each class among the teacher's source features."""

from __future__ import annotations

from torch import Tensor, nn

from udakit import ClassDistributions, SegBatch, distribution_contrast_loss, downscale_labels


class DistributionContrast(nn.Module):
    """Running statistics of unit features, and the loss against them.

    The features are those before the head; the released code has a projection head of two convolutions in between.
    """

    def __init__(self, num_classes: int, dim: int, *, temperature: float) -> None:
        super().__init__()
        self.distributions = ClassDistributions(num_classes, dim)
        self.num_classes, self.temperature = num_classes, temperature

    def update(self, teacher_features: Tensor, labels: Tensor) -> None:
        """Take in the teacher's features of a source batch."""
        unit = nn.functional.normalize(teacher_features.float(), dim=1)
        self.distributions.update(unit, self._small(labels, unit), sync=True)

    def forward(self, features: Tensor, batch: SegBatch) -> Tensor:
        """Contrast of a batch, on the cells that one class fills to three quarters, each with its mean weight."""
        labels = batch.labels if batch.weight is None else batch.labels.where(batch.weight > 0, 255)
        weight = None
        if batch.weight is not None:
            weight = nn.functional.adaptive_avg_pool2d(batch.weight.unsqueeze(1), features.shape[-2:]).squeeze(1)
        held = self.distributions
        return distribution_contrast_loss(
            features,
            self._small(labels, features),
            held.means,
            held.variances,
            temperature=self.temperature,
            seen=held.seen,
            pixel_weight=weight,
        )

    def _small(self, labels: Tensor, features: Tensor) -> Tensor:
        factor = labels.shape[-1] // features.shape[-1]
        return downscale_labels(labels, factor, num_classes=self.num_classes)
