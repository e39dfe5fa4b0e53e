"""Where the time of the README's main job goes: `python examples/train_gta2cs.py` on the built-in pair, by part.

    python benchmarks/main_job.py            # whatever is not in the JSON yet, then the table; all: 12 minutes
    python benchmarks/main_job.py --again    # every row anew
    python benchmarks/main_job.py --table    # measures nothing, writes what is there

The job runs in a fresh process with 60 steps a stage and one evaluation at the end of each. The time of a step is then
multiplied by the steps of the whole job, that of an evaluation by its evaluations, and that of a rendered scene by the
scenes that the draws are expected to touch. All else happens once. The clocks are those of `step_overhead.py`.

One row is as the README runs it, by the clock on the wall. The other has one thread, by processor time. A third has
the net's passes and the optimiser in other ways, which could make the job shorter. Three more have the mIoU that the
first stage comes to, for seeds 0, 1 and 2: the README names it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

_BEGAN = time.perf_counter(), time.process_time()
import train_gta2cs as job  # before all that imports torch: it sets the number of threads

IMPORT = time.perf_counter() - _BEGAN[0], time.process_time() - _BEGAN[1]

import torch

from benchmarks.harness import PAGES, Results, markdown_table, parser_for, write_section
from benchmarks.step_overhead import BACKWARD, NETS, OPTIMIZER, Clock, Stretch, clocks
from gta2cs import choosing, observers, toy
from gta2cs.loading import StepData
from gta2cs.stage import StageState

ROWS: dict[str, dict[str, str]] = {"as the README runs it": {}, "one thread": {"OMP_NUM_THREADS": "1"}}
CLOCKS = {"as the README runs it": "wall-clock time", "one thread": "processor time"}
WAYS = "other ways"
STARTS = {f"start, seed {seed}": seed for seed in range(3)}
STEPS = 60  # of each stage
REST, CROPS, SCENES = "rest of a step", "crops", "rendering the scenes"


# Part -> what the job calls for it. What these call counts as their own, but for the scenes.
WHOLE: dict[str, tuple[tuple[Any, str], ...]] = {
    "scores against truth": ((observers, "score_on_target"), (job, "score_on_target")),
    "scores without labels": ((choosing, "score_without_labels"), (job, "score_without_labels")),
    "checkpoints": ((StageState, "save"), (choosing, "save_choice")),
    "BatchNorm statistics of target": ((job, "adapt_batch_norm"),),
    "choice of target's statistics": ((job, "try_target_statistics"),),
    "report and pictures": ((job, "write_report"),),
}
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    REST: ((job.TrainingStep, "__call__"),),
    BACKWARD: ((job.Accelerator, "backward"),),
    OPTIMIZER: ((sys.modules["accelerate.optimizer"].AcceleratedOptimizer, "step"),),
    CROPS: ((StepData, "__getitem__"),),
    SCENES: ((toy, "render"),),
    **WHOLE,
}


class JobClock(Clock):
    """Also notes when each stage begins and ends, and looks into no part of `WHOLE`."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now)
        self.stages: list[tuple[float, float]] = []
        self.inside = False

    @contextmanager
    def around(self, part: str) -> Iterator[None]:
        if self.inside and part != SCENES:
            yield
            return
        opened = part in WHOLE
        self.inside = self.inside or opened
        try:
            with super().around(part):
                yield
        finally:
            self.inside = self.inside and not opened

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.around(part):
                return function(*args, **kwargs)

        return call

    def noted(self, train_stage: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(train_stage)
        def call(*args: Any) -> Any:
            start = self.now()
            result = train_stage(*args)
            self.stages.append((start, self.now()))
            return result

        return call

    def phase(self, stretch: Stretch) -> str:
        """Where a stretch of time belongs: the steps or evaluations of a stage, the scenes, or what happens once."""
        if stretch.part == SCENES:
            return "scenes"
        for index, (start, end) in enumerate(self.stages):
            if start <= stretch.start < end:
                first = min(s.start for s in self.stretches if s.part == REST and s.start >= start)
                if stretch.part not in WHOLE:
                    return f"step {index}"
                return f"evaluation {index}" if stretch.start > first else "once"
        return "once"


def run_with(clock: JobClock, config: job.Config) -> float:
    """Run the job with the clock around every part, and return how long it took."""
    with tempfile.TemporaryDirectory(prefix="main_job_") as folder, clocks(clock), ExitStack() as stack:
        stack.enter_context(mock.patch.object(job, "train_stage", clock.noted(job.train_stage)))
        for part, owners in PARTS.items():
            for owner, name in owners:
                stack.enter_context(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        started = clock.now()
        job.main(dataclasses.replace(config, out=Path(folder) / "run"))
        return clock.now() - started


def profile(steps: int, now: Callable[[], float]) -> dict[str, Any]:
    """Seconds by phase and part of the job with few steps, and how often each phase happens in the whole one."""
    full, clock = job.parse([]), JobClock(now)
    short = [dataclasses.replace(stage, steps=min(steps, stage.steps)) for stage in full.stages]
    seconds = run_with(clock, dataclasses.replace(full, stages=short, eval_every=0, save_every=0))

    phases = [(clock.phase(s), s) for s in clock.stretches if s.end]
    named = Clock(now)
    named.stretches = [Stretch(f"{name}/{s.part}", s.start, s.end) for name, s in phases]
    found = named.exclusive()
    found["once/rest"] = seconds - sum(found.values())
    found["once/import"] = IMPORT[now is time.process_time]

    rendered = sum(name == "scenes" for name, _ in phases)
    draws = sum(stage.steps for stage in full.stages) * full.batch_size
    times = {"once": 1.0, "scenes": scenes(draws) / rendered}
    for index, (stage, few) in enumerate(zip(full.stages, short, strict=True)):
        times[f"step {index}"] = stage.steps / few.steps
        times[f"evaluation {index}"] = -(-stage.steps // full.eval_every)
    return {
        "measured": {name: seconds for name, seconds in found.items() if seconds},
        "times": times,
        "stages": [{"recipe": stage.recipe, "steps": stage.steps} for stage in full.stages],
        "steps": steps,
        "scenes": rendered,
    }


def start(seed: int) -> dict[str, Any]:
    """The mIoU on target that the job's first stage comes to: what its second one starts from."""
    full = job.parse(["--seed", str(seed)])
    first = full.stages[0]
    with tempfile.TemporaryDirectory(prefix="main_job_") as folder:
        short = dataclasses.replace(full, stages=[first], eval_every=0, save_every=0, out=Path(folder) / "run")
        rows = job.main(short)
    return {"mIoU": rows[first.recipe].miou, "recipe": first.recipe, "steps": first.steps}


def ways(turns: int = 7) -> dict[str, float]:
    """Milliseconds of processor time of the job's net and optimiser in other ways, in turns, on one thread."""
    torch.set_num_threads(1)
    full = job.parse([])
    images = torch.randn(full.batch_size, 3, *full.data.crop)
    wide = images.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    plain = full.net.build(7, 3).train()
    net = full.net.build(7, 3).to(memory_format=torch.channels_last).train()

    def passes(net: torch.nn.Module, images: torch.Tensor, half: bool = False) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                total = net(images).head_logits.float().sum()
            total.backward()

        return call

    calls: dict[str, Callable[[], Any]] = {
        "net, forward and backward, as it is": passes(net, wide),
        "the same, channels first": passes(plain, images),
        "the same, bfloat16": passes(net, wide, half=True),
        "AdamW, as it is": torch.optim.AdamW(net.parameters(), lr=1e-5).step,
        "AdamW, fused": torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True).step,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def scenes(draws: int, each: int = 400, validation: int = 60) -> float:
    """Scenes of both domains that so many uniform draws of each touch, on average, and those that are scored."""
    return 2 * each * (1 - (1 - 1 / each) ** draws) + validation


def whole_job(row: dict[str, Any]) -> dict[str, Counter[str]]:
    """Seconds of the whole job by part: of the steps of each stage, of all evaluations and scenes, of what is once."""
    found: dict[str, Counter[str]] = {}
    for name, seconds in row["measured"].items():
        phase, _, part = name.partition("/")
        group = phase.split()[0] if phase.startswith("evaluation") else phase
        found.setdefault(group, Counter())[part] += seconds * row["times"][phase]
    return found


# --- the page --------------------------------------------------------------------------------------------------------

TITLES = {NETS: "nets, forward", BACKWARD: "nets, backward", OPTIMIZER: "optimiser", CROPS: "cutting crops"}


def lines_of(row: dict[str, Any]) -> dict[str, float]:
    """Line of the table -> seconds."""
    found = whole_job(row)
    lines: dict[str, float] = {}
    for index, stage in enumerate(row["stages"]):
        parts = found[f"step {index}"]
        where = f"{stage['recipe']}, {stage['steps']} steps: "
        for part, title in TITLES.items():
            lines[where + title] = parts[part]
        lines[where + "parts of udakit and the rest"] = sum(s for part, s in parts.items() if part not in TITLES)
    for part, seconds in found["evaluation"].most_common():
        lines[f"{part}, during training"] = seconds
    lines[SCENES] = sum(found["scenes"].values())
    for part, seconds in found["once"].most_common():
        lines[f"{part}, once"] = seconds
    return lines


def table(results: Results) -> str:
    """Markdown: seconds and share of each part."""
    rows = {name: lines_of(results.rows[name]) for name in ROWS if name in results}
    if not rows:
        return "Not measured yet."
    totals = {name: sum(lines.values()) for name, lines in rows.items()}
    every = dict.fromkeys(line for lines in rows.values() for line in lines)
    body = [
        [line, *(f"{rows[n].get(line, 0):.1f} ({rows[n].get(line, 0) / totals[n]:.0%})" for n in rows)]
        for line in every
        if any(rows[n].get(line, 0) >= 0.005 * totals[n] for n in rows)
    ]
    body.append(["all", *(f"{totals[n]:.0f}" for n in rows)])
    steps = " and ".join(dict.fromkeys(str(results.rows[name]["steps"]) for name in rows))
    kinds = ", ".join(f'"{name}" is {CLOCKS[name]}' for name in rows)
    other = ""
    if WAYS in results:
        found = [[name, f"{ms:.1f}"] for name, ms in results.rows[WAYS]["milliseconds"].items()]
        other = f"\n\nOne step of one batch in other ways:\n\n{markdown_table(['one thread', 'ms'], found)}"
    return (
        f"{markdown_table(['seconds (share)', *rows], body)}\n\n"
        f"Measured with {steps} steps and one evaluation of each stage, and scaled to the whole job. "
        f"The column {kinds}. Parts under half a percent are left out."
        f"{other}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "main_job.json", page=PAGES / "step.md")
    parser.add_argument("--one", choices=[*ROWS, WAYS, *STARTS], help="measure one row here and print it")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each stage")
    options = parser.parse_args(arguments)
    if options.one == WAYS:
        print(json.dumps({"milliseconds": ways()}))
        return
    if options.one in STARTS:
        print(json.dumps(start(STARTS[options.one])))
        return
    if options.one:
        now = time.process_time if options.one == "one thread" else time.perf_counter
        print(json.dumps(profile(options.steps, now)))
        return
    results = Results(options.results)
    for name in results.waiting([*ROWS, WAYS, *STARTS] if not options.table else (), again=options.again):
        command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--steps", str(options.steps)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | ROWS.get(name, {})
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results.add(name, json.loads(done.stdout.splitlines()[-1]))
        if name in ROWS:
            print(f"{name}: {sum(lines_of(results.rows[name]).values()):.0f} s for the whole job", flush=True)
    if not options.no_table:
        write_section("main job", table(results), options.page)


if __name__ == "__main__":
    main()
