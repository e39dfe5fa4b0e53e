"""Does a net contradict itself least at the scale of target at which it is right? Score and true mIoU, scale by scale.

    UDAKIT_DATA=/data python benchmarks/scales.py      # whatever is not in the JSON yet: about two minutes a pair
    python benchmarks/scales.py --table                # measures nothing, writes the table

The nets are the source-only starts of benchmarks/adaptation.py. Unlabelled target training images give the score, the
target validation set the truth, both enlarged or shrunk before the net sees them.
"""

from __future__ import annotations

import math
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

from torch import nn

from benchmarks import adaptation
from benchmarks.harness import PAIR_NAMES, markdown_table
from gta2cs.evaluation import evaluate, headline
from gta2cs.label_free import BY_CLASS, LabelFree, measure
from gta2cs.matching import REACH, STEP, Rescaled, match_scale

RESULTS = ROOT / "benchmarks" / "results" / "scales.json"


def run(pair_name: str, seed: int, data_root: Path | None, cache: Path) -> list[dict[str, Any]]:
    """Score and truth of a pair's source-only net at every scale."""
    _, pair, net = adaptation.started(pair_name, seed, data_root, cache)
    assert pair.target_val is not None
    found = []
    shares = None  # of scale 1, which comes first: a class that is lost at another scale counts against that scale
    for position in sorted(range(-REACH, REACH + 1), key=abs):
        seen = Rescaled(net, STEP**position)
        unlabelled = measure(seen, pair.target_train, pair.classes, known=shares)  # as the loop asks
        shares = shares or unlabelled.shares
        truth = evaluate(seen, pair.target_val, pair.classes)
        found.append(
            {
                "position": position,
                "score": unlabelled.scores[BY_CLASS],
                "miou": truth.means[headline(truth.means)],
            }
        )
        print(f"{pair_name}: {found[-1]}", flush=True)
    return sorted(found, key=itemgetter("position"))


def climbed(found: list[dict[str, Any]]) -> int:
    """Position that `match_scale` comes to."""
    score = {entry["position"]: entry["score"] for entry in found}

    def known(net: nn.Module, shares: object) -> LabelFree:
        return LabelFree({BY_CLASS: score[round(math.log(getattr(net, "factor", 1.0), STEP))]}, [])

    return round(math.log(match_scale(known, nn.Identity())[0], STEP))


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a pair, a column a scale; score / true mIoU, the scale that is taken in bold."""
    positions = range(-REACH, REACH + 1)
    rows = []
    for key, found in results.items():
        pair, seed = key.split("/")
        taken = climbed(found)
        cells = {e["position"]: f"{100 * e['score']:.0f} / {e['miou']:.1f}" for e in found}
        cells[taken] = f"**{cells[taken]}**"
        rows.append([f"{PAIR_NAMES[pair]}, seed {seed}", *(cells[k] for k in positions)])
    if not rows:
        return "Not measured yet.\n"
    return markdown_table(["target enlarged by", *(f"{STEP**k:.2g}" for k in positions)], rows) + "\n"


if __name__ == "__main__":
    adaptation.main_of_starts(__doc__, "scales", run, table, RESULTS)
