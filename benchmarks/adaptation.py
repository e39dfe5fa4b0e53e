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
import statistics
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
from benchmarks.harness import PAIR_NAMES, device_name, write_section
from benchmarks.results_page import STATISTICS
from gta2cs.checkpoints import load_checkpoint
from gta2cs.datasets import Pair
from gta2cs.files import write_json
from gta2cs.label_free import DEFAULT, collapsed, completed
from gta2cs.pretrained import load_init
from gta2cs.recipes.combined import SHARED

RESULTS = ROOT / "benchmarks" / "results" / "adaptation.json"
PAGE = ROOT / "docs" / "results" / "one_policy.md"
SUMMARY = ROOT / "docs" / "results.md"
HALF = {"decoder_pyramid_channels": 128, "decoder_segmentation_channels": 64}  # of an FPN: time
FPN = {"arch": "fpn", "options": HALF}
STREET: dict[str, Any] = {"net": {"arch": "deeplabv3plus"}, "crop": (160, 208), "warm": 600, "steps": 400}
NUCLEI: dict[str, Any] = {"net": FPN, "crop": (128, 128), "warm": 200, "steps": 600}
# What is a pair's own: net, crop, steps. Nothing that a method could be tuned by.
PAIRS: dict[str, dict[str, Any]] = {
    "toy": {"net": FPN, "crop": (128, 192), "warm": 300, "steps": 450},
    "nuclei": NUCLEI,
    "nuclei_backwards": NUCLEI,
    "camvid": STREET,
    "carla2camvid": STREET,
}
# Street pairs that came last. A pair's name in the loop and, where the domains change places, its two folders.
FURTHER: dict[str, dict[str, Any]] = {
    "carla2dusk": STREET,
    "dusk2day": {**STREET, "of": "camvid", "folders": ("camvid/target", "camvid/source")},
    "day2carla": {**STREET, "of": "carla2camvid", "folders": ("camvid/source", "carla")},
}
STREETS = {"camvid", "carla2camvid", *FURTHER}
TOGETHER = dict.fromkeys(STREETS, STREETS)  # share images
LR = {"source_only": 3e-4, "oracle": 3e-4}
ADAPTATION_LR = 3e-4
SCORE = DEFAULT  # that deploys a net
TITLES = {
    "source_only": "source-only",
    STATISTICS: "source-only, BatchNorm's statistics of target",
    "dacs_defaults": "DACS, options of its paper",
    "dacs_batch": "DACS, labels by statistics of target batches",
    "dacs_running": "DACS, labels by running statistics of source",
    "diga": "DiGA",
    "ehtdi": "EHTDI",
    "combined": "combined",
    "quick": "combined, with a teacher as quick as in short runs",
    "weighed": "combined, with 90 % of each class, weighed by confidence",
    "decided": "combined as it was before",
    "ablation_unmatched": "DACS, labels by statistics of target batches, scale not matched",
    "oracle": "oracle",
}
COMBINED_PAGE = ROOT / "docs" / "methods" / "combined.md"
WARM_UP = 20  # steps of linear warm-up of the learning rate, in every stage
EVERY = 100  # steps between scores

# What the policy chooses between. Images and augmentation, the same for every row of a policy ...
SCALES = {"source_scale": (0.6, 1.7), "target_scale": (0.8, 1.25)}
AUGMENT: dict[str, Any] = {"jitter": SHARED["jitter"]}
MATCH = {"match_scale": True}  # of every row that adapts
DEFAULT_DATA = {"match_scale": False, "source_scale": (1.0, 1.0), "target_scale": (1.0, 1.0)}
# ... and how DACS labels: by statistics of source or of the target batch. `combined` takes half of each.
LABELLING: dict[str, dict[str, Any]] = {
    "running": {"teacher_mode": "eval", "record_mixed": False},
    "batch": {"teacher_mode": "batch_statistics"},
}
SETTINGS: dict[str, dict[str, Any]] = {name: {**SHARED, **own} for name, own in LABELLING.items()}
QUICK: dict[str, Any] = {"slow_teacher": False}  # the teacher stays as quick as it begins, also in more than 300 steps
# `combined` before: the score chose between the two, and no source steps came first.
DECIDED = {**QUICK, "candidates": LABELLING}
# Forms of `combined`, all with source steps first: row -> options. The first two are the same in up to 300 steps.
COMBINED: dict[str, dict[str, Any]] = {
    "combined": {},
    "quick": QUICK,
    "weighed": {"shared": {"share": 0.9, "confidence_weight": True}},
}
BLENDED = {"teacher_mode": "batch_statistics", "teacher_running_share": 0.5, "buffers": "ema"}
# `combined` without source steps first: row -> (title, how its teacher labels)
AT_ONCE: dict[str, tuple[str, dict[str, Any]]] = {
    "running_at_once": ("running statistics of source", LABELLING["running"]),
    "batch_at_once": ("statistics of the target batch", LABELLING["batch"]),
    "recorded_at_once": ("half of each, the running ones also of mixed images", BLENDED),
    "blended_at_once": ("half of each", {**BLENDED, "record_mixed": False}),
}
EHTDI = {
    "labels_from": "teacher",
    "mix_weight": 1.0,
    "paste_weight": 1.0,
    "boundary_weight": 0.1,
    "boundary_paste_weight": 0.01,
    "pixel_contrast": 0.1,
    "prototype_contrast": 0.1,
}
ABLATION: dict[str, dict[str, Any]] = {
    "ablation_unmatched": {"recipes": ["dacs"], "options": SETTINGS["batch"], "data": {"match_scale": False}},
}
# What was tried, each change of the `decided` row alone: name -> (title, changes: `shared` to the options, `data` to
# the data, `recipes`, `lr`).
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("no random scales", {"data": {"target_scale": (1.0, 1.0)}}),
    "ratio": ("a weight by confidence in place of class balance", {"shared": {"selector": "confident_ratio"}}),
    "ratio_fixed": (
        "that, and no random scales",
        {"shared": {"selector": "confident_ratio"}, "data": {"target_scale": (1.0, 1.0)}},
    ),
    "late": ("half of the steps on source first", {"recipes": ["source_only", "combined"]}),
    "share": ("90 % of each class", {"shared": {"share": 0.9}}),
    "mirror": ("labels of the mean over mirror images", {"shared": {"mirror_teacher": True}}),
    "adaptive": ("adaptive thresholds", {"shared": {"selector": "adaptive"}}),
    "aligned": ("aligned class shares", {"shared": {"align": True}}),
    "quick": ("a quicker teacher (0.98)", {"shared": {"ema": 0.98}}),
    "slow": ("a slower teacher (0.996)", {"shared": {"ema": 0.996}}),
    "half": ("half of the weight on the mixture", {"shared": {"mix_weight": 0.5}}),
    "jitter": ("jitter 0.8", {"shared": {"jitter": 0.8}}),
    "clean": ("source not augmented", {"shared": {"augment_source": False}}),
    "distance": ("feature distance to ImageNet (0.005)", {"shared": {"feature_distance": 0.005}}),
    "prototypes": ("prototype contrast (0.1)", {"shared": {"prototype_contrast": 0.1}}),
    "symmetric": ("symmetric cross-entropy", {"shared": {"pseudo_loss": "symmetric_cross_entropy"}}),
    "masked": (
        "masked consistency (weight 0.5, ratio 0.5)",
        {"shared": {"mask_weight": 0.5, "mask_ratio": 0.5}},
    ),
    "rare": (
        "source images of rare classes more often (0.1)",
        {"data": {"rare_class_temperature": 0.1, "rare_class_pixels": 100, "rare_class_image_pixels": 500}},
    ),
    "unstyled": ("source in its own colours", {"shared": {"translate": "none"}}),
    "histogram": ("histograms in place of colours", {"shared": {"translate": "histogram"}}),
    "styled": ("every source image in the style of target", {"shared": {"translate_share": 1.0}}),
    "joint": ("one forward for both batches", {"shared": {"batch_norm": "joint"}}),
    "lr": ("learning rate 1e-4", {"lr": 1e-4}),
}


def tried_row(name: str) -> dict[str, Any]:
    """The row of a change."""
    _, change = TRIED[name]
    options = {"combined": {"shared": change.get("shared", {}), **DECIDED}, "source_only": AUGMENT}
    return {"recipes": ["combined"], "own": True, **change, "options": options}


TRIED_ROWS = {f"tried_{name}": tried_row(name) for name in TRIED}
LR |= {f"tried_{name}": change["lr"] for name, (_, change) in TRIED.items() if "lr" in change}
LONGER = 4  # times the steps
LONGER_ROWS = ("source_only", "dacs_batch", "diga", "ehtdi", *COMBINED)
BAD: dict[str, dict[str, Any]] = {  # runs made bad on purpose, for the study of the scores
    "bad_argmax": {"options": {"selector": "argmax", "jitter": 0.2}},
    "bad_threshold": {"options": {"selector": "threshold", "threshold": 0.99, "jitter": 0.2}},
    # Options of the paper, and labels by statistics of source: on nuclei the rarer class vanishes.
    "bad_eval": {"own": True, "data": DEFAULT_DATA, "options": {"teacher_mode": "eval"}},
}


def rows_of() -> dict[str, dict[str, Any]]:
    """Every row: its stages, their options, changes to the data. Rows of DACS are the settings to choose from."""
    rows: dict[str, dict[str, Any]] = {
        "source_only": {"recipes": ["source_only"]},
        "dacs_defaults": {"recipes": ["dacs"], "own": True, "data": DEFAULT_DATA},
        **{f"dacs_{name}": {"recipes": ["dacs"], "options": options} for name, options in SETTINGS.items()},
        **{
            name: {
                "recipes": ["source_only", "combined"],
                "own": True,
                "options": {"source_only": AUGMENT, "combined": options},
            }
            for name, options in COMBINED.items()
        },
        "decided": {"recipes": ["combined"], "own": True, "options": DECIDED},
        **{
            name: {"recipes": ["combined"], "own": True, "options": {**QUICK, "candidates": {"only": own}}}
            for name, (_, own) in AT_ONCE.items()
        },
        "diga": {"recipes": ["diga_warmup", "diga"], "options": {"augment_source": True, "translate": "color"}},
        "ehtdi": {"recipes": ["ehtdi"], "options": EHTDI},
        "oracle": {"recipes": ["source_only"], "data": {"oracle": True}},
    }
    rows |= {f"longer_{name}": {**rows[name], "times": LONGER} for name in LONGER_ROWS}
    rows |= ABLATION | TRIED_ROWS
    return rows | {name: {"recipes": ["dacs"], "bad": True, **row} for name, row in BAD.items()}


GROUPS: dict[str, tuple[str, ...]] = {
    "main": ("source_only", *(f"dacs_{name}" for name in SETTINGS), "combined", "oracle"),
    "methods": ("dacs_defaults", "diga", "ehtdi"),
    "labelling": ("decided", *AT_ONCE),
    "weighed": ("weighed",),
    "ablation": tuple(ABLATION),
    "longer": tuple(f"longer_{name}" for name in LONGER_ROWS),
    "tried": tuple(TRIED_ROWS),
    "bad": tuple(BAD),
}


def choose(pair: str, results: dict[str, Any]) -> str:
    """The setting of DACS with the best mean gain over source-only, on the pairs that share no images with `pair`."""
    gains = gains_elsewhere(pair, results)
    return max(gains, key=lambda name: statistics.mean(gains[name] or [0.0]))


def others(pair: str) -> list[str]:
    """The pairs that share no images with a pair."""
    return [other for other in PAIRS if other not in TOGETHER.get(pair, {pair})]


def gains_elsewhere(pair: str, results: dict[str, Any]) -> dict[str, list[float]]:
    """Gain over source-only of each setting of DACS, a number for each other pair that has run all of them."""
    gains: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for other in others(pair):
        base = final(results, other, "source_only")
        found = {name: final(results, other, f"dacs_{name}") for name in SETTINGS}
        if base and all(found.values()):
            for name, values in found.items():
                gains[name].append(statistics.mean(values) - statistics.mean(base))
    return gains


def final(
    results: dict[str, Any], pair: str, row: str, net: str = "student", seeds: Iterable[int] | None = None
) -> list[float]:
    """True mIoU of a row's last checkpoint, a number a seed; of these seeds alone, where they are given."""
    runs = [r for r in runs_of(results, pair, row) if seeds is None or r["seed"] in seeds]
    if row == STATISTICS:
        return [r["rows"][row]["means"][headline(r["rows"][row]["means"])] for r in runs]
    return [c["miou"] for r in runs for c in r["checkpoints"][-2:] if c["net"] == net and c["step"] == r["steps"]]


def seeds_of(results: dict[str, Any], pair: str, *rows: str) -> set[int]:
    """Seeds that all of these rows have."""
    return set.intersection(*({r["seed"] for r in runs_of(results, pair, row)} for row in rows))


def configure(pair: str, row: str, seed: int, data_root: Path | None, cache: Path) -> train_gta2cs.Config:
    """The run of a row; "warm" is the source-only net that all rows of a seed start from."""
    own = {**PAIRS, **FURTHER}[pair]
    entry = {"recipes": ["source_only"]} if row == "warm" else rows_of()[row]
    steps = own["warm"] if row == "warm" else own["steps"] * entry.get("times", 1)
    recipes = entry["recipes"]
    counts = [steps // len(recipes)] * len(recipes)
    counts[-1] += steps - sum(counts)
    options = {**({} if entry.get("own") else AUGMENT), **entry.get("options", {})}
    each = [options.get(recipe, options) for recipe in recipes]  # by recipe, or the same for all
    lr = LR.get(row, LR["source_only"] if row == "warm" else ADAPTATION_LR)
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(
            pair=own.get("of", pair),
            data_root=data_root,
            crop=own["crop"],
            **{**roots_of(own, data_root), **SCALES, **MATCH, **entry.get("data", {})},
        ),
        net=train_gta2cs.NetConfig(**own["net"]),
        stages=[
            train_gta2cs.Stage(recipe, n, lr=lr, lr_warmup=WARM_UP, options=dict(given))
            for recipe, n, given in zip(recipes, counts, each, strict=True)
        ],
        head_multiplier=3.0,
        seed=seed if row == "warm" else seed + 100,  # other batches than those of what it starts from
        init=None if row == "warm" else warm_start(pair, seed, cache),
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


def warm_start(pair: str, seed: int, cache: Path) -> Path:
    """Where the source-only net of a seed lies once it is trained."""
    return cache / pair / f"seed{seed}" / "warm" / "stage1_source_only" / "last.pt"


def warmed(pair: str, seed: int, data_root: Path | None, cache: Path) -> train_gta2cs.Config:
    """Configuration of a seed's source-only net, which is trained first where it is missing."""
    config = configure(pair, "warm", seed, data_root, cache)
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
    if row != "warm":
        warmed(pair, seed, data_root, cache)
    config = configure(pair, row, seed, data_root, cache)
    began = time.perf_counter()
    rows = train_gta2cs.main(config)
    histories = histories_of(config)
    source_only = start_of(histories, warm_start(pair, seed, cache))
    return {
        "pair": pair,
        "recipe": row,
        "seed": seed,
        "bad": bool(row != "warm" and rows_of()[row].get("bad", False)),
        "start": "warm" if row != "warm" else None,
        "steps": sum(h["steps"] for h in histories),
        "seconds": round(time.perf_counter() - began, 1),
        "device": device_name(),
        "stages": [dataclasses.asdict(stage) for stage in config.stages],
        "source_only": source_only,
        "rows": {title: score.to_json() for title, score in rows.items()},
        "checkpoints": list(checkpoints_of(histories)),
    }


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


def histories_of(config: train_gta2cs.Config) -> list[dict[str, Any]]:
    """What each stage logged."""
    folders = [config.out / f"stage{i}_{stage.recipe}" for i, stage in enumerate(config.stages, 1)]
    return [json.loads(load_checkpoint(folder / "last.pt")["history"]) for folder in folders]


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


def headline(means: dict[str, float]) -> str:
    """The mean that counts: CARLA has no bicyclist, so there the one over the ten classes that both domains have."""
    return "mIoU10" if "mIoU10" in means else next(iter(means))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def add(path: Path, key: str, result: dict[str, Any] | list[Any]) -> None:
    """Add a result to the JSON, also beside another process that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(path, {**load(path), key: result})


# --- what came of it ------------------------------------------------------------------------------


def chosen(run: dict[str, Any], score: str = SCORE) -> dict[str, Any] | None:
    """What `select` deploys: the highest score among the start and all evaluations; None where nothing has one."""
    start = run.get("source_only")
    nets = [c for c in [start, *run["checkpoints"]] if c and "miou" in c and "scores" in c]
    if start:  # a net that has lost a class of the start is never chosen
        nets = [c for c in nets if not collapsed(start["shares"], c["shares"])]
    return max(nets, key=lambda net: completed(net)[score] or 0.0) if nets else None


def guarded(run: dict[str, Any], score: str = SCORE) -> dict[str, Any] | None:
    """The last student, or the source-only net where that has the higher score."""
    last = last_net(run)
    start = run.get("source_only")
    if last is None or "scores" not in last or not start or "miou" not in start:
        return None
    better = (completed(last)[score] or 0.0) > (completed(start)[score] or 0.0)
    return last if better and not collapsed(start["shares"], last["shares"]) else start


def last_net(run: dict[str, Any], name: str = "student") -> dict[str, Any] | None:
    """The net of this name at the last evaluation that has one."""
    return next((c for c in reversed(run["checkpoints"]) if c["net"] == name), None)


def runs_of(results: dict[str, Any], pair: str, row: str) -> list[dict[str, Any]]:
    """Runs of a row, by seed."""
    row = "source_only" if row == STATISTICS else row
    found = [r for r in results.values() if (r["pair"], r["recipe"]) == (pair, row)]
    return sorted(found, key=lambda r: r["seed"])


def table(results: dict[str, Any], of: Iterable[str] = PAIRS) -> str:
    """Markdown: a line a row, a column a pair; the last student, and for `combined` the net chosen without labels."""
    if not (pairs := pairs_run(results, of)):
        return "Not measured yet.\n"
    lines = [
        *lines_of(results, TITLES, pairs),
        line_of(results, "combined, chosen over all evaluations", chosen, pairs),
        line_of(results, "combined, last student or source-only", guarded, pairs),
    ]
    picks = [
        f"{PAIR_NAMES[pair]}: {choose(pair, results)}" for pair in pairs if any(gains_elsewhere(pair, results).values())
    ]
    if not picks:
        return "\n".join(lines) + "\n"
    return "\n".join(lines) + f"\n\nSetting of DACS that the other pairs choose: {', '.join(picks)}.\n"


def summary(results: dict[str, Any]) -> str:
    """Markdown: `combined`, by its last student and by the net that the loop deploys, between what bounds it."""
    if not (pairs := pairs_run(results)):
        return "Not measured yet.\n"
    titles = {row: TITLES[row] for row in ("source_only", STATISTICS, "combined")}
    deployed = line_of(results, "combined, the net chosen without labels", chosen, pairs)
    _, _, *oracle = lines_of(results, {"oracle": TITLES["oracle"]}, pairs)
    return "\n".join([*lines_of(results, titles, pairs), deployed, *oracle]) + "\n"


def further(results: dict[str, Any]) -> str:
    """Markdown: the whole table of the street pairs that came last."""
    return table(results, FURTHER)


def labelling(results: dict[str, Any]) -> str:
    """Markdown: the last student by how the teacher labels, with and without source steps first."""
    pairs = pairs_run(results, [*PAIRS, *FURTHER])
    rows = {
        **{name: title for name, (title, _) in AT_ONCE.items()},
        "decided": "running or batch, by the score",
        "combined": "half of each, after half of the steps on source",
        "source_only": "source-only, for comparison",
    }
    lines = head_of(pairs, "labels by ")
    for row, title in rows.items():
        cells = [spread(final(results, pair, row)) for pair in pairs]
        if any(text != "–" for text in cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    groups = {"street pairs": STREETS, "the others": set(PAIRS) - STREETS}
    picks = {name: preferred(results, set(pairs) - left_out) for name, left_out in groups.items()}
    if not all(picks.values()):
        return "\n".join(lines) + "\n"
    said = "; ".join(f"without {name}: {rows[row]}" for name, row in picks.items() if row)
    return "\n".join(lines) + f"\n\nHighest mean over the pairs, {said}.\n"


def weighed(results: dict[str, Any]) -> str:
    """Markdown: the last student of `combined` and of `weighed`, of runs with the same start; a column a pair."""
    beside: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for pair in (*PAIRS, *FURTHER):
        same_start = lambda run: (run["seed"], run.get("device"))  # noqa: E731
        starts = {same_start(run): run for run in runs_of(results, pair, "combined")}
        both = [(starts.get(same_start(run)), run) for run in runs_of(results, pair, "weighed")]
        if found := [(before, run) for before, run in both if before]:
            beside[pair] = found
    if not beside:
        return "Not measured yet.\n"
    lines = head_of([*beside], "labels ")
    for position, title in enumerate(("60 % of each class, full weight", "90 % of each class, weighed by confidence")):
        cells = [spread([last_net(found[position])["miou"] for found in runs]) for runs in beside.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def preferred(results: dict[str, Any], pairs: Iterable[str]) -> str | None:
    """The row of `labelling` with the highest mean over these pairs, of those that have run on all of them."""
    means = {}
    for row in (*AT_ONCE, "decided", "combined"):
        found = [final(results, pair, row) for pair in pairs]
        if found and all(found):
            means[row] = statistics.mean(statistics.mean(values) for values in found)
    return max(means, key=means.__getitem__) if means else None


def pairs_run(results: dict[str, Any], of: Iterable[str] = PAIRS) -> list[str]:
    """The pairs that have a source-only row."""
    return [pair for pair in of if runs_of(results, pair, "source_only")]


def head_of(pairs: Sequence[str], first: str = "") -> list[str]:
    """Head of a table with a column a pair."""
    return [f"| {first}| " + " | ".join(PAIR_NAMES[pair] for pair in pairs) + " |", "|---|" + "---:|" * len(pairs)]


def lines_of(results: dict[str, Any], titles: dict[str, str], pairs: Sequence[str]) -> list[str]:
    """Head of a table, and a line of each row that has run on any pair."""
    lines = head_of(pairs)
    for row, title in titles.items():
        cells = [cell(results, pair, row) for pair in pairs]
        if any(text != "–" for text in cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def line_of(
    results: dict[str, Any], title: str, pick: Callable[[dict[str, Any]], dict[str, Any] | None], pairs: Sequence[str]
) -> str:
    """A line of `combined` with a net that a rule picks from each run."""
    cells = []
    for pair in pairs:
        nets = [pick(run) for run in runs_of(results, pair, "combined")]
        cells.append(spread([net["miou"] for net in nets if net is not None]))
    return f"| {title} | {' | '.join(cells)} |"


def tried(results: dict[str, Any]) -> str:
    """Markdown: a line a change, a column a pair: gain of the last student, and of its score, over no change.

    Below, what the score chooses among all lines of a seed, and the best of them, which only labels know.
    """
    seeds = {pair: {r["seed"] for row in TRIED_ROWS for r in runs_of(results, pair, row)} for pair in PAIRS}
    pairs = [pair for pair, found in seeds.items() if found]
    if not pairs:
        return "Not measured yet.\n"
    lines = head_of(pairs)
    rows = {"decided": "nothing changed", **{f"tried_{name}": title for name, (title, _) in TRIED.items()}}
    for row, title in rows.items():
        cells = [tried_cell(results, pair, row, seeds[pair]) for pair in pairs]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(text or '–' for text in cells)} |")
    for title, pick in (("highest score of all lines", 1), ("best of all lines", 0)):
        cells = []
        for pair in pairs:
            nets = [max(last_of(results, pair, seed, *rows), key=lambda net: net[pick]) for seed in seeds[pair]]
            cells.append(spread([net[0] for net in nets]))
        lines.append(f"| **{title}** | {' | '.join(cells)} |")
    picks = {pair: tried_elsewhere(results, pair, seeds) for pair in pairs}
    cells = [f"{rows[row]}: {tried_cell(results, pair, row, seeds[pair]) or 'not run'}" for pair, row in picks.items()]
    lines.append(f"| **chosen on the other pairs** | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tried_elsewhere(results: dict[str, Any], pair: str, seeds: dict[str, set[int]]) -> str:
    """The line with the best mean gain on the pairs that share no images with `pair`, of those that ran on all."""
    elsewhere = [other for other in others(pair) if seeds[other]]
    gains = {"decided": 0.0}
    for row in TRIED_ROWS:
        found = [tried_gains(results, other, row, seeds[other]) for other in elsewhere]
        if found and all(found):
            gains[row] = statistics.mean(statistics.mean(miou for miou, _ in gain) for gain in found)
    return max(gains, key=lambda row: gains[row])


def tried_gains(results: dict[str, Any], pair: str, row: str, seeds: set[int]) -> list[tuple[float, float]]:
    """Gain in mIoU and in the score over `decided`, seed by seed, for the seeds that both ran with."""
    both = sorted(seeds & seeds_of(results, pair, row, "decided"))
    nets = [[last_of(results, pair, seed, name)[0] for name in (row, "decided")] for seed in both]
    return [(a[0] - b[0], a[1] - b[1]) for a, b in nets]


def tried_cell(results: dict[str, Any], pair: str, row: str, seeds: set[int]) -> str:
    """Gain in mIoU and, in brackets, in the score over `decided` with the same seeds; of that itself, its values."""
    if row == "decided":
        if not (found := [last_of(results, pair, seed, row)[0] for seed in seeds & seeds_of(results, pair, row)]):
            return ""
        miou, score = map(statistics.mean, zip(*found, strict=True))
        return f"{miou:.1f} ({score:.1f}) [{len(found)}]"
    gains = tried_gains(results, pair, row, seeds)
    return (
        "{:+.1f} ({:+.1f})".format(*map(statistics.mean, zip(*gains, strict=True))).replace("-", "−") if gains else ""
    )


def last_of(results: dict[str, Any], pair: str, seed: int, *rows: str) -> list[tuple[float, float]]:
    """mIoU and score, both in %, of the last student of every row that ran with a seed."""
    found = []
    for run in (r for row in rows for r in runs_of(results, pair, row) if r["seed"] == seed):
        net = last_net(run)
        found.append((net["miou"], 100 * (completed(net)[SCORE] or 0.0)))
    return found


def longer(results: dict[str, Any]) -> str:
    """Markdown: a line a row, two columns a pair: the last student after the usual steps, and after more of them.

    The oracle, which stands below, took the usual steps. Shares of the gap begin at source-only of as many steps.
    """
    pairs = [pair for pair in PAIRS if any(final(results, pair, f"longer_{row}") for row in LONGER_ROWS)]
    if not pairs:
        return f"Runs of {LONGER} times the steps (`--group longer`) are not measured yet.\n"
    head = [f"{PAIR_NAMES[pair]}, {PAIRS[pair]['steps'] * times} steps" for pair in pairs for times in (1, LONGER)]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for row in LONGER_ROWS:
        cells = []
        for pair in pairs:
            seeds = seeds_of(results, pair, f"longer_{row}")
            cells.append(cell(results, pair, "combined" if row == "quick" else row, seeds=seeds))  # the same there
            cells.append(cell(results, pair, f"longer_{row}", start="longer_source_only"))
        lines.append(f"| {TITLES[row]} | {' | '.join(cells)} |")
    oracles = [f"{spread(final(results, pair, 'oracle'))} | –" for pair in pairs]
    lines.append(f"| oracle | {' | '.join(oracles)} |")
    return "\n".join(lines) + "\n"


def cell(
    results: dict[str, Any], pair: str, row: str, *, seeds: Iterable[int] | None = None, start: str = "source_only"
) -> str:
    """Mean and spread of the last student's mIoU, and the share of the gap to the oracle that its seeds close."""
    seeds = seeds_of(results, pair, row) if seeds is None else seeds
    values = final(results, pair, row, seeds=seeds)
    if not values:
        return "–"
    base, top = (final(results, pair, name, seeds=seeds) for name in (start, "oracle"))
    text = spread(values)
    if row not in (start, "oracle") and base and top:
        gap = statistics.mean(top) - statistics.mean(base)
        text += f" ({100 * (statistics.mean(values) - statistics.mean(base)) / gap:.0f} %)"
    return text.replace("-", "−")


def spread(values: list[float]) -> str:
    """Mean, standard deviation where there are two at least, and how many."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} [{len(values)}]"


def study(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs as benchmarks/selection.py reads them: adapting runs whose nets have scores beside the truth."""
    named = lambda c: {**{k: v for k, v in c.items() if k != "miou"}, "truth_miou": c["miou"], "scores": completed(c)}  # noqa: E731
    return [
        {
            **{k: r[k] for k in ("pair", "recipe", "seed", "bad")},
            "start": named({"step": 0, "net": "source_only", **r["source_only"]}),
            "checkpoints": [named(c) for c in r["checkpoints"]],
        }
        for r in results.values()
        if r["pair"] in {**PAIRS, **FURTHER}
        and r.get("source_only")
        and "miou" in r["source_only"]
        and all("scores" in c for c in r["checkpoints"])
    ]


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
    parser.add_argument("--choose", action="store_true", help="train nothing, say which setting each pair's row uses")
    options = parser.parse_args()
    if options.choose:
        for pair in PAIRS:
            print(f"{pair}: {choose(pair, load(options.results))}, chosen on the other pairs")
        return
    if options.table or options.study:
        results = load(options.results)
        if options.table:
            write_section("policy_summary", summary(results), SUMMARY)
            write_section("one_policy", table(results), PAGE)
            write_section("further", further(results), PAGE)
            write_section("longer", longer(results), PAGE)
            write_section("labelling", labelling(results), COMBINED_PAGE)
            write_section("weighed", weighed(results), COMBINED_PAGE)
            write_section("tried", tried(results), COMBINED_PAGE)
        if options.study:
            write_json(options.study, study(results))
        return
    rows = options.rows or GROUPS[options.group]
    cases = itertools.product(options.seeds, rows, options.pairs)
    run_missing([(pair, row, seed) for seed, row, pair in cases], run, options)


if __name__ == "__main__":
    main()
