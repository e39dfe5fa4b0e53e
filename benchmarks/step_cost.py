"""Parameters, seconds and peak memory of a training step, for the small and the large net of DUDA's rows.

    python benchmarks/step_cost.py            # whatever is not in the JSON yet, then the table of docs/results/duda.md
    python benchmarks/step_cost.py --rows duda_pre duda --again
    python benchmarks/step_cost.py --table    # measures nothing, writes what is there

Each row is a fresh process that takes a few steps on random images of the pair's crop and batch. Memory is the peak of
the process less what it held before the first net was built: weights, teachers, optimiser, activations and gradients.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
from torch import nn

from benchmarks import real_pairs
from benchmarks.harness import SEED, Results, markdown_table, parser_for, write_section
from benchmarks.step_overhead import random_batch
from gta2cs.nets import param_groups
from gta2cs.recipes import RECIPES, Draws, Recipe

PAIR, CLASSES = "camvid", 11
ROWS = {
    "dacs": "large net alone",
    "small_source_only": "small net, source-only",
    "small_dacs": "small net alone",
    "small_kd": "small net, one frozen large teacher",
    "duda_pre": "pre-adaptation: both nets",
    "duda": "fine-tuning: small net, two frozen large teachers and its own",
}


def build(name: str) -> tuple[Recipe, Any]:
    """The recipe of a row with its nets as they are built, and the row's configuration."""
    config = real_pairs.configure(PAIR, name, SEED, None, Path())
    stage = config.stages[-1]

    def make_net(**changes: Any) -> nn.Module:
        return config.net.build(CLASSES, **{**changes, "weights": "random"})

    previous = None
    if stage.recipe == "duda":  # its large nets, untrained
        previous = RECIPES["duda_pre"].build(make_net(), CLASSES, {"large": stage.options["large"]}, make_net)
    recipe = RECIPES[stage.recipe].build(make_net(), CLASSES, stage.options, make_net, previous)
    return recipe.to(memory_format=torch.channels_last).train(), config


def measure(name: str, steps: int) -> dict[str, Any]:
    """Median over `steps` steps after one that does not count; to be called once in a process."""
    held = resident()
    torch.manual_seed(SEED)
    recipe, config = build(name)
    groups = [*param_groups(recipe.student, lr=1e-5), *recipe.extra_param_groups(1e-5)]  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups)
    batch = random_batch(config.batch_size, config.data.crop, CLASSES)
    seconds = []
    for step in range(steps + 1):
        began = time.perf_counter()
        losses = recipe(batch, Draws(SEED, step, range(config.batch_size), torch.device("cpu")))
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        recipe.after_step()
        seconds.append(time.perf_counter() - began)
    return {
        "recipe": config.stages[-1].recipe,
        "deployed": count(recipe.student.parameters()),
        "trained": count(p for group in groups for p in group["params"]),
        "held": count(recipe.parameters()),
        "seconds": statistics.median(seconds[1:]),
        "megabytes": (peak() - held) / 1e6,
        "crop": config.data.crop,
        "batch": config.batch_size,
    }


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def resident() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(results: Results) -> str:
    """Markdown: one line a row."""
    rows = {name: results.rows[name] for name in ROWS if name in results}
    if not rows:
        return "Not measured yet."
    head = ["row", "deployed", "trained", "held", "seconds a step", "peak memory, MB"]
    lines = [
        [
            f"`{name}`: {ROWS[name]}",
            *(f"{row[k] / 1e6:.2f}" for k in ("deployed", "trained", "held")),
            f"{row['seconds']:.2f}",
            f"{row['megabytes']:.0f}",
        ]
        for name, row in rows.items()
    ]
    first = next(iter(rows.values()))
    threads = results.environments[first["environment"]]["threads"]
    return (
        f"{markdown_table(head, lines)}\n\nParameters in millions: of the net that is deployed, of all that learns, of "
        f"all nets and teachers. Crops of {first['crop'][0]} × {first['crop'][1]}, "
        f"{first['batch']} + {first['batch']} images, float32, {threads} threads of the CPU."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "step_cost.json", page=ROOT / "docs" / "results" / "duda.md")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", choices=list(ROWS), help="measure one row here and print it")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one, options.steps)))
        return
    results = Results(options.results)
    for name in results.waiting(options.rows if not options.table else (), again=options.again):
        command = [sys.executable, __file__, "--one", name, "--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        results.add(name, row)
        print(f"{name:18} {row['seconds']:6.2f} s a step, {row['megabytes']:.0f} MB", flush=True)
    if not options.no_table:
        write_section("duda_cost", table(results), options.page)


if __name__ == "__main__":
    main()
