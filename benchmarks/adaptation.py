"""Adaptation under ONE policy: every recipe with the same options on every pair, scored without labels as it trains.

    UDAKIT_DATA=/data python benchmarks/adaptation.py                      # whatever is not in the JSON yet
    python benchmarks/adaptation.py --pairs nuclei toy --rows dacs combined --seeds 0 1
    python benchmarks/adaptation.py --choose                               # which policy the other pairs choose

A pair brings its paths, net, crop and numbers of steps; all that a method or an augmentation could be tuned by is the
policy's. The line under the table names the setting of DACS that the OTHER pairs choose (the street pairs, which share
images, are left out together). A run is (pair, row, seed): a source-only warm start, shared by the rows of a seed,
then the same number of optimiser steps for each row. The last checkpoint counts, never the best on validation; every
100 steps the label-free scores of all nets are kept beside their true mIoU, for benchmarks/selection.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import torch

import train_gta2cs
from benchmarks import adaptation_tables as tables
from benchmarks.adaptation_rows import (
    ADAPTATION_LR,
    AUGMENT,
    EVERY,
    FURTHER,
    GROUPS,
    LR,
    MATCH,
    PAIRS,
    SCALES,
    STARTS,
    WARM_UP,
    rows_of,
)
from benchmarks.harness import device_name, write_section
from gta2cs.checkpoints import load_checkpoint
from gta2cs.datasets import Pair
from gta2cs.evaluation import evaluate, headline
from gta2cs.files import write_json
from gta2cs.histories import histories_of
from gta2cs.label_free import measure
from gta2cs.loading import StepData, step_loader
from gta2cs.pretrained import load_init
from gta2cs.run_folder import stage_folder
from gta2cs.target_statistics import with_shares

RESULTS = ROOT / "benchmarks" / "results" / "adaptation.json"
PAGE = ROOT / "docs" / "results" / "one_policy.md"
SUMMARY = ROOT / "docs" / "results.md"
SCORES_PAGE = ROOT / "docs" / "results" / "scores.md"
COMBINED_PAGE = ROOT / "docs" / "methods" / "combined.md"


def configure(pair: str, row: str, seed: int, data_root: Path | None, cache: Path) -> train_gta2cs.Config:
    """The run of a row, or of one of `STARTS`; "warm" is the source-only net that all rows of a seed start from."""
    own = {**PAIRS, **FURTHER}[pair]
    starts = row in STARTS
    entry = {"recipes": ["source_only"]} if starts else rows_of()[row]
    steps = own["warm"] if starts else own["steps"] * entry.get("times", 1)
    recipes = entry["recipes"]
    counts = [steps // len(recipes)] * len(recipes)
    counts[-1] += steps - sum(counts)
    options = {**({} if entry.get("own") else AUGMENT), **entry.get("options", {})}
    if "large_start" in entry:
        options = {**options, "large_init": str(warm_start(pair, seed, cache, entry["large_start"]))}
    each = [options.get(recipe, options) for recipe in recipes]  # by recipe, or the same for all
    lr = LR.get(row, LR["source_only"] if starts else ADAPTATION_LR)
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(
            pair=own.get("of", pair),
            data_root=data_root,
            crop=own["crop"],
            **{**roots_of(own, data_root), **SCALES, **MATCH, **entry.get("data", {})},
        ),
        net=train_gta2cs.NetConfig(**own["net"], **STARTS.get(row, {})),
        stages=[
            train_gta2cs.Stage(recipe, n, lr=lr, lr_warmup=WARM_UP, options=dict(given))
            for recipe, n, given in zip(recipes, counts, each, strict=True)
        ],
        head_multiplier=3.0,
        seed=seed if starts else seed + 100,  # other batches than those of what it starts from
        init=None if starts else warm_start(pair, seed, cache),
        out=cache / pair / f"seed{seed}" / row,
        eval_every=EVERY,
        score_views=["mirror", "shift", "crop", "rotation"],
        save_every=100,
        resume=True,
    )


def roots_of(own: dict[str, Any], data_root: Path | None) -> dict[str, Path]:
    """Folders of a pair whose domains change places."""
    if "folders" not in own:
        return {}
    root = Path() if data_root is None else data_root
    return {name: root / folder for name, folder in zip(("source_root", "target_root"), own["folders"], strict=True)}


def warm_start(pair: str, seed: int, cache: Path, which: str = "warm") -> Path:
    """Where a source-only net of a seed lies once it is trained."""
    return cache / pair / f"seed{seed}" / which / stage_folder(0, "source_only") / "last.pt"


def warmed(pair: str, seed: int, data_root: Path | None, cache: Path, which: str = "warm") -> train_gta2cs.Config:
    """Configuration of a source-only net of a seed, which is trained first where it is missing."""
    config = configure(pair, which, seed, data_root, cache)
    if not (config.out / "results.json").is_file():
        train_gta2cs.main(config)
    return config


def started(
    pair: str, seed: int, data_root: Path | None, cache: Path
) -> tuple[train_gta2cs.Config, Pair, torch.nn.Module]:
    """A seed's source-only net, with its configuration and pair."""
    config = warmed(pair, seed, data_root, cache)
    opened = train_gta2cs.open_pair(config)
    net = config.net.build(len(opened.classes.names))
    load_init(net, warm_start(pair, seed, cache))
    return config, opened, net


def run(pair: str, row: str, seed: int, data_root: Path | None, cache: Path) -> dict[str, Any]:
    """Train a row, its warm start first where that is missing, and return what the JSON keeps of it."""
    if row not in STARTS:
        warmed(pair, seed, data_root, cache)
        if large := rows_of()[row].get("large_start"):
            warmed(pair, seed, data_root, cache, large)
    config = configure(pair, row, seed, data_root, cache)
    began = time.perf_counter()
    rows = train_gta2cs.main(config)
    histories = histories_of(config)
    source_only = start_of(histories, warm_start(pair, seed, cache))
    return {
        "pair": pair,
        "recipe": row,
        "seed": seed,
        "bad": bool(row not in STARTS and rows_of()[row].get("bad", False)),
        "start": None if row in STARTS else "warm",
        "steps": sum(h["steps"] for h in histories),
        "seconds": round(time.perf_counter() - began, 1),
        "device": device_name(),
        "stages": [dataclasses.asdict(stage) for stage in config.stages],
        "source_only": source_only,
        "rows": {title: score.to_json() for title, score in rows.items()},
        "checkpoints": list(checkpoints_of(histories)),
        "target_statistics": statistics_of(config),
    }


def statistics_of(config: train_gta2cs.Config) -> dict[str, Any]:
    """What `with_target_statistics` finds for the nets where a run starts and where it ends."""
    paths = {"start": config.init, "last": last_of(config)}
    return {name: with_target_statistics(config, path) for name, path in paths.items() if path is not None}


def last_of(config: train_gta2cs.Config) -> Path:
    """The checkpoint of the last stage."""
    return config.out / stage_folder(len(config.stages) - 1, config.stages[-1].recipe) / "last.pt"


def with_target_statistics(config: train_gta2cs.Config, path: Path) -> dict[str, dict[str, Any]]:
    """Truth and score of a run's student with the BatchNorm statistics of its training, of target, and half of each."""
    pair = train_gta2cs.open_pair(config)
    assert pair.target_val is not None
    net = config.net.build(len(pair.classes.names))
    load_init(net, path)
    data = StepData(
        pair.source_train, pair.target_train, batch_size=config.batch_size, crop=config.data.crop, seed=config.seed
    )
    crops = (batch.target_images for batch in step_loader(data, start=0, stop=50))
    found: dict[str, dict[str, Any]] = {}
    shares = None  # of the classes, with the statistics of training, which come first
    for name, seen in zip(tables.STATISTICS_OF, with_shares(net, crops).values(), strict=True):
        unlabelled = measure(seen, pair.target_train, pair.classes, known=shares)
        truth = evaluate(seen, pair.target_val, pair.classes)
        shares = shares or unlabelled.shares
        found[name] = {"miou": truth.means[headline(truth.means)], **unlabelled.to_json()}
    return found


def start_of(histories: list[dict[str, Any]], warm: Path) -> dict[str, Any] | None:
    """Scores of the net that the first adapting stage starts from, with its truth: where the stage before ended."""
    position = next((k for k, history in enumerate(histories) if "source_only" in history), None)
    if position is None:
        return None
    if position == 0:
        return {**histories[0]["source_only"], "miou": truth_of(warm)}
    *_, end = (net for net in checkpoints_of(histories[:position]))
    return {**histories[position]["source_only"], "miou": end["miou"]}


def truth_of(checkpoint: Path) -> float:
    """mIoU of the first net at the end of a stage."""
    entry = json.loads(load_checkpoint(checkpoint)["history"])["scores"][-1]
    means: dict[str, float] = next(iter(entry["nets"].values()))["means"]
    return means[headline(means)]


def checkpoints_of(histories: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Truth and label-free scores of every net at every evaluation; steps count over all stages."""
    before = 0
    for history in histories:
        unlabelled = {entry["step"]: entry["nets"] for entry in history.get("label_free", [])}
        for entry in history["scores"]:
            for net, score in entry["nets"].items():
                found = unlabelled.get(entry["step"], {}).get(net, {})
                yield {
                    "step": before + entry["step"],
                    "net": net,
                    "miou": score["means"][headline(score["means"])],
                    "means": score["means"],
                    "iou": score["iou"],
                    **found,
                }
        before += history["steps"]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def add(path: Path, key: str, result: dict[str, Any] | list[Any]) -> None:
    """Add a result to the JSON, also beside another process that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(path, {**load(path), key: result})


def parser_of_runs(
    description: str, *, results: Path, page: Path, pairs: Sequence[str], of: Sequence[str], seeds: Sequence[int]
) -> argparse.ArgumentParser:
    """The options of every script whose runs are (pair, ..., seed): by default `pairs`, of those in `of`."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--data-root", type=Path, default=os.environ.get("UDAKIT_DATA"))
    parser.add_argument("--pairs", nargs="+", choices=list(of), default=list(pairs))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "adaptation")
    parser.add_argument("--table", action="store_true", help=f"run nothing, rewrite the table of {page.name}")
    return parser


def run_missing(
    runs: Iterable[tuple[Any, ...]], run: Callable[..., dict[str, Any] | list[Any]], options: argparse.Namespace
) -> None:
    """Add `run(*key, data_root, cache)` to the JSON for every key (pair, ..., seed) that it lacks."""
    root = Path(options.data_root) if options.data_root else None
    for case in runs:
        if (key := "/".join(map(str, case))) in load(options.results):
            continue
        if case[0] != "toy" and (root is None or not root.is_dir()):
            print(f"skipped {key}: no --data-root and no UDAKIT_DATA")
            continue
        print(f"== {key}", flush=True)
        add(options.results, key, run(*case, root, options.cache))


def main_of_starts(
    description: str, section: str, run: Callable[..., Any], table: Callable[[dict[str, Any]], str], results: Path
) -> None:
    """Run a script about the source-only nets, whose table is a section of the page of `combined`."""
    options = parser_of_runs(
        description, results=results, page=COMBINED_PAGE, pairs=[*PAIRS], of=[*PAIRS], seeds=[0]
    ).parse_args()
    if options.table:
        write_section(section, table(load(options.results)), COMBINED_PAGE)
        return
    run_missing([(pair, seed) for seed, pair in itertools.product(options.seeds, options.pairs)], run, options)


def main() -> None:
    parser = parser_of_runs(__doc__, results=RESULTS, page=PAGE, pairs=[*PAIRS], of=[*PAIRS, *FURTHER], seeds=[0, 1, 2])
    parser.add_argument("--group", default="main", choices=list(GROUPS))
    parser.add_argument("--rows", nargs="+", help="default: all of the group")
    parser.add_argument("--study", type=Path, help="train nothing, write the runs for benchmarks/selection.py here")
    parser.add_argument(
        "--statistics", action="store_true", help="train nothing, score statistics of target where kept"
    )
    parser.add_argument("--choose", action="store_true", help="train nothing, say which setting each pair's row uses")
    options = parser.parse_args()
    if options.choose:
        for pair in PAIRS:
            print(f"{pair}: {tables.choose(pair, load(options.results))}, chosen on the other pairs")
        return
    if options.table or options.study:
        results = load(options.results)
        if options.table:
            write_section("policy_summary", tables.summary(results), SUMMARY)
            write_section("one_policy", tables.table(results), PAGE)
            write_section("further", tables.further(results), PAGE)
            write_section("either", tables.either(results), PAGE)
            write_section("longer", tables.longer(results), PAGE)
            write_section("labelling", tables.labelling(results), COMBINED_PAGE)
            write_section("without", tables.without(results), COMBINED_PAGE)
            write_section("weighed", tables.weighed(results), COMBINED_PAGE)
            write_section("tried", tables.tried(results), COMBINED_PAGE)
            write_section("target_statistics", tables.target_statistics(results), SCORES_PAGE)
        if options.study:
            write_json(options.study, tables.study(results))
        return
    if options.statistics:
        for key, result in load(options.results).items():
            root = Path(options.data_root) if options.data_root else None
            config = configure(result["pair"], result["recipe"], result["seed"], root, options.cache)
            if "target_statistics" not in result and last_of(config).is_file():
                print(f"== {key}", flush=True)
                add(options.results, key, {**result, "target_statistics": statistics_of(config)})
        return
    rows = options.rows or GROUPS[options.group]
    cases = itertools.product(options.seeds, rows, options.pairs)
    run_missing([(pair, row, seed) for seed, row, pair in cases], run, options)


if __name__ == "__main__":
    main()
