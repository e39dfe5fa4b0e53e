"""DUDA (WACV 2026): adapt a small net through a large one.

The large teacher is the EMA of a large auxiliary student, which any self-training recipe can drive; the small student
learns beside them (`duda_pre`, pre-adaptation), then alone from several teachers, with classes weighed by how
inconsistent it still is with them (`duda`, fine-tuning). What is the paper's and what is ours: docs/methods/duda.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gta2cs.checkpoints import load_net
from gta2cs.loading import Batch
from gta2cs.recipes.base import Draws, Losses, Preparation, Recipe
from gta2cs.recipes.dacs import Dacs
from gta2cs.recipes.diga import Diga
from gta2cs.recipes.ehtdi import Ehtdi
from gta2cs.recipes.self_training import Selection, SelfTraining
from udakit import EMATeacher, InconsistencyLoss, cross_entropy, fuse_teachers, kd_loss

BASES: dict[str, type[SelfTraining]] = {"dacs": Dacs, "diga": Diga, "ehtdi": Ehtdi}


class DudaPre(Recipe):
    """Pre-adaptation: a base recipe adapts the large pair, the small student learns from its batches and teacher."""

    @dataclass
    class Options:
        """Options of the recipe."""

        large: dict[str, Any] = field(default_factory=lambda: {"encoder": "tu-tf_efficientnet_lite2"})
        large_init: str = ""  # a checkpoint whose student is where the large student starts; empty: from ImageNet
        base: str = "dacs"  # dacs, diga, ehtdi
        base_options: dict[str, Any] = field(default_factory=dict)
        kd_weight: float = 1.0  # gradual distillation: from the teacher while it adapts; 0: hard labels alone
        temperature: float = 1.0

    def __init__(self, student: nn.Module, num_classes: int, options: Any, base: SelfTraining) -> None:
        super().__init__(student, num_classes, options)
        self.base = base

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> DudaPre:
        """Make the recipe; the large net is built like the small one but for the keys of `large`."""
        parsed = cls.parse(options)
        if parsed.base not in BASES:
            raise ValueError(f"Expected `base` to be one of {sorted(BASES)}, but got {parsed.base!r}.")
        if parsed.base == "ehtdi":  # which labels with its student unless told otherwise; here the teacher teaches
            parsed.base_options = {"labels_from": "teacher", **parsed.base_options}
        large = make_net(**parsed.large)
        if parsed.large_init:
            load_net(large, Path(parsed.large_init))
        base = BASES[parsed.base].build(large, num_classes, parsed.base_options, lambda: make_net(**parsed.large))
        return cls(student, num_classes, parsed, base)  # type: ignore[arg-type]

    def prepare(self, data: Preparation) -> None:
        """What the base recipe wants to see."""
        self.base.prepare(data)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step: the large student's and, marked `small_`, the small one's."""
        large = self.base(batch, draws)
        source, mixed, target_images, teacher_logits = large.shared
        terms = {
            **large.terms,
            "small_source": cross_entropy(self.student(source.images).logits, source.labels),
            "small_mix": cross_entropy(
                self.student(mixed.images).logits, mixed.labels, pixel_weight=mixed.weight, reduction="mean_all"
            ),
        }
        if self.options.kd_weight > 0:
            on_target = self.student(target_images).logits
            terms["small_kd"] = self.options.kd_weight * kd_loss(
                on_target, teacher_logits, temperature=self.options.temperature, resize="student"
            )
        return Losses(terms, large.selection)

    def extra_param_groups(self, lr: float) -> list[dict[str, Any]]:
        """The large student learns as well."""
        return [{"params": [p for p in self.base.student.parameters() if p.requires_grad], "lr": lr}]

    def after_step(self) -> None:
        """The large teacher follows the large student."""
        self.base.after_step()

    def nets(self) -> dict[str, nn.Module]:
        """The small student, which is deployed, and the large pair."""
        return {"student": self.student, **{f"large {name}": net for name, net in self.base.nets().items()}}


class Duda(SelfTraining):
    """Fine-tuning: the small student alone, from frozen large teachers and its own EMA, inconsistent classes first."""

    @dataclass
    class Options(SelfTraining.Options):
        """Options of the recipe."""

        teachers: list[str] = field(default_factory=lambda: ["large teacher", "large student", "own"])
        fuse: str = "mean"  # mean, max_confidence, agreement
        source_weight: float = 1.0
        kd_weight: float = 1.0
        temperature: float = 1.0
        inconsistency: bool = True  # False: plain distillation
        inconsistency_momentum: float = 0.99
        weight_temperature: float = 1.0

    def __init__(self, student: nn.Module, num_classes: int, options: Any, large: dict[str, nn.Module]) -> None:
        super().__init__(student, num_classes, options)
        known = [*large, "own"]
        for name in options.teachers:
            if name not in known:
                raise ValueError(f"Expected `teachers` to be among {known}, but got {name!r}.")
        # Never updated, so frozen; EMATeacher keeps their running statistics and their dropout still as well.
        self.large = nn.ModuleDict(
            {
                name.replace(" ", "_"): EMATeacher(net, mode=options.teacher_mode)
                for name, net in large.items()
                if name in options.teachers
            }
        )
        self.inconsistency = InconsistencyLoss(
            num_classes,
            momentum=options.inconsistency_momentum,
            weight_temperature=options.weight_temperature,
            temperature=options.temperature,
            teacher_kind="probabilities",
        )

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> Duda:
        """Make the recipe; the large teachers come from the stage before."""
        if not isinstance(previous, DudaPre):
            raise ValueError(f"Expected the stage before `duda` to be `duda_pre`, but got {type(previous).__name__}.")
        large = {name: net for name, net in previous.nets().items() if name != "student"}
        return cls(student, num_classes, cls.parse(options), large)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        options = self.options
        with torch.no_grad():
            teachers = [net(batch.target_images).logits for net in self.large.values()]
            if "own" in options.teachers:
                teachers.append(self.teacher(batch.target_images).logits)
            fused = fuse_teachers(teachers, mode=options.fuse)
        source_images, target_images = batch.source_images, batch.target_images
        if options.augment_source:
            source_images = self.augment(source_images, draws)
        if options.augment_mixed:
            target_images = self.augment(target_images, draws)
        on_source, on_target = self.both(source_images, target_images)
        terms = {"source": options.source_weight * cross_entropy(on_source.logits, batch.source_labels)}
        terms["kd"] = options.kd_weight * (
            self.inconsistency(on_target.logits, fused)
            if options.inconsistency
            else kd_loss(on_target.logits, fused, temperature=options.temperature, teacher_kind="probabilities")
        )
        return Losses(terms, Selection(fused))
