"""DACS (Tranheden et al., WACV 2021): an EMA teacher labels target images, classes of source are pasted onto them.

With the extras that everybody compares with: DAFormer's feature distance and several ways to select pseudo-labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gta2cs.loading import Batch
from gta2cs.recipes.base import Draws, Losses, Preparation, Recipe, Shared
from gta2cs.recipes.contrast import DistributionContrast
from gta2cs.recipes.rectified import CENTROID_BATCHES, RectifiedLabels
from gta2cs.recipes.self_training import Selection, TargetStyled
from udakit import (
    ArgmaxSelector,
    ClassQuantileSelector,
    ConfidentRatioSelector,
    PseudoLabels,
    SegBatch,
    ThresholdSelector,
    class_mask,
    class_mix,
    downscale_labels,
    feature_distance_loss,
)


class Dacs(TargetStyled):
    """Cross-entropy on source, and on source classes pasted onto pseudo-labelled target."""

    @dataclass
    class Options(TargetStyled.Options):
        """Options of the recipe."""

        selector: Literal["confident_ratio", "argmax", "threshold", "class_quantile", "rectified"] = "confident_ratio"
        threshold: float = 0.968
        share: float = 0.5  # of each predicted class, for class_quantile
        prototype_momentum: float = 1e-2  # for rectified (ProDA: 1e-4 over 80k steps and more)
        mix_weight: float = 1.0
        translate: str = "none"  # color, fourier, histogram, learned: source images in the style of target ...
        translate_share: float = 0.5  # ... this share of them
        contrast: float = 0.0  # weight of SePiCo's distribution contrast, on source and on the mixture each
        contrast_temperature: float = 100.0  # SePiCo; its gradient is about a hundredth of that of 1
        feature_distance: float = 0.0  # DAFormer: 0.005
        feature_distance_classes: list[int] = field(default_factory=list)  # DAFormer: the thing classes; empty: all

    def __init__(self, student: nn.Module, num_classes: int, options: Any, reference: nn.Module | None = None) -> None:
        super().__init__(student, num_classes, options)
        self.rectified: RectifiedLabels | None = None
        if options.selector == "rectified":
            self.rectified = RectifiedLabels(
                student, num_classes, mode=options.teacher_mode, momentum=options.prototype_momentum
            )
        self.selector = nn.Identity() if self.rectified is not None else make_selector(options, num_classes)
        self.contrast: DistributionContrast | None = None
        if options.contrast > 0:
            dim: int = student.feature_dim  # type: ignore[assignment]
            self.contrast = DistributionContrast(num_classes, dim, temperature=options.contrast_temperature)
        self.reference = reference.requires_grad_(False) if reference is not None else None
        if options.feature_distance > 0 and reference is None:
            raise ValueError("Expected `reference` (the ImageNet encoder) for feature_distance > 0, but got None.")

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> Dacs:
        """Make the recipe, with a fresh ImageNet net as the reference of the feature distance where that is on."""
        parsed = cls.parse(options)
        recipe = cls(student, num_classes, parsed, make_net() if parsed.feature_distance > 0 else None)
        return recipe.translating(make_net, previous)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        options = self.options
        source = SegBatch(self.translate(batch, draws), batch.source_labels)

        # 1. The teacher labels the clean target images.
        with torch.no_grad():
            on_target = self.teacher(batch.target_images)
            teacher_logits = on_target.logits
            valid = self.valid_rows(teacher_logits)
            if self.rectified is None:
                labelled, pseudo = teacher_logits, self.selector(teacher_logits, valid=valid)
            else:
                pseudo, labelled = self.rectified(batch.target_images, on_target, valid)
        target = SegBatch(batch.target_images, pseudo.labels, pseudo.weight)

        # 2. Half of the classes of each source image are pasted onto a target image: image, label and weight alike.
        mixed = class_mix(source, target, class_mask(source.labels, self.draw_classes(source.labels, draws)))

        # 3. The student sees strongly augmented images of both kinds.
        source_images = self.augment(source.images, draws) if options.augment_source else source.images
        mixed_images = self.augment(mixed.images, draws) if options.augment_mixed else mixed.images
        on_source, on_mixed = self.both(source_images, mixed_images)

        # 4. At the labels' size, without ever holding logits of that size. Over all pixels: a rejected or doubtful
        # pixel weighs less, it does not make the others weigh more.
        mix = on_mixed.cross_entropy(mixed.labels, pixel_weight=mixed.weight, reduction="mean_all")
        terms = {
            "source": on_source.cross_entropy(source.labels),
            "mix": options.mix_weight * mix,
            **self.masked_consistency(batch.target_images, draws, lambda seen: pseudo_loss(seen, pseudo)),
        }
        if self.contrast is not None:
            with torch.no_grad():
                self.contrast.update(self.teacher(source_images).features, source.labels)
            apart = self.contrast(on_source.features, source) + self.contrast(on_mixed.features, mixed)
            terms["contrast"] = options.contrast * apart
        if options.feature_distance > 0:
            terms["feature_distance"] = options.feature_distance * self._feature_distance(
                on_source.encoded, source._replace(images=source_images)
            )
        shared = Shared(
            source._replace(images=source_images),
            mixed._replace(images=mixed_images),
            batch.target_images,
            teacher_logits,
        )
        return Losses(terms, selection_of(options, labelled, pseudo), shared)

    def prepare(self, data: Preparation) -> None:
        """The translator, and for `rectified` the centroids of target."""
        super().prepare(data)
        if self.rectified is not None:
            self.rectified.prepare(data.batches(0, CENTROID_BATCHES))

    def translate(self, batch: Batch, draws: Draws) -> Tensor:
        """Give a share of the source images the style of a target image."""
        if self.options.translate == "none":
            return batch.source_images
        share = self.options.translate_share
        styled = self.in_target_style(batch.source_images, batch.target_images)
        chosen = draws(lambda i, g: torch.rand(1, 1, 1, 1, generator=g, device=g.device) < share)
        return torch.where(chosen, styled, batch.source_images)

    def train(self, mode: bool = True) -> Dacs:
        """Keep the reference in eval mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def _feature_distance(self, features: Tensor, source: SegBatch) -> Tensor:
        """DAFormer's distance to the ImageNet encoder, on the cells that a wanted class fills."""
        assert self.reference is not None
        with torch.no_grad():
            reference = self.reference.encode(source.images)
        small = downscale_labels(
            source.labels, source.labels.shape[-1] // features.shape[-1], num_classes=self.num_classes
        )
        wanted = self.options.feature_distance_classes or list(range(self.num_classes))
        valid = torch.isin(small, torch.tensor(wanted, device=small.device))
        return feature_distance_loss(features, reference, valid=valid)


def pseudo_loss(output: Any, pseudo: PseudoLabels) -> Tensor:
    """Cross-entropy with the pseudo-labels of whole target images, weighed as in the mixture: over all pixels."""
    return output.cross_entropy(  # type: ignore[no-any-return]
        pseudo.labels, pixel_weight=pseudo.weight, reduction="mean_all"
    )


def make_selector(options: Any, num_classes: int) -> nn.Module:
    """Build the pseudo-label selector that the options name."""
    if options.selector == "argmax":
        return ArgmaxSelector()
    if options.selector == "threshold":
        return ThresholdSelector(options.threshold)
    if options.selector == "class_quantile":
        return ClassQuantileSelector(num_classes, share=options.share, momentum=0.9, sync=True)
    if options.selector == "confident_ratio":
        return ConfidentRatioSelector(options.threshold)
    raise ValueError(f"Expected `selector` to be a known pseudo-label selector, but got {options.selector!r}.")


def selection_of(options: Any, logits: Tensor, pseudo: PseudoLabels) -> Selection:
    """What was kept of each class. `confident_ratio` keeps all with one weight: there, what was confident."""
    weight = pseudo.weight
    if options.selector == "confident_ratio":
        weight = ((pseudo.confidence >= options.threshold) & (weight > 0)).float()
    return Selection(logits, pseudo.labels, weight)
