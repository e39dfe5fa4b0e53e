"""segmentation_models_pytorch: DACS around any of its nets.

    python examples/integrations/smp_net.py

The loop is an ordinary one; the lines that udakit adds are marked with (+).
"""

from __future__ import annotations

from collections.abc import Iterator

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from udakit import ClassMix, ConfidentRatioSelector, EMATeacher, SegBatch, StrongAugment, cross_entropy

CLASSES = 19
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of smp's ImageNet encoders


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for your two loaders: normalised source images, their labels, and target images without labels."""
    for _ in range(steps):
        yield torch.randn(2, 3, size, size), torch.randint(CLASSES, (2, size, size)), torch.randn(2, 3, size, size)


def main(steps: int = 2, size: int = 64, encoder: str = "resnet18", weights: str | None = None) -> list[float]:
    """Train and return the losses. `weights="imagenet"` downloads; start from a source-trained net for real."""
    student = smp.Unet(encoder, encoder_weights=weights, classes=CLASSES).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=6e-5)

    # (+) The teacher is a copy that follows the student. With `warmup`, its first updates copy the student. This is
    # right for a student that starts from ImageNet. For a source-trained student, use warmup=False.
    teacher = EMATeacher(student, decay=0.999, warmup=True)
    select = ConfidentRatioSelector(threshold=0.968)  # (+) weight: the fraction of confident pixels
    mix = ClassMix(CLASSES)  # (+) half of the classes of a source image are pasted onto a target image
    augment = StrongAugment(mean=MEAN, std=STD)  # (+) colours and blur; needs the normalisation of the images

    losses = []
    for source_images, source_labels, target_images in batches(steps, size):
        # (+) The teacher sees the clean target image and the student a harder version. The student learns from this
        # difference; on equal images it could only learn to agree with itself.
        pseudo = select(teacher(target_images))
        target = SegBatch(target_images, pseudo.labels, pseudo.weight)
        mixed, _ = mix(SegBatch(source_images, source_labels), target)

        # Two forward passes, so that BatchNorm does not mix the statistics of source and mixed images.
        loss = cross_entropy(student(source_images), source_labels)
        # (+) "mean_all": if few pixels are trusted, the loss is small, instead of giving these few more weight.
        on_mixed = student(augment(mixed.images))
        loss = loss + cross_entropy(on_mixed, mixed.labels, pixel_weight=mixed.weight, reduction="mean_all")

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)  # (+) after the optimiser's step
        losses.append(loss.item())
    return losses  # deploy `teacher.module` or `student`: both are plain smp nets


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
