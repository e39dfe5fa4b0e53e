"""Compute threads sleep while they wait, and a quota of the container counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gta2cs.threads import available_cores, considerate_threads

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import sys, time
sys.path.insert(0, "examples")
from gta2cs.threads import considerate_threads
if sys.argv[1] == "considerate":
    considerate_threads()
import torch
x = torch.rand(1 << 17)
began = time.process_time()
for _ in range(3000):
    x = (x * 1.0001).clamp_max(1.0)
print(time.process_time() - began)
"""


def test_users_values_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    considerate_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    considerate_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_cores_of_the_container_count(tmp_path, files, most):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert available_cores(tmp_path) == (free if most is None else min(free, most))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="needs two cores and libgomp")
def test_beside_busy_processes_waiting_costs_less_processor_time():
    """The same work of two threads, in processor seconds, beside two processes that leave no core free."""
    asked = ("OMP_WAIT_POLICY", "MKL_NUM_THREADS")  # torch takes the number of threads from MKL where that is set
    environment = {k: v for k, v in os.environ.items() if k not in asked} | {"OMP_NUM_THREADS": "2"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        spent = {"spinning": 0.0, "considerate": 0.0}
        for way in [*spent] * 3:  # in turns, and summed: a single run may find a core free
            command = [sys.executable, "-c", WORK, way]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
            spent[way] += float(done.stdout)
    finally:
        for process in busy:
            process.kill()
    print(f"processor seconds: {spent}, at {time.strftime('%H:%M')}")
    assert spent["considerate"] < 0.8 * spent["spinning"], spent
