"""Whether an operation has one speed: the parts that work in pieces, each in ten fresh processes.

    python benchmarks/fresh_processes.py            # what is missing, then the table; stopped, it goes on
    python benchmarks/fresh_processes.py --again    # all processes anew, about 6 minutes on an idle core

By what a process freed before, the C library decides whether a freed block comes back as fresh pages. A part whose
pieces are of about a megabyte then has two speeds, and which one is chance. The figure of a process is the median of
processor time over calls, forward and (where there is one) backward, so that other programs matter little; one thread,
the medium size of `operators.py`, and no setting of the C library.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import PAGES, ROOT, Results, markdown_table, parser_for, write_section
from benchmarks.workloads import DTYPES, build_case, workloads

NAMES = (
    "ClassPrototypes.distances",
    "pixel_contrast_loss",
    "symmetric_kd_loss",
    "upsampled_cross_entropy",
    "upsampled_kd_loss",
    "LabelFreeScores",
)
FORWARD = ("LabelFreeScores",)  # without a gradient
PROCESSES, CALLS = 10, 5
WANTED = 1.5  # the slowest process over the fastest


def seconds_here(name: str, size: str) -> float:
    """Median processor time of a call in this process, after one that does not count."""
    torch.set_num_threads(1)
    workload = next(w for w in workloads() if w.name == name)
    call = build_case(workload, size, DTYPES["float32"], backward=name not in FORWARD).contestants["udakit"]
    found = []
    for _ in range(CALLS + 1):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def seconds_in_a_fresh_process(name: str, size: str) -> float:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--size", size]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def table(results: Results) -> str:
    """Markdown: the fastest and the slowest process of each row."""
    lines = []
    for name in NAMES:
        if name not in results or not (found := results.rows[name]["seconds"]):
            continue
        spread = max(found) / min(found)
        lines.append(
            [
                f"`{name}`" if name in FORWARD else f"`{name}`, with backward",
                str(len(found)),
                f"{1e3 * min(found):.1f}",
                f"{1e3 * statistics.median(found):.1f}",
                f"{1e3 * max(found):.1f}",
                f"{spread:.2f}" if spread <= WANTED else f"**{spread:.2f}**",
            ]
        )
    if not lines:
        return "Not measured yet."
    head = ["processor time in ms", "processes", "fastest", "median", "slowest", "slowest / fastest"]
    return f"{markdown_table(head, lines)}\n\nAt most {WANTED:g} is wanted; more is bold."


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "fresh_processes.json", page=PAGES / "operators.md")
    parser.add_argument("--one", choices=NAMES, help="print the seconds in this process, write nothing")
    parser.add_argument("--size", default="medium", choices=["tiny", "small", "medium", "large"])
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(seconds_here(options.one, options.size)))
        return
    results = Results(options.results)
    if options.again and not options.table:
        results.forget(NAMES)
    for name in NAMES if not options.table else ():
        found: list[float] = list(results.rows[name]["seconds"]) if results.is_there(name) else []
        while len(found) < options.processes:
            found.append(seconds_in_a_fresh_process(name, options.size))
            results.add(name, {"size": options.size, "seconds": found})
        print(f"{name:28} {max(found) / min(found):.2f}", flush=True)
    if not options.no_table:
        write_section("fresh processes", table(results), options.page)


if __name__ == "__main__":
    main()
