"""Shared code of the self-training recipes: EMA teacher, class draws, BatchNorm policy, and target styles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from gta2cs.learned_translator import Translator, train_translator
from gta2cs.recipes.base import Draws, Preparation, Recipe, check_shares
from gta2cs.translators import TRANSLATORS
from udakit import (
    DistributionAlignment,
    EMATeacher,
    draw_block_mask,
    draw_classes,
    draw_token_mask,
    hflip_average,
    keep_statistics,
    row_mask,
)

LEARNED = "learned"
MASKING = ("mask_weight", "mask_ratio", "mask_block", "mask_complements", "mask_tokens")
LABELLING = ("mirror_teacher", "align")
S = TypeVar("S", bound="TargetStyled")


class SelfTraining(Recipe):
    """A student, and a teacher with the moving average of its weights."""

    @dataclass
    class Options(Recipe.Options):
        """Options of every self-training recipe. Configurations of papers change some of them."""

        ema: float = 0.99  # the papers: 0.999 over 40k to 250k steps
        ema_warmup: bool = False  # True when the student starts from ImageNet instead of from a source-trained net
        teacher_mode: Literal["batch_statistics", "train", "eval"] = "batch_statistics"  # when it labels
        teacher_running_share: float = 0.0  # of the running statistics in those of batch_statistics
        batch_norm: Literal["separate", "joint"] = "separate"  # one forward a domain, or both in one
        record_mixed: bool = True  # False: the running statistics, for evaluation, are those of source alone
        buffers: Literal["copy", "ema", "keep"] = "copy"  # BatchNorm statistics of the teacher
        mix_fraction: float = 0.5  # of the classes of a source image
        augment_mixed: bool = True
        ignore_top: int = 0  # rows of a target crop without pseudo-label (DAFormer: 15 and 120 of 512)
        ignore_bottom: int = 0
        mirror_teacher: bool = False  # labels from the mean over an image and its mirror image (VFM-UDA)
        align: bool = False  # the class shares of the labels follow those of source (ReMixMatch)
        mask_weight: float = 0.0  # masked consistency on target (MIC: 1); 0: off
        mask_ratio: float = 0.7  # share of the blocks that is removed
        mask_block: int = 32  # side of a block (MIC: 64 in crops of 512 and of 1024)
        mask_complements: bool = False  # both halves, half of the weight each (MaskTwins: ratio 0.5)
        mask_tokens: bool = False  # patch tokens of `arch: vit` in place of blocks (VFM-UDA)

    def __init__(self, student: nn.Module, num_classes: int, options: Any) -> None:
        super().__init__(student, num_classes, options)
        self.teacher = EMATeacher(
            student, options.ema, options.ema_warmup, options.buffers, **labelling_statistics(options)
        )
        self.alignment = DistributionAlignment(num_classes, sync=True) if options.align else None

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse what no teacher can be made with, and a share of statistics that it does not use."""
        super().check(options)
        check_shares(options, "ema", "mix_fraction", "mask_ratio")
        share, mode = options.teacher_running_share, options.teacher_mode
        if not 0 <= share <= 1 or (share > 0 and mode != "batch_statistics"):
            raise ValueError(
                "Expected `teacher_running_share` to be a share in [0, 1], with `teacher_mode` batch_statistics, "
                f"but got {share} with {mode}."
            )

    def after_step(self) -> None:
        """Let the teacher follow the student."""
        self.teacher.update(self.student)

    def nets(self) -> dict[str, nn.Module]:
        """Student and teacher."""
        return {"student": self.student, "teacher": self.teacher.module}

    def look(self, labeller: nn.Module, images: Tensor) -> Any:
        """Output of the net that labels target images. With `mirror_teacher`, its logits are those of two views."""
        with torch.no_grad():
            if not self.options.mirror_teacher:
                return labeller(images)
            outputs = []

            def logits(view: Tensor) -> Tensor:
                outputs.append(labeller(view))
                return outputs[-1].logits  # type: ignore[no-any-return]

            mean = as_logits(hflip_average(logits, images))
            return dataclasses.replace(outputs[0], head_logits=mean, size=None)

    def aligned(self, logits: Tensor, source_labels: Tensor, valid: Tensor | None) -> Tensor:
        """Logits on target images with the class shares of the source labels; unchanged without `align`."""
        if self.alignment is None:
            return logits
        with torch.no_grad():
            self.alignment.update_source(source_labels)
            return as_logits(self.alignment(logits, valid=valid))

    def both(self, first: Tensor, second: Tensor) -> tuple[Any, Any]:
        """Student outputs of two batches. BatchNorm sees them together (one forward pass) or separately (two)."""
        if self.options.batch_norm == "separate":
            return self.student(first), self.on_mixed(second)
        joint = self.student(torch.cat([first, second]))
        return joint.split(len(first), len(second))  # type: ignore[no-any-return]

    def on_mixed(self, images: Tensor) -> Any:
        """Student output of mixed images. BatchNorm records their statistics or only uses them."""
        with nullcontext() if self.options.record_mixed else keep_statistics(self.student):
            return self.student(images)

    def masked_consistency(self, images: Tensor, draws: Draws, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Return the term "masked" (MIC): `loss` of the student's output on target images with blocks removed.

        The images are augmented like mixed ones, then masked; `loss` compares with the labels of the whole images.
        Half-empty images never enter BatchNorm's running statistics.
        """
        options = self.options
        if options.mask_weight == 0:
            return {}
        size, block, ratio = tuple(images.shape[-2:]), options.mask_block, options.mask_ratio
        if options.augment_mixed:
            images = self.augment(images, draws)
        if options.mask_tokens:
            tokens = self.student.token_count(*size)  # type: ignore[operator]
            removed = draw_token_mask(len(images), tokens, ratio=ratio, generator=draws.generators)
        else:
            removed = draw_block_mask(len(images), size, block_size=block, ratio=ratio, generator=draws.generators)
        losses = []
        with keep_statistics(self.student):
            for mask in [removed, ~removed] if options.mask_complements else [removed]:
                if options.mask_tokens:
                    output = self.student(images, token_mask=mask)
                else:
                    output = self.student(torch.where(mask.unsqueeze(1), 0, images))
                losses.append(loss(output))
        return {"masked": options.mask_weight * torch.stack(losses).mean()}

    def draw_classes(self, labels: Tensor, draws: Draws, **options: Any) -> Tensor:
        """Draw the classes of each label map that are pasted."""
        fraction = self.options.mix_fraction
        return draw_classes(
            labels, num_classes=self.num_classes, fraction=fraction, generator=draws.generators, **options
        )

    def valid_rows(self, logits: Tensor) -> Tensor | None:
        """Mask the rows at the top and bottom that show no street (own bonnet, borders)."""
        top, bottom = self.options.ignore_top, self.options.ignore_bottom
        if top == 0 and bottom == 0:
            return None
        n, _, h, w = logits.shape
        return row_mask(h, w, top, bottom).to(logits.device).expand(n, h, w)


def labelling_statistics(options: Any) -> dict[str, Any]:
    """The options of an `EMATeacher` that say which BatchNorm statistics it labels with."""
    return {"mode": options.teacher_mode, "running_share": options.teacher_running_share}


def as_logits(probabilities: Tensor) -> Tensor:
    """Logits with this softmax, so that later code need not know about two views or a prior."""
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


class TargetStyled(SelfTraining):
    """Self-training that also renders source images in the style of target."""

    @dataclass
    class Options(SelfTraining.Options):
        """Options of the renderings."""

        translate: str = "fourier"  # color, fourier, histogram, none; learned: a net, trained before the first step
        translator_steps: int = 200  # of "learned" (DiGA: 50k steps at 1e-4)
        translator_lr: float = 2e-3

    def __init__(self, student: nn.Module, num_classes: int, options: Any) -> None:
        super().__init__(student, num_classes, options)
        self.translator = Translator().requires_grad_(False) if options.translate == LEARNED else None

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse an unknown style."""
        super().check(options)
        if (name := options.translate) != LEARNED and name not in TRANSLATORS:
            raise ValueError(f"Expected `translate` to be one of {[*TRANSLATORS, LEARNED]}, but got {name!r}.")

    @classmethod
    def build(
        cls: type[S],
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> S:
        """Make the recipe. A translator that the stage before has trained is used again."""
        return cls(student, num_classes, cls.parse(options)).translating(make_net, previous)

    def translating(self: S, make_net: Callable[..., nn.Module], previous: Recipe | None) -> S:
        """Say where the translator comes from, if there is one."""
        trained = getattr(previous, "translator", None)
        if self.translator is not None and trained is not None and int(trained.steps) > 0:
            self.translator.load_state_dict(trained.state_dict())
        self.make_net = make_net  # called only where a translator is trained
        return self

    def prepare(self, data: Preparation) -> None:
        """Train the translator, once for all stages."""
        if self.translator is None or int(self.translator.steps) > 0:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.seed)
            self.translator.load_state_dict(Translator().state_dict())
            encoder = self.make_net().to(self.translator.steps.device)
        train_translator(
            self.translator,
            data.batches,
            encoder,  # type: ignore[arg-type]
            steps=self.options.translator_steps,
            lr=self.options.translator_lr,
            seed=data.seed,
            path=None if data.folder is None else data.folder / "translator.pt",
            resume=data.resume,
            console=data.console,
        )

    def in_target_style(self, source: Tensor, target: Tensor) -> Tensor:
        """Source images in the style of target images, one each."""
        if self.translator is None:
            return TRANSLATORS[self.options.translate](source, target, self.mean, self.std)
        with torch.no_grad():
            return self.translator(source, target).to(source.dtype)  # type: ignore[no-any-return]


class Selection:
    """The number of predicted and of kept pixels of each class in a step, kept ones by their weight.

    They are counted only on request, because few steps are logged, and the arg-max at full size costs as much as a
    loss.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor | None = None, weight: Tensor | Callable[[], Tensor] | None = None
    ) -> None:
        """Without `labels` and `weight`, every pixel was kept. A callable `weight` is called for the counts."""
        self._logits, self._labels, self._weight = logits.detach(), labels, weight

    @cached_property
    def _counts(self) -> Tensor:
        predicted = self._logits.max(1).indices.flatten()
        counted = torch.ones(2, len(predicted), device=predicted.device)
        if self._labels is not None:
            counted[1] *= self._labels.flatten() == predicted
        if self._weight is not None:
            weight = self._weight if isinstance(self._weight, Tensor) else self._weight()
            counted[1] *= weight.flatten()
        zeros = counted.new_zeros(2, self._logits.shape[1])
        return zeros.scatter_add(1, predicted.expand(2, -1), counted)

    @property
    def predicted(self) -> Tensor:
        """(C,) pixels of each predicted class."""
        return self._counts[0]

    @property
    def kept(self) -> Tensor:
        """(C,) the weights of those that kept their class."""
        return self._counts[1]
