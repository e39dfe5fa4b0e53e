"""Contrast between the student's features and the classes in the teacher's source features.

A class is represented by its whole distribution (SePiCo) or by its mean.
"""

from __future__ import annotations

from torch import Tensor, nn

from udakit import (
    ClassDistributions,
    ClassPrototypes,
    SegBatch,
    distribution_contrast_loss,
    downscale_labels,
    pixel_prototype_contrast_loss,
)


class Contrast(nn.Module):
    """Labels and weights at the size of features, for cells of which one class covers at least three quarters."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def small(self, labels: Tensor, features: Tensor) -> Tensor:
        """Labels of the cells."""
        factor = labels.shape[-1] // features.shape[-1]
        return downscale_labels(labels, factor, num_classes=self.num_classes)

    def cells(self, features: Tensor, batch: SegBatch) -> tuple[Tensor, Tensor | None]:
        """Labels of the cells without rejected pixels, and the mean weight of each."""
        if batch.weight is None:
            return self.small(batch.labels, features), None
        weight = nn.functional.adaptive_avg_pool2d(batch.weight.unsqueeze(1), features.shape[-2:]).squeeze(1)
        return self.small(batch.labels.where(batch.weight > 0, 255), features), weight


class DistributionContrast(Contrast):
    """Running statistics of unit features, and the loss against them.

    The features are those before the head; the released code has a projection head of two convolutions in between.
    """

    def __init__(self, num_classes: int, dim: int, *, temperature: float) -> None:
        super().__init__(num_classes)
        self.distributions = ClassDistributions(num_classes, dim)
        self.temperature = temperature

    def update(self, teacher_features: Tensor, labels: Tensor) -> None:
        """Update the statistics with the teacher's features of a source batch."""
        unit = nn.functional.normalize(teacher_features.float(), dim=1)
        self.distributions.update(unit, self.small(labels, unit), sync=True)

    def forward(self, features: Tensor, batch: SegBatch) -> Tensor:
        """Contrast of a batch."""
        labels, weight = self.cells(features, batch)
        held = self.distributions
        return distribution_contrast_loss(
            features,
            labels,
            held.means,
            held.variances,
            temperature=self.temperature,
            seen=held.seen,
            pixel_weight=weight,
        )


class PrototypeContrast(Contrast):
    """Class prototypes that follow the teacher's features, and the contrast of each pixel with them."""

    def __init__(self, num_classes: int, dim: int, *, momentum: float = 1e-2) -> None:
        super().__init__(num_classes)
        self.prototypes = ClassPrototypes(num_classes, dim, momentum=momentum)

    def update(self, teacher_features: Tensor, labels: Tensor) -> None:
        """Update the prototypes with the teacher's features of a source batch."""
        self.prototypes.update(teacher_features, self.small(labels, teacher_features), sync=True)

    def forward(self, features: Tensor, batch: SegBatch) -> Tensor:
        """Contrast of a batch."""
        labels, weight = self.cells(features, batch)
        held = self.prototypes
        return pixel_prototype_contrast_loss(features, labels, held.prototypes, seen=held.seen, pixel_weight=weight)
