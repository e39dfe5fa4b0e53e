"""DUDA (WACV 2026): adapt a small net through a large one.

The large teacher is the EMA of a large auxiliary student, which any self-training recipe can drive; the small student
learns beside them (`duda_pre`, pre-adaptation), then alone from several teachers, with classes weighed by how
inconsistent it still is with them (`duda`, fine-tuning). What is the paper's and what is ours: docs/methods/duda.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gta2cs.checkpoints import copy_net, load_checkpoint, load_net
from gta2cs.loading import Batch
from gta2cs.nets import param_groups
from gta2cs.recipes.base import Draws, Losses, Preparation, Recipe
from gta2cs.recipes.dacs import Dacs, pseudo_loss
from gta2cs.recipes.diga import Diga
from gta2cs.recipes.ehtdi import Ehtdi
from gta2cs.recipes.self_training import Selection, SelfTraining, as_logits, labelling_statistics
from udakit import EMATeacher, InconsistencyLoss, ProjectedFeatureLoss, fuse_teachers, kd_loss

if TYPE_CHECKING:
    from gta2cs.config import Config

BASES: dict[str, type[SelfTraining]] = {"dacs": Dacs, "diga": Diga, "ehtdi": Ehtdi}
OWN = "own"
LARGE_PAIR = {"large teacher": "teacher.module", "large student": "student"}  # where a self-training recipe holds them
LITE2 = {"encoder": "tu-tf_efficientnet_lite2"}


class DudaPre(Recipe):
    """Pre-adaptation: a base recipe adapts the large pair, the small student learns from its batches and teacher."""

    @dataclass
    class Options:
        """Options of the recipe."""

        large: dict[str, Any] = field(default_factory=lambda: dict(LITE2))
        large_init: str = ""  # a checkpoint whose student is where the large student starts; empty: from ImageNet
        base: str = "dacs"  # dacs, diga, ehtdi
        base_options: dict[str, Any] = field(default_factory=dict)
        kd_weight: float = 1.0  # ours: soft labels of the teacher while it adapts; 0: one-hot labels alone, as stated
        temperature: float = 1.0

    def __init__(self, student: nn.Module, num_classes: int, options: Any, base: SelfTraining) -> None:
        super().__init__(student, num_classes, options)
        self.base = base

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse an unknown base recipe, and options that it does not have."""
        if options.base not in BASES:
            raise ValueError(f"Expected `base` to be one of {sorted(BASES)}, but got {options.base!r}.")
        BASES[options.base].parse(options.base_options)

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> DudaPre:
        """Make the recipe. The large net is built like the small one, except for the keys of `large`."""
        parsed = cls.parse(options)
        if parsed.base == "ehtdi":  # which labels with its student unless told otherwise; here the teacher teaches
            parsed.base_options = {"labels_from": "teacher", **parsed.base_options}
        large = make_net(**parsed.large)
        if parsed.large_init:
            load_net(large, Path(parsed.large_init))
        base = BASES[parsed.base].build(large, num_classes, parsed.base_options, lambda: make_net(**parsed.large))
        return cls(student, num_classes, parsed, base)  # type: ignore[arg-type]

    def trains_for(self, steps: int) -> None:
        """Tell the base recipe as well."""
        super().trains_for(steps)
        self.base.trains_for(steps)

    def prepare(self, data: Preparation) -> None:
        """Let the base recipe prepare."""
        self.base.prepare(data)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step; those of the small student have the prefix `small_`."""
        large = self.base(batch, draws)
        source, mixed, target_images, teacher_logits = large.shared
        terms = {
            **large.terms,
            "small_source": self.student(source.images).cross_entropy(source.labels),
            "small_mix": pseudo_loss(self.student(mixed.images), mixed),
        }
        if self.options.kd_weight > 0:
            on_target = self.student(target_images).logits
            terms["small_kd"] = self.options.kd_weight * kd_loss(
                on_target, teacher_logits(), temperature=self.options.temperature, resize="student"
            )
        return Losses(terms, large.selection)

    def extra_param_groups(self, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """The large student, with the options of the small one, and whatever else its recipe trains."""
        large = param_groups(self.base.student, lr=lr, head_multiplier=head_multiplier)  # type: ignore[arg-type]
        return [*large, *self.base.extra_param_groups(lr, head_multiplier)]

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

        large: dict[str, Any] = field(default_factory=lambda: dict(LITE2))  # with large_from: as in `duda_pre`
        large_from: str = ""  # a checkpoint whose nets are the large teachers; empty: the stage before has them
        teachers: list[str] = field(default_factory=lambda: ["large teacher", "large student", OWN])
        fuse: Literal["mean", "max_confidence", "agreement"] = "mean"
        source_weight: float = 1.0
        kd_weight: float = 1.0
        temperature: float = 1.0
        inconsistency: bool = True  # False: plain distillation
        inconsistency_momentum: float = 0.99
        weight_temperature: float = 1.0
        feature_weight: float = 0.0  # distance of projected features to those of the first large teacher

    def __init__(self, student: nn.Module, num_classes: int, options: Any, large: dict[str, nn.Module]) -> None:
        super().__init__(student, num_classes, options)
        # Never updated, so frozen; EMATeacher keeps their running statistics and their dropout still as well.
        self.large = nn.ModuleDict(
            {
                name.replace(" ", "_"): EMATeacher(net, **labelling_statistics(options))
                for name, net in large.items()
                if name in options.teachers
            }
        )
        self.inconsistency = InconsistencyLoss(
            num_classes,
            momentum=options.inconsistency_momentum,
            sync=True,
            weight_temperature=options.weight_temperature,
            temperature=options.temperature,
            teacher_kind="probabilities",
        )
        self.projected: ProjectedFeatureLoss | None = None
        if options.feature_weight > 0:
            if not self.large:
                raise ValueError(
                    f"Expected a large net in `teachers` for feature_weight > 0, but got {options.teachers}."
                )
            dims = [net.feature_dim for net in (student, next(iter(self.large.values())).module)]
            self.projected = ProjectedFeatureLoss(*dims, resize="student")

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse an unknown teacher."""
        super().check(options)
        for name in options.teachers:
            if name not in (known := [*LARGE_PAIR, OWN]):
                raise ValueError(f"Expected `teachers` to be among {known}, but got {name!r}.")

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> Duda:
        """Make the recipe; the large teachers come from a checkpoint or from the stage before."""
        parsed = cls.parse(options)
        wanted = [name for name in parsed.teachers if name != OWN]
        if parsed.large_from:
            large = read_large(Path(parsed.large_from), wanted, lambda: make_net(**parsed.large))
        elif isinstance(previous, DudaPre):
            large = {name: previous.nets()[name] for name in wanted}
        else:
            raise no_large_nets(type(previous).__name__)
        return cls(student, num_classes, parsed, large)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        options = self.options
        with torch.no_grad():
            large = [self.look(net, batch.target_images) for net in self.large.values()]
            teachers = [output.logits for output in large]
            if OWN in options.teachers:
                teachers.append(self.look(self.teacher, batch.target_images).logits)
            fused = fuse_teachers(teachers, mode=options.fuse)
            valid = self.valid_rows(fused)
            if self.alignment is not None:
                fused = self.aligned(as_logits(fused), batch.source_labels, valid).softmax(1)
        source_images, target_images = batch.source_images, batch.target_images
        if options.augment_source:
            source_images = self.augment(source_images, draws)
        if options.augment_mixed:
            target_images = self.augment(target_images, draws)
        on_source, on_target = self.both(source_images, target_images)
        source = on_source.cross_entropy(batch.source_labels)
        terms = {"source": options.source_weight * source}
        per_class = None
        if options.inconsistency:
            kd = self.inconsistency(on_target.logits, fused, valid=valid)
            per_class = {
                "inconsistency": self.inconsistency.inconsistency,
                "weight in the distillation": self.inconsistency.class_weight,
            }
        else:
            kd = kd_loss(
                on_target.logits,
                fused,
                temperature=options.temperature,
                teacher_kind="probabilities",
                valid=valid,
            )
        terms["kd"] = options.kd_weight * kd
        terms |= self.masked_consistency(batch.target_images, draws, lambda seen: self._masked_kd(seen, fused, valid))
        if self.projected is not None:
            terms["features"] = options.feature_weight * self.projected(on_target.features, large[0].features)
        return Losses(terms, Selection(fused), per_class=per_class)

    def _masked_kd(self, seen: Any, fused: Tensor, valid: Tensor | None) -> Tensor:
        """Plain distillation of the teachers' predictions for the whole images."""
        return kd_loss(
            seen.logits, fused, temperature=self.options.temperature, teacher_kind="probabilities", valid=valid
        )

    def extra_param_groups(self, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """The projection. It starts at random, so it learns at the rate of the student's decoder."""
        if self.projected is None:
            return []
        return [{"params": list(self.projected.parameters()), "lr": lr * head_multiplier}]


def no_large_nets(before: str) -> ValueError:
    """The error of a stage of `duda` after something else, without a checkpoint."""
    return ValueError(
        "Expected the stage before `duda` to be `duda_pre`, or `large_from` to be a checkpoint, but got "
        f"{before} and no checkpoint."
    )


def check_large_nets(config: Config) -> None:
    """Refuse a large net in a file that is not there, unless a stage before may write it."""
    for index, stage in enumerate(config.stages):
        for name in ("large_init", "large_from"):
            file = stage.options.get(name)
            written = index > 0 and file and Path(file).resolve().is_relative_to(config.out.resolve())
            if file and not written and not Path(file).is_file():
                raise FileNotFoundError(
                    f"Expected `stages.{index}.options.{name}` to be a checkpoint, but there is no file {file}. Train "
                    "that net first."
                )


def read_large(path: Path, wanted: list[str], make_net: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Read large nets by name from a checkpoint of `duda_pre` or of a recipe that adapted the large net."""
    saved = load_checkpoint(path)["recipe"]
    base = "base." if any(name.startswith("base.") for name in saved) else ""
    large = {}
    for name in wanted:
        large[name] = make_net()
        copy_net(large[name], saved, base + LARGE_PAIR[name], path)
    return large
