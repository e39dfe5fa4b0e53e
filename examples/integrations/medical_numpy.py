"""Medical slices: NumPy volumes of one channel, from a scanner with labels to one without.

    python examples/integrations/medical_numpy.py

Losses, mixing, selectors and teachers work with any number of channels. Only colour operations need three, and two
scanners do not differ in colour.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from udakit import BilateralConsensus, ClassMix, ClassPrototypes, EMATeacher, FeatureTap, SegBatch, cross_entropy

CLASSES = ("background", "organ", "lesion")


def volumes(slices: int, size: int, contrast: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stand in for two arrays on disk (np.load, nibabel): intensities (slices, H, W) and labels, -1 where unknown."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    labels = np.zeros((slices, size, size), np.int16)
    for k in range(slices):
        cy, cx = rng.uniform(0.4, 0.6, 2)
        labels[k][np.hypot(y - cy, x - cx) < 0.3] = 1
        labels[k][np.hypot(y - cy, x - cx - 0.1) < 0.1] = 2
    labels[:, :, :2] = -1
    values = 100 + contrast * np.array([0, 40, 90, 0])[labels] + rng.normal(0, 15, labels.shape)
    return values.astype(np.float32), labels


def to_images(values: np.ndarray) -> Tensor:
    """(n, H, W) -> (n, 1, H, W), each slice to mean 0 and deviation 1: what scanners differ in most."""
    spread = values.std((1, 2), keepdims=True).clip(1e-6)
    return torch.from_numpy((values - values.mean((1, 2), keepdims=True)) / spread).unsqueeze(1)


def gamma(images: Tensor, generator: torch.Generator) -> Tensor:
    """The strong augmentation of this field: another contrast curve for each slice. Randomness is an argument."""
    power = torch.empty(len(images), 1, 1, 1).uniform_(0.6, 1.6, generator=generator)
    return images.sign() * images.abs().pow(power)


def main(steps: int = 2, size: int = 64, seed: int = 0) -> list[float]:
    """Train and return the losses."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    source_values, source_ids = volumes(8, size, contrast=1.0, seed=0)
    target_values, _ = volumes(8, size, contrast=0.5, seed=1)  # its labels are not used
    source_images, target_images = to_images(source_values), to_images(target_values)
    # Labels must be int64 or uint8. int16 has to be converted, and -1 does not fit into uint8.
    source_labels = torch.from_numpy(source_ids.astype(np.int64))

    student = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, len(CLASSES), 1)
    )
    teacher = EMATeacher(student, decay=0.99)
    tap = FeatureTap(teacher, "module.2")
    # `ignore_index` is a parameter everywhere: -1 here, from the files to the loss.
    prototypes = ClassPrototypes(len(CLASSES), 16, momentum=0.01, ignore_index=-1)
    select = BilateralConsensus(prototypes, ignore_index=-1)
    # Nine of ten pixels are background. It is never pasted: only organs and lesions are pasted onto target slices.
    mix = ClassMix(len(CLASSES), candidates=[1, 2], ignore_index=-1)
    rare = torch.tensor([0.2, 1.0, 5.0])  # does not change the divisor: absent lesions do not matter
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

    losses = []
    for step in range(steps):
        at = torch.arange(4) + 4 * (step % 2)
        source = SegBatch(source_images[at], source_labels[at])
        prototypes.update(tap(source.images)[1], source.labels)
        pseudo = select(*tap(target_images[at]))
        mixed, _ = mix(source, SegBatch(target_images[at], pseudo.labels, pseudo.weight), generator=generator)

        loss = cross_entropy(student(source.images), source.labels, class_weight=rare, ignore_index=-1)
        on_mixed = student(gamma(mixed.images, generator))
        loss = loss + cross_entropy(on_mixed, mixed.labels, class_weight=rare, ignore_index=-1, reduction="mean_all")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main(steps=40)))
