"""Semi-supervised adaptation: labelled source images, many target images, and labels for a few of them.

    python examples/integrations/semi_supervised.py

The third stream is small. Its labels are the most valuable ones, but a net sees them so often that it memorises them.
They are therefore mixed into everything instead of being repeated unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from udakit import ClassMix, ConfidentRatioSelector, EMATeacher, SegBatch, cross_entropy

CLASSES = 19


def batches(steps: int, size: int, few: int = 3) -> Iterator[tuple[SegBatch, SegBatch, Tensor]]:
    """Stand in for three loaders: source, the few labelled target images (repeated), and unlabelled target."""
    known = SegBatch(torch.randn(few, 3, size, size), torch.randint(CLASSES, (few, size, size)))
    for step in range(steps):
        source = SegBatch(torch.randn(2, 3, size, size), torch.randint(CLASSES, (2, size, size)))
        at = (2 * step + torch.arange(2)) % few
        yield source, SegBatch(known.images[at], known.labels[at]), torch.randn(2, 3, size, size)


def main(steps: int = 2, size: int = 64, known_weight: float = 1.0) -> list[float]:
    """Train and return the losses."""
    student = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    teacher = EMATeacher(student, decay=0.999)
    select = ConfidentRatioSelector()
    mix = ClassMix(CLASSES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    losses = []
    for source, known, target_images in batches(steps, size):
        pseudo = select(teacher(target_images))
        target = SegBatch(target_images, pseudo.labels, pseudo.weight)

        # Three pairs, one function: `class_mix` does not care which side has true labels. A batch without a weight
        # counts fully, so only the pseudo-labelled pixels of each mixture get a lower weight.
        source_on_target, _ = mix(source, target)
        known_on_target, _ = mix(known, target)  # the same camera on both sides; one has less reliable labels
        source_on_known, _ = mix(source, known)  # true labels on both sides: a supervised batch between the domains

        loss = cross_entropy(student(source.images), source.labels)
        loss = loss + known_weight * cross_entropy(student(known.images), known.labels)
        loss = loss + cross_entropy(student(source_on_known.images), source_on_known.labels)
        for mixed in (source_on_target, known_on_target):
            loss = loss + cross_entropy(
                student(mixed.images), mixed.labels, pixel_weight=mixed.weight, reduction="mean_all"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
