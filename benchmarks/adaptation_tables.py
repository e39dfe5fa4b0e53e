"""What came of the runs of benchmarks/adaptation.py: which net each of them deploys, and the tables of the pages."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.adaptation_rows import (
    AT_ONCE,
    FURTHER,
    LONGER,
    LONGER_ROWS,
    PAIRS,
    SCORE,
    SETTINGS,
    STREETS,
    TITLES,
    TOGETHER,
    TRIED,
    TRIED_ROWS,
    WITHOUT,
)
from benchmarks.harness import PAIR_NAMES, markdown_table
from benchmarks.results_page import STATISTICS
from gta2cs.choosing import CHOSEN
from gta2cs.evaluation import headline
from gta2cs.label_free import BY_CLASS, DIRECTIONS, can_be_deployed, collapsed, completed


def last_net(run: dict[str, Any], name: str = "student") -> dict[str, Any] | None:
    """The net of this name at the last evaluation that has one."""
    return next((c for c in reversed(run["checkpoints"]) if c["net"] == name), None)


def chosen(run: dict[str, Any], score: str = SCORE) -> dict[str, Any] | None:
    """What `select` deploys: the highest score among the start and all evaluations; None where nothing has one."""
    start = run.get("source_only")
    nets = [c for c in [start, *deployable(run)] if c and "miou" in c and "scores" in c]
    if start:  # a net that has lost a class of the start is never chosen
        nets = [c for c in nets if not collapsed(start["shares"], c["shares"])]
    return max(nets, key=lambda net: completed(net)[score] or 0.0) if nets else None


def deployed(run: dict[str, Any]) -> dict[str, Any] | None:
    """`best.pt` of a run whose loop tried BatchNorm statistics of target; None of one from before."""
    if "target_statistics" not in run:
        return None
    means = run["rows"][CHOSEN]["means"]
    return {"miou": means[headline(means)]}


def guarded(run: dict[str, Any], score: str = SCORE) -> dict[str, Any] | None:
    """The last student, or the source-only net where that has the higher score."""
    last = last_net(run)
    start = run.get("source_only")
    if last is None or "scores" not in last or not start or "miou" not in start:
        return None
    better = (completed(last)[score] or 0.0) > (completed(start)[score] or 0.0)
    return last if better and not collapsed(start["shares"], last["shares"]) else start


def runs_of(results: dict[str, Any], pair: str, row: str) -> list[dict[str, Any]]:
    """Runs of a row, by seed."""
    row = "source_only" if row == STATISTICS else row
    found = [r for r in results.values() if (r["pair"], r["recipe"]) == (pair, row)]
    return sorted(found, key=lambda r: r["seed"])


def seeds_of(results: dict[str, Any], pair: str, *rows: str) -> set[int]:
    """Seeds that all of these rows have."""
    return set.intersection(*({r["seed"] for r in runs_of(results, pair, row)} for row in rows))


def final(
    results: dict[str, Any], pair: str, row: str, net: str = "student", seeds: Iterable[int] | None = None
) -> list[float]:
    """True mIoU of a row's last checkpoint, a number a seed; of these seeds alone, where they are given."""
    runs = [r for r in runs_of(results, pair, row) if seeds is None or r["seed"] in seeds]
    if row == STATISTICS:
        return [r["rows"][row]["means"][headline(r["rows"][row]["means"])] for r in runs]
    return [c["miou"] for r in runs for c in r["checkpoints"] if c["net"] == net and c["step"] == r["steps"]]


def study(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs as benchmarks/selection.py reads them: adapting runs whose nets have scores beside the truth."""
    named = lambda c: {**{k: v for k, v in c.items() if k != "miou"}, "truth_miou": c["miou"], "scores": completed(c)}  # noqa: E731
    return [
        {
            **{k: r[k] for k in ("pair", "recipe", "seed", "bad")},
            "start": named({"step": 0, "net": "source_only", **r["source_only"]}),
            "checkpoints": [named(c) for c in deployable(r)],
        }
        for r in results.values()
        if r["pair"] in {**PAIRS, **FURTHER}
        and r.get("source_only")
        and "miou" in r["source_only"]
        and all("scores" in c for c in deployable(r))
    ]


def deployable(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Nets of all evaluations without DUDA's large ones."""
    return [c for c in run["checkpoints"] if can_be_deployed(c["net"])]


def table(results: dict[str, Any], of: Iterable[str] = PAIRS) -> str:
    """Markdown: a line a row, a column a pair; the last student, and for `combined` the net chosen without labels."""
    if not (pairs := pairs_run(results, of)):
        return "Not measured yet.\n"
    lines = [
        *lines_of(results, TITLES, pairs),
        line_of(results, "combined, chosen over all evaluations", chosen, pairs),
        line_of(results, "combined, last student or source-only", guarded, pairs),
    ]
    if any(deployed(run) for pair in pairs for run in runs_of(results, pair, "combined")):
        title = "combined, chosen over all evaluations, and its BatchNorm's statistics chosen"
        lines.append(line_of(results, title, deployed, pairs))
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


STATISTICS_OF = ("training", "half", "target")


def with_statistics(results: dict[str, Any], pair: str) -> list[dict[str, Any]]:
    """Nets of a pair whose truth and scores are known with each kind of statistics, each once."""
    runs = [r["target_statistics"] for r in results.values() if r["pair"] == pair and "target_statistics" in r]
    return list({json.dumps(net): net for tried in runs for net in tried.values()}.values())


def taken(net: dict[str, Any], score: str = BY_CLASS) -> str:
    """The kind of statistics with which a net has the highest score; of equal ones, those of training."""
    return max(STATISTICS_OF, key=lambda kind: DIRECTIONS[score] * (net[kind]["scores"][score] or 0))


def gains_by(nets: list[dict[str, Any]], score: str) -> list[float]:
    """mIoU that each net gains by the statistics that a score takes."""
    return [net[taken(net, score)]["miou"] - net["training"]["miou"] for net in nets]


def target_statistics(results: dict[str, Any]) -> str:
    """Markdown: what a trained net gains by BatchNorm statistics of target: always, and where a score says so."""
    nets = {pair: found for pair in [*PAIRS, *FURTHER] if (found := with_statistics(results, pair))}
    if not nets:
        return "Not measured yet.\n"
    mean_of = lambda values: f"{statistics.mean(values):+.1f}".replace("-", "−")  # noqa: E731
    scores = [
        name
        for name in DIRECTIONS
        if all(name in net[kind]["scores"] for of in nets.values() for net in of for kind in net)
    ]
    rows = []
    for pair, found in nets.items():
        gains = {kind: [net[kind]["miou"] - net["training"]["miou"] for net in found] for kind in STATISTICS_OF}
        by_score = gains_by(found, BY_CLASS)
        best = [max(values) for values in zip(*gains.values(), strict=True)]
        rows.append(
            [
                PAIR_NAMES[pair],
                str(len(found)),
                *(mean_of(values) for values in (gains["target"], gains["half"], by_score, best)),
                mean_of([min(by_score)]),
            ]
        )
    named = BY_CLASS.replace("_", " ")
    head = ["", "nets", "all of target's", "half", f"by {named}", "best of the three", f"worst by {named}"]
    chosen_elsewhere = {
        pair: max(scores, key=lambda s: sum(statistics.mean(gains_by(nets[p], s)) for p in nets if p in others(pair)))
        for pair in nets
    }
    picks = ", ".join(f"{PAIR_NAMES[pair]}: {score.replace('_', ' ')}" for pair, score in chosen_elsewhere.items())
    blind = [gain for pair, score in chosen_elsewhere.items() for gain in gains_by(nets[pair], score)]
    return (
        f"{markdown_table(head, rows)}\n\nScore that the other pairs choose: {picks}; "
        f"by it, all {len(blind)} nets gain {mean_of(blind)} in the mean, the worst {mean_of([min(blind)])}.\n"
    )


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


def preferred(results: dict[str, Any], pairs: Iterable[str]) -> str | None:
    """The row of `labelling` with the highest mean over these pairs, of those that have run on all of them."""
    means = {}
    for row in (*AT_ONCE, "decided", "combined"):
        found = [final(results, pair, row) for pair in pairs]
        if found and all(found):
            means[row] = statistics.mean(statistics.mean(values) for values in found)
    return max(means, key=means.__getitem__) if means else None


def weighed(results: dict[str, Any]) -> str:
    """Markdown: the last student of `combined` and of the forms with other labels."""
    titles = {
        "weighed": "90 % of each class, weighed by confidence",
        "rising": "from 60 to 90 % of each class, weighed by confidence",
    }
    return changes(results, "labels", "60 % of each class, full weight", titles)


def without(results: dict[str, Any]) -> str:
    """Markdown: the last student of `combined`, and without one of its parts."""
    titles = {f"without_{name}": title for name, (title, _) in WITHOUT.items()}
    return changes(results, "without", "nothing: `combined`", titles)


def changes(results: dict[str, Any], head: str, first: str, titles: dict[str, str]) -> str:
    """Markdown: the last student of `combined`, and the difference of other rows to it, of runs with the same start.

    A cell is a mean over seeds with their standard deviation, and how many.
    """
    found = {row: {pair: beside(results, pair, row) for pair in (*PAIRS, *FURTHER)} for row in titles}
    pairs = [pair for pair in (*PAIRS, *FURTHER) if any(of[pair] for of in found.values())]
    if not pairs:
        return "Not measured yet.\n"
    starts = {pair: {start: miou for of in found.values() for start, miou, _ in of[pair]} for pair in pairs}
    cells = [spread([*starts[pair].values()]) for pair in pairs]
    lines = [*head_of(pairs, f"{head} "), f"| {first} | {' | '.join(cells)} |"]
    for row, of in found.items():
        if any(of.values()):
            cells = [spread([other - miou for _, miou, other in of[pair]], "+") for pair in pairs]
            lines.append(f"| {titles[row]} | {' | '.join(cells)} |".replace("-", "−"))
    return "\n".join(lines) + "\n"


Start = tuple[int, str, float | None]


def beside(results: dict[str, Any], pair: str, row: str) -> list[tuple[Start, float, float]]:
    """Runs of a row that have a run of `combined` with the same start: which start, mIoU of that run, of this one."""
    return [(start, net["miou"], other["miou"]) for start, net, other in nets_beside(results, pair, row)]


def nets_beside(results: dict[str, Any], pair: str, row: str) -> list[tuple[Start, Any, Any]]:
    """The same with the last students, of `combined` and of the row."""
    found = []
    for run in runs_of(results, pair, row):
        if same := [whole for whole in runs_of(results, pair, "combined") if may_share_start(whole, run)]:
            whole = max(same, key=lambda whole: begins(whole, 0) is not None)  # rather one whose start is known
            found.append(((whole["seed"], whole.get("device", ""), begins(whole, 1)), last_net(whole), last_net(run)))
    return found


def may_share_start(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs are of one seed and device, and began at nets of equal mIoU, as far as the JSON knows it.

    A seed has several starts where the source-only net was trained anew.
    """
    if (run["seed"], run.get("device")) != (other["seed"], other.get("device")):
        return False
    for stages in (0, 1):
        first, second = begins(run, stages), begins(other, stages)
        if first is not None and second is not None:
            return abs(first - second) < 0.01
    return True


def begins(run: dict[str, Any], stages: int) -> float | None:
    """mIoU where a run begins, or where it adapts after one stage on source; None where the JSON does not say it."""
    if stages == 0 and "target_statistics" in run:
        return run["target_statistics"]["start"]["training"]["miou"]
    if not run.get("source_only") or (run["stages"][0]["recipe"] == "source_only") != (stages == 1):
        return None
    return run["source_only"].get("miou")


def either(results: dict[str, Any]) -> str:
    """Markdown: the last students of `combined` and of DACS from the same starts, and the one that a score keeps."""
    found = {pair: nets_beside(results, pair, "dacs_defaults") for pair in (*PAIRS, *FURTHER)}
    nets = {pair: [both for _, *both in runs] for pair, runs in found.items() if runs}
    if not nets:
        return "Not measured yet.\n"
    keep = lambda score: lambda both: max(both, key=lambda net: completed(net)[score] or 0.0)  # noqa: E731
    rules: dict[str, Callable[[list[Any]], Any]] = {
        "combined": lambda both: both[0],
        TITLES["dacs_defaults"]: lambda both: both[1],
        f"the one with the higher {SCORE.replace('_', ' ')}": keep(SCORE),
        f"the one with the higher {BY_CLASS.replace('_', ' ')}": keep(BY_CLASS),
        "the better one": lambda both: max(both, key=lambda net: net["miou"]),
    }
    lines = [f"{line} mean |" for line in head_of([*nets])]
    lines[1] = lines[1].replace(" mean |", "---:|")
    for title, rule in rules.items():
        values = [[rule(both)["miou"] for both in of] for of in nets.values()]
        mean = statistics.mean(map(statistics.mean, values))
        lines.append(f"| {title} | {' | '.join(map(spread, values))} | {mean:.1f} |")
    return "\n".join(lines) + "\n"


def longer(results: dict[str, Any]) -> str:
    """Markdown: a line a row, two columns a pair: the last student after the usual steps, and after more of them.

    The oracle, which stands below, took the usual steps. Shares of the gap begin at source-only of as many steps.
    """
    ran = lambda pair, row: bool(final(results, pair, f"longer_{row}"))  # noqa: E731
    pairs = [pair for pair in PAIRS if any(ran(pair, row) for row in LONGER_ROWS)]
    if not pairs:
        return f"Runs of {LONGER} times the steps (`--group longer`) are not measured yet.\n"
    head = [f"{PAIR_NAMES[pair]}, {PAIRS[pair]['steps'] * times} steps" for pair in pairs for times in (1, LONGER)]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for row in (row for row in LONGER_ROWS if any(ran(pair, row) for pair in pairs)):
        cells = []
        for pair in pairs:
            seeds = seeds_of(results, pair, f"longer_{row}")
            short = "combined" if row in ("steady", "quick") else row  # which are the same there
            cells.append(cell(results, pair, short, seeds=seeds))
            cells.append(cell(results, pair, f"longer_{row}", start="longer_source_only"))
        lines.append(f"| {TITLES[row]} | {' | '.join(cells)} |")
    oracles = [f"{spread(final(results, pair, 'oracle'))} | –" for pair in pairs]
    lines.append(f"| oracle | {' | '.join(oracles)} |")
    return "\n".join(lines) + "\n"


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


def choose(pair: str, results: dict[str, Any]) -> str:
    """The setting of DACS with the best mean gain over source-only, on the pairs that share no images with `pair`."""
    gains = gains_elsewhere(pair, results)
    return max(gains, key=lambda name: statistics.mean(gains[name] or [0.0]))


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


def others(pair: str) -> list[str]:
    """The pairs that share no images with a pair."""
    return [other for other in PAIRS if other not in TOGETHER.get(pair, {pair})]


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


def spread(values: list[float], sign: str = "") -> str:
    """Mean, with its sign if that is `+`, standard deviation where there are two at least, and how many."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation} [{len(values)}]"
