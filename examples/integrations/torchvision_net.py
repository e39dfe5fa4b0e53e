"""torchvision: get features from a net that returns only logits, for prototypes and DiGA's pseudo-labels.

    python examples/integrations/torchvision_net.py

torchvision's nets return {"out": logits, "aux": ...} but not their features. `FeatureTap` returns both from one forward
pass, without changing the net.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from udakit import BilateralConsensus, ClassPrototypes, EMATeacher, FeatureTap, cross_entropy, downscale_labels

CLASSES, DIM, STRIDE = 19, 256, 16
LAYER = "classifier.3"  # the last normalised features before the 1 x 1 classifier; `net.named_modules()` lists them


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for your two loaders: normalised source images, their labels, and target images without labels."""
    for _ in range(steps):
        labels = torch.randint(CLASSES, (2, size // STRIDE, size // STRIDE))  # regions larger than a feature pixel
        labels = labels.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
        yield torch.randn(2, 3, size, size), labels, torch.randn(2, 3, size, size)


def main(steps: int = 2, size: int = 64, weights: str | None = None) -> list[float]:
    """Train and return the losses. `weights="DEFAULT"` downloads ImageNet's for the backbone."""
    student = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=weights, num_classes=CLASSES).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=2.5e-4, momentum=0.9)
    teacher = EMATeacher(student, decay=0.999)

    # A tap on the teacher: calling it calls the teacher, and returns (logits, features) whatever the net returns.
    tap = FeatureTap(teacher, f"module.{LAYER}")
    prototypes = ClassPrototypes(CLASSES, DIM, momentum=1e-4)
    # A pixel is labelled where the classifier and the nearest class centre agree: there is no threshold to tune, and a
    # rare class, never confident, is not left out for it. The selector looks at `prototypes`, it does not own them.
    select = BilateralConsensus(prototypes)

    losses = []
    for source_images, source_labels, target_images in batches(steps, size):
        # Labels never come to feature size silently: a feature pixel gets a label where one class fills its cell.
        _, source_features = tap(source_images)
        small = downscale_labels(source_labels, size // source_features.shape[-1], num_classes=CLASSES)
        prototypes.update(source_features, small)  # true labels: the centres are worth something from the first step

        logits, features = tap(target_images)
        pseudo = select(logits, features)
        # Then the centres move towards target, by the labels that both views agree on.
        agreed = downscale_labels(pseudo.labels, size // features.shape[-1], num_classes=CLASSES)
        prototypes.update(features, agreed)

        loss = cross_entropy(student(source_images)["out"], source_labels)
        # Rejected pixels are ignored labels. Should every pixel be rejected, the loss is 0, not NaN.
        loss = loss + cross_entropy(student(target_images)["out"], pseudo.labels, reduction="mean_all")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
