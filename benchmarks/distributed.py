"""What the stateful parts send between processes at each step, and that their state is that of one process.

    python benchmarks/distributed.py            # 2 and 4 gloo processes on this machine, then the table
    python benchmarks/distributed.py --table    # measures nothing, writes the table of docs/performance/processes.md

Bytes are counted by functions around `torch.distributed`'s collectives, and must equal the formula beside them. No
time is measured: gloo between processes of one machine says nothing about a cluster.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.distributed as dist
from torch import Tensor, nn

import udakit
from benchmarks.harness import PAGES, markdown_table, parser_for, write_json, write_section
from distributed import run_ranks

CLASSES, DIM, BINS, STEPS, IMAGES = 19, 256, 4096, 3, 8  # images of the global batch
SHOWN = 64  # ranks that the table counts traffic for
SEED = 0
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_to_all", "all_to_all_single", "gather", "scatter", "reduce", "send", "recv", "barrier"),
    *("all_gather_object", "all_reduce_coalesced", "all_gather_coalesced", "broadcast_object_list"),
)


def global_batch(step: int) -> dict[str, Tensor]:
    """Features, labels and two nets' logits of one step; every rank takes its share."""
    g = torch.Generator().manual_seed(SEED + step)
    return {
        "features": torch.randn(IMAGES, DIM, 8, 8, generator=g),
        "labels": torch.randint(CLASSES, (IMAGES, 8, 8), generator=g),
        "student": 3 * torch.randn(IMAGES, CLASSES, 8, 8, generator=g),
        "teacher": 3 * torch.randn(IMAGES, CLASSES, 8, 8, generator=g),
    }


def parts() -> dict[str, tuple[nn.Module, Callable[[Any, dict[str, Tensor]], Any]]]:
    """Each stateful part with its step."""
    torch.manual_seed(SEED)
    net = nn.Conv2d(DIM, CLASSES, 1)

    def prototypes(module: udakit.ClassPrototypes, b: dict[str, Tensor]) -> None:
        module.update(b["features"], b["labels"], sync=True)

    return {
        "ClassPrototypes": (udakit.ClassPrototypes(CLASSES, DIM, 0.01, min_pixels=1), prototypes),
        "ClassPrototypes(per_image=False)": (
            udakit.ClassPrototypes(CLASSES, DIM, 0.01, per_image=False, min_pixels=1),
            prototypes,
        ),
        "InconsistencyLoss": (
            udakit.InconsistencyLoss(CLASSES, sync=True),
            lambda module, b: module(b["student"], b["teacher"]),
        ),
        "ClassQuantileSelector": (
            udakit.ClassQuantileSelector(CLASSES, bins=BINS, sync=True),
            lambda module, b: module(b["teacher"]),
        ),
        "ConfidentRatioSelector": (udakit.ConfidentRatioSelector(), lambda module, b: module(b["teacher"])),
        "EMATeacher": (udakit.EMATeacher(net), lambda module, b: module.update(net)),
    }


# Collective, bytes of a rank's own tensor, and the formula that a test of this file holds them to.
FORMULAS: dict[str, tuple[str | None, int, str]] = {
    "ClassPrototypes": ("all_gather", CLASSES * (8 * DIM + 8), "C (8 D + 8)"),
    "ClassPrototypes(per_image=False)": ("all_gather", CLASSES * (4 * DIM + 8), "C (4 D + 8)"),
    "InconsistencyLoss": ("all_reduce", 16 * CLASSES, "16 C"),
    "ClassQuantileSelector": ("all_reduce", 8 * CLASSES * BINS, "8 C bins"),
    "ConfidentRatioSelector": (None, 0, "0"),
    "EMATeacher": (None, 0, "0"),
}


def counting(log: list[tuple[str, int]]) -> Callable[[], None]:
    """Put a counter around every collective; the result takes them off again."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            own = (
                args[1] if name == "all_gather" and len(args) > 1 else options.get("tensor", args[0] if args else None)
            )
            log.append((name, own.nbytes if isinstance(own, Tensor) else -1))
            return original(*args, **options)

        return call

    for name, original in originals.items():
        setattr(dist, name, counted(name, original))

    def restore() -> None:
        for name, original in originals.items():
            setattr(dist, name, original)

    return restore


def run(rank: int, world_size: int) -> dict[str, Any]:
    """State of every part after the steps on this rank's images, and what it sent in the last step."""
    share = IMAGES // world_size
    found: dict[str, Any] = {"process": os.getpid()}
    for name, (module, step) in parts().items():
        for k in range(STEPS):
            batch = {key: x[rank * share : (rank + 1) * share] for key, x in global_batch(k).items()}
            log: list[tuple[str, int]] = []
            restore = counting(log)
            try:
                step(module, batch)
            finally:
                restore()
        found[name] = {"sent": log, "state": module.state_dict()}
    return found


def compare(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the parts; raises where a rank differs from one process, or its bytes from the formula."""
    rows = {}
    for name, (collective, size, _) in FORMULAS.items():
        difference = 0.0
        for found in ranks:
            expected_log = [] if collective is None else [(collective, size)]
            if found[name]["sent"] != expected_log:
                raise AssertionError(f"{name}: sent {found[name]['sent']}, but the formula says {expected_log}")
            for key, x in found[name]["state"].items():
                y = alone[name]["state"][key]
                if not x.is_floating_point():
                    assert torch.equal(x, y), f"{name}.{key}: integers differ"
                    continue
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
                difference = max(difference, float((x - y).abs().max()))
        rows[name] = {"collective": collective, "bytes": size, "largest_difference": difference}
    return rows


def measure(world_size: int) -> dict[str, Any]:
    """Real processes against this one on the global batch."""
    alone = run(0, 1)
    ranks = run_ranks(run, world_size, timeout=600)
    processes = {os.getpid(), *(found["process"] for found in ranks)}
    assert len(processes) == world_size + 1, "ranks that are not processes of their own"
    return compare(ranks, alone)


def traffic(collective: str | None, size: int, ranks: int) -> float:
    """Bytes that a rank receives (and sends) in a ring: a gather grows with the ranks, a sum does not."""
    return {None: 0.0, "all_gather": (ranks - 1) * size, "all_reduce": 2 * (ranks - 1) / ranks * size}[collective]


def table(found: dict[str, dict[str, Any]]) -> str:
    head = ["part", "collectives a step", "bytes of a rank", f"bytes received at {SHOWN} ranks"]
    head += [f"largest difference, {n} ranks against 1" for n in sorted(found, key=int)]
    rows = []
    for name, (collective, size, formula) in FORMULAS.items():
        own = f"{formula} = {size:,}" if size else "0"
        differences = [f"{found[n][name]['largest_difference']:.1g}" for n in sorted(found, key=int)]
        calls = "0" if collective is None else f"1 `{collective}`"
        rows.append([f"`{name}`", calls, own, f"{round(traffic(collective, size, SHOWN)):,}", *differences])
    note = f"Measured with C = {CLASSES}, D = {DIM} and {BINS} bins. Integer state agrees bit by bit."
    return f"{markdown_table(head, rows)}\n\n{note}"


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "distributed.json", page=PAGES / "processes.md")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args(arguments)
    found = json.loads(options.results.read_text()) if options.results.is_file() else {}
    torch.set_num_threads(1)
    for n in options.ranks if not options.table else ():
        if str(n) not in found or options.again:
            found[str(n)] = measure(n)
            write_json(options.results, found)
    print(table(found))
    if not options.no_table:
        write_section("distributed", table(found), options.page)


if __name__ == "__main__":
    main()
