"""Estimate without labels how much larger objects are in the target images, before adaptation begins.

A net contradicts itself least on target images at the scale of its training. The net that adaptation starts from is
therefore scored on the same unlabelled target images at smaller scales (mirror consistency times confidence). Source
crops are then enlarged so that they match the target. They are never shrunk: a small image leaves little to learn from.
This is ours; no paper has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gta2cs.label_free import BY_CLASS, LabelFree
from gta2cs.nets import SegOutput

STEP = math.sqrt(2)  # between neighbouring scales
REACH = 3  # steps at most: down to 0.35
WORTH = 0.1  # a scale has to take away a tenth of the contradictions: otherwise images stay as they are


class Rescaled(nn.Module):
    """A net that sees images enlarged by a factor. Its logits have the size of the given images."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, images: Tensor) -> SegOutput:
        """Enlarge or shrink, predict, and bring the logits back; enlarged images one at a time, for memory's sake."""
        if self.factor > 1 and len(images) > 1:
            each = [self(image) for image in images.split(1)]
            joined = (
                torch.cat(parts) for parts in zip(*((x.logits, x.features, x.encoded) for x in each), strict=True)
            )
            return SegOutput(*joined, tuple(images.shape[2:]))
        size = images.shape[2:]
        seen = [max(1, round(side * self.factor)) for side in size]
        out = self.net(F.interpolate(images, seen, mode="bilinear", antialias=self.factor < 1))
        logits = F.interpolate(out.logits.float(), size, mode="bilinear", antialias=self.factor > 1)
        return SegOutput(logits, out.features, out.encoded, tuple(size))


def match_scale(
    score: Callable[[nn.Module, Sequence[float] | None], LabelFree], net: nn.Module
) -> tuple[float, dict[float, float]]:
    """Search, down from 1, the scale of target images at which the net contradicts itself least.

    Args:
        score: scores a net on target images, without labels. It also takes the class shares at scale 1: a class that is
            lost at another scale counts as 0 there, since what is predicted nowhere never contradicts itself.
        net: the net that adaptation starts from, trained on source.

    Returns:
        The scale, at most 1, and the score at each scale that was tried. It is 1 where no smaller one takes away the
        share `WORTH` of what the score lacks, or a larger one is better, too (then the score says something else).
    """
    as_is = score(net, None)
    found = {0: as_is.scores[BY_CLASS]}

    def at(position: int) -> float:
        if position not in found:
            found[position] = score(Rescaled(net, STEP**position), as_is.shares).scores[BY_CLASS]
        return found[position]

    best = 0
    if at(-1) > at(0) >= at(1):
        best = -1
        while best > -REACH and at(best - 1) > at(best):
            best -= 1
    if 1 - at(best) > (1 - WORTH) * (1 - at(0)):
        best = 0
    return STEP**best, {STEP**position: found[position] for position in sorted(found)}
