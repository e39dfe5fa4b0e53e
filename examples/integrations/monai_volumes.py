"""MONAI: a net for volumes, MONAI's loss on source, self-training on target, MetaTensors throughout.

    pip install monai
    python examples/integrations/monai_volumes.py

The lines that udakit adds are marked with (+). Every part accepts (N, C, D, H, W) as well as (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor

from udakit import AdaptiveThresholdSelector, ClassMix, EMATeacher, SegBatch, cross_entropy

CLASSES = 3  # background, organ, lesion


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for two loaders of MONAI dictionaries: scans (N, 1, D, H, W) of two scanners, one with labels."""
    for _ in range(steps):
        labels = torch.randint(CLASSES, (2, 1, size, size, size))
        source = MetaTensor(labels.float() + 0.5 * torch.randn(labels.shape))
        target = MetaTensor(1.5 * torch.randint(CLASSES, labels.shape) + 0.5 * torch.randn(labels.shape) + 1)
        yield source, MetaTensor(labels), target


def harder(scans: Tensor) -> Tensor:
    """Change contrast and brightness and add noise, like another scanner. MONAI's Rand... transforms work as well."""
    shape = (len(scans), 1, 1, 1, 1)
    return scans * (0.7 + 0.6 * torch.rand(shape)) + 0.4 * torch.randn(shape) + 0.1 * torch.randn(scans.shape)


def main(steps: int = 2, size: int = 16) -> list[float]:
    """Train and return the losses; start from a source-trained net for real."""
    student = UNet(spatial_dims=3, in_channels=1, out_channels=CLASSES, channels=(8, 16, 32), strides=(2, 2)).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    source_loss = DiceCELoss(to_onehot_y=True, softmax=True)

    teacher = EMATeacher(student, decay=0.99)  # (+)
    # (+) A threshold that follows the net and is lower for rare classes: lesions are rare, with low confidence.
    select = AdaptiveThresholdSelector(CLASSES, momentum=0.99)
    mix = ClassMix(CLASSES)  # (+) half of the classes of a source scan are pasted into a target scan

    losses = []
    for source, source_labels, target in batches(steps, size):
        pseudo = select(teacher(target))  # (+)
        # (+) MONAI keeps a channel axis on labels, (N, 1, D, H, W); udakit's are (N, D, H, W).
        labelled = SegBatch(source, source_labels.squeeze(1))
        mixed, _ = mix(labelled, SegBatch(target, pseudo.labels, pseudo.weight))
        loss = source_loss(student(source), source_labels)
        # (+) "mean_all": if few voxels are trusted, the loss is small.
        z = student(harder(mixed.images))
        loss = loss + cross_entropy(z, mixed.labels, pixel_weight=mixed.weight, reduction="mean_all")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)  # (+) after the optimiser's step
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
