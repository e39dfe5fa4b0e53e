"""segmentation_models_pytorch with one logit per pixel and your own Dice loss: defects, vessels, roads, tumours.

    python examples/integrations/one_logit.py

The lines that udakit adds are marked with (+). `binary_logits` is used wherever a part needs logits. The net, its
sigmoid and its losses do not change.
"""

from __future__ import annotations

from collections.abc import Iterator

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from udakit import ClassMix, EMATeacher, SegBatch, StrongAugment, ThresholdSelector, binary_logits, cross_entropy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of smp's ImageNet encoders
IGNORE = 255


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for your two loaders: source images, masks of 0 and 1 (int64, no channel axis), target images."""
    for _ in range(steps):
        yield torch.randn(2, 3, size, size), torch.randint(2, (2, size, size)), torch.randn(2, 3, size, size)


def dice_loss(logits: Tensor, labels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """Your own loss on logits (N, 1, H, W), with a new factor for ignored pixels and weights.

    A pixel without a label counts in neither sum. As background, it would teach the net that nothing is there.
    """
    counts = (labels != IGNORE).to(logits.dtype)  # (+) rejected pseudo-labels do not count
    if pixel_weight is not None:
        counts = counts * pixel_weight  # (+) and uncertain ones count less
    p, foreground = logits.squeeze(1).sigmoid(), (labels == 1).to(logits.dtype)
    both = (p * foreground * counts).sum()
    return 1 - (2 * both + 1) / (((p + foreground) * counts).sum() + 1)


def main(steps: int = 2, size: int = 64, encoder: str = "resnet18", weights: str | None = None) -> list[float]:
    """Train and return the losses. `weights="imagenet"` downloads; start from a source-trained net for real."""
    student = smp.Unet(encoder, encoder_weights=weights, classes=1).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    teacher = EMATeacher(student, decay=0.999)  # (+) returns one logit per pixel, like the student
    # (+) 0.9 for both classes: foreground above a sigmoid of 0.9, background below 0.1, nothing in between.
    select = ThresholdSelector(0.9, ignore_index=IGNORE)
    mix = ClassMix(2)  # (+) pastes the foreground, or the background, of source onto target
    augment = StrongAugment(mean=MEAN, std=STD)  # (+)

    losses = []
    for source_images, source_labels, target_images in batches(steps, size):
        pseudo = select(binary_logits(teacher(target_images)))  # (+) a single logit would be refused
        target = SegBatch(target_images, pseudo.labels, pseudo.weight)  # (+)
        mixed, _ = mix(SegBatch(source_images, source_labels), target)  # (+)

        z = student(source_images)
        # The same value as F.binary_cross_entropy_with_logits(z.squeeze(1), source_labels.float()).
        loss = cross_entropy(binary_logits(z), source_labels) + dice_loss(z, source_labels)
        z = student(augment(mixed.images))  # (+)
        loss = loss + cross_entropy(binary_logits(z), mixed.labels, pixel_weight=mixed.weight, reduction="mean_all")
        loss = loss + dice_loss(z, mixed.labels, mixed.weight)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)  # (+) after the optimiser's step
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
