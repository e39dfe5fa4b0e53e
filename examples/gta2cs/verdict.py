"""What is known without labels, in words: which net of a run to use, and the tables of scores behind that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gta2cs.choosing import GUARD, LABELLED_BY_CHANCE, ONE_CLASS, SOURCE_ONLY, STATISTICS, score_of
from gta2cs.label_free import (
    DIRECTIONS,
    MARGIN,
    RELIABILITY,
    LabelFree,
    collapsed,
    direction_of,
    only_class,
    reliability,
    with_statistics,
)
from gta2cs.report import cell, table_of
from gta2cs.run_folder import stage_folder, stage_title
from gta2cs.stage import Run

SHOWN = ("balanced_consistency", "mirror_consistency", "confidence")  # in the first table of a report
EXPLAINED = (
    "Balanced consistency is the IoU of a net's prediction with that of the mirrored image, classes weighted by the "
    "root of their pixels, times the mean confidence. It lies between 0 and 1, and higher is better."
)
LOST = (  # the names of the classes go into it
    "it predicts less than a quarter of the source-only net's pixels as {}. No score can tell whether a class is being "
    "lost or was predicted too often before"
)


def verdict(run: Run, histories: list[dict[str, Any]]) -> str:
    """The end of a report: which net to use, by which score, by how much, and how reliable this is."""
    choice, source = run.choice, run.source_only
    if choice is None:
        return "No net was chosen: no evaluation took place.\n"
    lines = []
    if run.config.dry_run:
        lines.append("**A dry run of two steps a stage: what follows shows the form, and says nothing of the nets.**")
    score = choice.score if choice.score in DIRECTIONS else GUARD
    lower = direction_of(run.config.select) < 0
    named = score.replace("_", " ") + (" (lower is better)" if lower else "")
    last = next(iter(histories[-1]["label_free"][-1]["nets"].values()))["scores"][score]
    if source is None:
        lines.append(f"**Use the {choice.title}** (`best.pt`). Nothing was adapted, so there is nothing to compare.")
    else:
        before = source.scores[score]
        ahead = last < before if lower else last > before
        if choice.score == "last":
            looks = f"without labels the {'adapted' if ahead else 'source-only'} net looks better."
            if lost := lost_classes(run, histories):
                looks = f"{'but' if ahead else 'and'} {LOST.format(lost)}."
            lines.append(
                f"**`select: last`: `best.pt` is the {choice.title}.** Its {named} is {last:z.3f}, the source-only "
                f"net's {before:z.3f}{',' if lost else ':'} {looks}"
            )
        elif choice.net == SOURCE_ONLY:
            why = why_not_adapted(run, histories, named, last, before, ahead=ahead)
            lines.append(f"**Use the {choice.title}** (`best.pt`). {why}")
        else:
            trained = found_as_trained(run, histories) if choice.target_statistics else None
            value = choice.value if trained is None else trained.scores[score]
            assert value is not None
            lines.append(
                f"**Use the adapted net** (`best.pt`): the {choice.title}. Its {named} is {value:z.3f}, the "
                f"source-only net's {before:z.3f} ({value - before:+z.3f}), the last student's {last:z.3f}."
            )
            if score in RELIABILITY and round(abs(value - before), 3) <= MARGIN:
                lines.append("So small a difference says nothing: as far as this score can tell, the two are level.")
        if choice.target_statistics:
            lines.append(
                "Here nets are compared with the BatchNorm statistics of their training. The chosen one"
                f"{with_statistics(choice.target_statistics)}, has {choice.value:z.3f}."
            )
    chosen = found_of_chosen(run, histories)
    if chosen is not None and (only := only_class(chosen.shares)) is not None:
        lines.append(f"**The chosen net predicts only {run.pair.classes.names[only]}.** {ONE_CLASS}")
    if any(history.get("by_chance") for history in histories):
        lines.append(LABELLED_BY_CHANCE)
    if source is not None:
        lines.append(reliability(score, direction_of(run.config.select)))
    alarms = [alarm for history in histories for alarm in history.get("alarms", [])]
    if alarms:
        lines.append(
            "Classes whose share changed by a factor of four or more against the source-only net's. If the source-only "
            "net was wrong about them, that is a gain: look at predictions of both.\n\n"
            + "\n".join(f"- {a}" for a in alarms)
        )
    return "\n\n".join(lines) + "\n"


def why_not_adapted(
    run: Run, histories: list[dict[str, Any]], named: str, last: float, before: float, *, ahead: bool
) -> str:
    """Why the source-only net is used; `ahead` says whether the last student has the better score nevertheless."""
    if lost := lost_classes(run, histories):
        file = f"{stage_folder(len(histories) - 1, histories[-1]['name'])}/last.pt"
        return (
            f"The last student has {last:z.3f} against {before:z.3f} of {named}, {'but' if ahead else 'and'} "
            f"{LOST.format(lost)}, so such a net is never chosen. Compare the two in `panels.png`; if the student is "
            f"right, use `{file}`."
        )
    if run.config.select == "source_or_last":
        found = f"The last student has {last:z.3f} of {named}, the source-only net {before:z.3f}."
    else:
        found = f"No adapted net that kept its classes reaches its {named} of {before:z.3f}; the last student has "
        found += f"{last:z.3f}."
    return f"{found} The adaptation did not help, as far as this score can tell."


def lost_classes(run: Run, histories: list[dict[str, Any]]) -> str:
    """Names of the classes that the last student has lost; "" for none."""
    now = next(iter(histories[-1]["label_free"][-1]["nets"].values()))["shares"]
    return ", ".join(run.pair.classes.names[c] for c in collapsed(run.source_only.shares, now))


def found_of_chosen(run: Run, histories: list[dict[str, Any]]) -> LabelFree | None:
    """Scores and shares of the chosen net; None if they are not known."""
    if run.choice is not None and run.choice.target_statistics:
        return LabelFree.from_json(histories[-1][STATISTICS])
    return found_as_trained(run, histories)


def found_as_trained(run: Run, histories: list[dict[str, Any]]) -> LabelFree | None:
    """The same with the BatchNorm statistics of its training, with which nets are compared."""
    choice = run.choice
    if choice is None or choice.net == SOURCE_ONLY:
        return run.source_only
    entries = histories[choice.stage].get("label_free", ()) if choice.stage < len(histories) else ()
    saved = next((entry["nets"][choice.net] for entry in entries if entry.get("step") == choice.step), None)
    return None if saved is None else LabelFree.from_json(saved)


def label_free_tables(run: Run, histories: list[dict[str, Any]], names: Sequence[str]) -> str:
    """Three tables of the source-only net and the last nets: scores that count, shares of the classes, all scores."""
    nets: dict[str, LabelFree] = {}
    if run.source_only is not None:
        nets["source-only net"] = run.source_only
    if histories and histories[-1].get("label_free"):
        title = stage_title([history["name"] for history in histories], len(histories) - 1)
        for net, found in histories[-1]["label_free"][-1]["nets"].items():
            nets[f"{title}, {net}"] = LabelFree.from_json(found)
    chosen = found_of_chosen(run, histories)
    if chosen is not None and chosen not in nets.values():  # of an earlier evaluation
        assert run.choice is not None
        nets[f"chosen: {run.choice.title}"] = chosen
    if not nets:
        return ""
    known = list(next(iter(nets.values())).scores)
    shown = [name for name in dict.fromkeys((score_of(run.config.select), *SHOWN)) if name in known]
    value = lambda found, name: f"{found.scores.get(name, float('nan')):z.3f}"  # noqa: E731
    main = table_of(
        ["net, on target training images", *(_titled(name) for name in shown)],
        [[title, *(value(found, name) for name in shown)] for title, found in nets.items()],
    )
    shares = table_of(
        ["class, % of the predicted pixels", *nets],
        [[cell(c), *(f"{100 * found.shares[i]:.1f}" for found in nets.values())] for i, c in enumerate(names)],
    )
    everything = table_of(
        ["score", *nets], [[_titled(name), *(value(found, name) for found in nets.values())] for name in known]
    )
    return f"{EXPLAINED}\n\n{main}\n{shares}\n<details><summary>All scores</summary>\n\n{everything}\n</details>\n"


def _titled(score: str) -> str:
    named = score.replace("_", " ")
    return f"{named} (lower is better)" if DIRECTIONS.get(score) == -1 else named
