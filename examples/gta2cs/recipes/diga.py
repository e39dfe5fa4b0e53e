"""DiGA (Shen et al., CVPR 2023): distil to generalise, then adapt without thresholds.

Two recipes for two stages. `diga_warmup` trains on labelled source and distils between two renderings of the same
source image; the target is used only as a style there. `diga` adapts: the labels of the previous stage's net are kept
where the nearest class centroid agrees. A second `diga` stage in a config is the paper's second round: the student of
the first labels target anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gta2cs.loading import Batch
from gta2cs.recipes.base import Draws, Losses, Preparation, Shared
from gta2cs.recipes.dacs import make_selector, pseudo_loss, selection_of
from gta2cs.recipes.rectified import CENTROID_BATCHES, classes_at_features, target_centroids
from gta2cs.recipes.self_training import LABELLING, MASKING, TargetStyled, labelling_statistics
from udakit import (
    BilateralConsensus,
    ClassPrototypes,
    EMATeacher,
    RectifiedSelector,
    SegBatch,
    class_mask,
    class_mix,
    cross_domain_mix,
    resize_labels,
)


class DigaWarmup(TargetStyled):
    """Cross-entropy on source, symmetric distillation between the source image and its CrDoMix rendering."""

    FIXED = (
        "augment_mixed",
        "ignore_top",
        "ignore_bottom",
        *MASKING,
        *LABELLING,
    )  # of pseudo-labels, which there are none of

    @dataclass
    class Options(TargetStyled.Options):
        """Options of the recipe."""

        augment_source: bool = False  # the paper: the labels teach the image as it is
        skd: float = 0.5  # GTA5; SYNTHIA: 0.25
        reverse_weight: float = 0.5  # of the direction whose teacher saw the mixed view
        blend: float = 0.4  # of the strongly augmented image in the augmented rendering
        crdomix: bool = True  # False: the mixed view is the augmented rendering alone, nothing of it in target's style

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        clean, mixed = self.student_views(batch, draws)
        distilled = self.distil(clean, mixed)  # first: where it enlarges logits, the cross-entropy takes them
        return Losses({"source": clean.cross_entropy(batch.source_labels), "skd": distilled})

    def student_views(self, batch: Batch, draws: Draws) -> tuple[Any, Any]:
        """Student outputs on the clean source images and on their mixed view; the teacher sees the same two."""
        mixed = self.crdomix(batch, draws)
        images = batch.source_images
        self.views = (self.augment(images, draws) if self.options.augment_source else images, mixed)
        return self.both(*self.views)

    def crdomix(self, batch: Batch, draws: Draws) -> Tensor:
        """Mix half of the classes of an augmented rendering with the target-styled rendering. The layout stays."""
        images, blend = batch.source_images, self.options.blend
        augmented = blend * self.augment(images, draws) + (1 - blend) * images
        if not self.options.crdomix:
            return augmented
        translated = self.in_target_style(images, batch.target_images)
        chosen = self.draw_classes(batch.source_labels, draws, rounding="down")
        return cross_domain_mix(augmented, translated, class_mask(batch.source_labels, chosen, paste_ignore=True))

    def distil(self, clean: Any, mixed: Any) -> Tensor:
        """Symmetric distillation; the teacher's outputs are kept for the prototypes.

        This is `udakit.symmetric_kd_loss` of the enlarged logits, on a CPU without logits of that size.
        """
        with torch.no_grad():
            self.teacher_views = self.teacher(self.views[0]), self.teacher(self.views[1])
        forward, reverse = mixed.distillation(self.teacher_views[0]), clean.distillation(self.teacher_views[1])
        return self.options.skd * (forward + self.options.reverse_weight * reverse)


class Diga(DigaWarmup):
    """Self-training on labels on which classifier and nearest centroid agree, together with the distillation."""

    FIXED = ()

    @dataclass
    class Options(DigaWarmup.Options):
        """Options of the recipe."""

        skd: float = 0.25
        blend: float = 0.3
        mix_weight: float = 1.0
        # Consensus is the method; the others are for comparison, all else being equal.
        selector: Literal["consensus", "rectified", "threshold", "confident_ratio", "class_quantile", "argmax"] = (
            "consensus"
        )
        threshold: float = 0.968  # of threshold and confident_ratio
        share: float = 0.5  # of each predicted class, for class_quantile
        prototype_momentum: float = 1e-2  # the paper: 1e-4 over 80k steps

    def __init__(self, student: nn.Module, num_classes: int, options: Any) -> None:
        super().__init__(student, num_classes, options)
        # The net of the previous stage (its student: that is where this stage starts) labels the target images.
        self.labeller = EMATeacher(student, **labelling_statistics(options))  # never updated: frozen
        self.prototypes = ClassPrototypes(num_classes, student.feature_dim, momentum=options.prototype_momentum)
        self.consensus = BilateralConsensus(self.prototypes)
        own = {"consensus": self.consensus, "rectified": RectifiedSelector(self.prototypes)}
        self.selector = own.get(options.selector) or make_selector(options, num_classes)

    def prepare(self, data: Preparation) -> None:
        """Compute class centroids of the target: the mean features of the predicted classes, over one pass."""
        super().prepare(data)
        mean = target_centroids(self.labeller, self.prototypes, data.batches(0, CENTROID_BATCHES))
        self.prototypes.set_(mean.prototypes, mean.counts)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        source = SegBatch(batch.source_images, batch.source_labels)

        # 1. The labeller's classes, kept where the nearest centroid of the teacher's features agrees (or as the
        # option says). The centroids are kept up to date in any case: the consensus can be measured beside another.
        with torch.no_grad():
            labelled = self.look(self.labeller, batch.target_images).logits
            valid = self.valid_rows(labelled)
            labelled = self.aligned(labelled, source.labels, valid)
            teacher_target = self.teacher(batch.target_images)
            pseudo = self.selector(labelled, teacher_target.features, valid=valid)

        # 2. Source classes onto target, and both renderings of source, through the student.
        chosen = self.draw_classes(source.labels, draws, rounding="down")
        mask = class_mask(source.labels, chosen, paste_ignore=True)
        target = SegBatch(batch.target_images, pseudo.labels, pseudo.weight)
        target_images = self.augment(target.images, draws) if self.options.augment_mixed else target.images
        mixed = class_mix(source, target._replace(images=target_images), mask)
        clean, crdomix = self.student_views(batch, draws)
        on_mixed = self.on_mixed(mixed.images)

        mix = on_mixed.cross_entropy(mixed.labels, pixel_weight=mixed.weight, reduction="mean_all")
        distilled = self.distil(clean, crdomix)
        terms = {
            "source": clean.cross_entropy(source.labels),
            "mix": self.options.mix_weight * mix,
            "skd": distilled,
            **self.masked_consistency(batch.target_images, draws, lambda seen: pseudo_loss(seen, pseudo)),
        }

        # 3. The centroids follow the teacher: on target, and on the rendering of source.
        self._follow(teacher_target, pseudo.labels)
        self._follow(self.teacher_views[1], source.labels)
        shared = Shared(source, mixed, batch.target_images, lambda: teacher_target.logits)
        return Losses(terms, selection_of(self.options, labelled, pseudo), shared)

    def _follow(self, teacher: Any, labels: Tensor) -> None:
        """Update the centroids on the pixels where the teacher's arg-max agrees with the label, of all ranks."""
        small = resize_labels(labels, teacher.features.shape[-2:])
        self.prototypes.update(teacher.features, small.where(classes_at_features(teacher) == small, 255), sync=True)
