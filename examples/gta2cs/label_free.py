"""Scores of a net without labels, on a small fixed set of target training images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gta2cs.datasets import ClassSet, Unlabelled
from gta2cs.evaluation import evaluating, of_rank_0
from gta2cs.loading import evaluation_batches
from udakit import ConsistencyScore, LabelFreeScores, View, crop_view, mirror_view, rotation_view, shift_view
from udakit.validation.under_views import view_logits

PRESENT = 1e-3  # share of the pixels from which on a class counts as predicted
FACTOR = 4  # by which a class's share may change before the alarm speaks
LARGE = 0.01  # share of the pixels from which on a class may not collapse in the deployed net
STRIDE = 32  # of the nets: a crop keeps the size a multiple of it


def _crop(images: Tensor) -> View:
    """Take a band off two borders, a stride wide where the image has that much to spare."""
    margin = [(STRIDE if side > 2 * STRIDE else 0, 0) for side in images.shape[2:]]
    return crop_view(margin)


# name -> the view for a batch of images
VIEWS: dict[str, Callable[[Tensor], View]] = {
    "mirror": lambda images: mirror_view(),
    "shift": lambda images: shift_view((3, 5)),  # less than a stride
    "crop": _crop,
    "rotation": lambda images: rotation_view(5.0),
}
# score -> whether its source calls a higher value better (1) or a lower one (-1); ours are of `VIEWS`
DIRECTIONS = {
    **{f"{view}_consistency": 1 for view in VIEWS},
    **{f"{view}_worst_class": 1 for view in VIEWS},
    "confident_consistency": 1,  # ours: mirror consistency times confidence, so that certainty decides between equals
    "balanced_consistency": 1,  # ours: the same, each class with the weight of the root of its pixels
    "confidence": 1,
    "negative_entropy": 1,
    "information_maximization": 1,
    "nuclear_norm": 1,
    "class_correlation": -1,
    "neighbourhood_density": 1,
    "matrix_norm": 1,
}
DEFAULT = "balanced_consistency"  # what `select` looks at
BY_CLASS = "confident_consistency"  # decides scale, colours, BatchNorm statistics: every class counts the same
# What is known of a score, in words, for the verdict.
MARGIN = 0.01  # differences of a hundredth say nothing
STUDY = "In udakit's study of eight pairs of domains, the rank correlation of this score with the true mIoU was"
RELIABILITY = {
    "balanced_consistency": f"{STUDY} 0.24 to 0.87, where 1 is a perfect order and 0 chance. "
    "Differences of a hundredth say nothing.",
    "confident_consistency": f"{STUDY} -0.29 to 0.96: it can point the wrong way.",
    "mirror_consistency": f"{STUDY} -0.48 to 0.97: it can point the wrong way.",
}
UNRELIABLE = (
    "udakit's study did not find this score reliable. The published ones followed the share of the rarer class: the "
    "better net scored higher where target has more of it and lower where it has less."
)


def direction_of(select: str) -> int:
    """1 where `select` takes a higher score for better, else -1; a minus before the name turns it round."""
    direction = DIRECTIONS.get(select.removeprefix("-"), 1)  # `last` and `source_or_last` name no score
    return -direction if select.startswith("-") else direction


def reliability(score: str, direction: int) -> str:
    """What the study found of a score; a score that is turned round is none that was studied."""
    return RELIABILITY.get(score, UNRELIABLE) if direction == DIRECTIONS.get(score) else UNRELIABLE


def can_be_deployed(net: str) -> bool:
    """Whether a net of this name may be chosen: DUDA's large ones are of another size than what is deployed."""
    return not net.startswith("large ")


def with_statistics(share: float) -> str:
    """Words behind a net's name if a share of its BatchNorm statistics are those of target."""
    of = {0.0: "", 1.0: "BatchNorm statistics of target"}.get(share, f"{share:.0%} of target's BatchNorm statistics")
    return f", with {of}" if of else ""


def collapsed(before: Sequence[float], now: Sequence[float]) -> list[int]:
    """Classes of a hundredth of the source-only net's pixels or more that have lost three quarters of them.

    No score is trusted about such a net: one that gives up a class contradicts itself less.
    """
    return [c for c, (was, is_) in enumerate(zip(before, now, strict=False)) if was >= LARGE and is_ < was / FACTOR]


def only_class(shares: Sequence[float]) -> int | None:
    """The class that takes all pixels but a thousandth, if there is one."""
    return next((c for c, share in enumerate(shares) if share > 1 - PRESENT), None)


class NoScoreError(ValueError):
    """A net has no score, because its logits are not finite."""


@dataclass
class LabelFree:
    """Scores of a net from its predictions, without labels."""

    scores: dict[str, float]
    shares: list[float]  # of the pixels predicted as each class
    class_iou: dict[str, list[float | None]] = field(default_factory=dict)  # by view; None where neither map has it

    def to_json(self) -> dict[str, Any]:
        """Plain numbers of six digits."""
        return {
            "scores": {k: _short(v) for k, v in self.scores.items()},
            "shares": [_short(v) for v in self.shares],
            "class_iou": {view: [_short(v) for v in iou] for view, iou in self.class_iou.items()},
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LabelFree:
        """Read what `to_json` wrote."""
        scores = {k: float("nan") if v is None else v for k, v in completed(saved).items()}
        return cls(scores, saved["shares"], saved["class_iou"])


def _short(value: float | None) -> float | None:
    """Six digits of a number; None for NaN."""
    return None if value is None or value != value else float(f"{value:.6g}")


def views_of(select: str, views: Sequence[str]) -> list[str]:
    """The requested views and the one that `select` needs, in the order of `VIEWS`."""
    return [view for view in VIEWS if view in views or select.removeprefix("-").startswith(f"{view}_")]


def picked(count: int, wanted: int) -> list[int]:
    """The given number of indices, evenly spread and always the same."""
    wanted = min(count, wanted)
    return [count * (2 * i + 1) // (2 * wanted) for i in range(wanted)]


@torch.no_grad()
def measure(
    net: nn.Module,
    images: Unlabelled,
    classes: ClassSet,
    *,
    count: int = 24,
    views: Sequence[str] = ("mirror",),
    known: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
) -> LabelFree:
    """Score a net in eval mode on `count` unlabelled images; modes are restored afterwards.

    `known` are the shares of the source-only net's predictions. A class that it predicts and that is gone counts as 0
    in the consistency: a net that says the same everywhere never contradicts itself.

    Ranks share the images and come to the same scores, of rank 0's net.

    Raises:
        ValueError: no image, or a NaN among the logits.
    """
    if len(images) == 0:
        raise ValueError("Expected target training images for the label-free scores, but there are none.")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net, c = of_rank_0(net), len(classes.names)
    generator = torch.Generator(device).manual_seed(rank)  # the same pixels at every evaluation
    scores = LabelFreeScores(c, generator=generator).to(device)
    agreement = {view: ConsistencyScore(c).to(device) for view in views}
    mine = picked(len(images), count)[rank::world]
    with evaluating(net):
        for batch, _, _ in evaluation_batches(images, batch_size=batch_size, indices=mine):
            _see(net, batch.to(device), scores, agreement)
    merged = scores.merged()
    found = {name: float(value) for name, value in merged.compute().items()}
    shares = merged.class_share.tolist()
    kept = [max(own, before) >= PRESENT for own, before in zip(shares, known or shares, strict=True)]
    iou = {view: _class_iou(score) for view, score in agreement.items()}
    for view in agreement:
        counted = [value or 0.0 for value, is_kept in zip(iou[view], kept, strict=True) if is_kept]
        found[f"{view}_consistency"] = sum(counted) / len(counted)
        found[f"{view}_worst_class"] = min(counted)
    if "mirror" in agreement:
        found["confident_consistency"] = found["mirror_consistency"] * found["confidence"]
        found["balanced_consistency"] = balanced_iou(shares, iou["mirror"]) * found["confidence"]
    return LabelFree(found, shares, iou)


def completed(saved: dict[str, Any]) -> dict[str, float | None]:
    """The scores that `to_json` wrote, with `balanced_consistency` also where a run of before it existed wrote them."""
    scores: dict[str, float | None] = {**saved["scores"]}
    mirror, sure = saved.get("class_iou", {}).get("mirror"), scores.get("confidence")
    if "balanced_consistency" not in scores and mirror is not None and sure is not None and sum(saved["shares"]) > 0:
        scores["balanced_consistency"] = _short(balanced_iou(saved["shares"], mirror) * sure)
    return scores


def complete(history: dict[str, Any]) -> dict[str, Any]:
    """The history of a stage, with scores that did not exist when an earlier version wrote it."""
    nets = [net for entry in history.get("label_free", ()) for net in entry["nets"].values()]
    for found in [*nets, *([history["source_only"]] if "source_only" in history else [])]:
        found["scores"] = completed(found)
    return history


def balanced_iou(shares: Sequence[float], class_iou: Sequence[float | None]) -> float:
    """Mean IoU with the root of a class's share of the pixels as its weight.

    With equal weights a few pixels of rare classes decide; weighted by pixels, a rare class may vanish unseen.
    """
    weights = [share**0.5 for share in shares]
    return sum(weight * (iou or 0.0) for weight, iou in zip(weights, class_iou, strict=True)) / sum(weights)


def _see(net: nn.Module, images: Tensor, scores: LabelFreeScores, agreement: dict[str, ConsistencyScore]) -> None:
    """Update all scores with a batch; the net sees the batch itself once, however many views there are."""

    def logits_of(batch: Tensor) -> Tensor:
        return net(batch.contiguous(memory_format=torch.channels_last)).logits.float()

    straight = logits_of(images)
    for view, score in agreement.items():
        first, second, valid = view_logits(
            lambda x: straight if x is images else logits_of(x), images, *VIEWS[view](images)
        )
        score(first, second, valid=valid)
    scores.update(straight)


def _class_iou(score: ConsistencyScore) -> list[float | None]:
    """The IoU of the two maps for each class, over all ranks; None where neither has it."""
    overlap = score.overlap.clone()
    if dist.is_initialized():
        dist.all_reduce(overlap)
    both, union = overlap.tolist()
    return [b / u if u else None for b, u in zip(both, union, strict=True)]
