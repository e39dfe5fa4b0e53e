"""Which label-free score may be trusted to choose a net? Every score against the true mIoU, over the nets of many runs.

    python benchmarks/selection.py --collect runs/a runs/b --into runs.json          # of finished or stopped runs
    python benchmarks/selection.py --collect runs/ruined --bad --into runs.json      # made bad on purpose
    python benchmarks/selection.py runs.json --markdown table.md --picture selection.png

    python benchmarks/selection.py benchmarks/results/adaptation.json --cache runs/adaptation   # of adaptation.py

`runs.json` is a list of {pair, recipe, seed, bad, start, checkpoints}; `start` (the source-only net) and each of the
checkpoints are {step, net, truth_miou, scores: {name: value}, shares: [...]}. Three questions are asked of each score:

- checkpoint: which of the nets of this run?           Regret: mIoU of the best one less that of the chosen one.
- setting: which of the runs of this pair and seed, by their last student?
- guard: the last student of this run, or the source-only net?

The sign of a score is fixed on the other pairs (by its mean Spearman correlation there), and so is the score itself in
the row "chosen on the other pairs"; the street pairs, which share images, are left out together. Intervals are 95 %
bootstraps over runs, drawn within each pair.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from benchmarks.harness import markdown_table, pair_name
from gta2cs.evaluation import headline
from gta2cs.histories import all_scores, read_run
from gta2cs.label_free import DEFAULT, PRESENT, collapsed
from gta2cs.rank_statistics import kendall, ranks, spearman

Net = dict[str, Any]
Run = dict[str, Any]
STREETS = {"camvid", "carla2camvid", "carla2dusk", "dusk2day", "day2carla"}
TOGETHER = (STREETS,)  # share images: left out together
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
QUESTIONS = ("checkpoint", "setting", "guard")
SHOWN = (
    "balanced_consistency",
    "confident_consistency",
    "mirror_consistency",
    "nuclear_norm",
    "neighbourhood_density",
    "negative_entropy",
)  # in the picture


# --- scores and questions -------------------------------------------------------------------------


class Score:
    """A score, or several added by their ranks among the candidates; higher is better once it has its sign."""

    def __init__(self, *names: str) -> None:
        self.names = names

    @property
    def title(self) -> str:
        return " + ".join(name.replace("_", " ") for name in self.names)

    def values(self, nets: Sequence[Net], signs: dict[str, int]) -> list[float]:
        """A number for each candidate; what has no score comes last."""
        columns = []
        for name in self.names:
            x = [n["scores"].get(name) for n in nets]
            columns.append([-np.inf if v is None or not np.isfinite(v) else signs[name] * v for v in x])
        return columns[0] if len(columns) == 1 else list(np.sum([ranks(c) for c in columns], axis=0))


def score_names(runs: Sequence[Run]) -> list[str]:
    """Names that every run has, in the order of the first."""
    found = [list(net["scores"]) for run in runs for net in run["checkpoints"]]
    return [name for name in found[0] if all(name in names for names in found)]


def nets_of(runs: Iterable[Run]) -> list[Net]:
    """All nets once: the checkpoints, and source-only nets that runs share."""
    nets: list[Net] = []
    for run in runs:
        nets += run["checkpoints"]
        if run.get("start") and run["start"] not in nets:
            nets.append(run["start"])
    return nets


def last_student(run: Run) -> Net:
    """The net of a run that is deployed when nobody chooses: the first of those of the last step."""
    step = max(net["step"] for net in run["checkpoints"])
    return next(net for net in run["checkpoints"] if net["step"] == step)


def choices(runs: Sequence[Run], question: str) -> list[list[Net]]:
    """The lists of candidates that a question is about; where there is one candidate there is no choice."""
    if question == "checkpoint":
        lists = [run["checkpoints"] for run in runs]
    elif question == "guard":
        lists = [[run["start"], last_student(run)] for run in runs if run.get("start")]
    else:
        groups: dict[tuple[str, int], list[Net]] = {}
        for run in runs:
            groups.setdefault((run["pair"], run["seed"]), []).append(last_student(run))
        lists = list(groups.values())
    return [nets for nets in lists if len(nets) > 1]


Policy = Callable[[Sequence[Net], str], float]  # (candidates, question) -> mIoU of what it takes


def by_score(score: Score, signs: dict[str, int]) -> Policy:
    """Take the candidate with the highest score; ties are broken by chance, so their mean is what one gets.

    As in the loop, a net that has lost a class of the one that it started from is taken only if there is no other.
    """

    def take(nets: Sequence[Net], question: str) -> float:
        values = np.array(score.values(nets, signs))
        gone = np.array([net.get("lost", False) for net in nets])
        values = np.where(gone & ~gone.all(), -np.inf, values)
        truth = np.array([net["truth_miou"] for net in nets])
        return float(truth[values == values.max()].mean())

    return take


def at_random(nets: Sequence[Net], question: str) -> float:
    """What a blind choice gets in the mean."""
    return float(np.mean([net["truth_miou"] for net in nets]))


def always_last(nets: Sequence[Net], question: str) -> float:
    """The last student; between settings nothing is last, and the choice is blind."""
    if question == "setting":
        return at_random(nets, question)
    return float(last_student({"checkpoints": nets})["truth_miou"])


def regrets(runs: Sequence[Run], question: str, policy: Policy) -> list[float]:
    """Best less chosen, for each list of candidates."""
    return [
        max(net["truth_miou"] for net in nets) - policy(nets, question) for nets in choices(runs, question)
    ]  # fmt: skip


def source_only_regrets(runs: Sequence[Run], question: str) -> list[float]:
    """What never adapting loses; below 0 where no candidate reaches the source-only net."""
    if question == "setting":
        return []
    with_start = [run for run in runs if run.get("start")]
    lists = choices(with_start, question) if question == "guard" else [run["checkpoints"] for run in with_start]
    return [
        max(net["truth_miou"] for net in nets) - run["start"]["truth_miou"]
        for run, nets in zip(with_start, lists, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """Mean of what is finite; NaN of nothing."""
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


# --- leaving pairs out ----------------------------------------------------------------------------


def by_pair(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each pair."""
    pairs: dict[str, list[Run]] = {}
    for run in runs:
        pairs.setdefault(run["pair"], []).append(run)
    return pairs


def others(pairs: dict[str, list[Run]], pair: str) -> dict[str, list[Run]]:
    """The pairs that are not this one and share no image with it."""
    group = next((g for g in TOGETHER if pair in g), {pair})
    return {name: runs for name, runs in pairs.items() if name not in group}


def pair_correlation(runs: Sequence[Run], name: str, statistic: Callable[..., float] = spearman) -> float:
    """Correlation with the truth over all nets of a pair."""
    nets = nets_of(runs)
    return statistic([n["scores"].get(name) for n in nets], [n["truth_miou"] for n in nets])


def signs_on(pairs: dict[str, list[Run]], names: Sequence[str]) -> dict[str, int]:
    """Direction of each score: the sign of its mean correlation over these pairs."""
    return {name: -1 if mean([pair_correlation(runs, name) for runs in pairs.values()]) < 0 else 1 for name in names}


def pair_regret(runs: Sequence[Run], policy: Policy) -> float:
    """One number for the three questions: the mean of their mean regrets."""
    return mean([mean(regrets(runs, question, policy)) for question in QUESTIONS])


def candidates(names: Sequence[str]) -> list[Score]:
    """Every score, and every two of them added by rank."""
    return [Score(name) for name in names] + [Score(*two) for two in combinations(names, 2)]


def chosen_on(pairs: dict[str, list[Run]], names: Sequence[str], signs: dict[str, int]) -> Score:
    """The score with the least regret over these pairs, each pair alike; the simpler one on a tie."""

    def regret(score: Score) -> tuple[float, int]:
        return mean([pair_regret(runs, by_score(score, signs)) for runs in pairs.values()]), len(score.names)

    return min(candidates(names), key=regret)


# --- one row --------------------------------------------------------------------------------------


def row(pairs: dict[str, list[Run]], policy_of: dict[str, Policy | None], question: str) -> dict[str, list[float]]:
    """Regrets of each pair; a policy of None is the source-only net."""
    found = {}
    for pair, runs in pairs.items():
        policy = policy_of[pair]
        found[pair] = source_only_regrets(runs, question) if policy is None else regrets(runs, question, policy)
    return found


def mean_over_pairs(found: dict[str, list[float]]) -> float:
    """Each pair counts alike."""
    return mean([mean(values) for values in found.values()])


def interval(found: dict[str, list[float]], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % of the mean over pairs when the runs of each pair are drawn anew."""
    generator = np.random.default_rng(seed)
    means = []
    for values in found.values():
        x = np.array(values)
        if len(x):
            means.append(x[generator.integers(len(x), size=(draws, len(x)))].mean(1))
    if not means:
        return float("nan"), float("nan")
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


class Study:
    """All numbers of a list of runs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        check_runs(runs)
        for run in runs:
            for net in run["checkpoints"]:
                net["lost"] = bool(run.get("start")) and lost(run["start"], net)
        self.pairs, self.names = by_pair(runs), score_names(runs)
        self.rest = {pair: others(self.pairs, pair) or self.pairs for pair in self.pairs}
        self.signs = {pair: signs_on(rest, self.names) for pair, rest in self.rest.items()}
        self.elected = {pair: chosen_on(rest, self.names, self.signs[pair]) for pair, rest in self.rest.items()}

    def policies(self) -> dict[str, dict[str, Policy | None]]:
        """Row -> the policy of each pair."""
        rows: dict[str, dict[str, Policy | None]] = {}
        for name in self.names:
            rows[name.replace("_", " ")] = {p: by_score(Score(name), self.signs[p]) for p in self.pairs}
        rows["chosen on the other pairs"] = {p: by_score(self.elected[p], self.signs[p]) for p in self.pairs}
        rows["last"] = dict.fromkeys(self.pairs, always_last)
        rows["source-only"] = dict.fromkeys(self.pairs, None)
        rows["random"] = dict.fromkeys(self.pairs, at_random)
        rows["impossible best"] = dict.fromkeys(self.pairs, lambda nets, q: max(n["truth_miou"] for n in nets))
        return rows

    def correlations(self, name: str) -> dict[str, Any]:
        """Spearman in each pair, and the means of Spearman and Kendall in pairs and in runs, by the raw sign."""
        within = [
            [spearman([n["scores"].get(name) for n in r["checkpoints"]], [n["truth_miou"] for n in r["checkpoints"]])
             for r in runs] for runs in self.pairs.values()
        ]  # fmt: skip
        return {
            "pairs": {pair: pair_correlation(runs, name) for pair, runs in self.pairs.items()},
            "kendall": mean([pair_correlation(runs, name, kendall) for runs in self.pairs.values()]),
            "within": mean([mean(values) for values in within]),
        }


def check_runs(runs: Any) -> None:
    """Refuse what is no list of runs, by what is missing."""
    if not isinstance(runs, list) or not runs:
        raise ValueError("Expected a list of at least one run.")
    for number, run in enumerate(runs):
        missing = {"pair", "recipe", "seed", "checkpoints"} - set(run)
        if missing or not run["checkpoints"]:
            raise ValueError(f"Expected run {number} to have checkpoints and {sorted(missing)}, but they are missing.")
        for net in [*run["checkpoints"], *([run["start"]] if run.get("start") else [])]:
            if not {"step", "net", "truth_miou", "scores"} <= set(net):
                raise ValueError(f"Expected every net of run {number} to have step, net, truth_miou and scores.")


# --- what is written ------------------------------------------------------------------------------


def markdown(runs: Sequence[Run]) -> str:
    """A short table, and a folded one with everything: a row a score, correlations as measured.

    Regrets have the sign of each score as the other pairs fix it.
    """
    study = Study(runs)
    good_runs = [run for run in runs if not run.get("bad")]
    good = Study(good_runs) if good_runs and len(good_runs) < len(runs) else None
    pairs = list(study.pairs)
    short = [["score", "lowest ρ", "highest ρ", "ρ within runs", *(f"regret, {question}" for question in QUESTIONS)]]
    whole = [["score", *(f"ρ {pair_name(pair)}" for pair in pairs), "τ"]]
    for question in QUESTIONS:
        whole[0] += [f"regret, {question}", *(["without bad runs"] if good else [])]
    good_policies = good.policies() if good else {}
    for title, policy_of in study.policies().items():
        name = title.replace(" ", "_")
        first = f"**{title}**" if title == "chosen on the other pairs" else title
        short.append([first, "–", "–", "–"])
        whole.append([first, *["–"] * (len(pairs) + 1)])
        if name in study.names:
            found = study.correlations(name)
            each = [value for value in found["pairs"].values() if not np.isnan(value)] or [np.nan]
            short[-1][1:] = map(_two, (min(each), max(each), found["within"]))
            whole[-1][1:] = map(_two, (*found["pairs"].values(), found["kendall"]))
        for question in QUESTIONS:
            regret = row(study.pairs, policy_of, question)
            low, high = interval(regret)
            value = mean_over_pairs(regret)
            short[-1].append("–" if np.isnan(value) else f"{value:.1f}")
            whole[-1].append("–" if np.isnan(value) else f"{value:.1f} [{low:.1f}, {high:.1f}]")
            if good:
                without = mean_over_pairs(row(good.pairs, good_policies[title], question))
                whole[-1].append("–" if np.isnan(without) else f"{without:.1f}")
    nets = sum(len(nets_of(r)) for r in study.pairs.values())
    bad = sum(bool(run.get("bad")) for run in runs)
    elected = "; ".join(f"{pair_name(pair)}: {score.title}" for pair, score in study.elected.items())
    parts = [
        markdown_table(short[0], short[1:]),
        f"{nets} nets of {len(runs)} runs on {len(pairs)} pairs ({bad} runs made bad on purpose). Regret in points of "
        "mIoU, mean over pairs.",
        f"Chosen on the other pairs, for {elected}.",
        "<details markdown>\n<summary>Every pair, with 95 % bootstrap intervals over runs</summary>",
        markdown_table(whole[0], whole[1:]),
        guard_table(study).rstrip(),
        "</details>\n",
    ]
    return "\n\n".join(filter(None, parts))


def guard_table(study: Study, name: str = DEFAULT) -> str:
    """How often the adapted net would be deployed, and what that gains and misses, by one score with its raw sign."""
    if name not in study.names:
        return ""
    lines = [
        f"| by {name.replace('_', ' ')} | runs | last student - source-only | deployed | gain | "
        "better by 3, not deployed | `best.pt` - source-only | adapted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    if not any(choices(runs, "guard") for runs in study.pairs.values()):
        return ""
    signs = {name: 1}
    for pair, runs in study.pairs.items():
        duels = choices(runs, "guard")
        if not duels:
            continue
        deployed = [b["scores"][name] > a["scores"][name] and not lost(a, b) for a, b in duels]
        gains = [b["truth_miou"] - a["truth_miou"] for a, b in duels]
        got = [gain if taken else 0.0 for gain, taken in zip(gains, deployed, strict=True)]
        missed = sum(gain >= 3 and not taken for gain, taken in zip(gains, deployed, strict=True))
        best, adapted = [], 0
        for run in runs:
            if run.get("start"):
                kept = [net for net in run["checkpoints"] if not lost(run["start"], net)]
                nets = [run["start"], *kept]  # the earlier one on a tie, as in the loop
                chosen = nets[int(np.argmax(Score(name).values(nets, signs)))]
                best.append(chosen["truth_miou"] - run["start"]["truth_miou"])
                adapted += chosen is not run["start"]
        lines.append(
            f"| {pair_name(pair)} | {len(duels)} | {np.mean(gains):+.1f} | {sum(deployed)} | {np.mean(got):+.1f} "
            f"| {missed} | {np.mean(best):+.1f} | {adapted} |"
        )
    return "\n".join(lines) + "\n"


def weights_table(pairs: dict[str, list[Run]]) -> str:
    """What the guard gains if a class weighs its share of the pixels to a power, and the power other pairs take."""
    gains = {power: {pair: guarded_gain(runs, power) for pair, runs in pairs.items()} for power in POWERS}
    lines = ["| power | " + " | ".join(map(pair_name, pairs)) + " | mean |", "|---:|" + "---:|" * (len(pairs) + 1)]
    for power, found in gains.items():
        values = [*found.values(), mean(list(found.values()))]
        lines.append(f"| {power:g} | " + " | ".join(f"{value:+.2f}".replace("-", "−") for value in values) + " |")
    picks = []
    for pair in pairs:
        rest = {power: mean([v for other, v in found.items() if other != pair]) for power, found in gains.items()}
        picks.append(f"{pair_name(pair)}: {max(rest, key=rest.__getitem__):g}")
    return "\n".join(lines) + f"\n\nPower that the other pairs choose, for {'; '.join(picks)}.\n"


def guarded_gain(runs: Sequence[Run], power: float) -> float:
    """Mean gain of the last student where it has the higher score and has lost no class, 0 elsewhere."""
    found = []
    for run in runs:
        start, last = run.get("start"), last_student(run)
        if start and "class_iou" in start and "class_iou" in last:
            taken = weighted(last, power) > weighted(start, power) and not lost(start, last)
            found.append(last["truth_miou"] - start["truth_miou"] if taken else 0.0)
    return mean(found)


def weighted(net: Net, power: float) -> float:
    """Mirror IoU with such weights, times confidence."""
    weights = [share**power if share >= PRESENT or power > 0 else 0.0 for share in net["shares"]]
    iou = net["class_iou"]["mirror"]
    total = sum(weight * (value or 0.0) for weight, value in zip(weights, iou, strict=True))
    return total / sum(weights) * net["scores"]["confidence"]  # type: ignore[no-any-return]


def lost(start: Net, net: Net) -> bool:
    """Whether a net has lost a class of the one that it started from, so that the loop never deploys it."""
    return bool(collapsed(start.get("shares", ()), net.get("shares", ())))


def _two(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Scores against the truth: a column a pair, a row a score; a star is where runs start, a cross is of a bad run."""
    pairs = by_pair(runs)
    names = [name for name in SHOWN if name in score_names(runs)] or score_names(runs)[:4]
    figure, axes = plt.subplots(
        len(names), len(pairs), figsize=(2.9 * len(pairs), 2.5 * len(names)), squeeze=False, layout="constrained"
    )
    for line, name in zip(axes, names, strict=True):
        for axis, (pair, members) in zip(line, pairs.items(), strict=True):
            for run in members:
                x = [np.nan if net["scores"][name] is None else net["scores"][name] for net in run["checkpoints"]]
                y = [net["truth_miou"] for net in run["checkpoints"]]
                color, marker = ("C3", "x") if run.get("bad") else ("C0", "o")
                axis.scatter(x, y, s=6, lw=0.5, color=color, marker=marker, alpha=0.5)
                if run.get("start"):
                    axis.scatter(run["start"]["scores"][name], run["start"]["truth_miou"], s=45, color="k", marker="*")
            axis.set_title(f"{pair_name(pair)}, ρ = {_two(pair_correlation(members, name))}", fontsize=9)
            axis.set_xlabel(name.replace("_", " "), fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("mIoU on target, %", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    with Image.open(path) as picture:  # few colours, for a small file
        picture.convert("RGB").quantize(24, dither=Image.Dither.NONE).save(path, optimize=True)


# --- collecting -----------------------------------------------------------------------------------


def collect(folder: Path, *, bad: bool = False) -> Run:
    """One run's entry: of `history.json`, or of the checkpoints of a run that was stopped."""
    run = read_run(folder).to_json()
    run["checkpoints"] = [net for net in run["checkpoints"] if net["truth_miou"] is not None]
    if not run["checkpoints"]:
        raise ValueError(f"Expected {folder} to be a run whose target has labels: there is nothing to compare with.")
    if run["start"] and run["start"]["truth_miou"] is None:
        run["start"] = None
    return {**run, "bad": bad}


def read(path: Path, cache: Path | None = None) -> list[Run]:
    """Runs of a list as above, or of the results of `adaptation.py` (the oracle is no candidate and left out)."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(saved, list):
        return saved
    return [_of_adaptation(run, cache) for run in saved.values() if run["recipe"] != "oracle"]


def _of_adaptation(run: dict[str, Any], cache: Path | None) -> Run:
    def net(found: dict[str, Any], step: int, name: str, miou: float) -> Net:
        return {"step": step, "net": name, "truth_miou": miou, "scores": all_scores(found), "shares": found["shares"]}

    start, found = None, run.get("source_only")
    miou = None if found is None else found.get("miou")
    if found is not None and miou is None and cache is not None:
        warm = cache / run["pair"] / f"seed{run['seed']}" / "warm" / "results.json"
        means = json.loads(warm.read_text())["source_only"]["means"] if warm.is_file() else None
        miou = means and means[headline(means)]
    if found is not None and miou is not None:
        start = net(found, 0, "source_only", miou)
    checkpoints = [net(c, c["step"], c["net"], c["miou"]) for c in run["checkpoints"] if c.get("scores")]
    kept = {key: run[key] for key in ("pair", "recipe", "seed")}
    return {**kept, "bad": bool(run.get("bad")), "start": start, "checkpoints": checkpoints}


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect runs, or write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, help="runs.json")
    parser.add_argument("--markdown", type=Path, help="where the table goes; without it to the terminal")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--collect", nargs="+", type=Path, default=[], metavar="RUN", help="folders of runs")
    parser.add_argument("--into", type=Path, default=Path("runs.json"))
    parser.add_argument("--bad", action="store_true", help="the collected runs were made bad on purpose")
    parser.add_argument("--cache", type=Path, help="the cache of adaptation.py, for the truth of its warm starts")
    options = parser.parse_args(arguments)
    if options.collect:
        known = json.loads(options.into.read_text()) if options.into.is_file() else []
        found = {run.get("folder", str(number)): run for number, run in enumerate(known)}
        for folder in options.collect:
            found[str(folder)] = {"folder": str(folder), **collect(folder, bad=options.bad)}
        options.into.write_text(json.dumps(list(found.values()), indent=0) + "\n")
        print(f"{options.into}: {len(found)} runs")
    if options.runs is not None:
        runs = read(options.runs, options.cache)
        text = markdown(runs)
        if options.markdown is None:
            print(text)
        else:
            options.markdown.write_text(text, encoding="utf-8")
        if options.picture is not None:
            draw(runs, options.picture)


if __name__ == "__main__":
    main()
