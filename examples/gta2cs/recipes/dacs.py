"""DACS (Tranheden et al., WACV 2021): an EMA teacher labels target images, and source classes are pasted onto them.

It includes common extras: DAFormer's feature distance and several ways to select pseudo-labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gta2cs.loading import Batch
from gta2cs.recipes.base import Draws, Losses, Preparation, Recipe, Shared, write_numbers
from gta2cs.recipes.contrast import DistributionContrast, PrototypeContrast
from gta2cs.recipes.rectified import CENTROID_BATCHES, RectifiedLabels
from gta2cs.recipes.self_training import Selection, TargetStyled, labelling_statistics
from udakit import (
    AdaptiveThresholdSelector,
    ArgmaxSelector,
    ClassQuantileSelector,
    ConfidentRatioSelector,
    PseudoLabels,
    SegBatch,
    ThresholdSelector,
    class_mask,
    class_mix,
    confident_ratio,
    downscale_labels,
    feature_distance_loss,
    feature_distillation_loss,
)


class Dacs(TargetStyled):
    """Cross-entropy on source, and on source classes pasted onto pseudo-labelled target."""

    @dataclass
    class Options(TargetStyled.Options):
        """Options of the recipe."""

        selector: Literal["confident_ratio", "argmax", "threshold", "adaptive", "class_quantile", "rectified"] = (
            "confident_ratio"
        )
        threshold: float = 0.968
        threshold_momentum: float = 0.99  # for adaptive (FreeMatch: 0.999 over some hundred thousand steps)
        share: float = 0.5  # of each predicted class, for class_quantile
        share_end: float | None = None  # rising to this at the end of the stage, as CBST's does; None: it stays
        confidence_weight: bool = False  # times the share of pixels from `threshold` up, as confident_ratio has it
        prototype_momentum: float = 1e-2  # for rectified (ProDA: 1e-4 over 80k steps and more)
        mix_weight: float = 1.0
        pseudo_loss: Literal["cross_entropy", "symmetric_cross_entropy"] = "cross_entropy"  # on pseudo-labels (ProDA)
        translate: str = "none"  # color, fourier, histogram, learned: source images in the style of target ...
        translate_share: float = 0.5  # ... this share of them
        contrast: float = 0.0  # weight of SePiCo's distribution contrast, on source and on the mixture each
        contrast_temperature: float = 100.0  # SePiCo; its gradient is about a hundredth of that of 1
        prototype_contrast: float = 0.0  # weight of the contrast of pixels with class prototypes, on both batches each
        feature_distillation: float = 0.0  # VFM-UDA++: 0.1, on both batches each
        feature_distance: float = 0.0  # DAFormer: 0.005
        feature_distance_classes: list[int] = field(default_factory=list)  # DAFormer: the thing classes; empty: all

    def __init__(self, student: nn.Module, num_classes: int, options: Any, reference: nn.Module | None = None) -> None:
        super().__init__(student, num_classes, options)
        self.rectified: RectifiedLabels | None = None
        if options.selector == "rectified":
            self.rectified = RectifiedLabels(
                student, num_classes, momentum=options.prototype_momentum, **labelling_statistics(options)
            )
        self.selector = nn.Identity() if self.rectified is not None else make_selector(options, num_classes)
        self.done = 0
        self.register_buffer("course", torch.tensor([0, 0]))  # of a rising share: steps done, steps of the stage
        wanted = options.feature_distance_classes or list(range(num_classes))
        self.register_buffer("distance_classes", torch.tensor(wanted), persistent=False)
        dim: int = student.feature_dim  # type: ignore[assignment]
        self.contrasts = nn.ModuleDict()
        if options.contrast > 0:
            temperature = options.contrast_temperature
            self.contrasts["contrast"] = DistributionContrast(num_classes, dim, temperature=temperature)
        if options.prototype_contrast > 0:
            self.contrasts["prototype_contrast"] = PrototypeContrast(num_classes, dim)
        self.reference = reference.requires_grad_(False) if reference is not None else None
        for name in ("feature_distance", "feature_distillation"):
            if getattr(options, name) > 0 and reference is None:
                raise ValueError(f"Expected `reference` (the frozen net) for {name} > 0, but got None.")
        self.projection = (
            make_projection(reference) if reference is not None and options.feature_distillation > 0 else None
        )

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse `share_end` without class quantiles, and `confidence_weight` with a selector that has it already."""
        super().check(options)
        if options.selector != "rectified":
            make_selector(options, 2)  # refuses wrong options now, not after the stages before
        if options.confidence_weight:
            ConfidentRatioSelector(options.threshold)
        if options.confidence_weight and options.selector == "confident_ratio":
            raise ValueError(
                "Expected `confidence_weight` to be false with `selector` confident_ratio, whose labels have that "
                "weight, but got true."
            )
        if options.share_end is None:
            return
        if options.selector != "class_quantile" or not 0 < options.share_end <= 1:
            raise ValueError(
                "Expected `share_end` to be a share in (0, 1], with `selector` class_quantile, "
                f"but got {options.share_end} with {options.selector}."
            )

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> Dacs:
        """Make the recipe. Losses that compare features get a fresh ImageNet net as their reference."""
        parsed = cls.parse(options)
        compares = parsed.feature_distance > 0 or parsed.feature_distillation > 0
        recipe = cls(student, num_classes, parsed, make_net() if compares else None)
        return recipe.translating(make_net, previous)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        options = self.options
        source = SegBatch(self.translate(batch, draws), batch.source_labels)

        # 1. The teacher labels the clean target images.
        with torch.no_grad():
            on_target = self.look(self.teacher, batch.target_images)
            valid = self.valid_rows(on_target.logits)
            teacher_logits = self.aligned(on_target.logits, source.labels, valid)
            if self.rectified is None:
                labelled, pseudo = teacher_logits, self.selector(teacher_logits, valid=valid)
            else:
                pseudo, labelled = self.rectified(batch.target_images, on_target, valid)
            selection = selection_of(options, labelled, pseudo)
            if options.confidence_weight:  # what the selector kept is for the log; all of it weighs less
                ratio = confident_ratio(pseudo.confidence, threshold=options.threshold)
                pseudo = pseudo._replace(weight=pseudo.weight * ratio)
        target = SegBatch(batch.target_images, pseudo.labels, pseudo.weight)

        # 2. Half of the classes of each source image are pasted onto a target image: image, label and weight alike.
        mixed = class_mix(source, target, class_mask(source.labels, self.draw_classes(source.labels, draws)))

        # 3. The student sees strongly augmented images of both kinds.
        source_images = self.augment(source.images, draws) if options.augment_source else source.images
        mixed_images = self.augment(mixed.images, draws) if options.augment_mixed else mixed.images
        on_source, on_mixed = self.both(source_images, mixed_images)

        # 4. At the labels' size, without ever holding logits of that size. Over all pixels: a rejected or doubtful
        # pixel weighs less, it does not make the others weigh more.
        mix = pseudo_loss(on_mixed, mixed, options.pseudo_loss)
        terms = {
            "source": on_source.cross_entropy(source.labels),
            "mix": options.mix_weight * mix,
            **self.masked_consistency(
                batch.target_images, draws, lambda seen: pseudo_loss(seen, pseudo, options.pseudo_loss)
            ),
        }
        if self.contrasts:
            with torch.no_grad():
                features = self.teacher(source_images).features
            for name, contrast in self.contrasts.items():
                contrast.update(features, source.labels)
                apart = contrast(on_source.features, source) + contrast(on_mixed.features, mixed)
                terms[name] = getattr(options, name) * apart
        if options.feature_distillation > 0:
            distilled = self._distil(on_source.encoded, source.images) + self._distil(on_mixed.encoded, mixed.images)
            terms["feature_distillation"] = options.feature_distillation * distilled
        if options.feature_distance > 0:
            terms["feature_distance"] = options.feature_distance * self._feature_distance(
                on_source.encoded, source._replace(images=source_images)
            )
        shared = Shared(
            source._replace(images=source_images),
            mixed._replace(images=mixed_images),
            batch.target_images,
            lambda: teacher_logits,
        )
        return Losses(terms, selection, shared)

    def prepare(self, data: Preparation) -> None:
        """Prepare the translator, and for `rectified` the class centroids of the target."""
        super().prepare(data)
        if self.rectified is not None:
            self.rectified.prepare(data.batches(0, CENTROID_BATCHES))

    def after_step(self) -> None:
        """Move the teacher, and the share of each class that is kept."""
        super().after_step()
        self.done += 1
        if self.options.share_end is not None:
            write_numbers(self.course, self.done, self.steps)
            self.move_share()

    def move_share(self) -> None:
        """From `share` to `share_end`, evenly."""
        begin, end = self.options.share, self.options.share_end
        self.selector.share = begin + (end - begin) * min(1.0, self.done / max(1, self.steps))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        saved = state_dict.setdefault(prefix + "course", self.course)  # what an earlier version wrote may have none
        if self.options.share_end is not None:
            self.done = int(saved[0])
            self.move_share()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def translate(self, batch: Batch, draws: Draws) -> Tensor:
        """Give some of the source images the style of a target image."""
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

    def extra_param_groups(self, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """The projection of the distilled features learns at the rate of the student's decoder."""
        if self.projection is None:
            return []
        return [{"name": "projection", "params": list(self.projection.parameters()), "lr": lr * head_multiplier}]

    def _distil(self, encoded: Tensor, images: Tensor) -> Tensor:
        """VFM-UDA++: projected features of augmented images against the frozen net's of the images as they are."""
        assert self.reference is not None
        assert self.projection is not None
        with torch.no_grad():
            reference = self.reference.encode(images)  # type: ignore[operator]
        return feature_distillation_loss(self.projection(encoded), reference)

    def _feature_distance(self, features: Tensor, source: SegBatch) -> Tensor:
        """DAFormer's distance to the ImageNet encoder, on the cells that a wanted class fills."""
        assert self.reference is not None
        with torch.no_grad():
            reference = self.reference.encode(source.images)
        small = downscale_labels(
            source.labels, source.labels.shape[-1] // features.shape[-1], num_classes=self.num_classes
        )
        return feature_distance_loss(features, reference, valid=torch.isin(small, self.distance_classes))


def pseudo_loss(output: Any, pseudo: PseudoLabels | SegBatch, kind: str = "cross_entropy") -> Tensor:
    """Loss with pseudo-labels, averaged over all pixels, so uncertain pixels do not raise the weight of others."""
    loss = getattr(output, kind)
    return loss(pseudo.labels, pixel_weight=pseudo.weight, reduction="mean_all")  # type: ignore[no-any-return]


def make_projection(reference: nn.Module) -> nn.Module:
    """VFM-UDA++'s projection to the number of channels of the frozen encoder."""
    from timm.layers import LayerNorm2d  # slow to import

    first = next(m for m in reference.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        dim = reference.eval().encode(torch.zeros(1, first.in_channels, 64, 64)).shape[1]  # type: ignore[operator]
    return nn.Sequential(nn.Conv2d(dim, dim, 1), LayerNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 1))


def make_selector(options: Any, num_classes: int) -> nn.Module:
    """Build the pseudo-label selector of the options."""
    if options.selector == "argmax":
        return ArgmaxSelector()
    if options.selector == "threshold":
        return ThresholdSelector(options.threshold)
    if options.selector == "adaptive":
        return AdaptiveThresholdSelector(num_classes, options.threshold_momentum, sync=True)
    if options.selector == "class_quantile":
        return ClassQuantileSelector(num_classes, share=options.share, momentum=0.9, sync=True)
    if options.selector == "confident_ratio":
        return ConfidentRatioSelector(options.threshold)
    raise ValueError(f"Expected `selector` to be a known pseudo-label selector, but got {options.selector!r}.")


def selection_of(options: Any, logits: Tensor, pseudo: PseudoLabels) -> Selection:
    """What was kept of each class. For `confident_ratio`, which keeps everything, the confident pixels."""
    if options.selector != "confident_ratio":
        return Selection(logits, pseudo.labels, pseudo.weight)
    confident = pseudo.confidence, pseudo.weight, options.threshold
    return Selection(logits, pseudo.labels, lambda: ((confident[0] >= confident[2]) & (confident[1] > 0)).float())
