"""The results table: every recipe on every pair of domains, over seeds, resumable.

    UDAKIT_DATA=/data python benchmarks/real_pairs.py            # whatever is not in the JSON yet
    python benchmarks/real_pairs.py --data-root /data --pairs camvid --recipes source_only dacs --seeds 0 1 2
    python benchmarks/real_pairs.py --table                      # only rewrite the table of docs/results.md

A run is (pair, recipe, seed). A source-only warm start is trained once for each (pair, seed) and shared; every recipe
then takes the same number of optimiser steps from it. The last checkpoint counts, never the best on validation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import torch

import train_gta2cs
from gta2cs.report import write_json, write_text

RESULTS = ROOT / "benchmarks" / "results" / "real_pairs.json"
PAIRS = {
    "camvid": "CamVid day → dusk (real, 62 validation images, 11 classes)",
    "carla2camvid": "CARLA → CamVid day (synthetic → real, 57 validation images)",
    "toy": "toy pair: game → camera (rendered)",
}
# Colour jitter of source and mixed images, the same in every row.
AUGMENT = {"jitter": 0.4, "hue": 0.05}
RARE = {"rare_class_temperature": 0.05}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the runs of a pair share, whatever the recipe."""

    warm_steps: int
    steps: int
    lr: float
    config: dict[str, Any]
    augment: dict[str, float]
    adaptation_data: dict[str, Any]  # of the recipes' steps, not of the warm start


def setting(pair: str) -> Setting:
    if pair == "toy":
        return Setting(300, 450, 2e-4, {"data": {"crop": (128, 192)}, "net": {"arch": "fpn"}}, {}, {})
    data = {"crop": (160, 208), "source_scale": (0.7, 1.5), "target_scale": (0.8, 1.3)}
    return Setting(600, 400, 2e-4, {"data": data, "net": {"arch": "deeplabv3plus"}}, AUGMENT, RARE)


# How DACS's teacher sees target, chosen on seed 0: where BatchNorm statistics of target hurt the source-trained net
# (day -> dusk), the teacher labels with running statistics; elsewhere with those of the batch.
POLICY: dict[str, dict[str, Any]] = {
    "camvid": {"teacher_mode": "eval", "buffers": "ema"},
    "carla2camvid": {"translate": "color"},
    "toy": {"translate": "color"},
}


def recipe_configs(pair: str = "toy") -> dict[str, dict[str, Any]]:
    """Rows of the table: the recipe, its options, and changes to the data."""
    return {
        "source_only": {"recipe": "source_only"},
        "dacs": {"recipe": "dacs", "options": POLICY[pair], "lr": 3e-4 if pair == "toy" else setting(pair).lr},
        "oracle": {"recipe": "source_only", "data": {"oracle": True}},
    }


def base_config(pair: str, seed: int, data_root: Path | None, out: Path) -> train_gta2cs.Config:
    changes = setting(pair).config
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(pair=pair, data_root=data_root, **changes["data"]),
        net=train_gta2cs.NetConfig(**changes["net"]),
        head_multiplier=3.0,
        seed=seed,
        out=out,
        eval_every=0,
        save_every=100,
        resume=True,
    )


def warm_start(pair: str, seed: int, data_root: Path | None, cache: Path) -> Path:
    """Train the source-only net that every recipe starts from, the oracle too, or find it."""
    out = cache / pair / f"seed{seed}" / "warm"
    config = base_config(pair, seed, data_root, out)
    steps, augment = setting(pair).warm_steps, setting(pair).augment
    config.stages = [train_gta2cs.Stage("source_only", steps, lr=3e-4, lr_warmup=20, options=dict(augment))]
    if not (out / "results.json").is_file():
        train_gta2cs.main(config)
    return out / "stage1_source_only" / "last.pt"


def run(pair: str, name: str, seed: int, data_root: Path | None, cache: Path) -> dict[str, Any]:
    row, shared = recipe_configs(pair)[name], setting(pair)
    config = base_config(pair, seed, data_root, cache / pair / f"seed{seed}" / name)
    config.data = dataclasses.replace(config.data, **{**shared.adaptation_data, **row.get("data", {})})
    options = {**shared.augment, **row.get("options", {})}
    config.stages = [
        train_gta2cs.Stage(row["recipe"], shared.steps, lr=row.get("lr", shared.lr), lr_warmup=20, options=options)
    ]
    config.init = warm_start(pair, seed, data_root, cache)
    config.seed = seed + 100  # other batches than those of the warm start
    began = time.perf_counter()
    rows = train_gta2cs.main(config)
    return {
        "pair": pair,
        "recipe": name,
        "seed": seed,
        "rows": {title: score.to_json() for title, score in rows.items()},
        "seconds": round(time.perf_counter() - began, 1),
        "stage": dataclasses.asdict(config.stages[0]),
        "machine": {"torch": torch.__version__, "cpu": platform.machine(), "cores": os.cpu_count()},
    }


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def summarize(results: dict[str, Any]) -> str:
    """Markdown: for each pair one table of the means with spread, and one of IoU per class."""
    parts = []
    for pair, title in PAIRS.items():
        runs = [r for r in results.values() if r["pair"] == pair]
        rows: dict[str, list[dict[str, Any]]] = {}
        for recipe in recipe_configs():
            for r in sorted((r for r in runs if r["recipe"] == recipe), key=lambda r: r["seed"]):
                for name, score in r["rows"].items():
                    label = name.replace("source_only", "oracle (labelled target)") if recipe == "oracle" else name
                    if recipe == "oracle" and "BatchNorm" in name:
                        continue
                    rows.setdefault(label.replace(r["stage"]["recipe"], recipe), []).append(score)
        if not rows:
            continue
        first = next(iter(rows.values()))[0]
        means, classes = list(first["means"]), list(first["iou"])
        table = [f"### {title}", "", "| row | seeds | " + " | ".join(means + classes) + " |"]
        table.append("|---|---:|" + "---:|" * len(means + classes))
        for name, scores in rows.items():
            cells = [spread([s["means"][m] for s in scores]) for m in means]
            cells += [mean([s["iou"][c] for s in scores]) for c in classes]
            table.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"**{statistics.mean(values):.1f}**{deviation}"


def mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.1f}" if known else "–"


def write_table(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the two markers of the page."""
    begin, end = "<!-- real_pairs: begin -->", "<!-- real_pairs: end -->"
    text = page.read_text()
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    write_text(page, f"{head}{begin}\n\n{summarize(results)}\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-root", type=Path, default=os.environ.get("UDAKIT_DATA"))
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--recipes", nargs="+", default=list(recipe_configs()), choices=list(recipe_configs()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "real_pairs")
    parser.add_argument("--table", action="store_true", help="train nothing, rewrite the table")
    parser.add_argument("--no-table", action="store_true", help="leave docs/results.md alone")
    options = parser.parse_args()
    root = Path(options.data_root) if options.data_root else None
    for pair in options.pairs if not options.table else []:
        for seed in options.seeds:
            for recipe in options.recipes:
                key = f"{pair}/{recipe}/{seed}"
                if key in load(options.results):
                    continue
                if pair != "toy" and (root is None or not root.is_dir()):
                    print(f"skipped {key}: no --data-root and no UDAKIT_DATA")
                    continue
                print(f"== {key}", flush=True)
                result = run(pair, recipe, seed, root, options.cache)
                options.results.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.results, {**load(options.results), key: result})
    if not options.no_table:
        write_table(load(options.results), ROOT / "docs" / "results.md")


if __name__ == "__main__":
    main()
