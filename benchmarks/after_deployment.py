"""Adaptation without source data: BatchNorm's statistics, TENT, information maximisation, each alone and together.

    UDAKIT_DATA=/data python benchmarks/after_deployment.py      # whatever is not in the JSON yet
    python benchmarks/after_deployment.py --table                # adapts nothing, writes the table

The nets are the source-only starts of benchmarks/adaptation.py. `adapt` of examples/integrations/source_free.py adapts
them on unlabelled crops of target training images, one pass of 60 batches of 4, and the target validation set scores
the net of the last step, as well as the net that the label-free score keeps. Two further scores pick among the six
nets: the agreement with their mean, and the accuracy that confidence lets expect, which needs labelled source crops.
"""

from __future__ import annotations

import importlib.util
import itertools
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

from benchmarks import adaptation, adaptation_tables
from benchmarks.harness import PAIR_NAMES, write_section
from gta2cs.datasets import Pair
from gta2cs.evaluation import evaluate, headline
from gta2cs.files import write_json
from gta2cs.loading import Batch, StepData, step_loader
from gta2cs.nets import SegNet
from udakit import ConfidenceThreshold, EnsembleAgreement

RESULTS = ROOT / "benchmarks" / "results" / "after_deployment.json"
PAGE = ROOT / "docs" / "methods" / "test_time.md"
PAIRS = ("nuclei", "nuclei_backwards", "camvid")
STEPS, BATCH = 60, 4
KEPT = " kept"  # behind a row's name: the net that the label-free score keeps
LOOKED_AT = 10  # batches that compare the nets
PICKS = {
    "agreement": "of these six, the one that all together agree with most",
    "expected_accuracy": "of these six, the one of the highest expected accuracy",
}
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
    config, pair, net = adaptation.started(pair_name, seed, data_root, cache)
    batches = crops_of(pair, config.data.crop, seed)
    images = torch.cat([batch.target_images for batch in batches])
    module = source_free()
    found, nets = {"source_only": score(net, pair)}, {"source_only": Logits(net).eval()}
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
        found[name], nets[name] = score(adapted.last.net, pair), adapted.last.eval()
        found[name + KEPT] = score(adapted.net.net, pair)
        print(f"{pair_name} {seed} {name}: {found[name]} (source-only {found['source_only']})", flush=True)
    return {
        "pair": pair_name,
        "seed": seed,
        "images": len(images),
        "steps": STEPS,
        "miou": found,
        "agreement": agreement_of(nets, batches[:LOOKED_AT]),
        "expected_accuracy": {name: expected_accuracy(net, batches[:LOOKED_AT]) for name, net in nets.items()},
        "processor_seconds": seconds,
    }


def crops_of(pair: Pair, crop: tuple[int, int], seed: int) -> list[Batch]:
    """One pass of crops: unlabelled ones of target training images, and labelled ones of source."""
    data = StepData(pair.source_train, pair.target_train, batch_size=BATCH, crop=crop, seed=seed)
    return list(step_loader(data, start=0, stop=STEPS))


@torch.no_grad()
def agreement_of(nets: dict[str, nn.Module], batches: list[Batch]) -> dict[str, float]:
    """How far each net agrees with all of them together (EnsV), on target crops."""
    agreement = EnsembleAgreement(len(nets), kind="logits")
    for batch in batches:
        agreement([net(batch.target_images) for net in nets.values()])
    return dict(zip(nets, (round(x, 4) for x in agreement.compute().tolist()), strict=True))


@torch.no_grad()
def expected_accuracy(net: nn.Module, batches: list[Batch]) -> float:
    """Accuracy on target as the confidence has it, by a threshold that is right on source (ATC)."""
    threshold = ConfidenceThreshold()
    for batch in batches:
        threshold.fit(net(batch.source_images), batch.source_labels)
    found = [float(threshold.estimate(net(batch.target_images))) for batch in batches]
    return round(sum(found) / len(found), 4)


def score(net: nn.Module, pair: Pair) -> float:
    """True mIoU on the target validation set."""
    assert pair.target_val is not None
    means = evaluate(net, pair.target_val, pair.classes).means
    return round(means[headline(means)], 2)


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a row, a column a pair, the gain over source-only of the same seeds behind each."""
    runs = {pair: [r for r in results.values() if r["pair"] == pair] for pair in PAIRS}
    pairs = [pair for pair in PAIRS if runs[pair]]
    if not pairs:
        return "Not measured yet.\n"
    lines = ["| | " + " | ".join(PAIR_NAMES[pair] for pair in pairs) + " |", "|---|" + "---:|" * len(pairs)]
    for name, (title, _) in ROWS.items():
        lines.append(line(title, name, [runs[pair] for pair in pairs]))
    for score_name, title in PICKS.items():
        lines.append(line(title, score_name, [runs[pair] for pair in pairs]))
    best = "statistics_information" + KEPT
    lines.append(
        line(
            "statistics, then information maximisation, or what mirror consistency keeps in its place",
            best,
            [runs[p] for p in pairs],
        )
    )
    return "\n".join(lines) + "\n"


def line(title: str, name: str, columns: list[list[dict[str, Any]]]) -> str:
    cells = []
    for runs in columns:
        values = [r["miou"][max(r[name], key=r[name].get) if name in PICKS else name] for r in runs]
        text = adaptation_tables.spread(values)
        if name != "source_only":
            gain = sum(v - r["miou"]["source_only"] for v, r in zip(values, runs, strict=True)) / len(runs)
            text += f" ({gain:+.1f})".replace("-", "−")
        cells.append(text)
    return f"| {title} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = adaptation.parser_of_runs(__doc__, results=RESULTS, page=PAGE, pairs=PAIRS, of=PAIRS, seeds=[0, 1])
    options = parser.parse_args(arguments)
    if options.table:
        results = adaptation.load(options.results)
        write_json(RESULTS, results)
        write_section("after_deployment", table(results), PAGE)
        return
    cases = itertools.product(options.seeds, options.pairs)
    adaptation.run_missing([(pair, seed) for seed, pair in cases], run, options)


if __name__ == "__main__":
    main()
