"""A frozen vision transformer (DINOv2 and its like) with a light head that is all that learns.

    python examples/integrations/vit_backbone.py

timm builds the backbone, here without weights; for real `timm.create_model("vit_base_patch14_dinov2", pretrained=True,
dynamic_img_size=True, num_classes=0)` and crops that are multiples of its patch. A frozen backbone needs a teacher of
the head alone: it is neither stored nor averaged twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from udakit import ClassQuantileSelector, EMATeacher, cross_entropy

CLASSES = 19


class FrozenViT(nn.Module):
    """Patch tokens of a ViT as a feature map, and a head on them."""

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        self.backbone.requires_grad_(False)  # before the teacher is made: it shares what does not require a gradient
        width = self.backbone.embed_dim
        self.head = nn.Sequential(nn.Conv2d(width, 64, 1), nn.GELU(), nn.Conv2d(64, CLASSES, 1))

    def features(self, images: Tensor) -> Tensor:
        """(N, D, h, w): the tokens without class and register tokens, back in their grid."""
        with torch.no_grad():
            tokens = self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :]
        patch = self.backbone.patch_embed.patch_size
        rows, columns = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def train(self, mode: bool = True) -> FrozenViT:
        """The backbone stays in evaluation: drop path would change features that cannot adapt to it."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the size of the images."""
        logits = self.head(self.features(images))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


Result = tuple[list[float], FrozenViT, EMATeacher]


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for your two loaders: normalised source images, their labels, and target images without labels."""
    for _ in range(steps):
        yield torch.randn(2, 3, size, size), torch.randint(CLASSES, (2, size, size)), torch.randn(2, 3, size, size)


def main(steps: int = 2, size: int = 64, name: str = "vit_tiny_patch16_224") -> Result:
    """Train; returns the losses, the student and the teacher."""
    student = FrozenViT(name).train()
    # One backbone in memory for both: what does not require a gradient is the student's own tensor. Unfreezing it later
    # is an error at the next update, since a shared tensor would no longer be averaged.
    teacher = EMATeacher(student, decay=0.99, share_frozen=True)
    select = ClassQuantileSelector(CLASSES, share=0.5)  # the surer half of every class: no class is left out
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)

    losses = []
    for source_images, source_labels, target_images in batches(steps, size):
        pseudo = select(teacher(target_images))
        # The head sees features whose domains differ less than the images did, so the student's view is made harder
        # where it is cheap: whole features are dropped.
        features = F.dropout2d(student.features(target_images), 0.5)
        on_target = F.interpolate(student.head(features), (size, size), mode="bilinear", align_corners=False)

        loss = cross_entropy(student(source_images), source_labels)
        loss = loss + cross_entropy(on_target, pseudo.labels, reduction="mean_all")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        losses.append(loss.item())
    return losses, student, teacher


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()[0]))
