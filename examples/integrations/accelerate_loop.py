"""accelerate: several processes, mixed precision, gradient accumulation, and a checkpoint with the teacher in it.

accelerate launch examples/integrations/accelerate_loop.py          # or plain python
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from udakit import ClassMix, ClassQuantileSelector, EMATeacher, SegBatch, cross_entropy

CLASSES = 19


def batches(steps: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stand in for your two loaders, prepared by accelerate, so that batches arrive on the device."""
    for _ in range(steps):
        labels = torch.randint(CLASSES, (2, size, size), device=device)
        yield torch.randn(2, 3, size, size, device=device), labels, torch.randn(2, 3, size, size, device=device)


def main(
    steps: int = 2, size: int = 64, out: Path | None = None, accumulate: int = 2, cpu: bool = False
) -> list[float]:
    """Train, save to `out` and return the losses."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=cpu)
    student = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))

    # Before `prepare`: a copy of the plain net, neither wrapped nor sent through the gradient scaler. `update` takes
    # the wrapped student as it is; it looks through DistributedDataParallel and torch.compile.
    teacher = EMATeacher(student, decay=0.999).to(accelerator.device)
    # Ranks see different images. With `sync` the class thresholds are those of the global batch, the same everywhere.
    select = ClassQuantileSelector(CLASSES, share=0.5, sync=True).to(accelerator.device)
    mix = ClassMix(CLASSES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    student, optimizer = accelerator.prepare(student, optimizer)
    # All their state is in buffers. Once registered, they are in every checkpoint, and a resumed run continues exactly.
    # Without this, a resumed run would silently use a random teacher.
    accelerator.register_for_checkpointing(teacher, select)

    losses = []
    for source_images, source_labels, target_images in batches(steps * accumulate, size, accelerator.device):
        with accelerator.accumulate(student):
            with accelerator.autocast():
                pseudo = select(teacher(target_images))
            mixed, _ = mix(
                SegBatch(source_images, source_labels), SegBatch(target_images, pseudo.labels, pseudo.weight)
            )
            loss = cross_entropy(student(source_images), source_labels)
            loss = loss + cross_entropy(
                student(mixed.images), mixed.labels, pixel_weight=mixed.weight, reduction="mean_all"
            )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        # The student changes only after the gradients of `accumulate` batches. With an update for every batch, the
        # memory of the teacher would be `accumulate` times shorter than its decay says.
        if accelerator.sync_gradients:
            teacher.update(student)
            losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    if out is not None:
        accelerator.save_state(str(out))
    return losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
