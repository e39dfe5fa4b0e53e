"""ProDA's selection: fixed soft labels of the stage's initial net, rectified by class centroids of the target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gta2cs.loading import Batch
from udakit import ClassPrototypes, EMATeacher, PseudoLabels, RectifiedSelector

CENTROID_BATCHES = 50  # of target, for the first centroids


class RectifiedLabels(nn.Module):
    """A frozen copy of the student as it is now, and centroids that follow the teacher's features.

    The stage must start from a trained net, because its labels are never renewed, only re-weighted.
    """

    def __init__(self, student: nn.Module, num_classes: int, *, momentum: float, **statistics: Any) -> None:
        super().__init__()
        self.labeller = EMATeacher(student, **statistics)  # never updated: frozen
        self.prototypes = ClassPrototypes(num_classes, student.feature_dim, momentum=momentum)  # type: ignore[arg-type]
        self.select = RectifiedSelector(self.prototypes)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Compute the class centroids of the target as the mean over one pass."""
        mean = target_centroids(self.labeller, self.prototypes, batches)
        self.prototypes.set_(mean.prototypes, mean.counts)

    def forward(self, images: Tensor, teacher: Any, valid: Tensor | None) -> tuple[PseudoLabels, Tensor]:
        """Pseudo-labels and the labeller's logits of target images; the centroids move to the teacher's features."""
        with torch.no_grad():
            logits = self.labeller(images).logits
            pseudo = self.select(logits, teacher.features, valid=valid)
            self.prototypes.update(teacher.features, classes_at_features(teacher), sync=True)
        return pseudo, logits


@torch.no_grad()
def target_centroids(labeller: nn.Module, like: ClassPrototypes, batches: Iterable[Batch]) -> ClassPrototypes:
    """Mean feature of each class that the labelling net predicts on target images."""
    mean = ClassPrototypes(like.num_classes, like.dim, mode="mean").to(like.counts.device)
    for batch in batches:
        output = labeller(batch.target_images)
        mean.update(output.features, classes_at_features(output))
    return mean


def classes_at_features(output: Any) -> Tensor:
    """Arg-max at the size of the features, computed only for those pixels."""
    return output.sampled(output.features.shape[-2:]).argmax(1)  # type: ignore[no-any-return]
