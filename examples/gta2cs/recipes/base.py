"""The base of all recipes: forward returns the training loss, and state_dict holds everything a run must save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gta2cs.loading import MEAN, STD, Batch, sample_generator
from udakit import SegBatch, draw_strong_augment, strong_augment

T = TypeVar("T")


class Draws:
    """The random draws of one step, a function of (seed, step, global sample index) and of nothing else.

    Sample i draws from its own generator. The draws therefore depend neither on the batch size of a rank nor on earlier
    draws, and resuming needs no saved random state.
    """

    def __init__(self, seed: int, step: int, samples: Sequence[int], device: torch.device) -> None:
        self.seed, self.step, self.samples, self.device = seed, step, list(samples), device

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One generator for each sample, seeded on first use."""
        return [
            torch.Generator(self.device).manual_seed(
                sample_generator(self.seed, self.step, sample, "draws").initial_seed()
            )
            for sample in self.samples
        ]

    def __call__(self, draw: Callable[[int, torch.Generator], T]) -> T:
        """Call `draw(i, generator)` for each sample of the batch and concatenate what it returns along axis 0."""
        drawn = [draw(i, generator) for i, generator in enumerate(self.generators)]
        return pytree.tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *drawn)


def write_numbers(buffer: Tensor, *numbers: int) -> None:
    """Put numbers into a buffer. A GPU need not be waited for, as it must be to copy a new tensor there."""
    for place, number in zip(buffer, numbers, strict=True):
        place.fill_(number)


class Shared(NamedTuple):
    """What another student may learn from: the batches of the first one, and the teacher on clean target images."""

    source: SegBatch
    mixed: SegBatch
    target_images: Tensor
    teacher_logits: Callable[[], Tensor]  # at full size, which takes time: only where they are asked for


class Losses(NamedTuple):
    """Named losses, already weighted. Their sum is minimised.

    `selection` (a `Selection` of the pseudo-labels) and `per_class`, named quantities of (C,), are for the log.
    """

    terms: dict[str, Tensor]
    selection: Any = None
    shared: Shared | None = None
    per_class: dict[str, Tensor] | None = None

    @property
    def total(self) -> Tensor:
        """The sum of the losses, which is backpropagated."""
        return torch.stack([term.float() for term in self.terms.values()]).sum()


class Preparation(NamedTuple):
    """What a recipe may see before its first step: images of both domains, and no target labels."""

    batches: Callable[[int, int], Iterable[Batch]]  # of the steps start ... stop - 1, as a function of the step
    seed: int = 0
    folder: Path | None = None  # of the run, for what takes long to make; None in all processes but the first
    resume: bool = False  # whether to use what lies there
    console: Console | None = None  # for a progress bar
    trained: bool = True  # whether the net comes from a stage before, or was loaded with its head


class Recipe(nn.Module):
    """A training method around a student net.

    `forward(batch, draws)` returns the losses of a step. `after_step()` is called after the optimiser's step and
    updates the teachers. Subclasses define their options in the dataclass `Options`. `student` is the net that is
    optimised and deployed.
    """

    FIXED: ClassVar[tuple[str, ...]] = ()  # inherited options that the method leaves no choice about
    IDLE_PARAMETERS: ClassVar[bool] = False  # whether a step leaves some parameters without a gradient
    MATCH_SCALE: ClassVar[bool] = False  # the default of `data.match_scale`

    @dataclass
    class Options:
        """Options of every recipe."""

        augment_source: bool = True  # colour jitter and blur on the source images
        jitter: float = 0.2  # strength of brightness, contrast and saturation (DAFormer 0.2, DACS 0.25)
        hue: float = 0.2  # as a share of the full circle
        blur: float = 0.5  # share of images that are blurred

    mean: Tensor  # that the images were normalised with: buffers, so that a step makes no constants
    std: Tensor

    def __init__(self, student: nn.Module, num_classes: int, options: Any) -> None:
        super().__init__()
        self.student = student
        self.num_classes = num_classes
        self.options = options
        self.steps = 0  # that it trains for; the loop says how many
        self.decisions: list[str] = []  # made without labels, in words; the loop prints them and takes them away
        self.normalised_with(MEAN, STD)

    def normalised_with(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation of each channel that the images were normalised with."""
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def trains_for(self, steps: int) -> None:
        """Take the number of optimiser steps. The loop says it before anything else, also in a resumed run."""
        self.steps = steps

    def augment(self, images: Tensor, draws: Draws) -> Tensor:
        """Colour jitter and blur, drawn for each image."""
        jitter, hue, blur = self.options.jitter, self.options.hue, self.options.blur
        colours = {"saturation": jitter, "hue": hue} if images.shape[1] == 3 else {}  # other channels have none
        strong = draw_strong_augment(
            len(images),
            brightness=jitter,
            contrast=jitter,
            **colours,
            blur_probability=blur,
            generator=draws.generators,
            device=images.device,
        )
        return strong_augment(images, strong, mean=self.mean, std=self.std)

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of one step."""
        raise NotImplementedError

    def prepare(self, data: Preparation) -> None:
        """Look at the images once, before the first step. A resumed run loads the result instead."""

    def after_step(self) -> None:
        """Update everything that has no gradients. Called once after each optimiser step."""

    def nets(self) -> dict[str, nn.Module]:
        """Return the nets to report, by name. The first one is deployed."""
        return {"student": self.student}

    def extra_param_groups(self, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups of everything else that learns; the arguments are those of the student's groups."""
        return []

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> Recipe:
        """Make the recipe.

        `make_net(**changes)` builds another net like the student, with changes. `previous` is the recipe of the stage
        before, whose teachers can be used.
        """
        return cls(student, num_classes, cls.parse(options))

    @classmethod
    def option_names(cls) -> list[str]:
        """The allowed names of `options`."""
        return [f.name for f in fields(cls.Options) if f.name not in cls.FIXED]

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Any:
        """Check the names and values of `options` and fill in the defaults."""
        known, kinds = cls.option_names(), get_type_hints(cls.Options)
        for name, value in options.items():
            if name not in known:
                raise ValueError(
                    f"Expected the options of recipe {cls.__name__} to be among {known}, but got {name!r}."
                )
            if not fits(value, kinds[name]):
                raise ValueError(
                    f"Expected `{name}` of recipe {cls.__name__} to be {words_of(kinds[name])}, but got {value!r}."
                )
        parsed = cls.Options(**options)
        cls.check(parsed)
        return parsed

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse values that are out of range or do not go together. The loop asks before it reads any data."""
        check_shares(options, "jitter", "blur")
        check_shares(options, "hue", most=0.5)


def check_shares(options: Any, *names: str, most: float = 1) -> None:
    """Refuse options that are no share, those of `names` that the recipe has."""
    for name in names:
        if not 0 <= getattr(options, name, 0) <= most:
            raise ValueError(f"Expected `{name}` to be in [0, {most}], but got {getattr(options, name)}.")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is what the annotation of an option says."""
    outer, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if outer is Literal:
        return value in inner
    if outer in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if outer is list:
        return isinstance(value, list | tuple) and all(fits(each, inner[0]) for each in value)
    if outer is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def words_of(kind: Any) -> str:
    """The annotation of an option, in words."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is Literal:
        return f"one of {list(inner)}"
    if outer in (Union, UnionType):
        return " or ".join(words_of(each) for each in inner)
    if outer is list:
        return f"a list, each {words_of(inner[0])}"
    if outer is dict:
        return "a table of options" if inner[1] is Any else f"a table, each value {words_of(inner[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a name", type(None): "null"}
    return names.get(kind, str(kind))
