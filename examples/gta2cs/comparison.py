"""Runs on one target, ranked without labels: which net is the best, in which file it lies, and how right that was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from gta2cs import report
from gta2cs.choosing import LABELLED_BY_CHANCE
from gta2cs.histories import RunNets
from gta2cs.label_free import MARGIN, RELIABILITY, collapsed, direction_of, reliability, with_statistics
from gta2cs.rank_statistics import spearman

TOP = 15  # nets in the second table
HOW_TO_USE = (
    "`predict.py --checkpoint` takes such a file, in the folder of its run, with `--net teacher` for a teacher that "
    "is not the net of `best.pt`. Of runs with `keep_checkpoints: true`, the nets of every step at which one was saved "
    "are kept."
)


class Comparison:
    """Runs on one target, best first by a score."""

    def __init__(self, runs: Sequence[RunNets], score: str) -> None:
        self.score, self.sign = score.removeprefix("-"), direction_of(score)
        for what in ("pair", "images", "classes"):
            if len(found := {str(getattr(run, what)) for run in runs}) > 1:
                raise ValueError(
                    "Expected runs on one pair, with the same images and classes, because other scores do not compare, "
                    f"but got {what} {' and '.join(sorted(found))}."
                )
        for run in runs:
            if self.score not in run.last["scores"]:
                known = sorted(run.last["scores"])
                raise ValueError(f"Expected {run.folder} to have the score {self.score!r}, but it has {known}.")
        self.runs = sorted(runs, key=lambda run: self.value(run.as_trained(self.best(run))), reverse=True)

    def value(self, net: dict[str, Any]) -> float:
        """The value of the score; higher is better."""
        found = net["scores"].get(self.score)
        return float("-inf") if found is None else self.sign * found

    def best(self, run: RunNets) -> dict[str, Any]:
        """The net of a run to use: the one with the best score, which may be its source-only net.

        It is one that has lost no class of that net. Nets are compared with the BatchNorm statistics of their training.
        If the run chose the same net, it is the one of `best.pt`, which may have statistics of target.
        """
        if run.chosen is not None and self.selects(run):  # of equal ones, its own
            return run.chosen
        trained = [net for net in run.nets if not net.get("target_statistics")]
        return run.deployed(max(trained, key=lambda net: (not self.lost(run, net), self.value(net))))

    def selects(self, run: RunNets) -> bool:
        """Whether the run chooses among all of its nets by the very score."""
        return run.select.removeprefix("-") == self.score and direction_of(run.select) == self.sign

    def lost(self, run: RunNets, net: dict[str, Any]) -> bool:
        """Whether a net has lost a class of the run's source-only net."""
        return run.start is not None and bool(collapsed(run.start["shares"], net["shares"]))

    @property
    def all_nets(self) -> list[tuple[RunNets, dict[str, Any]]]:
        """Every net of every run, best first; those that have lost a class come last.

        A net with statistics of target has the place of the same net with those of its training.
        """
        pairs = [(run, net) for run in self.runs for net in run.nets]
        used = {id(self.best(run)) for run in self.runs}

        def rank(pair: tuple[RunNets, dict[str, Any]]) -> tuple[bool, float, bool]:
            run, net = pair
            return not self.lost(run, net), self.value(run.as_trained(net)), id(net) in used

        return sorted(pairs, key=rank, reverse=True)

    @property
    def labelled(self) -> bool:
        """Whether the truth is known of any net."""
        return any(net["truth_miou"] is not None for _, net in self.all_nets)

    def text(self) -> str:
        """The page, as Markdown."""
        winner = self.runs[0]
        net = self.best(winner)
        named, value = self.score.replace("_", " "), number(winner.as_trained(net)["scores"].get(self.score), 3)
        compared = [pair for pair in self.all_nets if not pair[1].get("target_statistics")]
        kept = sum(not self.lost(*pair) for pair in compared)
        of = "nets" if kept == len(compared) else "nets that kept their classes"
        lines = [
            f"# {winner.pair}: {len(self.runs)} runs, compared without labels\n",
            f"**Use the {title(net)}, in `{winner.folder.name}`**: its {named} is {value}, the "
            f"{'highest' if self.sign > 0 else 'lowest'} of {kept or len(compared)} {of}. "
            f"{self.with_its_statistics(winner, net)}{self.level_with_start(winner, net)}"
            f"{reliability(self.score, self.sign)}\n",
            f"{where(winner, net)}\n",
            self.table_of_runs(),
            *(f"{line}\n" for line in (*self.doubts(), *self.stopped(), *self.other_choices())),
            "![The score along each run; a star is the source-only net](score.png)\n",
            *self.how_right(),
            f"\n## The {min(TOP, len(self.all_nets))} nets with the best score\n",
            self.table_of_nets(),
            f"{HOW_TO_USE}\n",
        ]
        return "\n".join(lines)

    def doubts(self) -> list[str]:
        """A sentence for each run whose source-only net nothing has trained."""
        return [
            f"{report.cell(run.folder.name)}: {LABELLED_BY_CHANCE.replace('**', '')}"
            for run in self.runs
            if run.by_chance
        ]

    def stopped(self) -> list[str]:
        """A sentence for each run that is not finished."""
        return [
            f"{report.cell(run.folder.name)} is not finished: "
            + ("it goes on" if run.adapts else "its nets are those of its source-only stage. It goes on and adapts")
            + " with its own command and `--resume`."
            for run in self.runs
            if not run.finished
        ]

    def other_choices(self) -> list[str]:
        """A sentence for each run that chose another net than the one that is best here."""
        return [
            f"{report.cell(run.folder.name)} itself chose another net{by(run)}, the {title_of_choice(run)}: the one "
            f"in its `best.pt`, which its own report and `predict.py --checkpoint {run.folder}` mean."
            for run in self.runs
            if run.choice is not None and self.best(run) is not run.chosen
        ]

    def with_its_statistics(self, run: RunNets, net: dict[str, Any]) -> str:
        """A sentence, where the net to use has other BatchNorm statistics than those that nets are compared with."""
        if run.as_trained(net) is net:
            return ""
        value = number(net["scores"].get(self.score), 3)
        return f"That is with the BatchNorm statistics of its training; as it is in `best.pt` it has {value}. "

    def level_with_start(self, run: RunNets, net: dict[str, Any]) -> str:
        """A sentence, where the score cannot tell the chosen net from the source-only net of its run."""
        trained = run.as_trained(net)
        if run.start is None or trained is run.start or self.score not in RELIABILITY:
            return ""
        gain = round(abs(self.value(trained) - self.value(run.start)), 3)
        return "The run's source-only net is level with it: use either. " if gain <= MARGIN else ""

    def table_of_runs(self) -> str:
        """One row per run: the chosen net and its score, and the scores of the source-only net and the last student."""
        head = ["run", "recipe", "chosen net", "seed", "its score", "of source-only", "of the last"]
        head += ["true mIoU of the chosen", "of source-only", "of the last", "of the best"] if self.labelled else []
        lines = []
        for run in self.runs:
            best, start = self.best(run), run.start
            values = [
                run.as_trained(best)["scores"].get(self.score),
                start and start["scores"].get(self.score),
                run.last["scores"][self.score],
            ]
            truths = [net["truth_miou"] for net in run.nets if net["truth_miou"] is not None]
            true = [
                best["truth_miou"],
                start and start["truth_miou"],
                run.last["truth_miou"],
                max(truths, default=None),
            ]
            cells = [report.cell(run.name), run.recipe, title(best), str(run.seed)]
            lines.append(cells + [number(v, 3) for v in values] + [number(v, 1) for v in true if self.labelled])
        return report.table_of(head, lines, words=3)

    def table_of_nets(self) -> str:
        """One row per net, best first."""
        head = ["net", "run", "file", self.score.replace("_", " "), *(["mIoU"] if self.labelled else [])]
        lines = []
        for run, net in self.all_nets[:TOP]:
            name = f"{title(net)} (a class shrank)" if self.lost(run, net) else title(net)
            file = run.file_of(net)
            place = "not kept" if file is None else f"`{file.relative_to(run.folder)}`"
            cells = [name, report.cell(run.name), place, number(net["scores"].get(self.score), 3)]
            lines.append(cells + ([number(net["truth_miou"], 1)] if self.labelled else []))
        return report.table_of(head, lines, words=3)

    def how_right(self) -> list[str]:
        """What the labels say about the choice, if there are any."""
        nets = [net for _, net in self.all_nets if net["scores"].get(self.score) is not None]
        known = [(self.value(net), net["truth_miou"]) for net in nets if net["truth_miou"] is not None]
        if len(known) < 2:
            return ["Target has no labels: nothing says how right this is.\n"]
        used, best = self.best(self.runs[0])["truth_miou"], max(truth for _, truth in known)
        rho = spearman([value for value, _ in known], [truth for _, truth in known])
        last = [run.last["truth_miou"] for run in self.runs if run.last["truth_miou"] is not None]
        said = [
            "Target has labels, which took no part in the choice.",
            f"The best of all nets has an mIoU of {best:.1f}, the chosen one is not compared with its truth yet."
            if used is None
            else f"The chosen net has an mIoU of {used:.1f}, the best of all {best:.1f}: the choice loses "
            f"{best - used:z.1f}.",
            f"The last student of a run taken blindly has {sum(last) / len(last):.1f} in the mean." if last else "",
            f"Spearman's rank correlation over {len(known)} nets: {rho:z.2f}." if rho == rho else "",
        ]
        return [
            "## How good the choice was\n",
            f"{' '.join(filter(None, said))}\n",
            "![The score against the true mIoU of every net; a star is a source-only net](truth.png)\n",
        ]

    def draw(self, folder: Path) -> None:
        """The two pictures of the page."""
        named = self.score.replace("_", " ")
        figure, axis = plt.subplots(figsize=(8, 4))
        for number_, run in enumerate(self.runs):
            color = f"C{number_ % 10}"
            for k, name in enumerate(dict.fromkeys(net["net"] for net in run.checkpoints)):
                nets = [net for net in scored(run.checkpoints, self.score) if net["net"] == name]
                line = {"ls": ("-", "--", ":")[k % 3], "marker": "o", "ms": 3, "lw": 1, "color": color}
                label = f"{run.folder.name}, {name}"
                axis.plot([n["step"] for n in nets], [n["scores"][self.score] for n in nets], label=label, **line)
            for net in scored([run.start] if run.start else [], self.score):
                axis.plot(net["step"], net["scores"][self.score], "*", color=color, ms=9)
        finish(figure, axis, "step, over all stages", named, folder / "score.png")
        if all(net["truth_miou"] is None for _, net in self.all_nets):
            return
        figure, axis = plt.subplots(figsize=(8, 4))
        for number_, run in enumerate(self.runs):
            nets = [net for net in scored(run.nets, self.score) if net["truth_miou"] is not None]
            for net in nets:
                star = net is run.start
                axis.plot(
                    net["scores"][self.score], net["truth_miou"], "*" if star else "o", color=f"C{number_ % 10}",
                    ms=9 if star else 4, label=run.folder.name if net is nets[-1] else None,
                )  # fmt: skip
        finish(figure, axis, named, "mIoU on target, %", folder / "truth.png")


def finish(figure: Any, axis: Any, x: str, y: str, path: Path) -> None:
    """Label, save and close the figure."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def title(net: dict[str, Any]) -> str:
    """Name of a net in tables and in the run's own report; steps count within their stage."""
    name = net["net"].partition(",")[0]
    found = "source-only net" if name == "source_only" else f"{name} of {net['stage']}, step {net['stage_step']}"
    return found + with_statistics(net.get("target_statistics", 0.0))


def by(run: RunNets) -> str:
    """How a run chooses, in brackets."""
    return f" (`select: {run.select}`)" if run.select else ""


def title_of_choice(run: RunNets) -> str:
    """Name of the net that a run chose, also where its history does not tell of it."""
    choice: dict[str, Any] = run.choice or {}
    net = {**choice, "stage": choice.get("recipe"), "stage_step": choice.get("step")} | (run.chosen or {})
    return title(net)


def where(run: RunNets, net: dict[str, Any]) -> str:
    """A sentence that says which file holds a net."""
    file = run.file_of(net)
    if file is None:
        return "No file holds this net: a run keeps the net that it chose itself and the last ones of a stage."
    name = net["net"]
    named = "" if file.name == "best.pt" or name in ("student", "source_only") else f", with `--net {name}`"
    return f"It is in `{file}`{named}."


def scored(nets: Sequence[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    """Those of the nets that have the score: a run that was resumed with other `score_views` has others then."""
    return [net for net in nets if net["scores"].get(score) is not None]


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:z.{digits}f}"
