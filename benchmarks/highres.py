"""Losses at label size from low-resolution logits: `F.interpolate` and the plain loss against the banded one.

    python benchmarks/highres.py               # rows that the JSON does not have yet, then the table
    python benchmarks/highres.py --again       # every row anew
    python benchmarks/highres.py --side 32     # a quick look at another size; nothing is written
    python benchmarks/highres.py --table       # measures nothing, writes the table of docs/performance/losses.md

A row is forward and backward to the gradient of the low-resolution logits. Memory is the most that the call holds at
once beyond its inputs, by the events of torch's allocator. On a GPU (`--device cuda`) both are measured there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import udakit
from benchmarks.harness import (
    PAGES,
    SEED,
    Results,
    markdown_table,
    parser_for,
    peak_extra_bytes,
    settle_memory,
    time_together,
    write_section,
)

CLASSES, SIDE, FACTOR = 19, 256, 4
LOSSES = {"upsampled_cross_entropy": "cross_entropy", "upsampled_kd_loss": "kd_loss"}  # and their plain form


def calls(loss: str, n: int, side: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """The two ways to the gradient of the same logits."""
    generator = torch.Generator().manual_seed(SEED)
    logits, teacher = (3 * torch.randn(n, CLASSES, side, side, generator=generator) for _ in range(2))
    size = (FACTOR * side, FACTOR * side)
    labels = torch.randint(CLASSES, (n, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    logits, teacher, labels = logits.to(device).requires_grad_(), teacher.to(device), labels.to(device)

    def upsample(x: Tensor) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def plain() -> Tensor:
        if loss == "upsampled_kd_loss":
            return udakit.kd_loss(upsample(logits), upsample(teacher))
        return udakit.cross_entropy(upsample(logits), labels)

    def banded() -> Tensor:
        if loss == "upsampled_kd_loss":
            return udakit.upsampled_kd_loss(logits, teacher, size=size)
        return udakit.upsampled_cross_entropy(logits, labels)

    def gradient(value: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            (found,) = torch.autograd.grad(value(), logits)
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return call

    return {"plain": gradient(plain), "banded": gradient(banded)}


def peak_bytes(call: Callable[[], Tensor], device: str) -> int:
    if device != "cuda":
        return peak_extra_bytes(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def measure(loss: str, n: int, side: int, device: str) -> dict[str, Any]:
    contestants = calls(loss, n, side, device)
    plain, banded = (call() for call in contestants.values())
    row: dict[str, Any] = {
        "loss": loss,
        "n": n,
        "side": side,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "difference": float((plain - banded).abs().max() / plain.abs().max()),
        "peak_bytes": {name: peak_bytes(call, device) for name, call in contestants.items()},
    }
    row["seconds"] = time_together(contestants)
    return row


def key(loss: str, n: int, side: int, device: str) -> str:
    return f"{loss} n={n} side={side} {device}"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Medians with half the interquartile range, and peaks, of both ways."""
    lines = []
    for row in rows.values():
        shape = f"{row['n']} x {CLASSES} x {row['side']}² → {FACTOR * row['side']}²"
        names = {"plain": f"`F.interpolate`, then `{LOSSES[row['loss']]}`", "banded": f"`{row['loss']}`"}
        for way, name in names.items():
            time, peak = row["seconds"][way], row["peak_bytes"][way]
            where = shape if row["device"] == "cpu" else f"{shape}, {row['device']}"
            spread = f"{1000 * time['median']:.1f} ± {500 * time['iqr']:.1f}"
            lines.append([f"{name}, {where}", spread, f"{peak / 2**20:.1f}"])
    return markdown_table(["forward and backward", "ms", "peak extra MiB"], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "highres.json", page=PAGES / "losses.md")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, default=SIDE, help="of the logits; another than the default is not written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    settle_memory()
    results = Results(options.results)
    found = {}
    for loss in LOSSES if not options.table else ():
        for n in options.batch:
            name = key(loss, n, options.side, options.device)
            if options.side == SIDE and name in results and not options.again:
                continue
            found[name] = measure(loss, n, options.side, options.device)
            if options.side == SIDE:
                results.add(name, found[name])
    print(table(results.rows if options.side == SIDE else found))
    if options.side == SIDE and not options.no_table:
        write_section("highres", table(results.rows), options.page)


if __name__ == "__main__":
    main()
