"""transformers SegFormer: masked image consistency, and DAFormer's distance to the features of ImageNet.

    python examples/integrations/transformers_segformer.py

The net is built from a config, with random weights, because an example should run without a network. For real:
`SegformerForSemanticSegmentation.from_pretrained("nvidia/mit-b5", num_labels=19)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from udakit import (
    ConfidentRatioSelector,
    EMATeacher,
    FeatureTap,
    copy_net,
    cross_entropy,
    draw_block_mask,
    feature_distance_loss,
)

CLASSES = 19


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for your two loaders: normalised source images, their labels, and target images without labels."""
    for _ in range(steps):
        yield torch.randn(2, 3, size, size), torch.randint(CLASSES, (2, size, size)), torch.randn(2, 3, size, size)


def logits_of(net: torch.nn.Module, images: Tensor) -> Tensor:
    """Call the net; SegFormer's logits are at a quarter of the size, labels are not: the logits go up."""
    return F.interpolate(net(images).logits, images.shape[-2:], mode="bilinear", align_corners=False)


def main(steps: int = 2, size: int = 64) -> list[float]:
    """Train and return the losses."""
    config = SegformerConfig(depths=(1, 1, 1, 1), hidden_sizes=(16, 32, 64, 128), num_attention_heads=(1, 2, 4, 8))
    config.num_labels = CLASSES
    config.decoder_hidden_size = 64
    student = SegformerForSemanticSegmentation(config).train()
    # A transformer has dropout and drop path: the teacher labels without them (mode "batch_statistics", the default),
    # whoever calls `.train()` on a Module that contains it.
    teacher = EMATeacher(student, decay=0.999)
    select = ConfidentRatioSelector()

    # The encoder before any training, of ImageNet: it still knows rare things that synthetic source images unteach.
    reference = copy_net(student.segformer).requires_grad_(False).eval()
    features_of = FeatureTap(student, "segformer", index="last_hidden_state")  # an output with names: take one of them

    # Two learning rates, as for every pretrained encoder under a fresh head.
    groups = [
        {"params": student.segformer.parameters(), "lr": 6e-5},
        {"params": student.decode_head.parameters(), "lr": 6e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    losses = []
    for source_images, source_labels, target_images in batches(steps, size):
        small_logits, features = features_of(source_images)  # one pass gives both
        logits = F.interpolate(small_logits, (size, size), mode="bilinear", align_corners=False)
        loss = cross_entropy(logits, source_labels)
        with torch.no_grad():
            reference_features = reference(source_images).last_hidden_state
        loss = loss + 0.005 * feature_distance_loss(features, reference_features)

        # MIC: the teacher sees all of a target image, the student a part. It has to use context, which attention can.
        pseudo = select(logits_of(teacher, target_images))
        hidden = draw_block_mask(len(target_images), (size, size), block_size=size // 4, ratio=0.7)
        masked = torch.where(hidden.unsqueeze(1), 0, target_images)  # 0 is the mean colour of normalised images
        loss = loss + cross_entropy(
            logits_of(student, masked), pseudo.labels, pixel_weight=pseudo.weight, reduction="mean_all"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
