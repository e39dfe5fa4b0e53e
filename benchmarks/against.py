"""Processor time of every operation of this checkout, against that of another one.

    git worktree add /tmp/before 26ab581
    python benchmarks/against.py /tmp/before --results rows.json             # rows that the JSON does not have yet
    python benchmarks/against.py /tmp/before --results rows.json --ops kd_loss --again
    python benchmarks/against.py --results rows.json                         # measures nothing, prints the table
    python benchmarks/against.py --page                                      # writes it to the page, from our own JSON

Two processes hold one checkout each and are called in turns. Both run the calls of the other checkout's own registry,
so that what is compared is what could be called there. The time is that of the processor, which a busy machine hardly
changes, and a ratio is the median over pairs of neighbouring runs. All rows take about 20 minutes on an idle core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent

RESULTS = ROOT / "benchmarks" / "results" / "against.json"
OTHER = RESULTS.with_name("against_intel.json")  # the same on another processor
PAGE = ROOT / "docs" / "performance" / "before.md"
MODES = ("forward", "forward+backward")
MEASURED = ("tiny", "medium")
PAIRS, SECONDS = 15, 0.05  # runs of each, and how long one should take at least
ALLOWED = 1.05


# --- the worker: one package, the calls of the older registry -------------------------------------------------------


def work(package: str, calls: str) -> None:
    """Answer lines of JSON: `{"row": [operation, size, mode]}` makes a row, `{"calls": k}` runs it k times."""
    sys.path[0] = package
    import udakit  # noqa: F401  # of `package`; what follows is of `calls`

    sys.path[0] = calls
    from benchmarks.harness import settle_memory
    from benchmarks.workloads import NotThere, build_case, workloads

    settle_memory()
    known = {workload.name: workload for workload in workloads()}
    step = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Any
        if "row" in asked:
            name, size, mode = asked["row"]
            try:
                case = build_case(known[name], size, backward=mode == MODES[1], rivals=False)
                step = case.contestants["udakit"]
                answer = "ready"
            except NotThere:
                answer = "no such row"
        elif "calls" in asked:
            assert step is not None
            begin = time.process_time()
            for _ in range(asked["calls"]):
                step()
            answer = time.process_time() - begin
        else:
            answer = list(known)
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that works, and how to ask it."""

    def __init__(self, package: Path, calls: Path) -> None:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import against; "
        code += f"against.work({str(package)!r}, {str(calls)!r})"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)  # type: ignore[call-overload]

    def ask(self, **question: Any) -> Any:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process ended at {question}.")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- the rows ---------------------------------------------------------------------------------------------------------


def measure(before: Worker, now: Worker, row: tuple[str, str, str], pairs: int = PAIRS) -> dict[str, Any] | None:
    """Seconds a call of both, the ratio of neighbouring runs and its quartiles; None where there is no such row."""
    both = (before, now)
    if any(worker.ask(row=row) != "ready" for worker in both):
        return None
    first = max(worker.ask(calls=1) for worker in both)  # a second call, to know how long it takes
    calls = max(1, round(SECONDS / max(first, 1e-7)))
    times: list[list[float]] = [[], []]
    for i in range(pairs + 1):
        for which in (0, 1) if i % 2 else (1, 0):
            times[which].append(both[which].ask(calls=calls) / calls)
    ratios = [b / a for a, b in zip(*times, strict=True)][1:]
    low, median, high = statistics.quantiles(ratios, n=4)
    seconds = {name: statistics.median(t) for name, t in zip(("before", "now"), times, strict=True)}
    return {**seconds, "ratio": median, "low": low, "high": high, "pairs": pairs, "calls": calls}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The median ratio, and every row by size; in bold what is slower by more than the spread and 5 %."""
    from benchmarks.harness import markdown_table

    ratios = [row["ratio"] for row in rows.values()]
    slower = [key for key, row in rows.items() if row["low"] > ALLOWED]
    text = (
        f"{len(rows)} rows. The median ratio is {statistics.median(ratios):.2f}. {len(slower)} are slower by more than "
        f"{ALLOWED - 1:.0%} beyond the quartiles of their runs.\n\n"
    )
    lines = []
    for key, row in rows.items():
        name, size, mode = key.split("/")
        spread = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        times = [f"{1000 * row[when]:.3g}" for when in ("before", "now")]
        lines.append([f"`{name}`, {size}, {mode}", *times, f"**{spread}**" if key in slower else spread])
    return text + markdown_table(["operation, size, mode", "ms before", "ms now", "ratio (quartiles)"], lines)


def by_size(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: the median ratio of each size, what is slower beyond its spread by what it loses, then every row."""
    from benchmarks.harness import markdown_table

    lines, lost = [], {}
    for size in dict.fromkeys(key.split("/")[1] for key in rows):
        own = {key: row for key, row in rows.items() if key.split("/")[1] == size}
        slower = {key: row for key, row in own.items() if row["low"] > ALLOWED}
        quicker = sum(row["high"] < 1 / ALLOWED for row in own.values())
        median = statistics.median(row["ratio"] for row in own.values())
        lines.append([size, str(len(own)), f"{median:.2f}", str(quicker), str(len(slower))])
        lost |= {key: 1000 * (row["now"] - row["before"]) for key, row in slower.items()}
    head = ["size", "rows", "median ratio", f"quicker by {ALLOWED - 1:.0%}", f"slower by {ALLOWED - 1:.0%}"]
    worst = sorted(lost, key=lambda key: -lost[key])
    named = ["operation, size, mode", "ms before", "ms lost", "ratio"]
    cells = [
        ["`{}`, {}, {}".format(*key.split("/")), *(f"{x:.2g}" for x in (1000 * rows[key]["before"], lost[key])), ratio]
        for key in worst
        for ratio in [f"{rows[key]['ratio']:.2f}"]
    ]
    every = f"<details markdown>\n<summary>Every row</summary>\n\n{table(rows).strip()}\n\n</details>\n"
    return f"{markdown_table(head, lines)}\n\nSlower, largest loss first:\n\n{markdown_table(named, cells)}\n\n{every}"


def both_processors() -> str:
    """Markdown: the rows of each processor under its name."""
    parts = []
    for path in (RESULTS, OTHER):
        content = json.loads(path.read_text(encoding="utf-8"))
        named = content["environments"][0]["cpu"].partition(" (x86")[0].replace("(R)", "").removesuffix(" Processor")
        parts.append(f"### {named}\n\n{by_size(content['rows'])}")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.harness import Results, write_section

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout; without it nothing is measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure all anew; stopped, go on without it")
    parser.add_argument("--ops", nargs="+", help="operations, all by default")
    parser.add_argument("--sizes", nargs="+", default=list(MEASURED))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.page:
        write_section("against", both_processors(), PAGE)
        return
    if options.before is not None:
        with Worker(options.before, options.before) as before, Worker(ROOT, options.before) as now:
            every = itertools.product(options.ops or before.ask(), options.sizes, options.modes)
            asked = {"/".join(what): what for what in every}
            for key in results.waiting(asked, again=options.again):
                row = measure(before, now, asked[key], options.pairs)
                if row is not None:
                    results.add(key, row)
                    spread = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                    print(f"{key:60s} {1000 * row['before']:9.3f} ms  {spread}", flush=True)
    print(table(results.rows))


if __name__ == "__main__":
    main()
