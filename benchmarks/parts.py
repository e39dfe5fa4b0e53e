"""What one part adds to DACS: every part alone, with its published setting, in equally many steps.

    UDAKIT_DATA=/data python benchmarks/parts.py                          # whatever is not in the JSON yet
    python benchmarks/parts.py --pairs nuclei --parts mic_random rectified --seeds 0
    python benchmarks/parts.py --table                                    # trains nothing, writes the tables

Images, net, augmentation, learning rate and the source-only start are those of benchmarks/adaptation.py: no option was
chosen by looking at a result of these runs, and a part's own options are those of its paper, made fit for crops of 128
pixels and a few hundred steps. The last student counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import train_gta2cs
from benchmarks import adaptation, adaptation_tables, selection
from benchmarks.harness import PAIR_NAMES, write_section
from gta2cs.files import write_json
from gta2cs.histories import histories_of

RESULTS = ROOT / "benchmarks" / "results" / "parts.json"
PAGE = ROOT / "docs" / "results" / "parts.md"
MASKED = ROOT / "docs" / "methods" / "mic.md"
TRIAL = "carla2camvid"  # where masked consistency did not help in half of the steps
SCORES = ROOT / "docs" / "results" / "scores.md"
SUMMARY = ROOT / "docs" / "methods" / "which_brings_what.md"
STEPS = {"nuclei": 200, "nuclei_backwards": 200, "toy": 200, "carla2camvid": 800}
LOST, WON = 1, 3  # points of mIoU against the source-only start, of a run that should be kept back or deployed
BASE = "dacs"
POLICY = "dacs_batch"  # the row of benchmarks/adaptation.py; the released code of these parts labels in train mode
SELECTION = {"selector": "confident_ratio"}
# Name, title, options of the recipe beside those of the policy.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("DACS alone", {}),
    "mic_random": ("masked consistency, random blocks", {"mask_weight": 1.0, "mask_ratio": 0.7}),
    "mic_complements": (
        "masked consistency, both complements",
        {"mask_weight": 1.0, "mask_ratio": 0.5, "mask_complements": True},
    ),
    "rectified": ("rectified labels (ProDA)", {"selector": "rectified"}),
    "symmetric": ("symmetric cross-entropy", {"pseudo_loss": "symmetric_cross_entropy"}),
    "adaptive": ("adaptive thresholds", {"selector": "adaptive"}),
    "aligned": ("aligned class shares", {"align": True}),
    "feature_distillation": ("feature distillation, of the ImageNet encoder", {"feature_distillation": 0.1}),
    "distribution_contrast": ("distribution contrast (SePiCo)", {"contrast": 1.0}),
    "prototype_contrast": ("pixel against prototype contrast", {"prototype_contrast": 0.1}),
    "mirror_teacher": ("teacher's mean over mirror images", {"mirror_teacher": True}),
    "class_quantile": ("class quantiles, the policy's selection", {"selector": "class_quantile"}),
}

# What the papers' ablations say of a part on GTA5 -> Cityscapes: docs/methods/which_brings_what.md has the sources.
PUBLISHED = {
    "mic_random": "+2.1 on HRDA",
    "mic_complements": "+1.7 over random masks",
    "rectified": "+10.4 over the warm-up net, with symmetric cross-entropy and two further terms",
    "feature_distillation": "+1.4 over VFM-UDA, with a multi-scale adapter",
}


def configure(pair: str, part: str, seed: int, data_root: Path | None, cache: Path) -> train_gta2cs.Config:
    """The run of a part: the policy's DACS with batch statistics, and DACS' own selection in place of the policy's."""
    config = adaptation.configure(pair, POLICY, seed, data_root, cache)
    (stage,) = config.stages
    options = {**stage.options, **SELECTION, **PARTS[part][1]}
    return dataclasses.replace(
        config,
        stages=[dataclasses.replace(stage, steps=STEPS[pair], options=options)],
        out=cache / pair / f"seed{seed}" / f"part_{part}",
        score_views=["mirror"],
    )


def run(pair: str, part: str, seed: int, data_root: Path | None, cache: Path) -> dict[str, Any]:
    """Train a part, its source-only start first where that is missing, and return what the JSON keeps of it."""
    adaptation.warmed(pair, seed, data_root, cache)
    config = configure(pair, part, seed, data_root, cache)
    began = time.process_time()
    train_gta2cs.main(config)
    histories = histories_of(config)
    start = adaptation.truth_of(adaptation.warm_start(pair, seed, cache))
    return {
        "pair": pair,
        "part": part,
        "seed": seed,
        "steps": histories[-1]["steps"],
        "start": start,
        "source_only": {**histories[0]["source_only"], "miou": start},
        "processor_seconds": round(time.process_time() - began, 1),
        "options": config.stages[-1].options,
        "checkpoints": list(adaptation.checkpoints_of(histories)),
    }


def last(run: dict[str, Any], net: str = "student") -> float:
    """True mIoU of a run's last net of a name."""
    return float(adaptation_tables.last_net(run, net)["miou"])


def gains(results: dict[str, Any], pair: str, part: str, net: str = "student") -> list[float]:
    """Differences to DACS alone, one for each seed that has run both."""
    found = [results.get(f"{pair}/{part}/{r['seed']}") for r in results.values() if is_run(r, pair, BASE)]
    return [last(r, net) - last(results[f"{pair}/{BASE}/{r['seed']}"], net) for r in found if r is not None]


def is_run(run: dict[str, Any], pair: str, part: str) -> bool:
    return (run["pair"], run["part"]) == (pair, part)


def table(results: dict[str, Any], of: Iterable[str] = ("nuclei", "nuclei_backwards", "toy")) -> str:
    """Markdown: a line a part; for each pair the student, its gain over DACS of the same seed, and the teacher's."""
    pairs = [pair for pair in of if any(is_run(r, pair, BASE) for r in results.values())]
    if not pairs:
        return "Not measured yet.\n"
    head = " | ".join(f"{PAIR_NAMES[pair]} | gain | teacher, gain" for pair in pairs)
    lines = [f"| added to DACS | {head} |", "|---|" + "---:|---:|---:|" * len(pairs)]
    starts = [[r["start"] for r in results.values() if is_run(r, pair, BASE)] for pair in pairs]
    lines.append(f"| source-only start | {' | '.join(f'{adaptation_tables.spread(s)} | | ' for s in starts)} |")
    for part, (title, _) in PARTS.items():
        if not any(is_run(r, pair, part) for pair in pairs for r in results.values()):
            continue
        cells: list[str] = []
        for pair in pairs:
            values = [last(r) for r in results.values() if is_run(r, pair, part)]
            cells.append(adaptation_tables.spread(values) if values else "not run")
            added = values and part != BASE
            cells += [signed(gains(results, pair, part, net)) if added else "" for net in ("student", "teacher")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    steps = ", ".join(f"{STEPS[pair]} on {PAIR_NAMES[pair]}" for pair in pairs)
    return "\n".join(lines) + f"\n\nSteps after the start: {steps}. In brackets each seed's gain.\n"


def trial(results: dict[str, Any]) -> str:
    """Markdown: the same of the pair on which one part was asked about."""
    return table(results, [TRIAL])


def guard(results: dict[str, Any]) -> str:
    """Markdown: in how many runs the last student lost and the loop kept its start, or won and was deployed."""
    lines = [
        f"| | runs | lost more than {LOST} | kept back | won {WON} and more | deployed | gain of the last student "
        "| of the net chosen without labels |",
        "|---|" + "---:|" * 7,
    ]
    for pair in PAIR_NAMES:
        runs = [r for r in results.values() if r["pair"] == pair and adaptation_tables.guarded(r) is not None]
        if not runs:
            continue
        chosen = [adaptation_tables.chosen(r)["miou"] - r["source_only"]["miou"] for r in runs]
        means = [signed([statistics.mean(values)]) for values in ([gain_of(r) for r in runs], chosen)]
        lines.append(f"| {PAIR_NAMES[pair]} | {' | '.join(map(str, [len(runs), *guard_counts(runs), *means]))} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "Not measured yet.\n"


def gain_of(run: dict[str, Any]) -> float:
    """Points of mIoU of the last student over the net that it started from."""
    return float(last(run) - run["source_only"]["miou"])


def guard_counts(runs: Iterable[dict[str, Any]]) -> tuple[int, int, int, int]:
    """Runs whose student lost, those of them whose start was kept, runs whose student won, those deployed."""
    found = [(run, adaptation_tables.guarded(run)) for run in runs]
    judged = [(gain_of(run), net is run["source_only"]) for run, net in found if net is not None]
    lost = [kept for gain, kept in judged if gain < -LOST]
    won = [not kept for gain, kept in judged if gain >= WON]
    return len(lost), sum(lost), len(won), sum(won)


def weights(results: dict[str, Any]) -> str:
    """Markdown: what the guard would gain with other weights of the classes in its score."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for run in results.values():
        if adaptation_tables.guarded(run) is not None and run["source_only"].get("class_iou"):
            named = [{**net, "truth_miou": net["miou"]} for net in (run["source_only"], *run["checkpoints"])]
            pairs.setdefault(run["pair"], []).append({"start": named[0], "checkpoints": named[1:]})
    ordered = {pair: pairs[pair] for pair in PAIR_NAMES if pair in pairs}
    return selection.weights_table(ordered) if ordered else "Not measured yet.\n"


def published(results: dict[str, Any]) -> str:
    """Markdown: the published gain of a part beside ours on each pair."""
    pairs = [pair for pair in STEPS if any(is_run(r, pair, BASE) for r in results.values())]
    if not pairs:
        return "Not measured yet.\n"
    lines = ["| part | published | " + " | ".join(PAIR_NAMES[pair] for pair in pairs) + " |"]
    lines.append("|---|---|" + "---:|" * len(pairs))
    for part, gain in PUBLISHED.items():
        found = [signed(gains(results, pair, part)) or "not run" for pair in pairs]
        lines.append(f"| {PARTS[part][0]} | {gain} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def signed(values: list[float]) -> str:
    """Mean of the gains, and each seed's behind it where there are two at least."""
    if not values:
        return ""
    each = f" ({', '.join(f'{v:+.1f}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{each}".replace("-", "−")


def main(arguments: list[str] | None = None) -> None:
    parser = adaptation.parser_of_runs(
        __doc__, results=RESULTS, page=PAGE, pairs=["nuclei", "toy"], of=[*STEPS], seeds=[0, 1]
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args(arguments)
    if options.table:
        results = adaptation.load(options.results)
        write_json(RESULTS, results)
        write_section("parts", table(results), PAGE)
        write_section("parts_published", published(results), SUMMARY)
        write_section("masked_trial", trial(results), MASKED)
        both = {**adaptation.load(adaptation.RESULTS), **results}
        write_section("guard", guard(both), SCORES)
        write_section("weights", weights(both), SCORES)
        return
    cases = itertools.product(options.seeds, options.pairs, options.parts)
    adaptation.run_missing([(pair, part, seed) for seed, pair, part in cases], run, options)


if __name__ == "__main__":
    main()
