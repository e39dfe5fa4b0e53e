"""How good are pseudo-labels? Precision and coverage of every selector against target truth, outside training.

    python benchmarks/selection_quality.py runs/diga_toy/stage3_diga/last.pt
    python benchmarks/selection_quality.py runs/diga_toy/stage3_diga/last.pt --picture docs/pictures/diga_consensus.png
    python benchmarks/selection_quality.py runs/*/stage3_diga/last.pt --write   # into the JSON and the page

A checkpoint of the recipe `diga` holds all that labels: the labeller, the teacher, the centroids. Every selector gets
the same logits of the labeller, of the same target training images; the truth is read here and nowhere in training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import train_gta2cs
from benchmarks.harness import PAIR_NAMES, RESULTS, write_section
from gta2cs.checkpoints import load_checkpoint
from gta2cs.datasets import Pair, build_pair
from gta2cs.loading import evaluation_batches
from gta2cs.recipes import RECIPES, Diga
from gta2cs.report import save_panels, write_json
from udakit import (
    AdaptiveThresholdSelector,
    ArgmaxSelector,
    ClassQuantileSelector,
    ConfidentRatioSelector,
    PseudoLabels,
    RectifiedSelector,
    ThresholdSelector,
)

IMAGES = 32
BATCH = 4
IGNORE = 255
MEASURED = RESULTS / "selection_quality.json"
PAGE = ROOT / "docs" / "results" / "selection.md"


def load_diga(checkpoint: Path, num_classes: int) -> Diga:
    """Build the recipe of a checkpoint of the last stage of its run, in training mode, as it labelled."""
    saved = load_checkpoint(checkpoint)
    config = json.loads(saved["config"])
    stage = config["stages"][int(checkpoint.parent.name.split("_")[0].removeprefix("stage")) - 1]
    if stage["recipe"] != "diga":
        raise ValueError(f"Expected {checkpoint} to be of the recipe diga, but it is of {stage['recipe']}.")
    net = train_gta2cs.NetConfig(**{**config["net"], "weights": "random"})  # all tensors come from the checkpoint

    def make_net(**changes: Any) -> nn.Module:
        return net.build(num_classes, **changes)

    recipe = RECIPES["diga"].build(make_net(), num_classes, stage["options"], make_net)
    recipe.load_state_dict(saved["recipe"])
    assert isinstance(recipe, Diga)
    return recipe.train()


@torch.no_grad()
def label(recipe: Diga, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the labeller and features of the teacher, as in a step of the recipe."""
    return recipe.labeller(images).logits.float(), recipe.teacher(images).features.float()


def selections(recipe: Diga, logits: Tensor, features: Tensor) -> dict[str, PseudoLabels]:
    """What every selector makes of the same logits. The quantiles are those of all these images together."""
    selectors = {
        "threshold 0.9": ThresholdSelector(0.9),
        "threshold 0.968": ThresholdSelector(0.968),
        "confident ratio": ConfidentRatioSelector(0.968),
        "class quantile 0.5": ClassQuantileSelector(logits.shape[1], share=0.5, momentum=0.0),
        "adaptive thresholds": AdaptiveThresholdSelector(logits.shape[1], momentum=0.0),
        "argmax": ArgmaxSelector(),
    }
    with torch.no_grad():
        rectified = RectifiedSelector(recipe.prototypes)
        found = {"consensus": recipe.consensus(logits, features), "rectified": rectified(logits, features)}
        return found | {name: selector(logits) for name, selector in selectors.items()}


def score(pseudo: PseudoLabels, truth: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Precision and coverage in percent, over the pixels that have a truth; a pixel counts by its weight.

    Precision of a class: of what carries its label, how much is it. Coverage of a class: of its pixels, how many carry
    any label. Overall alike. None where there is nothing to divide by.
    """
    known = truth != IGNORE
    weight = (pseudo.weight * (pseudo.labels != IGNORE))[known].double()
    labels, truth = pseudo.labels[known].clamp_max(len(names)), truth[known]

    def count(ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(len(names) + 1, dtype=torch.float64).scatter_add(0, ids, weights)[: len(names)]

    labelled, right = count(labels, weight), count(labels, weight * (labels == truth))
    covered, pixels = count(truth, weight), count(truth, torch.ones_like(weight))

    def percent(part: Tensor, whole: Tensor) -> float | None:
        return round(100 * float(part / whole), 2) if float(whole) > 0 else None

    return {
        "precision": percent(right.sum(), labelled.sum()),
        "coverage": percent(covered.sum(), pixels.sum()),
        "class_precision": {n: percent(right[c], labelled[c]) for c, n in enumerate(names)},
        "class_coverage": {n: percent(covered[c], pixels[c]) for c, n in enumerate(names)},
    }


def labelled_subset(pair: Pair, count: int = IMAGES) -> tuple[list[Tensor], Tensor]:
    """Batches of the same few target training images, spread over the set, and their labels."""
    assert pair.target_train_labelled is not None
    data = pair.target_train_labelled()
    count = min(count, len(data))
    indices = range(0, count * (len(data) // count), len(data) // count)
    images, labels = [], []
    for batch, truth, _ in evaluation_batches(data, batch_size=BATCH, indices=indices):
        assert truth is not None
        images.append(batch)
        labels.append(truth)
    return images, torch.cat(labels)


def measure(checkpoint: Path, pair: Pair, count: int = IMAGES) -> dict[str, Any]:
    """Scores of every selector at one checkpoint: {"step": ..., "selectors": {name: score}}."""
    batches, truth = labelled_subset(pair, count)
    recipe = load_diga(checkpoint, len(pair.classes))
    logits, features = (torch.cat(x) for x in zip(*(label(recipe, images) for images in batches), strict=True))
    found = selections(recipe, logits, features)
    return {
        "step": load_checkpoint(checkpoint)["step"],
        "selectors": {name: score(pseudo, truth, pair.classes.names) for name, pseudo in found.items()},
    }


def measure_run(folder: Path, pair: Pair, count: int = IMAGES) -> list[dict[str, Any]]:
    """Scores along a stage that kept its checkpoints; these are large, and go once the scores are written."""
    path = folder / "selection.json"
    steps = sorted(folder.glob("step_*.pt"))
    if steps or not path.is_file():
        write_json(path, [measure(checkpoint, pair, count) for checkpoint in steps])
    for checkpoint in steps:
        checkpoint.unlink()
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def draw(checkpoint: Path, pair: Pair, path: Path, count: int = 3) -> None:
    """Picture of target images: image, label of the classifier, of the nearest centroid, their consensus, truth."""
    batches, truth = labelled_subset(pair, BATCH)
    recipe = load_diga(checkpoint, len(pair.classes))
    data = pair.target_train_labelled()  # type: ignore[misc]
    logits, features = label(recipe, batches[0])
    consensus = recipe.consensus(logits, features).labels
    similarity = F.softmax(-recipe.prototypes.distances(features), dim=1)
    nearest = F.interpolate(similarity, consensus.shape[1:], mode="bilinear").argmax(1)  # as the consensus sees it
    panels = []
    for i in range(count):
        labels = {
            "pseudo-label": logits[i].argmax(0),
            "nearest centroid": nearest[i],
            "consensus": consensus[i],
            "truth": truth[i],
        }
        image, _ = data[i * (len(data) // BATCH)]
        panels.append({"image": image.permute(1, 2, 0).numpy()} | {k: v.byte().numpy() for k, v in labels.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_panels(path, panels, pair.classes)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # camera noise is large otherwise


def markdown(entry: dict[str, Any]) -> str:
    """Table of one checkpoint: precision and coverage of every selector, then the precision of each class."""
    names = list(next(iter(entry["selectors"].values()))["class_precision"])
    lines = ["| selector | precision | coverage | " + " | ".join(names) + " |", "|---|" + "---:|" * (2 + len(names))]
    for name, found in entry["selectors"].items():
        values = [found["precision"], found["coverage"], *found["class_precision"].values()]
        lines.append(f"| {name} | " + " | ".join("–" if v is None else f"{v:.1f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> str:
    """Markdown: the table of each run of the JSON."""
    parts = [
        f"### {PAIR_NAMES[key.split('/')[0]]}, seed {key.split('/')[1]}, step {entry['step']} of the last stage\n\n"
        f"{markdown(entry)}"
        for key, entry in results.items()
    ]
    return "\n".join(parts) or "Not measured yet.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of the recipe diga")
    parser.add_argument("--images", type=int, default=IMAGES, help="target training images to look at")
    parser.add_argument("--picture", type=Path, help="draw pseudo-label, centroid label, consensus and truth")
    parser.add_argument("--write", action="store_true", help=f"into {MEASURED.name} and {PAGE.name}")
    options = parser.parse_args()
    for checkpoint in options.checkpoints:
        config = json.loads(load_checkpoint(checkpoint)["config"])
        data = config["data"]
        pair = build_pair(**{key: data[key] for key in ("data_root", "source_root", "target_root")}, name=data["pair"])
        if options.picture:
            draw(checkpoint, pair, options.picture)
            print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")
            continue
        found = measure(checkpoint, pair, options.images)
        print(markdown(found))
        if options.write:
            known = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
            known[f"{data['pair']}/{config['seed']}"] = found
            write_json(MEASURED, known)
            write_section("selectors", table(known), PAGE)


if __name__ == "__main__":
    main()
