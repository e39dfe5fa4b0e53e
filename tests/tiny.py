"""The smallest net and the smallest pair that the whole loop runs with, for tests of what is around the net."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_gta2cs
from gta2cs import choosing, observers
from gta2cs.config import NetConfig
from gta2cs.evaluation import Score
from gta2cs.report import write_json
from odd_files import noise, save

NET: dict[str, Any] = {
    "encoder": "tu-test_efficientnet",
    "weights": "random",
    "options": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
}
"""150 000 weights: a sixth of the default net's time."""

ARGUMENTS = [f"--net.encoder={NET['encoder']}", "--net.weights=random", f"--net.options={json.dumps(NET['options'])}"]


def tiny_net() -> NetConfig:
    return NetConfig(**NET)


def small_pair(root: Path) -> Path:
    """Four images of each domain, one of target with a label: evaluating takes no time."""
    for i in range(4):
        for domain in ("source", "target"):
            save(root / domain / "images" / f"{i}.png", np.kron(noise(3) // (i + 1), np.ones((16, 12, 1), np.uint8)))
        save(root / "source" / "labels" / f"{i}.png", np.kron(noise(high=3), np.ones((16, 12), np.uint8)))
    save(root / "target" / "labels" / "3.png", np.kron(noise(high=3), np.ones((16, 12), np.uint8)))
    (root / "target" / "train.txt").write_text("0\n1\n2\n3\n")
    (root / "target" / "val.txt").write_text("3\n")
    (root / "classes.yaml").write_text("names: [a, b, c]\n")
    return root


def without_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every net one and the same score, leave its statistics, write no report: for tests of the training alone."""
    for module in (train_gta2cs, observers, choosing):
        monkeypatch.setattr(module, "score_on_target", lambda *_: Score({"a": 1.0, "b": 1.0}, {"mIoU": 1.0}))
    monkeypatch.setattr(train_gta2cs, "try_target_statistics", lambda run, net, *_: net)
    monkeypatch.setattr(train_gta2cs, "write_report", lambda run, *_: write_json(run.config.out / "results.json", {}))
