"""Two real processes against one process on the global batch: integers bit-equal, floats within 1e-6."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import udakit
from distributed import run_ranks

pytestmark = pytest.mark.slow

MODES = [(mode, per_image) for mode in ("ema", "mean") for per_image in (True, False)]
SPLIT = {0: slice(0, 3), 1: slice(3, 4)}  # ranks of unequal batch sizes


def _steps() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Global batches of 4 images: class 2 is on rank 0 alone, class 1 on rank 1 alone, class 3 comes late."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step in range(3):
        features = 5 + torch.randn(4, 6, 4, 5, generator=generator)
        labels = torch.randint(3, (4, 4, 5), generator=generator)
        labels[:3][labels[:3] == 1] = 255
        labels[3:][labels[3:] == 2] = 0
        if step:
            labels[1:, 0] = 3
        logits = 3 * torch.randn(4, 4, 4, 5, generator=generator)
        steps.append((features, labels, logits))
    return steps


def _run(rank: int, world_size: int, part: slice, sync: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"process": os.getpid()}
    for mode, per_image in MODES:
        prototypes = udakit.ClassPrototypes(4, 6, 0.2, mode, per_image, 2)
        for features, labels, _ in _steps():
            prototypes.update(features[part], labels[part], sync=sync)
        found[f"{mode} {per_image}"] = prototypes.state_dict()
    selector = udakit.ClassQuantileSelector(4, 0.4, 0.9, sync=sync)
    for _, _, logits in _steps():
        found["selected"] = selector(logits[part]).labels
    found["histogram"] = selector.histogram
    return found


def _rank(rank: int, world_size: int) -> dict[str, Any]:
    return _run(rank, world_size, SPLIT[rank], sync=True)


def _rank_alone(rank: int, world_size: int) -> dict[str, Any]:
    return _run(rank, world_size, SPLIT[rank], sync=False)


def test_two_ranks_equal_one_process_on_the_global_batch(tmp_path: Path) -> None:
    ranks = run_ranks(_rank, 2, tmp_path=tmp_path)
    assert len({os.getpid(), *(found["process"] for found in ranks)}) == 3
    alone = _run(0, 1, slice(None), sync=True)  # no process group: one rank
    for found in ranks:
        for mode, per_image in MODES:
            ours, expected = found[f"{mode} {per_image}"], alone[f"{mode} {per_image}"]
            assert torch.equal(ours["counts"], expected["counts"])
            torch.testing.assert_close(ours["prototypes"], expected["prototypes"], rtol=1e-6, atol=1e-6)
        assert torch.equal(found["histogram"], alone["histogram"])
    for mode, per_image in MODES:
        first, second = (found[f"{mode} {per_image}"]["prototypes"] for found in ranks)
        assert torch.equal(first, second)
    assert torch.equal(torch.cat([found["selected"] for found in ranks]), alone["selected"])


def test_without_sync_every_rank_keeps_to_itself(tmp_path: Path) -> None:
    ranks = run_ranks(_rank_alone, 2, tmp_path=tmp_path)
    for rank, found in enumerate(ranks):
        own = _run(0, 1, SPLIT[rank], sync=False)
        assert torch.equal(found["ema True"]["prototypes"], own["ema True"]["prototypes"])
        assert torch.equal(found["histogram"], own["histogram"])
    assert not torch.equal(ranks[0]["histogram"], ranks[1]["histogram"])
