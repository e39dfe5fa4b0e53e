"""Scores as the benchmarks define them: one confusion matrix over the whole data set, then IoU per class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gta2cs.datasets import ClassSet, Labelled
from gta2cs.loading import evaluation_batches, normalise
from gta2cs.reading import ImageFormat
from udakit import copy_net


@dataclass
class Score:
    """IoU per class in percent (NaN where a class occurs neither in truth nor in prediction) and the named means."""

    iou: dict[str, float]
    means: dict[str, float]

    @classmethod
    def of(cls, confusion: Tensor, classes: ClassSet) -> Score:
        """Compute the score from a confusion matrix with the truth in its rows."""
        matrix = confusion.cpu().double().numpy()
        hit = np.diag(matrix)
        union = matrix.sum(0) + matrix.sum(1) - hit
        iou = 100 * np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
        means = {}
        for name, ids in classes.scores.items():
            subset = iou[list(ids)]
            means[name] = float(np.nanmean(subset)) if np.isfinite(subset).any() else float("nan")
        return cls(dict(zip(classes.names, iou.tolist(), strict=True)), means)

    @property
    def miou(self) -> float:
        """The mean that counts."""
        return self.means[headline(self.means)]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, rounded to a hundredth of a point."""
        rounded = lambda d: {k: None if np.isnan(v) else round(v, 2) for k, v in d.items()}  # noqa: E731
        return {"iou": rounded(self.iou), "means": rounded(self.means)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Score:
        """The inverse of `to_json`."""
        parse = lambda d: {k: float("nan") if v is None else float(v) for k, v in d.items()}  # noqa: E731
        return cls(parse(saved["iou"]), parse(saved["means"]))


def headline(means: Mapping[str, Any]) -> str:
    """Name of the mean that counts: the first, and for CARLA, which has no bicyclist, that of the other ten classes."""
    return "mIoU10" if "mIoU10" in means else next(iter(means))


@torch.no_grad()
def predict(
    net: nn.Module, image: Tensor, device: torch.device | str = "cpu", format: ImageFormat | None = None
) -> Tensor:
    """Class probabilities (C, H, W) of one image (K, H, W) from a data set, at its own size."""
    return class_probabilities(net, normalise(image[None].to(device), format))[0]


@torch.no_grad()
def evaluate(
    net: nn.Module,
    dataset: Labelled,
    classes: ClassSet,
    *,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    batch_size: int = 8,
    trimap: int = 0,
) -> Score:
    """Score a net in eval mode on a labelled data set, or on its first `limit` images. Modes are restored afterwards.

    With `trimap` > 0, the last mean, "boundary", is the first mean over the pixels within this distance of a true
    boundary. It shows how sharp the edges are, whatever the size of the regions.

    The ranks share the images and get the same score, that of rank 0's net, whose buffers are saved.
    """
    from torchmetrics.classification import MulticlassConfusionMatrix  # takes seconds, which `--help` need not wait

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net = of_rank_0(net)
    metric, near = (
        MulticlassConfusionMatrix(len(classes.names), ignore_index=255, validate_args=False).to(device)
        for _ in range(2)
    )
    indices = range(rank, min(limit or len(dataset), len(dataset)), world)
    with evaluating(net):
        for images, labels, _ in evaluation_batches(dataset, batch_size=batch_size, indices=indices):
            assert labels is not None
            probabilities = class_probabilities(net, images.to(device))
            if probabilities.shape[-2:] != labels.shape[-2:]:  # images were resized on loading, the truth never is
                probabilities = F.interpolate(probabilities, labels.shape[-2:], mode="bilinear", align_corners=False)
            predicted, labels = probabilities.argmax(1), labels.to(device)
            metric.update(predicted, labels)
            if trimap > 0:
                near.update(predicted, labels.where(near_boundary(labels, trimap), 255))
    score = Score.of(metric.compute(), classes)  # torchmetrics adds up the ranks' counts
    if trimap > 0:
        score.means["boundary"] = next(iter(Score.of(near.compute(), classes).means.values()))
    return score


def of_rank_0(net: nn.Module) -> nn.Module:
    """The net itself, or with several processes a copy with the buffers of rank 0, which are saved."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return net
    net = copy_net(net)
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)
    return net


def near_boundary(labels: Tensor, distance: int, ignore_index: int = 255) -> Tensor:
    """Pixels with another class within `distance` rows and columns; ignored pixels do not count as neighbours."""
    ignored = labels == ignore_index
    high, low = labels.float().masked_fill(ignored, -torch.inf), -labels.float().masked_fill(ignored, torch.inf)
    widest, lowest = (F.max_pool2d(x, 2 * distance + 1, stride=1, padding=distance) for x in (high, low))
    return (widest > -lowest) & ~ignored


def class_probabilities(net: nn.Module, images: Tensor) -> Tensor:
    """Softmax of a net's logits, float32."""
    return net(images.contiguous(memory_format=torch.channels_last)).logits.float().softmax(1)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Context in which a net is in eval mode; afterwards every submodule gets its own mode back."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
