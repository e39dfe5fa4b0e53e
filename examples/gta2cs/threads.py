"""Compute threads that sleep while they wait, at most one for each available core.

Import and call this before torch, whose thread pool reads these variables once. Threads that spin while they wait for
each other make a busy machine ten times slower. Threads that sleep have no measurable cost on an idle one. Values set
by the user stay: `OMP_NUM_THREADS=1 python examples/train_gta2cs.py`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def considerate_threads() -> None:
    """Set `OMP_WAIT_POLICY` and `OMP_NUM_THREADS` for this process and its children, unless the user has."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))


def available_cores(cgroup: Path = CGROUP) -> int:
    """The number of cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """The cores allowed by the control group, of version 2 ("50000 100000", "max 100000") or 1; None: no limit."""
    try:
        if (limits := cgroup / "cpu.max").is_file():
            granted, period = limits.read_text(encoding="ascii").split()
        else:
            granted = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        return None if granted in ("max", "-1") else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
