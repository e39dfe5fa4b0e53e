"""The spawner itself: real ranks, real results, loud failures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed import run_ranks

pytestmark = pytest.mark.slow


def _sum_and_process(rank: int, world_size: int, scale: float) -> tuple[float, int]:
    x = torch.tensor([scale * (rank + 1)])
    dist.all_reduce(x)
    return x.item(), os.getpid()


def _raise_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ArithmeticError("rank one is broken")


def _hang(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_ranks_are_processes_that_talk(tmp_path: Path) -> None:
    results = run_ranks(_sum_and_process, 2, 10.0, tmp_path=tmp_path)
    assert [value for value, _ in results] == [30.0, 30.0]
    assert len({os.getpid(), *(process for _, process in results)}) == 3


def test_an_error_of_one_rank_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)_raise_on_rank_one, rank 1: .*rank one is broken"):
        run_ranks(_raise_on_rank_one, 2, tmp_path=tmp_path)


def test_a_hanging_rank_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((TimeoutError, RuntimeError), match=r"did not end within|[Tt]imeout|[Tt]imed out"):
        run_ranks(_hang, 2, tmp_path=tmp_path, timeout=8.0)


def test_one_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="`world_size` to be at least 2"):
        run_ranks(_hang, 1)
