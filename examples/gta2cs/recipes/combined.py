"""Decide with a label-free score: the scale and the colours of the source, and which candidate continues.

Ours; no paper has it. No fixed setting serves every pair of domains, and falling losses do not show which one does.
What tells them apart without a target label is how far a net contradicts itself on the mirror image, times how sure it
is (docs/families/validation.md). So before the first step the loop finds how much larger things are in target, and
scales source images to it (gta2cs/matching.py). The same question is asked about colours: source images take those of
target only where target crops in the colours of source are understood better than as they are.

There is one candidate unless you name several. Those are compared on target crops: with `trial` 0 by the labels that
their teachers would begin with, which costs no step; otherwise they take turns for that share of the steps, a step
each, on nets of their own. One goes on. A trial counts into the steps of the stage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gta2cs.evaluation import evaluating
from gta2cs.label_free import MARGIN, PRESENT
from gta2cs.loading import Batch
from gta2cs.nets import param_groups
from gta2cs.recipes.base import Draws, Losses, Preparation, Recipe, write_numbers
from gta2cs.recipes.dacs import Dacs
from gta2cs.recipes.self_training import LEARNED
from gta2cs.translators import TRANSLATORS
from udakit import EMATeacher
from udakit.validation import ConsistencyScore, LabelFreeScores

UNTRAINED = (
    "the last layer of the net is untrained, so the following is decided by chance; "
    "name a net trained on these classes by `init` or `net.weights`, or put a stage of source_only before"
)

# How the teacher labels: statistics of a target batch mislead where the domains differ in what they show, running
# statistics of source where they differ in look, each by about ten points on some pair (docs/methods/combined.md).
# Half of each is never far behind the better one.
CANDIDATES: dict[str, dict[str, Any]] = {
    "blended": {
        "teacher_mode": "batch_statistics",
        "teacher_running_share": 0.5,
        "buffers": "ema",
        "record_mixed": False,  # so that the running statistics are source's
    }
}
SHARED: dict[str, Any] = {
    "jitter": 0.5,
    "selector": "class_quantile",
    "share": 0.6,
    "translate": "color",
    "translate_share": 0.7,
}

# In a long stage a quick teacher repeats the errors of its student until both agree on them.
MEMORY = 1 / 3  # of the steps, which a teacher averages over at least ...
SLOWEST = 0.999  # ... but it is not slower than in the papers
# And there is time to learn from pixels that are less sure, where each counts the less the fewer are sure.
LONG = 300  # steps, up to which neither changes anything
RISING: dict[str, Any] = {"share_end": 0.9, "confidence_weight": True}
LABELS = ("selector", "share", *RISING)  # who gives one of these has chosen the labels


class Combined(Recipe):
    """DACS with the candidate that the label-free score chooses."""

    IDLE_PARAMETERS = True
    MATCH_SCALE = True

    @dataclass
    class Options:
        """Options of the recipe."""

        candidates: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(CANDIDATES))
        """Name of each candidate, and the options of dacs that it has of its own."""
        shared: dict[str, Any] = field(default_factory=dict)  # options of dacs for all of them, over the policy's
        match_style: bool = True  # leave source in its own colours where target in those of source is understood worse
        slow_teacher: bool = True  # over a third of a long stage's steps, unless candidates or `shared` have an `ema`
        rising_share: bool = True  # more labels towards the end of a long stage, unless those say which
        trial: float = 0.0  # share of the steps in which the candidates take turns; 0: compared before the first step
        images: int = 24  # target crops that the score looks at

    candidates: nn.ModuleDict
    images: Tensor
    progress: Tensor
    styled: Tensor

    def __init__(self, num_classes: int, options: Any, candidates: dict[str, Dacs]) -> None:
        super().__init__(next(iter(candidates.values())).student, num_classes, options)
        self.candidates = nn.ModuleDict(candidates)
        self.names = list(candidates)  # also of those that are dropped later
        self.register_buffer("images", torch.empty(0), persistent=True)
        # Steps done, steps of the trial, the candidate that was kept (-1: none yet): a resumed run goes on from it.
        self.register_buffer("progress", torch.tensor([0, 0, -1]))
        # The candidates whose source images may take the style of target.
        self.register_buffer("styled", torch.ones(len(candidates), dtype=torch.bool))
        self.done, self.trial_steps, self.kept = 0, 0, -1
        self.scores: dict[str, float] = {}
        self.of_many_steps: dict[str, list[str]] = {}  # what a long stage changed, in words, and in which candidates

    @classmethod
    def check(cls, options: Any) -> None:
        """Refuse what no trial can be held with, and options that a candidate does not have."""
        if not options.candidates:
            raise ValueError("Expected `candidates` to name at least one, but got an empty table.")
        if not 0 <= options.trial < 1:
            raise ValueError(f"Expected `trial` to be a fraction in [0, 1), but got {options.trial}.")
        if options.images < 1:
            raise ValueError(f"Expected `images` to be at least 1, but got {options.images}.")
        for name, own in options.candidates.items():
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"Expected another name for candidate {name!r}: a word that torch does not use itself."
                )
            try:
                # What a long stage refuses is said now, not after the stages before.
                Dacs.parse({**options_of(options.shared, own), **(RISING if rises(options, name) else {})})
            except ValueError as error:
                raise ValueError(f"{error} It is an option of candidate '{name}' or of `shared`.") from error

    @classmethod
    def build(
        cls,
        student: nn.Module,
        num_classes: int,
        options: dict[str, Any],
        make_net: Callable[..., nn.Module],
        previous: Recipe | None = None,
    ) -> Combined:
        """Make the candidates: the first around `student` itself, the others around nets like it."""
        parsed = cls.parse(options)
        first = next(m for m in student.modules() if isinstance(m, nn.Conv2d))
        candidates = {}
        for name, own in parsed.candidates.items():
            net = student  # also of the others where nothing is trained before one is kept
            if candidates and parsed.trial > 0:
                net = make_net(weights="random")
                net.load_state_dict(student.state_dict())
            given = options_of(parsed.shared, own, channels=first.in_channels)
            candidates[name] = Dacs.build(net, num_classes, given, make_net, previous)
        return cls(num_classes, parsed, candidates)

    def trains_for(self, steps: int) -> None:
        """Tell each candidate the steps that it trains for if it is kept, and what so many of them change."""
        super().trains_for(steps)
        count = len(self.names)
        turns = int(self.options.trial * steps / count) if count > 1 else 0
        self.trial_steps = count * turns
        self.of_many_steps.clear()
        for name, candidate in self.candidates.items():
            candidate.trains_for(steps - self.trial_steps + turns)
            if candidate.steps <= LONG:
                continue
            if self.options.slow_teacher and "ema" not in {**self.options.shared, **self.options.candidates[name]}:
                candidate.teacher.decay = decay = slowed(candidate.options.ema, candidate.steps)
                self.note(name, f"the teacher averages over {1 / (1 - decay):.0f} of them")
            if rises(self.options, name):
                vars(candidate.options).update(RISING)
                write_numbers(candidate.course, 0, candidate.steps)
                more = "labels rise from {share:.0%} to {share_end:.0%} of each class, weighed by confidence"
                self.note(name, more.format_map(vars(candidate.options)))

    def note(self, name: str, change: str) -> None:
        """Remember for `prepare` what is different because the candidate trains for many steps."""
        self.of_many_steps.setdefault(f"{self.candidates[name].steps} steps: {change}", []).append(name)

    def prepare(self, data: Preparation) -> None:
        """Keep some target crops for the score; let every candidate look at the images."""
        self.kept = 0 if len(self.candidates) == 1 else -1
        self.progress = self.progress.new_tensor([0, self.trial_steps, self.kept])
        for change, names in self.of_many_steps.items():
            self.decisions.append(change if len(names) == len(self.names) else f"{', '.join(names)}: {change}")
        now = self.kept < 0 and self.trial_steps == 0
        if not data.trained and (now or (self.options.match_style and self.styles())):
            self.decisions.append(UNTRAINED)
        crops: list[Tensor] = []
        of_source: list[Tensor] = []
        for batch in data.batches(0, self.options.images):
            crops.extend(batch.target_images)
            of_source.extend(batch.source_images)
            if len(crops) >= self.options.images:
                break
        self.images = torch.stack(crops[: self.options.images])
        if self.options.match_style:
            self.match_style(torch.stack(of_source[: self.options.images]))
        for candidate in self.candidates.values():
            candidate.prepare(data)
        if now:
            self.decide()

    def styles(self) -> list[str]:
        """Styles of target that the candidates give to source images; a learned one does not exist yet."""
        styles = dict.fromkeys(candidate.options.translate for candidate in self.candidates.values())
        return [style for style in styles if style not in ("none", LEARNED)]

    @torch.no_grad()
    def match_style(self, source: Tensor) -> None:
        """Turn `translate` off for candidates that predict no better on target images in the style of the source.

        A net contradicts itself least on images that look like its training images. If target images in the style of
        the source do not look like the source, then source images in the style of the target do not look like the
        target.
        """
        if not (asked := self.styles()):
            return
        styles = [candidate.options.translate for candidate in self.candidates.values()]
        own = self.consistency(self.student, self.images)
        for style in asked:
            images = TRANSLATORS[style](self.images, source, self.mean, self.std)
            plain, styled = means_of([[own], [self.consistency(self.student, images)]])
            taken = bool(self.agree(ahead([plain, styled])))
            self.styled[[other == style for other in styles]] = taken
            found = f"consistency of target {100 * plain:.1f}, in the style of source {100 * styled:.1f}"
            kept = "takes the style of target" if taken else "keeps its own style"
            self.decisions.append(f"{style}: {found}; source {kept}")
        self.apply_styles()

    def apply_styles(self) -> None:
        """Tell each candidate the result."""
        for styled, name in zip(self.styled.tolist(), self.names, strict=True):
            if not styled and name in self.candidates:
                self.candidates[name].options.translate = "none"

    @property
    def active(self) -> Dacs:
        """The candidate that trains in this step."""
        turn = self.done % len(self.names) if self.kept < 0 else self.kept
        return self.candidates[self.names[turn]]  # type: ignore[return-value]

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        """Return the losses of the candidate that trains in this step."""
        return self.active(batch, draws)  # type: ignore[no-any-return]

    def after_step(self) -> None:
        """Update the active teacher. At the end of the trial, keep the candidate with the best score."""
        self.active.after_step()
        self.done += 1
        if self.kept < 0 and self.done >= self.trial_steps:
            self.decide()
        write_numbers(self.progress, self.done, self.trial_steps, self.kept)

    def decide(self) -> None:
        """Score the candidates, teachers as they label, students once they differ, and keep the best."""
        nets = {
            name: {"teacher": c.teacher, **({"student": c.student} if self.trial_steps else {})}
            for name, c in self.candidates.items()
        }
        self.scores = self.scores_of(nets)  # type: ignore[arg-type]
        self.keep(self.agree(ahead(list(self.scores.values()))))
        self.drop_others()
        write_numbers(self.progress, self.done, self.trial_steps, self.kept)
        found = ", ".join(f"{name} {100 * score:.1f}" for name, score in self.scores.items())
        self.decisions.append(f"step {self.done}: consistency {found}; '{self.names[self.kept]}' goes on")

    @torch.no_grad()
    def scores_of(self, candidates: dict[str, dict[str, nn.Module]]) -> dict[str, float]:
        """Mirror consistency times confidence on the kept target crops, a mean over a candidate's nets."""
        found = [[self.consistency(net, self.images) for net in nets.values()] for nets in candidates.values()]
        return dict(zip(candidates, means_of(found), strict=True))

    @torch.no_grad()
    def consistency(self, net: nn.Module, crops: Tensor) -> tuple[Tensor, float]:
        """IoU of each class between a prediction and that of the mirror image (NaN: none predicted), and confidence."""
        metric = ConsistencyScore(self.num_classes).to(crops.device)
        scores = LabelFreeScores(self.num_classes).to(crops.device)
        with nullcontext() if isinstance(net, EMATeacher) else evaluating(net):  # a teacher knows how it labels
            for images in crops.split(8):
                logits = net(images).logits
                metric(logits, net(images.flip(-1)).logits.flip(-1))
                scores.update(logits)
        return metric.class_iou.where(scores.class_share >= PRESENT, torch.nan), float(scores.compute()["confidence"])

    def agree(self, position: int) -> int:
        """Use the scores of rank 0, because running statistics, and so scores, differ slightly between ranks."""
        if not dist.is_initialized():
            return position
        said = torch.tensor(position, device=self.images.device)
        dist.broadcast(said, 0)
        return int(said)

    def keep(self, position: int) -> None:
        """Deploy one candidate; the others are not trained any more."""
        self.kept = position
        self.student = self.candidates[self.names[position]].student  # type: ignore[assignment]

    def drop_others(self) -> None:
        """Free what was not kept, where nothing was trained in it: a teacher, and a selector without counts.

        After a trial the others stay, because the optimiser holds the parameters of their students.
        """
        if self.trial_steps == 0:
            for name in self.names:
                if name != self.names[self.kept] and name in self.candidates:
                    del self.candidates[name]

    def nets(self) -> dict[str, nn.Module]:
        """Student and teacher of the candidate that was kept; before, of the first."""
        return self.candidates[self.names[max(0, self.kept)]].nets()  # type: ignore[operator, no-any-return]

    def extra_param_groups(self, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """The other candidates' students learn like the first, where they are nets of their own."""
        first, *others = self.candidates.values()
        groups = first.extra_param_groups(lr, head_multiplier)  # type: ignore[operator]
        for candidate in others:
            if candidate.student is not first.student:
                groups += param_groups(candidate.student, lr=lr, head_multiplier=head_multiplier)  # type: ignore[arg-type]
            groups += candidate.extra_param_groups(lr, head_multiplier)  # type: ignore[operator]
        return groups  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        held = f"{prefix}candidates."
        theirs = dict.fromkeys(key.removeprefix(held).split(".")[0] for key in state_dict if key.startswith(held))
        if unknown := [name for name in theirs if name not in self.names]:
            raise ValueError(
                f"it has the candidate {', '.join(unknown)}, and this run has {', '.join(self.names)}. If you changed "
                "no `candidates`, an earlier version with other ones wrote it: use --overwrite to start anew."
            )
        if (saved := state_dict.get(prefix + "progress")) is not None:
            self.done, self.trial_steps, kept = saved.tolist()
            self.keep(max(0, kept))  # `student` is the kept one's: known before its tensors are read
            self.kept = kept
            if kept >= 0:
                self.drop_others()
                gone = tuple(f"{prefix}candidates.{name}." for name in self.names if name not in self.candidates)
                for name in [name for name in state_dict if name.startswith(gone)]:
                    del state_dict[name]  # of checkpoints that were written with the others
        for name, candidate in self.candidates.items():
            saved = state_dict.get(course := f"{held}{name}.course")
            if rises(self.options, name) and (saved is None or int(saved[1]) == 0):
                # An earlier version began this run, without a share that rises: it goes on as it began.
                vars(candidate.options).update(share_end=None, confidence_weight=False)
                state_dict[course] = torch.zeros_like(candidate.course)
        styled = state_dict.setdefault(prefix + "styled", self.styled)  # checkpoints of before it existed have none
        self.styled = styled.to(self.styled.device)
        self.apply_styles()
        if (images := state_dict.get(prefix + "images")) is not None:
            self.images = torch.empty_like(images, device=self.images.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def options_of(shared: dict[str, Any], own: dict[str, Any], channels: int = 3) -> dict[str, Any]:
    """Options of a candidate: its own, before those of all candidates, before those of the policy."""
    given = {**shared, **own}
    policy = SHARED if channels == 3 else {**SHARED, "translate": "histogram"}  # other channels have no colours
    if given.get("selector", SHARED["selector"]) != SHARED["selector"]:  # what only that selector has goes with it
        policy = {name: value for name, value in policy.items() if name not in ("share", "share_end")}
    return {**policy, **given}


def rises(options: Any, name: str) -> bool:
    """Whether the share of labels of the candidate rises in a long stage: unless somebody has chosen the labels."""
    return bool(options.rising_share and {*options.shared, *options.candidates[name]}.isdisjoint(LABELS))


def slowed(decay: float, steps: int) -> float:
    """The decay of a teacher that learns for so many steps: the given one, or for many steps a slower one."""
    return max(decay, min(SLOWEST, 1 - 1 / (MEMORY * max(1, steps))))


def means_of(found: list[list[tuple[Tensor, float]]]) -> list[float]:
    """Consistency times confidence, a mean over the nets of each entry.

    The consistency is an IoU, a mean over the classes that any net of any entry predicts: a class that a net has lost
    counts as 0 for it, since one class everywhere never contradicts itself.
    """
    seen = torch.stack([iou >= 0 for nets in found for iou, _ in nets]).any(0)
    return [sum(float(iou.nan_to_num()[seen].mean()) * sure for iou, sure in nets) / len(nets) for nets in found]


def ahead(scores: list[float]) -> int:
    """Position of the best score; an earlier one stays unless a later one is ahead of it by more than `MARGIN`."""
    best = 0
    for position, score in enumerate(scores):
        if score > scores[best] + MARGIN:
            best = position
    return best
