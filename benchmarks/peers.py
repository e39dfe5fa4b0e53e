"""Well-kept libraries on the same pixels: name of the operation -> name of the peer -> how to make its call.

A peer takes the tensors of the entry. pytorch-metric-learning is optional; without it its rows are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contract.registry import Call
from textbook import IGNORE, sample_pixels

Make = Callable[[Call], Callable[..., Any]]


def cross_entropy_unit(call: Call) -> Callable[..., Any]:
    """`F.cross_entropy` on the first logits: the unit in which people think of a loss."""
    logits = call.args[0]
    labels = torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    return lambda logits, *args, **tensors: F.cross_entropy(logits, labels, ignore_index=IGNORE)


def metric_learning(name: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`SupConLoss` or `NTXentLoss` of pytorch-metric-learning on (rows, classes), the mean of all that it lists."""
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.reducers import MeanReducer

    return getattr(losses, name)(temperature=temperature, reducer=MeanReducer())  # type: ignore[no-any-return]


def _pixel_contrast(call: Call) -> Callable[..., Any]:
    """SupCon with one positive each is InfoNCE. Its distance normalises; the embeddings are unit vectors."""
    loss = metric_learning("SupConLoss", call.options["temperature"])

    def contrast(view_a: Tensor, view_b: Tensor, *, valid: Tensor) -> Tensor:
        a, b, kept = (x.flatten(2).transpose(1, 2) for x in (view_a, view_b, valid.unsqueeze(1)))
        losses = []
        for k in range(len(a)):
            rows = torch.cat([a[k][kept[k, :, 0]], b[k][kept[k, :, 0]]])
            losses.append(loss(rows, torch.arange(len(rows) // 2).repeat(2)))
        return torch.stack(losses).mean()

    return contrast


def _supervised_contrast(call: Call) -> Callable[..., Any]:
    loss = metric_learning("SupConLoss", 0.1)
    classes, anchors = call.options["num_classes"], call.options["max_anchors"]
    return lambda features, labels: loss(*sample_pixels(features, labels, classes, anchors))


def _strong_augment(call: Call) -> Callable[..., Any]:
    """The same strengths, drawn again at each call as these classes do; images in [0, 1], no normalisation."""
    augment = nn.Sequential(
        kornia.augmentation.ColorJiggle(0.2, 0.2, 0.2, 0.2, p=0.8),
        kornia.augmentation.RandomGaussianBlur((11, 11), (0.15, 1.15), p=0.5),
    )
    return lambda images, draw: augment(images)


def _boundary_band(call: Call) -> Callable[..., Any]:
    kernel = torch.ones(3, 3)
    return lambda mask: kornia.morphology.gradient(mask.unsqueeze(1).float(), kernel).squeeze(1) > 0


def _average(call: Call) -> Callable[..., Any]:
    averaged = AveragedModel(call.args[1], multi_avg_fn=get_ema_multi_avg_fn(call.options["decay"]), use_buffers=False)
    averaged.update_parameters(call.args[1])  # the first update copies
    return lambda _, student: averaged.update_parameters(student)


PEERS: dict[str, dict[str, Make]] = {
    "pixel_contrast_loss": {"SupConLoss (pytorch-metric-learning)": _pixel_contrast},
    "supervised_pixel_contrast_loss": {"SupConLoss (pytorch-metric-learning)": _supervised_contrast},
    "strong_augment": {"ColorJiggle + RandomGaussianBlur (kornia)": _strong_augment},
    "boundary_band": {"morphology.gradient (kornia)": _boundary_band},
    "EMATeacher.update": {"AveragedModel (torch)": _average},
}
