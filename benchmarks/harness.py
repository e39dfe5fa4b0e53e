"""What every benchmark shares: interleaved timing, a memory meter, the copy bandwidth, results, and options.

Times are median and interquartile range by `torch.utils.benchmark`. The contestants of a row run in turns
on the same inputs, so that a slow minute of the machine is slow for all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import sys
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark import timer as clock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from gta2cs.files import write_json, write_text

PAGE = ROOT / "docs" / "performance.md"  # in short
PAGES = ROOT / "docs" / "performance"  # one page a script, or few
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0
PAIR_NAMES = {
    "toy": "game → camera",
    "nuclei": "nuclei",
    "nuclei_backwards": "nuclei, backwards",
    "camvid": "day → dusk",
    "carla2camvid": "CARLA → day",
    "carla2dusk": "CARLA → dusk",
    "dusk2day": "dusk → day",
    "day2carla": "day → CARLA",
}
Contestants = Mapping[str, Callable[[], Any]]


# --- time -----------------------------------------------------------------------------------------


def time_together(
    contestants: Contestants, *, min_run_time: float = 0.2, min_runs: int = 5, max_time: float = 3.0
) -> dict[str, dict[str, float]]:
    """Seconds a call of each contestant: {"median", "iqr", "runs", "calls"}.

    A run is a block of calls that takes about a tenth of `min_run_time`. The contestants take turns, a run each, until
    each has `min_run_time` seconds and `min_runs` runs, or `max_time` seconds and three runs. A trial call that is not
    counted comes first; what only the very first call pays for (compiling) should have been paid before.
    """
    # The standard library's loop with torch's clock, which waits for an accelerator: torch's own `Timer.timeit` warms
    # up by two more calls at every run.
    timers = {name: timeit.Timer(f, timer=clock) for name, f in contestants.items()}
    raw: dict[str, list[float]] = {name: [] for name in timers}
    calls = {}
    for name, timer in timers.items():
        calls[name] = max(1, int(0.1 * min_run_time / max(timer.timeit(1), 1e-9)))

    def unfinished(name: str) -> bool:
        runs, spent = len(raw[name]), sum(raw[name])
        if spent > max_time and runs >= 3:
            return False
        return runs < min_runs or spent < min_run_time

    while waiting := [name for name in timers if unfinished(name)]:
        for name in waiting:
            raw[name].append(timers[name].timeit(calls[name]))
    found = {}
    for name, times in raw.items():
        task = TaskSpec(stmt=name, setup="", num_threads=torch.get_num_threads())
        m = Measurement(number_per_run=calls[name], raw_times=times, task_spec=task)
        found[name] = {"median": m.median, "iqr": m.iqr, "runs": len(times), "calls": calls[name]}
    return found


# --- memory ---------------------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
MMAP_THRESHOLD = 32 * 2**20  # where glibc's own, which moves, comes to rest in a process that frees large blocks
_freed_memory = "by chance"


def settle_memory() -> bool:
    """Let the C library keep freed blocks up to 32 MiB and return larger ones, from the start; False where it cannot.

    Left alone, glibc decides that by what the process freed before, and gives the end of its heap back now and then:
    whether a call pays for fresh pages is chance, and the same row took 60 or 100 ms.
    """
    global _freed_memory
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    settled = mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
    _freed_memory = "up to 32 MiB" if settled else _freed_memory
    return settled


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds at once beyond what was held before it, its result included.

    Counted from the events of torch's CPU allocator, which every tensor passes through, also those inside an operator
    (a dispatch mode sees only what crosses the dispatcher). Workspace that a vendor's library takes from the system,
    such as a Fourier plan, is in no count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"))
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@cache
def copy_bandwidth(mebibytes: int = 256) -> float:
    """Bytes moved a second (read and written) by a copy too large for the caches."""
    source = torch.rand(mebibytes * 2**20 // 4)
    target = torch.empty_like(source)
    found = time_together({"copy": lambda: target.copy_(source)}, min_run_time=1.0)
    return 2 * source.numel() * source.element_size() / found["copy"]["median"]


# --- the machine ----------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a number depends on beside the code; rows name the environment they were measured in."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "freed_memory_kept": _freed_memory,
        "seed": SEED,
    }


def pair_name(pair: str) -> str:
    """What a table calls a pair of domains."""
    return PAIR_NAMES.get(pair, pair.replace("_", " "))


def device_name(device: str | None = None) -> str:
    """The card's name, or "CPU"; by default of whatever a run would take."""
    on_card = torch.cuda.is_available() if device is None else device != "cpu"
    return torch.cuda.get_device_name() if on_card else "CPU"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return f"{found[1].strip() if found else platform.processor()} ({platform.machine()}, {os.cpu_count()} cores)"


# --- results --------------------------------------------------------------------------------------


class Results:
    """Rows of a JSON file by key. Written whole after each row, so that a run that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.is_file() else {}
        self.environments: list[dict[str, Any]] = content.get("environments", [])
        self.rows: dict[str, dict[str, Any]] = content.get("rows", {})

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def is_there(self, key: str) -> bool:
        """Whether a row need not be measured."""
        return key in self.rows and not self.rows[key].get("old", False)

    def forget(self, keys: Iterable[str]) -> None:
        """Mark rows to be measured again. They stay until they are, and a run that was stopped knows what is left."""
        for key in set(keys) & set(self.rows):
            self.rows[key]["old"] = True
        write_json(self.path, {"environments": self.environments, "rows": self.rows})

    def waiting(self, keys: Iterable[str], *, again: bool = False) -> Iterator[str]:
        """Those of the keys that are to be measured, in order: what is missing, or all of them `again`.

        A run that was stopped goes on without `again`.
        """
        keys = list(keys)
        if again:
            self.forget(keys)
        return (key for key in keys if not self.is_there(key))

    def here(self) -> int:
        """Number of the environment of this process; its copy bandwidth is measured once."""
        mine = environment()
        for number, known in enumerate(self.environments):
            if {k: v for k, v in known.items() if k != "copy_bandwidth"} == mine:
                return number
        self.environments.append({**mine, "copy_bandwidth": copy_bandwidth()})
        return len(self.environments) - 1

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {**row, "environment": self.here()}
        write_json(self.path, {"environments": self.environments, "rows": self.rows})

    def bandwidth(self, row: dict[str, Any]) -> float:
        return float(self.environments[row["environment"]]["copy_bandwidth"])


def write_section(name: str, text: str, page: Path) -> None:
    """Put a text between the two markers of a section of the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"Expected {page} to have the markers {begin!r} and {end!r} once each.")
    head, rest = whole.split(begin)
    _, tail = rest.split(end)
    write_text(page, f"{head}{section(name, text)}{tail}")


def section(name: str, text: str) -> str:
    """A section of a page with its markers."""
    return f"<!-- {name}: begin -->\n\n{text.strip()}\n\n<!-- {name}: end -->"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# --- options --------------------------------------------------------------------------------------


def parser_for(description: str, results: str, *, page: Path) -> argparse.ArgumentParser:
    """The options that every script has; it adds its own. `description` is its docstring, `results` its JSON's name."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--again", action="store_true", help="measure all anew; stopped, go on without it")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--no-table", action="store_true", help="leave the page alone")
    parser.add_argument("--results", type=Path, default=RESULTS / results, help="the JSON")
    parser.add_argument("--page", type=Path, default=page)
    return parser
