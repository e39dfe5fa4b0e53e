"""Your own data: a folder of images and label PNGs with two classes, and ids that are neither 0..C-1 nor 255.

    python examples/integrations/two_classes.py

Cracks in concrete: the labels hold 0 where nobody looked, 1 for sound wall, 2 for crack. One lab labelled its photos
(source), another only took some (target).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from udakit import ClassMix, ClassQuantileSelector, EMATeacher, SegBatch, check_labels, cross_entropy, map_ids

IDS = {1: 0, 2: 1}  # id in the files -> class; every other id, here 0, becomes 255, which all of udakit ignores
CLASSES = ("wall", "crack")


def make_folder(root: Path, count: int, size: int, shade: int) -> None:
    """Stand in for your folder: `images/*.png`, `labels/*.png`."""
    rng = np.random.default_rng(shade)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        ids = np.full((size, size), 1, np.uint8)
        ids[:, rng.integers(size - 4) :][:, :4] = 2
        ids[:4] = 0
        image = rng.normal(shade - 60 * (ids == 2), 12).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).convert("RGB").save(root / "images" / f"{i:03d}.png")
        Image.fromarray(ids).save(root / "labels" / f"{i:03d}.png")


class Folder(Dataset[tuple[Tensor, ...]]):
    """Images, with labels if asked for: the target set is made without, so nothing can train on them by mistake."""

    def __init__(self, root: Path, *, labelled: bool) -> None:
        self.images = sorted((root / "images").glob("*.png"))
        self.labels = [root / "labels" / path.name for path in self.images] if labelled else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        pixels = torch.from_numpy(np.array(Image.open(self.images[index]).convert("RGB")))
        image = pixels.permute(2, 0, 1).float() / 127.5 - 1
        if self.labels is None:
            return (image,)
        ids = np.array(Image.open(self.labels[index]))  # never .convert("RGB"): that would look up palette colours
        return image, torch.from_numpy(map_ids(ids, IDS)).long()


def main(steps: int = 2, size: int = 64, lr: float = 1e-3) -> dict[str, float]:
    """Train; returns the IoU of each class on target."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder, "source"), 4, size, shade=170)
        make_folder(Path(folder, "target"), 4, size, shade=130)
        source = DataLoader(Folder(Path(folder, "source"), labelled=True), batch_size=2, shuffle=True)
        target = DataLoader(Folder(Path(folder, "target"), labelled=False), batch_size=2, shuffle=True)

        # Once, before training: an id that the table forgot would otherwise be ignored for ever, in silence.
        for _, labels in source:
            check_labels(labels, num_classes=len(CLASSES))

        # Every photo has its own light: a normalisation of each image takes that out before anything has to adapt.
        student = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1))
        teacher = EMATeacher(student, decay=0.9)
        # One global threshold would keep the frequent class and reject the rare one; a share of each class does not.
        select = ClassQuantileSelector(len(CLASSES), share=0.5)
        # With two classes "half of them" is one: let it be the crack. A pasted wall would hide the target image.
        mix = ClassMix(len(CLASSES), fraction=1.0, candidates=[1])
        optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
        done = 0
        while done < steps:
            for (source_images, source_labels), (target_images,) in zip(source, target, strict=True):
                pseudo = select(teacher(target_images))
                mixed, _ = mix(
                    SegBatch(source_images, source_labels), SegBatch(target_images, pseudo.labels, pseudo.weight)
                )
                loss = cross_entropy(student(source_images), source_labels)
                loss = loss + cross_entropy(student(mixed.images), mixed.labels, reduction="mean_all")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                teacher.update(student)
                done += 1
        return score(teacher.module.eval(), Folder(Path(folder, "target"), labelled=True))


@torch.no_grad()
def score(net: nn.Module, data: Folder) -> dict[str, float]:
    """IoU of each class in percent, from sums over the whole set: the mean of the images' IoUs is another number."""
    hit, union = torch.zeros(2), torch.zeros(2)
    for image, labels in data:  # type: ignore[attr-defined]
        predicted = net(image[None]).argmax(1)[0]
        for c in range(2):
            at, truth = (predicted == c) & (labels != 255), labels == c
            hit[c] += (at & truth).sum()
            union[c] += (at | truth).sum()
    return dict(zip(CLASSES, (100 * hit / union).tolist(), strict=True))


if __name__ == "__main__":
    print("IoU on target, %:", ", ".join(f"{name} {iou:.1f}" for name, iou in main(steps=60, lr=1e-2).items()))
