"""EHTDI (Li et al., ACM MM 2022): target boundaries with labels, and contrast between two views at two levels.

One stage, no distillation. Source classes are pasted onto target (ClassMix), confident target regions onto source, so
that the edges of target regions get labels on both sides. A boundary term gives these edges more weight. Two views of
the same mixed image are contrasted pixel by pixel and class by class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gta2cs.loading import Batch
from gta2cs.outputs import SegOutput
from gta2cs.recipes.base import Draws, Losses, Shared
from gta2cs.recipes.dacs import pseudo_loss
from gta2cs.recipes.self_training import Selection, SelfTraining
from udakit import (
    ArgmaxSelector,
    SegBatch,
    boundary_band,
    class_mask,
    class_mix,
    paste,
    pixel_contrast_loss,
    prototype_contrast_loss,
    resize_labels,
    target_paste,
)


class Ehtdi(SelfTraining):
    """Cross-entropy on source and on both kinds of paste, with boundary terms, pixel and prototype contrast."""

    FIXED = ("augment_mixed",)  # two views are what it contrasts

    @dataclass
    class Options(SelfTraining.Options):
        """Options of the recipe."""

        labels_from: Literal["student", "teacher"] = "student"  # the released code labels with the student
        mix_classes: list[int] = field(default_factory=list)  # that may be pasted (released: ids > 4); empty: all
        mix_weight: float = 0.1
        paste_weight: float = 0.1  # 0: no target paste
        paste_threshold: float = 0.95
        boundary_weight: float = 0.1  # on the band of the source paste
        boundary_paste_weight: float = 0.01  # on the band of the target paste, outside the source paste
        boundary_kernel: int = 3  # side of the element that makes a band; released: 2, a pixel and those up and left
        pixel_contrast: float = 0.01
        prototype_contrast: float = 0.01
        contrast_stride: int = 8  # the contrasts see the logits averaged over cells of this size

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        options = self.options
        source = SegBatch(batch.source_images, batch.source_labels)

        # 1. Labels for the weak view of target: all pixels, no threshold.
        with torch.no_grad():
            labeller = self.student if options.labels_from == "student" else self.teacher
            target_logits = self.look(labeller, batch.target_images).logits
            valid = self.valid_rows(target_logits)
            target_logits = self.aligned(target_logits, source.labels, valid)
            pseudo = ArgmaxSelector()(target_logits, valid=valid)
        target = SegBatch(batch.target_images, pseudo.labels)

        # 2. Source classes onto target, confident target regions onto source; strong views of both share the geometry.
        candidates = options.mix_classes or None
        source_mask = class_mask(source.labels, self.draw_classes(source.labels, draws, candidates=candidates))
        mixed = class_mix(source, target, source_mask)
        strong_source = source._replace(images=self.augment(source.images, draws))
        strong_target = target._replace(images=self.augment(target.images, draws))
        strong_mixed = paste(source_mask, strong_source.images, strong_target.images)
        pasted, target_mask = target_paste(
            strong_source, strong_target, pseudo.confidence, threshold=options.paste_threshold
        )

        source_images = strong_source.images if options.augment_source else source.images
        on_source, on_mixed = self.both(source_images, strong_mixed)
        mix, boundary = self.with_boundary(on_mixed, mixed.labels, source_mask, options.boundary_weight)
        terms = {
            "source": on_source.cross_entropy(source.labels),
            "mix": options.mix_weight * mix,
            **self.masked_consistency(batch.target_images, draws, lambda seen: pseudo_loss(seen, pseudo)),
        }
        if boundary is not None:
            terms["boundary"] = options.boundary_weight * boundary
        terms |= self.paste_terms(pasted, target_mask, source_mask)

        # 3. Two views of the mixed image: its weak and its strong rendering.
        sure = source_mask | (pseudo.confidence > options.paste_threshold)
        terms |= self.contrast_terms(mixed._replace(labels=mixed.labels.where(sure, 255)), on_mixed)
        shared = Shared(strong_source, mixed._replace(images=strong_mixed), batch.target_images, lambda: target_logits)
        return Losses(terms, Selection(target_logits, pseudo.labels, pseudo.weight), shared)

    def paste_terms(self, pasted: SegBatch, target_mask: Tensor, source_mask: Tensor) -> dict[str, Tensor]:
        """Cross-entropy on source images with pasted target regions, and on the regions' boundary bands."""
        options = self.options
        if options.paste_weight <= 0:
            return {}
        loss, boundary = self.with_boundary(
            self.on_mixed(pasted.images),
            pasted.labels,
            target_mask,
            options.boundary_paste_weight,
            outside=source_mask,
        )
        terms = {"paste": options.paste_weight * loss}
        if boundary is not None:
            terms["paste_boundary"] = options.boundary_paste_weight * boundary
        return terms

    def with_boundary(
        self, output: SegOutput, labels: Tensor, mask: Tensor, weight: float, *, outside: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy on a mixture and on the boundary band of its paste, the latter only where it has a weight."""
        if weight <= 0:
            return output.cross_entropy(labels), None
        return output.cross_entropy_and_band(labels, band_of(mask, outside, self.options.boundary_kernel))

    def contrast_terms(self, mixed: SegBatch, on_strong: SegOutput) -> dict[str, Tensor]:
        """Contrast of the weak rendering with the strong one, pixel by pixel and class by class.

        The class means are those of the labelled pixels: the caller leaves labels only where it is sure of them.
        """
        options, terms = self.options, {}
        if options.pixel_contrast <= 0 and options.prototype_contrast <= 0:
            return terms
        weak, strong = (self._small(x) for x in (self.on_mixed(mixed.images), on_strong))
        if options.pixel_contrast > 0:
            terms["pixel_contrast"] = options.pixel_contrast * pixel_contrast_loss(
                strong.softmax(1), weak.softmax(1), temperature=1 / 20
            )
        if options.prototype_contrast > 0:
            terms["prototype_contrast"] = options.prototype_contrast * prototype_contrast_loss(
                strong, weak, resize_labels(mixed.labels, strong.shape[-2:]), num_classes=self.num_classes
            )
        return terms

    def _small(self, output: SegOutput) -> Tensor:
        return output.averaged(self.options.contrast_stride)


def band_of(mask: Tensor, outside: Tensor | None, kernel_size: int) -> Tensor:
    """The boundary band of a paste, without the pixels of another one."""
    band = boundary_band(mask, kernel_size=kernel_size)
    return band if outside is None else band & ~outside
