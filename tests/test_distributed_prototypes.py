"""Real processes against one process on the global batch: integers bit-equal, floats within 1e-6."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import udakit
from distributed import run_ranks
from udakit._state import gather_ranks, sum_ranks

pytestmark = pytest.mark.slow

MODES = [(mode, per_image) for mode in ("ema", "mean") for per_image in (True, False)]
# Which images of the global batch a rank holds: unequal batches, and at four ranks one that is empty.
SPLIT = {
    2: [slice(0, 3), slice(3, 4)],
    4: [slice(0, 1), slice(1, 1), slice(1, 3), slice(3, 4)],
}
ranks = pytest.mark.parametrize("world_size", SPLIT)


def _steps() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Global batches of 4 images: class 2 is not in the last, class 1 in no other, class 3 comes late."""
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
    criterion = udakit.InconsistencyLoss(4, momentum=0.5, sync=sync)
    for _, _, logits in _steps():
        criterion(logits[part], logits[part].roll(1, 1) + 4 * logits[part])
    found["inconsistency"] = criterion.state_dict()
    return found


def _rank(rank: int, world_size: int) -> dict[str, Any]:
    return _run(rank, world_size, SPLIT[world_size][rank], sync=True)


def _rank_alone(rank: int, world_size: int) -> dict[str, Any]:
    return _run(rank, world_size, SPLIT[world_size][rank], sync=False)


@ranks
def test_ranks_equal_one_process_on_the_global_batch(world_size: int, tmp_path: Path) -> None:
    found = run_ranks(_rank, world_size, tmp_path=tmp_path)
    assert len({os.getpid(), *(x["process"] for x in found)}) == world_size + 1
    alone = _run(0, 1, slice(None), sync=True)  # no process group: one rank
    for own in found:
        for mode, per_image in MODES:
            ours, expected = own[f"{mode} {per_image}"], alone[f"{mode} {per_image}"]
            assert torch.equal(ours["counts"], expected["counts"])
            torch.testing.assert_close(ours["prototypes"], expected["prototypes"], rtol=1e-6, atol=1e-6)
            assert torch.equal(ours["prototypes"], found[0][f"{mode} {per_image}"]["prototypes"])
        assert torch.equal(own["histogram"], alone["histogram"])
        for name, x in alone["inconsistency"].items():
            assert torch.equal(own["inconsistency"][name], x), name
    assert torch.equal(torch.cat([own["selected"] for own in found]), alone["selected"])


@ranks
def test_without_sync_every_rank_keeps_to_itself(world_size: int, tmp_path: Path) -> None:
    found = run_ranks(_rank_alone, world_size, tmp_path=tmp_path)
    for own, part in zip(found, SPLIT[world_size], strict=True):
        expected = _run(0, 1, part, sync=False)
        assert torch.equal(own["ema True"]["prototypes"], expected["ema True"]["prototypes"])
        assert torch.equal(own["histogram"], expected["histogram"])
    assert not torch.equal(found[0]["histogram"], found[-1]["histogram"])


def _gather(rank: int, world_size: int) -> list[Tensor]:
    mine = torch.full((2, 3), float("nan")), torch.tensor([2**60 + rank]), torch.tensor([rank % 2 == 0])
    return [*gather_ranks(*mine), sum_ranks(torch.tensor([2**53 + 1]))]


@ranks
def test_tensors_of_any_kind_travel_together(world_size: int, tmp_path: Path) -> None:
    """As bytes: through float32 the integers would be rounded."""
    for nan, numbers, flags, total in run_ranks(_gather, world_size, tmp_path=tmp_path):
        assert nan.shape == (world_size, 2, 3)
        assert nan.isnan().all()
        assert numbers.flatten().tolist() == [2**60 + rank for rank in range(world_size)]
        assert flags.flatten().tolist() == [rank % 2 == 0 for rank in range(world_size)]
        assert total.tolist() == [world_size * (2**53 + 1)]
