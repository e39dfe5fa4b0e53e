"""The results table: every recipe on every pair of domains, over seeds, resumable.

    UDAKIT_DATA=/data python benchmarks/real_pairs.py            # whatever is not in the JSON yet
    python benchmarks/real_pairs.py --data-root /data --pairs camvid --recipes source_only dacs --seeds 0 1 2
    python benchmarks/real_pairs.py --group diga_ablation        # DiGA part by part, on one pair
    python benchmarks/real_pairs.py --table                      # only rewrite docs/results.md and its sub-pages

A run is (pair, recipe, seed). A source-only warm start is trained once for each (pair, seed) and net, and shared; every
recipe then takes the same number of optimiser steps from it. The last checkpoint counts, never the best on validation.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import torch

import train_gta2cs
from benchmarks import class_weights, results_page, selection_quality
from benchmarks.rows import GROUPS, PAIRS, net_config, row_of, setting
from gta2cs.datasets import build_pair
from gta2cs.histories import histories_of
from gta2cs.report import write_json
from gta2cs.run_folder import stage_folder

RESULTS = ROOT / "benchmarks" / "results" / "real_pairs.json"
MARKERS = {"main": "real_pairs"}  # of docs/results.md and its sub-pages, where a group's is not its name
NOTHING = "Not measured yet.\n"


def stages_of(pair: str, row: dict[str, Any]) -> list[train_gta2cs.Stage]:
    """Stages of a row; their steps sum to the row's share of the pair's steps."""
    shared = setting(pair)
    total = round((shared.steps + (shared.warm_steps if row.get("from_imagenet") else 0)) * row.get("share", 1))
    parts = row.get("stages") or [{"recipe": row["recipe"]}]
    options = row.get("options", {})
    steps = [total // len(parts)] * len(parts)
    steps[-1] += total - sum(steps)
    lr = row.get("lr", shared.lr)
    return [
        train_gta2cs.Stage(
            part["recipe"],
            n,
            lr=lr,
            lr_warmup=20,
            options={**augment_of(pair, part["recipe"]), **options, **part.get("options", {})},
        )
        for part, n in zip(parts, steps, strict=True)
    ]


def augment_of(pair: str, recipe: str) -> dict[str, float]:
    """The pair's augmentation, for a recipe that augments by itself: `duda_pre` leaves it to its base."""
    known = train_gta2cs.RECIPES[recipe].option_names()
    return {name: value for name, value in setting(pair).augment.items() if name in known}


def base_config(pair: str, seed: int, data_root: Path | None, out: Path, net: str = "standard") -> train_gta2cs.Config:
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(pair=pair, data_root=data_root, **setting(pair).config["data"]),
        net=train_gta2cs.NetConfig(**net_config(pair, net)),
        head_multiplier=3.0,
        seed=seed,
        out=out,
        eval_every=0,
        eval_trimap=3,
        save_every=100,
        resume=True,
    )


def warm_start(
    pair: str, seed: int, data_root: Path | None, cache: Path, dry_run: bool = False, net: str = "standard"
) -> Path:
    """Train the source-only net that every recipe starts from, the oracle too, or find it."""
    out = cache / pair / f"seed{seed}" / ("warm" if net == "standard" else f"warm_{net}")
    config = base_config(pair, seed, data_root, out, net)
    config.dry_run = dry_run
    steps, augment = setting(pair).warm_steps, setting(pair).augment
    config.stages = [train_gta2cs.Stage("source_only", steps, lr=3e-4, lr_warmup=20, options=dict(augment))]
    if not (out / "results.json").is_file():
        train_gta2cs.main(config)
    return out / stage_folder(0, "source_only") / "last.pt"


def last_checkpoint(config: train_gta2cs.Config) -> Path:
    return config.out / stage_folder(len(config.stages) - 1, config.stages[-1].recipe) / "last.pt"


def configure(pair: str, name: str, seed: int, data_root: Path | None, cache: Path) -> train_gta2cs.Config:
    """The run of a row, but for where it starts."""
    row = row_of(pair, name)
    config = base_config(pair, seed, data_root, cache / pair / f"seed{seed}" / name, row.get("net", "standard"))
    config.data = dataclasses.replace(config.data, **{**setting(pair).adaptation_data, **row.get("data", {})})
    config.stages = stages_of(pair, row)
    config.seed = seed + (200 if "start" in row else 100)  # other batches than those of what it starts from
    if config.stages[-1].recipe == "diga":  # the quality of its selection is measured along the way
        config.keep_checkpoints, config.save_every = True, 50
    return config


def start_of(
    pair: str, name: str, seed: int, data_root: Path | None, cache: Path, dry_run: bool = False
) -> Path | None:
    """Checkpoint that a row starts from: none, the warm start, or the end of another row, which is made or found."""
    row = row_of(pair, name)
    if row.get("from_imagenet"):
        return None
    if "start" not in row:
        return warm_start(pair, seed, data_root, cache, dry_run, row.get("net", "standard"))
    return end_of(pair, row["start"], seed, data_root, cache, dry_run)


def end_of(pair: str, name: str, seed: int, data_root: Path | None, cache: Path, dry_run: bool = False) -> Path:
    """Last checkpoint of a row, which is made or found."""
    config = configure(pair, name, seed, data_root, cache)
    if not (config.out / "results.json").is_file():
        run(pair, name, seed, data_root, cache, dry_run)
    return last_checkpoint(config)


def checkpoints_of(
    pair: str, name: str, seed: int, data_root: Path | None, cache: Path, dry_run: bool = False
) -> dict[str, str]:
    """Options of a row that name a checkpoint: the standard net's warm start ("warm"), or the end of another row."""
    return {
        option: str(
            warm_start(pair, seed, data_root, cache, dry_run)
            if source == "warm"
            else end_of(pair, source, seed, data_root, cache, dry_run)
        )
        for option, source in row_of(pair, name).get("checkpoints", {}).items()
    }


def run(pair: str, name: str, seed: int, data_root: Path | None, cache: Path, dry_run: bool = False) -> dict[str, Any]:
    config = configure(pair, name, seed, data_root, cache)
    config.dry_run = dry_run
    config.init = start_of(pair, name, seed, data_root, cache, dry_run)
    stages = [dataclasses.asdict(stage) for stage in config.stages]  # as the results have them: without paths
    checkpoints = checkpoints_of(pair, name, seed, data_root, cache, dry_run)
    for stage in config.stages:
        stage.options = {**stage.options, **checkpoints}
    began = time.perf_counter()
    rows = train_gta2cs.main(config)
    histories = histories_of(config)
    result: dict[str, Any] = {
        "pair": pair,
        "recipe": name,
        "seed": seed,
        "rows": {title: score.to_json() for title, score in rows.items()},
        "seconds": round(time.perf_counter() - began, 1),
        "stages": stages,
        "parameters": parameters_of(config, len(next(iter(rows.values())).iou)),
        "step_seconds": [round(h.get("step_seconds", h["seconds"]) / h["steps"], 3) for h in histories],
        "machine": {"torch": torch.__version__, "cpu": platform.machine(), "cores": os.cpu_count()},
    }
    if per_class := class_weights.thin(histories[-1]):
        result["per_class"] = per_class
    if config.keep_checkpoints:
        images = selection_quality.BATCH if dry_run else selection_quality.IMAGES
        folder, domains = last_checkpoint(config).parent, build_pair(pair, data_root=data_root)
        result["selection"] = selection_quality.measure_run(folder, domains, images)
        for checkpoint in config.out.rglob("step_*.pt"):  # of the stages before, too
            checkpoint.unlink()
    return result


def parameters_of(config: train_gta2cs.Config, classes: int) -> int:
    """Parameters of the net that is deployed."""
    return sum(p.numel() for p in config.net.build(classes, weights="random").parameters())


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def summarize(results: dict[str, Any], group: str = "main") -> str:
    """Markdown: for each pair one table of the means with spread, and of IoU per class."""
    parts = []
    for pair in GROUPS[group].pairs:
        rows: dict[str, list[dict[str, Any]]] = {}
        for recipe in GROUPS[group].rows(pair):
            runs = [r for r in results.values() if (r["pair"], r["recipe"]) == (pair, recipe)]
            for r in sorted(runs, key=lambda r: r["seed"]):
                for name, score in last_rows(r).items():
                    rows.setdefault(name, []).append(score)
        if not rows:
            continue
        first = next(iter(rows.values()))[0]
        means = list(dict.fromkeys(m for scores in rows.values() for s in scores for m in s["means"]))
        classes = list(first["iou"])
        short = ["| row | seeds | " + " | ".join(means) + " |", "|---|---:|" + "---:|" * len(means)]
        table = ["| row | seeds | " + " | ".join(means + classes) + " |"]
        table.append("|---|---:|" + "---:|" * len(means + classes))
        for name, scores in rows.items():
            cells = [spread([s["means"][m] for s in scores if m in s["means"]]) for m in means]
            short.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
            cells += [mean([s["iou"][c] for s in scores]) for c in classes]
            table.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
        per_class = results_page.folded("IoU of every class", "\n".join(table))
        parts.append(f"### {PAIRS[pair]}\n\n" + "\n".join(short) + f"\n\n{per_class}")
    return "\n\n".join(parts) + "\n" if parts else NOTHING


def last_rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of what a run's last stage came to, under the name of its row."""
    stages = result.get("stages") or [result["stage"]]
    recipe, last = result["recipe"], stages[-1]["recipe"]
    found = {}
    for name, score in result["rows"].items():
        if name.split(",")[0].split(" + ")[0] != last or (recipe == "oracle" and "BatchNorm" in name):
            continue
        found[name.replace(last, "oracle (labelled target)" if recipe == "oracle" else recipe)] = score
    return found


def summarize_selection(results: dict[str, Any], pictures: Path) -> str:
    """Markdown and a plot: the selectors on the same nets along DiGA's own run, averaged over its seeds."""
    parts = []
    for pair, title in PAIRS.items():
        row = "self_consensus" if any(k.startswith(f"{pair}/self_consensus/") for k in results) else "diga"
        runs = [r["selection"] for r in results.values() if (r["pair"], r["recipe"]) == (pair, row)]
        if not runs:
            continue
        merged = [average(entries) for entries in zip(*runs, strict=True)]
        last = merged[-1]
        picture = pictures / f"selection_{pair}.png"
        plot_selection(merged, picture)
        seeds = f"{len(runs)} seed" + "s" * (len(runs) > 1)
        parts.append(
            f"### {title}\n\nLabels of the row `{row}` at step {last['step']} mean over {seeds}: "
            "precision of all labels and of the labels of each class, share of all pixels that carry one.\n\n"
            f"{selection_quality.markdown(last)}\n![precision and coverage over the steps](pictures/{picture.name})"
        )
    return "\n\n".join(parts) + "\n" if parts else NOTHING


def average(entries: Sequence[Any]) -> Any:
    """Mean of the numbers of equally nested entries; None where none is known."""
    if isinstance(entries[0], dict):
        return {k: average([e[k] for e in entries]) for k in entries[0]}
    known = [e for e in entries if e is not None]
    return statistics.mean(known) if known else None


def plot_selection(entries: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    steps = [entry["step"] for entry in entries]
    for axis, quantity in zip(axes, ("precision", "coverage"), strict=True):
        for name in entries[0]["selectors"]:
            axis.plot(steps, [e["selectors"][name][quantity] for e in entries], marker="o", ms=3, lw=1, label=name)
        axis.set(title=f"{quantity}, %", xlabel="step of self-training")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"**{statistics.mean(values):.1f}**{deviation}"


def mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.1f}" if known else "–"


def sections(results: dict[str, Any], pictures: Path) -> dict[str, str]:
    """The text of each marker of docs/results.md and its sub-pages; plots go into the folder `pictures`."""
    results_page.plot(results, pictures / "results_gain.png")
    texts = results_page.sections(results)
    texts |= {MARKERS.get(group, group): summarize(results, group) for group in GROUPS}
    texts["diga_selection"] = summarize_selection(results, pictures)
    texts["duda_classes"] = summarize_classes(results, pictures)
    return texts


def summarize_classes(results: dict[str, Any], pictures: Path) -> str:
    """Markdown and a plot: DUDA's most inconsistent classes of each pair."""
    found = {title: class_weights.markdown(results, pair, pictures) for pair, title in PAIRS.items()}
    parts = [f"### {title}\n\n{text}" for title, text in found.items() if text]
    return "\n\n".join(parts) + "\n" if parts else NOTHING


def write_tables(results: dict[str, Any], page: Path) -> None:
    """Put each group's tables, and what else is made of the results, between the two markers that bear its name."""
    for name, text in sections(results, page.parent / "pictures").items():
        results_page.write(name, text, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-root", type=Path, default=os.environ.get("UDAKIT_DATA"))
    parser.add_argument("--group", default="main", choices=list(GROUPS))
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), help="default: those of the group")
    parser.add_argument("--recipes", nargs="+", help="rows; default: all of the group")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the group")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "real_pairs")
    parser.add_argument("--table", action="store_true", help="train nothing, rewrite the tables")
    parser.add_argument("--no-table", action="store_true", help="leave the pages alone")
    parser.add_argument("--dry-run", action="store_true", help="two steps a stage, in a folder that is thrown away")
    options = parser.parse_args()
    group = GROUPS[options.group]
    recipes = options.recipes or list(group.rows("toy"))
    if unknown := set(recipes) - set(group.rows("toy")):
        parser.error(f"Expected rows of {options.group}, {list(group.rows('toy'))}, but got {sorted(unknown)}.")
    with tempfile.TemporaryDirectory() as thrown_away:
        if options.dry_run:
            options.results, options.cache = Path(thrown_away) / "results.json", Path(thrown_away)
        if not options.table:
            train_rows(options, recipes, options.pairs or group.pairs, options.seeds or group.seeds)
    if not options.no_table and not options.dry_run:
        write_tables(load(options.results), ROOT / "docs" / "results.md")


def train_rows(options: argparse.Namespace, recipes: list[str], pairs: Sequence[str], seeds: Sequence[int]) -> None:
    """Run whatever has no entry in the results yet."""
    root = Path(options.data_root) if options.data_root else None
    for pair, seed, recipe in itertools.product(pairs, seeds, recipes):
        key = f"{pair}/{recipe}/{seed}"
        if key in load(options.results):
            continue
        if pair != "toy" and (root is None or not root.is_dir()):
            print(f"skipped {key}: no --data-root and no UDAKIT_DATA")
            continue
        print(f"== {key}", flush=True)
        result = run(pair, recipe, seed, root, options.cache, options.dry_run)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.results, {**load(options.results), key: result})


if __name__ == "__main__":
    main()
