"""Entries of udakit.resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample

NET = {"module": "a function of a net, with no state of its own"}
DRAWN = {"module": "a function of what was drawn, with no state of its own"}


def _model(images: Tensor) -> Tensor:
    return torch.cat([images, 2 * images.roll(1, -1)], dim=1)  # roll: it matters where a window ends


def _sliding(s: Sample) -> Call:
    window, stride = (5 * s.h // 8, 6 * s.w // 8), (3 * s.h // 8, 4 * s.w // 8)  # a few windows at any size
    return Call((_model, s.images(), window, stride))


def _draw_box(s: Sample) -> Call:
    options = {"detail": (s.h // 2, s.w // 2), "divisor": 2, "scope": "image", "device": "cpu"}
    return Call((s.n, (s.h, s.w)), {}, options)


def _start(s: Sample) -> Tensor:
    """Another place in each image, on the grid of the detail's cells, not of the context's."""
    start = torch.tensor([[0, 2], [4, 6], [2, 0]])[torch.arange(s.n) % 3]
    return s.tag(start if s.h == 8 else start.clamp_max(2), "batch_values")


def _crop(s: Sample) -> Call:
    return Call((s.features(), udakit.DetailBox(_start(s), (s.h // 2, s.w // 2), (s.h, s.w))))


def _fuse(s: Sample) -> Call:
    context = s.logits(s.h // 4, s.w // 4)
    attention = s.tag(s.normal(*context.shape).sigmoid(), "probabilities")
    detail = s.logits(s.h // 4, s.w // 4)
    return Call((context, detail, attention, udakit.DetailBox(_start(s), (s.h // 2, s.w // 2), (s.h, s.w))))


def _fuse_whole(s: Sample) -> Call:
    context = s.logits(s.h // 4, s.w // 4)
    attention = s.tag(s.normal(*context.shape).sigmoid(), "probabilities")
    return Call((context, s.logits(s.h // 2, s.w // 2), attention))


MAPS: dict[str, Any] = {
    "kind": "map",
    "output": "logits",
    "grad": (0, 1, 2),
    "space": "test_resolution.py::test_fusion_of_whole_images",
}

OPERATIONS = [
    Operation(
        "sliding_logits",
        _sliding,
        udakit.sliding_logits,
        kind="map",
        grad=(1,),
        output="logits",
        covers=("sliding_bands",),
        space="test_resolution.py::test_windows_value_and_gradient",
        exempt=NET,
    ),
    Operation(
        "draw_detail_box",
        _draw_box,
        udakit.draw_detail_box,
        kind="draw",
        grad=(),
        output="other",
        covers=("DetailBox",),
        space="none",
        exempt={"module": "crop_detail and fuse_scales apply one draw to images, labels and logits"},
    ),
    Operation(
        "crop_detail",
        _crop,
        udakit.crop_detail,
        kind="map",
        output="features",
        space="test_resolution.py::test_crops_and_fusion_in_other_dimensions",
        exempt={**DRAWN, "shape_errors.dtype": "labels, weights and images are cut alike"},
    ),
    Operation(
        "fuse_scales",
        _fuse,
        udakit.fuse_scales,
        exempt={**DRAWN, "shape_errors.size": "the detail may have any resolution, which the result takes"},
        **MAPS,
    ),
    Operation("fuse_scales[whole]", _fuse_whole, udakit.fuse_scales, exempt=DRAWN, **MAPS),
]
