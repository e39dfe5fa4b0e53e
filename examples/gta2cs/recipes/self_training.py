"""What the self-training recipes share: an EMA teacher, strong augmentation, class draws, a policy for BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gta2cs.recipes.base import Draws, Recipe
from udakit import EMATeacher, draw_classes, row_mask


class SelfTraining(Recipe):
    """A student, and a teacher that is its exponential moving average."""

    @dataclass
    class Options(Recipe.Options):
        """Options of every self-training recipe; where a paper differs, its config says so."""

        ema: float = 0.99  # the papers: 0.999 over 40k to 250k steps
        ema_warmup: bool = False  # True when the student starts from ImageNet instead of from a source-trained net
        teacher_mode: Literal["batch_statistics", "train", "eval"] = "batch_statistics"  # when it labels
        batch_norm: Literal["separate", "joint"] = "separate"  # one forward a domain, or both in one
        buffers: Literal["copy", "ema", "keep"] = "copy"  # BatchNorm statistics of the teacher
        mix_fraction: float = 0.5  # of the classes of a source image
        augment_mixed: bool = True
        ignore_top: int = 0  # rows of a target crop without pseudo-label (DAFormer: 15 and 120 of 512)
        ignore_bottom: int = 0

    def __init__(self, student: nn.Module, num_classes: int, options: Any) -> None:
        super().__init__(student, num_classes, options)
        self.teacher = EMATeacher(student, options.ema, options.ema_warmup, options.buffers, mode=options.teacher_mode)

    def after_step(self) -> None:
        """Let the teacher follow the student."""
        self.teacher.update(self.student)

    def nets(self) -> dict[str, nn.Module]:
        """Student and teacher."""
        return {"student": self.student, "teacher": self.teacher.module}

    def both(self, first: Tensor, second: Tensor) -> tuple[Any, Any]:
        """Student outputs of two batches, in one forward or in two: BatchNorm sees them together or apart."""
        if self.options.batch_norm == "separate":
            return self.student(first), self.student(second)
        joint = self.student(torch.cat([first, second]))
        halves = [x.split([len(first), len(second)]) for x in joint]
        return type(joint)(*(h[0] for h in halves)), type(joint)(*(h[1] for h in halves))

    def draw_classes(self, labels: Tensor, draws: Draws, **options: Any) -> Tensor:
        """Draw the classes of each label map that are pasted."""
        fraction = self.options.mix_fraction
        return draws(
            lambda i, g: draw_classes(
                labels[i : i + 1], num_classes=self.num_classes, fraction=fraction, generator=g, **options
            )
        )

    def valid_rows(self, logits: Tensor) -> Tensor | None:
        """Mask the rows at the top and bottom that show no street (own bonnet, borders)."""
        top, bottom = self.options.ignore_top, self.options.ignore_bottom
        if top == 0 and bottom == 0:
            return None
        n, _, h, w = logits.shape
        return row_mask(h, w, top, bottom).to(logits.device).expand(n, h, w)


class Selection(NamedTuple):
    """How the pseudo-labels of a step fared, per predicted class: pixels predicted, pixels kept (by their weight)."""

    predicted: Tensor
    kept: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, weight: Tensor) -> Selection:
        """Count from the logits that were selected from, and what the selector made of them."""
        predicted = logits.argmax(1).flatten()
        kept = (labels.flatten() == predicted) * weight.flatten()
        zeros = torch.zeros(logits.shape[1], device=logits.device)
        return cls(zeros.scatter_add(0, predicted, torch.ones_like(kept)), zeros.scatter_add(0, predicted, kept))
