"""Is target understood better in the colours of source exactly where a net without labels would say so?

    UDAKIT_DATA=/data python benchmarks/colours.py     # whatever is not in the JSON yet: about a minute a pair
    python benchmarks/colours.py --table               # measures nothing, writes the table

The nets are the source-only starts of benchmarks/adaptation.py. Unlabelled target training images give the score, the
target validation set the truth; both as they are, and each in the colours of a source image.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import torch

from benchmarks import adaptation
from benchmarks.harness import PAIR_NAMES, markdown_table
from gta2cs.datasets import Labelled, Unlabelled
from gta2cs.evaluation import evaluate, headline
from gta2cs.label_free import BY_CLASS, measure
from gta2cs.recipes.combined import ahead
from gta2cs.samples import Remembered
from gta2cs.translators import TRANSLATORS

RESULTS = ROOT / "benchmarks" / "results" / "colours.json"
STYLES = ("none", "color")
D = TypeVar("D", Labelled, Unlabelled)


def restyled(data: D, source: Labelled, style: str) -> D:
    """The same data set with each image in the style of a source image."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(source), (len(data),), generator=generator).tolist()

    def image(index: int) -> torch.Tensor:
        content, look = (x.images[i][None] / 255 for x, i in ((data, index), (source, chosen[index])))
        return 255 * TRANSLATORS[style](content, look, (0.0,) * 3, (1.0,) * 3)[0]

    found = copy.copy(data)
    found.images = Remembered(len(data), image)
    return found


def run(pair_name: str, seed: int, data_root: Path | None, cache: Path) -> dict[str, dict[str, float]]:
    """Score and truth of a pair's source-only net on target images in each style."""
    _, pair, net = adaptation.started(pair_name, seed, data_root, cache)
    assert pair.target_val is not None
    found = {}
    shares = None  # of target as it is: a class that is lost in the colours of source counts against them
    for style in STYLES:
        unlabelled = measure(net, restyled(pair.target_train, pair.source_train, style), pair.classes, known=shares)
        shares = shares or unlabelled.shares
        truth = evaluate(net, restyled(pair.target_val, pair.source_train, style), pair.classes)
        found[style] = {
            "score": unlabelled.scores[BY_CLASS],
            "miou": truth.means[headline(truth.means)],
        }
    print(f"{pair_name}: {found}", flush=True)
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a line a pair; score / true mIoU of target as it is and in the colours of source."""
    rows = []
    for key, found in results.items():
        pair, seed = key.split("/")
        cells = [f"{100 * found[style]['score']:.1f} / {found[style]['miou']:.1f}" for style in STYLES]
        taken = ("its own", "target's")[ahead([found[style]["score"] for style in ("none", "color")])]
        rows.append([f"{PAIR_NAMES[pair]}, seed {seed}", *cells, taken])
    if not rows:
        return "Not measured yet.\n"
    return markdown_table(["", "target as it is", "target in source's colours", "source takes"], rows) + "\n"


if __name__ == "__main__":
    adaptation.main_of_starts(__doc__, "colours", run, table, RESULTS)
