"""Training on labelled source alone: the baseline, and the warm start of everything else."""

from __future__ import annotations

from dataclasses import dataclass

from gta2cs.loading import MEAN, STD, Batch
from gta2cs.recipes.base import Draws, Losses, Recipe
from udakit import cross_entropy, draw_strong_augment, strong_augment


class SourceOnly(Recipe):
    """Cross-entropy on source."""

    @dataclass
    class Options:
        """Options of the recipe."""

        augment: bool = True  # colour jitter and blur on the source images

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the cross-entropy of a source batch."""
        images = batch.source_images
        if self.options.augment:
            strong = draws(lambda i, g: draw_strong_augment(1, generator=g))
            images = strong_augment(images, strong, mean=MEAN, std=STD)
        return Losses({"source": cross_entropy(self.student(images).logits, batch.source_labels)})
