"""Training on labelled source images only: the baseline, and the start of all other recipes."""

from __future__ import annotations

from gta2cs.loading import Batch
from gta2cs.recipes.base import Draws, Losses, Recipe


class SourceOnly(Recipe):
    """Cross-entropy on source."""

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the cross-entropy of a source batch."""
        images = batch.source_images
        if self.options.augment_source:
            images = self.augment(images, draws)
        return Losses({"source": self.student(images).cross_entropy(batch.source_labels)})
