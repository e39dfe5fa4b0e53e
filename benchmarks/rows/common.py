"""What the rows of every results table share: the pairs of domains, their settings, and what a table is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

PAIRS = {
    "camvid": "CamVid day → dusk (real, 62 validation images, 11 classes)",
    "carla2camvid": "CARLA → CamVid day (synthetic → real, 57 validation images)",
    "toy": "toy pair: game → camera (rendered)",
}
# Colour jitter of source and mixed images, the same in every row.
AUGMENT = {"jitter": 0.4, "hue": 0.05}
RARE = {"rare_class_temperature": 0.05}
# As in examples/configs/dacs_toy.yaml: half the channels, for two CPU cores.
TOY_DECODER = {"decoder_pyramid_channels": 128, "decoder_segmentation_channels": 64}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the runs of a pair share, whatever the recipe."""

    warm_steps: int
    steps: int
    lr: float  # of the rows that go on training
    adaptation_lr: float  # of the rows that adapt
    config: dict[str, Any]
    augment: dict[str, float]
    adaptation_data: dict[str, Any]  # of the recipes' steps, not of the warm start


def setting(pair: str) -> Setting:
    if pair == "toy":
        config = {"data": {"crop": (128, 192)}, "net": {"arch": "fpn", "options": TOY_DECODER}}
        return Setting(300, 450, 2e-4, 4e-4, config, {}, {})
    data = {"crop": (160, 208), "source_scale": (0.7, 1.5), "target_scale": (0.8, 1.3)}
    return Setting(600, 400, 2e-4, 2e-4, {"data": data, "net": {"arch": "deeplabv3plus"}}, AUGMENT, RARE)


# Under a million parameters, for DUDA: the standard nets' encoder cut after its fourth level, a narrow decoder.
SMALL = {"arch": "deeplabv3plus", "options": {"encoder_depth": 4, "decoder_channels": 64}}


def net_config(pair: str, name: str = "standard") -> dict[str, Any]:
    """Fields of NetConfig: of the pair's standard net, or of the small one."""
    if name not in ("standard", "small"):
        raise ValueError(f'Expected `name` to be "standard" or "small", but got {name!r}.')
    return SMALL if name == "small" else {"options": {}, **setting(pair).config["net"]}


# How DACS's teacher sees target, chosen on seed 0: where BatchNorm statistics of target hurt the source-trained net
# (day -> dusk), the teacher labels with running statistics; elsewhere with those of the batch.
POLICY: dict[str, dict[str, Any]] = {
    "camvid": {"teacher_mode": "eval", "buffers": "ema"},
    "carla2camvid": {"translate": "color"},
    "toy": {"translate": "color"},
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that make one table, and where they are run unless told otherwise."""

    rows: Callable[[str], dict[str, dict[str, Any]]]
    pairs: tuple[str, ...]
    seeds: tuple[int, ...]
