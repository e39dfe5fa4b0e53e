"""PyTorch Lightning: student, teacher and selector in one LightningModule.

    pip install lightning && python examples/integrations/lightning_module.py

Lightning moves, saves and resumes whatever is a submodule. `EMATeacher` is one, with nothing outside its buffers, so
the teacher is on the right device and in every checkpoint without a callback.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from udakit import ClassMix, ConfidentRatioSelector, EMATeacher, SegBatch, cross_entropy

CLASSES = 19


def make_module(student: nn.Module) -> Any:
    """Build the LightningModule. Lightning is imported here, so that the file can be read by those without it."""
    import lightning

    class Adaptation(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = student
            self.teacher = EMATeacher(student, decay=0.999)
            self.select = ConfidentRatioSelector()
            self.mix = ClassMix(CLASSES)

        def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
            source_images, source_labels = batch["source"]
            (target_images,) = batch["target"]
            pseudo = self.select(self.teacher(target_images))
            mixed, _ = self.mix((source_images, source_labels), SegBatch(target_images, pseudo.labels, pseudo.weight))
            loss = cross_entropy(self.student(source_images), source_labels)
            return loss + cross_entropy(
                self.student(mixed.images), mixed.labels, pixel_weight=mixed.weight, reduction="mean_all"
            )

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            # Not `on_train_batch_end`, which also runs for batches whose gradients are only accumulated.
            super().optimizer_step(*args, **kwargs)
            self.teacher.update(self.student)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # Only the student's: `self.parameters()` would include those of the teacher.
            return torch.optim.AdamW(self.student.parameters(), lr=1e-4)

    return Adaptation()


def main(steps: int = 2, size: int = 64, **trainer: Any) -> Any:
    """Train and return the module. `trainer` are options of lightning.Trainer: devices, precision, ..."""
    import lightning
    from lightning.pytorch.utilities import CombinedLoader

    student = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    images, labels = torch.randn(8, 3, size, size), torch.randint(CLASSES, (8, size, size))
    loaders = {
        "source": DataLoader(TensorDataset(images, labels), batch_size=2, shuffle=True),
        "target": DataLoader(TensorDataset(torch.randn(6, 3, size, size)), batch_size=2, shuffle=True),
    }
    # The domains differ in length: an epoch ends with the longer one, and the shorter one starts again.
    both = CombinedLoader(loaders, mode="max_size_cycle")
    module = make_module(student)
    lightning.Trainer(max_steps=steps, **trainer).fit(module, both)
    return module


if __name__ == "__main__":
    main()
