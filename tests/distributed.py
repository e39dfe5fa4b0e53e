"""Real processes for tests of `torch.distributed` on the CPU: never a silent fall-back to one process.

```python
def worker(rank, world_size, scale):          # at module level: it is pickled by name
    x = torch.tensor([float(rank)]) * scale
    torch.distributed.all_reduce(x)
    return x

def test_sum(tmp_path):
    assert run_ranks(worker, 2, 10.0, tmp_path=tmp_path) == [torch.tensor([10.0])] * 2
```
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    worker: Callable[..., Any], world_size: int, *args: Any, tmp_path: Path | None = None, timeout: float = 300.0
) -> list[Any]:
    """Run `worker(rank, world_size, *args)` in `world_size` fresh processes joined by gloo; return their results.

    The processes meet through a file, so that no port is needed. A rank that raises, dies, or hangs longer than
    `timeout` seconds fails the call with that rank's traceback, and so does a group of another size than asked for.
    """
    if world_size < 2:
        raise ValueError(f"Expected `world_size` to be at least 2, but got {world_size}: one process proves nothing.")
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        context = mp.spawn(
            _rank, args=(world_size, folder, worker, args, timeout), nprocs=world_size, join=False, daemon=True
        )
        try:
            deadline = time.monotonic() + timeout
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{worker.__name__}: {world_size} ranks did not end within {timeout:g} s")
        except Exception as error:
            for process in context.processes:
                process.kill()
            # The first rank to fail is the cause; the others then fail for want of a peer.
            errors = sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
            if errors:
                raise RuntimeError(f"{worker.__name__}, rank {errors[0].stem}: {errors[0].read_text()}") from error
            raise
        files = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise RuntimeError(f"{worker.__name__}: no result of {missing}")
        return [torch.load(file, weights_only=False) for file in files]


def _rank(rank: int, world_size: int, folder: str, worker: Callable[..., Any], args: tuple[Any, ...], t: float) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=t)
    )
    try:
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, rank)
        if seen != list(range(world_size)):
            raise RuntimeError(f"Expected {world_size} ranks, but rank {rank} sees {seen}.")
        torch.save(worker(rank, world_size, *args), f"{folder}/{rank}.pt")
        dist.barrier()  # nobody leaves while another still talks
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    # All is saved and said. Taking gloo's threads down may abort a process now and then ("terminate called without an
    # active exception", seen with sharded nets, which make groups of their own), and is nothing that a test asks for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
