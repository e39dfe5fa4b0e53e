"""Adaptation without source data: BatchNorm's statistics, TENT, information maximisation, each alone and together.

    UDAKIT_DATA=/data python benchmarks/after_deployment.py      # whatever is not in the JSON yet
    python benchmarks/after_deployment.py --table                # adapts nothing, writes the table

The nets are the source-only starts of benchmarks/adaptation.py. `adapt` of examples/integrations/source_free.py adapts
them on unlabelled crops of target training images, one pass of 60 batches of 4, and the target validation set scores
the net of the last step, as well as the net that the label-free score keeps.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import torch
from torch import Tensor, nn

import train_gta2cs
from benchmarks import adaptation
from benchmarks.harness import write_section
from gta2cs.datasets import Pair
from gta2cs.evaluation import evaluate
from gta2cs.files import write_json
from gta2cs.loading import StepData, step_loader
from gta2cs.nets import SegNet
from gta2cs.pretrained import load_init

RESULTS = ROOT / "benchmarks" / "results" / "after_deployment.json"
PAGE = ROOT / "docs" / "methods" / "test_time.md"
PAIRS = ("nuclei", "nuclei_backwards", "camvid")
STEPS, BATCH = 60, 4
KEPT = " kept"  # behind a row's name: the net that the label-free score keeps
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "source_only": ("source-only", {}),
    "statistics": ("BatchNorm's statistics", {"steps": 0}),
    "entropy": ("entropy on scales and shifts", {"loss_of": "mean_entropy", "statistics": False}),
    "information": ("information maximisation on scales and shifts", {"statistics": False}),
    "statistics_entropy": ("statistics, then entropy (TENT)", {"loss_of": "mean_entropy"}),
    "statistics_information": ("statistics, then information maximisation", {}),
}


def source_free() -> ModuleType:
    """The integration script, as a module."""
    spec = importlib.util.spec_from_file_location("source_free", ROOT / "examples" / "integrations" / "source_free.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Logits(nn.Module):
    """A net of the loop as one that returns logits."""

    def __init__(self, net: SegNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the images' size."""
        return self.net(images).logits  # type: ignore[no-any-return]


def run(pair_name: str, seed: int, data_root: Path | None, cache: Path) -> dict[str, Any]:
    """Adapt the source-only net of a seed in every way, and score each."""
    config = adaptation.configure(pair_name, "warm", seed, data_root, cache)
    if not (config.out / "results.json").is_file():
        train_gta2cs.main(config)
    pair = train_gta2cs.open_pair(config)
    net = config.net.build(len(pair.classes.names))
    load_init(net, adaptation.warm_start(pair_name, seed, cache))
    images = target_crops(pair, config.data.crop, seed)
    module = source_free()
    found = {"source_only": score(net, pair)}
    seconds = {}
    for name, (_, options) in ROWS.items():
        if name == "source_only":
            continue
        torch.manual_seed(seed)
        began = time.process_time()
        given = {"steps": STEPS, **options}
        if "loss_of" in given:
            given["loss_of"] = getattr(module, given["loss_of"])
        adapted = module.adapt(Logits(net).eval(), images, batch_size=BATCH, **given)
        seconds[name] = round(time.process_time() - began, 1)
        found[name] = score(adapted.last.net, pair)
        found[name + KEPT] = score(adapted.net.net, pair)
        print(f"{pair_name} {seed} {name}: {found[name]} (source-only {found['source_only']})", flush=True)
    return {
        "pair": pair_name,
        "seed": seed,
        "images": len(images),
        "steps": STEPS,
        "miou": found,
        "processor_seconds": seconds,
    }


def target_crops(pair: Pair, crop: tuple[int, int], seed: int) -> Tensor:
    """(M, K, h, w) unlabelled crops of target training images, one pass of the adaptation."""
    data = StepData(pair.source_train, pair.target_train, batch_size=BATCH, crop=crop, seed=seed)
    return torch.cat([batch.target_images for batch in step_loader(data, start=0, stop=STEPS)])


def score(net: nn.Module, pair: Pair) -> float:
    """True mIoU on the target validation set."""
    assert pair.target_val is not None
    means = evaluate(net, pair.target_val, pair.classes).means
    return round(means[adaptation.headline(means)], 2)


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a row, a column a pair, the gain over source-only of the same seeds behind each."""
    runs = {pair: [r for r in results.values() if r["pair"] == pair] for pair in PAIRS}
    pairs = [pair for pair in PAIRS if runs[pair]]
    if not pairs:
        return "Not measured yet.\n"
    lines = ["| | " + " | ".join(adaptation.NAMES[pair] for pair in pairs) + " |", "|---|" + "---:|" * len(pairs)]
    for name, (title, _) in ROWS.items():
        lines.append(line(title, name, [runs[pair] for pair in pairs]))
    best = "statistics_information" + KEPT
    lines.append(line("the line above, or what a label-free score keeps in its place", best, [runs[p] for p in pairs]))
    return "\n".join(lines) + "\n"


def line(title: str, name: str, columns: list[list[dict[str, Any]]]) -> str:
    cells = []
    for runs in columns:
        text = adaptation.spread([r["miou"][name] for r in runs])
        if name != "source_only":
            gain = sum(r["miou"][name] - r["miou"]["source_only"] for r in runs) / len(runs)
            text += f" ({gain:+.1f})".replace("-", "−")
        cells.append(text)
    return f"| {title} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-root", type=Path, default=os.environ.get("UDAKIT_DATA"))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "adaptation")
    parser.add_argument("--table", action="store_true", help=f"adapt nothing, rewrite the table of {PAGE.name}")
    options = parser.parse_args(arguments)
    if options.table:
        results = adaptation.load(options.results)
        write_json(RESULTS, results)
        write_section("after_deployment", table(results), PAGE)
        return
    root = Path(options.data_root) if options.data_root else None
    for seed, pair in itertools.product(options.seeds, options.pairs):
        if (key := f"{pair}/{seed}") in adaptation.load(options.results):
            continue
        if root is None or not root.is_dir():
            print(f"skipped {key}: no --data-root and no UDAKIT_DATA")
            continue
        print(f"== {key}", flush=True)
        adaptation.add(options.results, key, run(pair, seed, root, options.cache))


if __name__ == "__main__":
    main()
