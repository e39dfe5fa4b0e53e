"""The shipped policy, by a user's own command, on a pair that no training option was chosen on: toy, turned round.

    python benchmarks/unseen_pair.py             # whatever is not in the JSON yet: about 20 minutes a seed
    python benchmarks/unseen_pair.py --table     # trains nothing, writes the table

`train_gta2cs.py --data.pair toy_backwards` trains on source, then adapts. The rivals go on from where its first stage
ends, for as many steps: with source alone, and with labelled target images (the oracle).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import train_gta2cs
from benchmarks.adaptation import add, last_of, load, with_target_statistics
from benchmarks.adaptation_tables import spread, taken
from benchmarks.harness import markdown_table, write_section
from benchmarks.results_page import STATISTICS
from gta2cs.evaluation import headline
from gta2cs.run_folder import stage_folder

PAIR = "toy_backwards"
RESULTS = ROOT / "benchmarks" / "results" / "unseen_pair.json"
PAGE = ROOT / "docs" / "results" / "one_policy.md"
BY_SCORE = "source_only + the share of BatchNorm statistics that the score takes"
RIVALS: dict[str, list[str]] = {"source": [], "oracle": ["--data.oracle", "true"]}
ROWS = {  # title: the run, and its row
    "where adaptation starts": ("policy", "source_only"),
    "where adaptation starts, BatchNorm's statistics of target": ("policy", STATISTICS),
    "source-only": ("source", "source_only"),
    "source-only, BatchNorm's statistics of target": ("source", STATISTICS),
    "source-only, all, half or none of these statistics, by the score": ("source", BY_SCORE),
    "combined": ("policy", "combined, student"),
    "combined, the net that the loop deploys": ("policy", "chosen without labels"),
    "oracle": ("oracle", "source_only"),
}


def run(seed: int, cache: Path) -> dict[str, dict[str, float]]:
    """mIoU of every row of the policy's run and of its rivals."""
    policy = train_gta2cs.parse(command("policy", seed, cache))
    *_, adapting = policy.stages
    start = cache / f"policy_{seed}" / stage_folder(0, policy.stages[0].recipe) / "last.pt"
    stage = {**vars(policy.stages[0]), "steps": adapting.steps}
    found = {"policy": trained(policy)}
    for name, more in RIVALS.items():
        going_on = ["--init", str(start), f"--stages={json.dumps([stage])}", *more]
        config = train_gta2cs.parse([*command(name, seed, cache), *going_on])
        found[name] = trained(config)
        if name == "source":  # what the loop does to the net that it deploys
            tried = with_target_statistics(config, last_of(config))
            found[name][BY_SCORE] = tried[taken(tried)]["miou"]
    return found


def command(name: str, seed: int, cache: Path) -> list[str]:
    """What every run of a seed has on its command line."""
    return ["--data.pair", PAIR, "--seed", str(seed), "--resume", "--out", str(cache / f"{name}_{seed}")]


def trained(config: train_gta2cs.Config) -> dict[str, float]:
    """mIoU of every row of a run, which is trained where it is not finished."""
    if not (config.out / "results.json").is_file():
        train_gta2cs.main(config)
    rows = json.loads((config.out / "results.json").read_text(encoding="utf-8"))
    return {title: row["means"][headline(row["means"])] for title, row in rows.items()}


def values(results: dict[str, dict[str, dict[str, float]]], title: str) -> list[float]:
    """mIoU of a row, seed by seed."""
    name, row = ROWS[title]
    return [results[seed][name][row] for seed in sorted(results)]


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a line a row, with the share of the gap between source-only and the oracle."""
    if not results:
        return "Not measured yet.\n"
    base, top = (statistics.mean(values(results, title)) for title in ("source-only", "oracle"))
    rows = []
    for title in ROWS:
        closed = 100 * (statistics.mean(values(results, title)) - base) / (top - base)
        share = f"{closed:.0f} %".replace("-", "−") if title not in ("source-only", "oracle") else ""
        rows.append([title, spread(values(results, title)), share])
    return markdown_table(["", "camera → game, mIoU", "share of the gap"], rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "unseen_pair")
    parser.add_argument("--table", action="store_true", help=f"train nothing, rewrite the table of {PAGE.name}")
    options = parser.parse_args()
    if options.table:
        write_section("unseen_pair", table(load(RESULTS)), PAGE)
        return
    for seed in options.seeds:
        if str(seed) not in load(RESULTS):
            add(RESULTS, str(seed), run(seed, options.cache))


if __name__ == "__main__":
    main()
