"""The results of a finished run: the table in the terminal, results.json, report.md and .html, panels and curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.markup import escape
from torch import nn

from gta2cs import choosing, html, report
from gta2cs.config import DataConfig, plain
from gta2cs.datasets import places_of, root_of
from gta2cs.evaluation import Score, headline, predict
from gta2cs.interrupts import stop_if_asked
from gta2cs.label_free import can_be_deployed, picked
from gta2cs.reading import viewable
from gta2cs.stage import Run
from gta2cs.target_statistics import said_of_statistics
from gta2cs.verdict import label_free_tables, verdict


def write_report(run: Run, rows: dict[str, Score], nets: dict[str, nn.Module], histories: list[dict[str, Any]]) -> None:
    """Write table, curves and panels into the run's folder, and the table to the terminal.

    A part that fails is reported and left out, so that a problem with a picture does not lose the numbers.
    """
    config, pair = run.config, run.pair
    report.write_json(config.out / "results.json", {name: score.to_json() for name, score in rows.items()})
    history = {"config": plain(config), "stages": histories, "choice": asdict(run.choice) if run.choice else None}
    report.write_json(config.out / "history.json", history)
    if rows:
        run.console.print(report.rich_table(rows, pair.classes))
        if sentence := report.gain_sentence(rows):
            run.console.print(sentence.replace("**", ""), markup=False)
    pictures: dict[str, Callable[[], object]] = {
        "panels.png": lambda: report.save_panels(config.out / "panels.png", panels_of(run, nets), pair.classes),
        "curves.png": lambda: report.save_curves(
            config.out / "curves.png", histories, pair.classes, score=choosing.score_of(config.select)
        ),
    }
    failed = [name for name, write in pictures.items() if not _written(run, name, write)]
    for name in failed:
        with suppress(OSError):
            (config.out / name).unlink(missing_ok=True)  # of before the run was resumed: it shows other nets
    parts: dict[str, Callable[[], object]] = {
        "report.md": lambda: report.write_text(config.out / "report.md", text_of(run, rows, histories, without=failed)),
        "report.html": lambda: html.write_html(config.out / "report.md", pair.classes),
        "the verdict": lambda: run.console.print(verdict(run, histories).replace("**", ""), markup=False),
    }
    failed += [name for name, write in parts.items() if not _written(run, name, write)]
    if "report.md" not in failed:
        html_page = "" if "report.html" in failed else f"{config.out / 'report.html'} (to open in a browser), "
        run.console.print(f"Report: {html_page}{config.out / 'report.md'}", markup=False)


def _written(run: Run, name: str, write: Callable[[], object]) -> bool:
    try:
        write()
    except Exception as error:  # whatever it is, checkpoints and results.json are there
        stop_if_asked()
        why = f"{type(error).__name__}: {error}"
        run.console.print(f"[yellow]{name} could not be written: {escape(why)}[/]")
        return False
    return True


def text_of(run: Run, rows: dict[str, Score], histories: list[dict[str, Any]], without: Sequence[str] = ()) -> str:
    """The report: scores against the truth if there are target labels, scores without labels, and the verdict.

    `without` are the pictures that could not be drawn.
    """
    config, pair = run.config, run.pair
    seconds, steps = sum(h["seconds"] for h in histories), sum(h["steps"] for h in histories)
    text = f"# {report.cell(domains(config.data))}: {' → '.join(s.recipe for s in config.stages)}\n\n"
    if rows and (sentence := report.gain_sentence(rows)):
        text += f"{sentence}\n\n"
    text += f"Seed {config.seed}, {steps} steps, {seconds:.0f} s. "
    if pair.target_val is not None:
        text += (
            f"IoU in percent on {len(pair.target_val)} target images, one confusion matrix, last checkpoint; the last "
            f"row is the net of `best.pt`, chosen without labels.\n\n{report.markdown_table(rows, pair.classes)}\n"
        )
        if known := headlines(histories[-1]):
            text += (
                "Best net of the last stage's evaluations, for information only (it was chosen on this very set): "
                f"{max(known):.1f}.\n\n"
            )
    else:
        text += "Target has no label, so nothing is compared with truth.\n\n"
    decisions = [line for history in histories for line in history.get("decisions", [])]
    if tried := histories[-1].get(choosing.STATISTICS):
        decisions.append(said_of_statistics(tried))
    decided = "".join(f"- {line}\n" for line in decisions)
    decided = f"## Decided without labels\n\n{decided}\n" if decided else ""
    truth, scored = ("their truth, ", "mIoU on target, ") if pair.target_val is not None else ("", "")
    pictures = {
        "panels.png": f"Target images, {truth}what the nets predict, and how sure the chosen one is",
        "curves.png": f"Losses, {scored}scores without labels and, with pseudo-labels, the share that was kept",
    }
    shown = "".join(
        f"`{name}` could not be drawn; the log says why.\n\n" if name in without else f"![{title}]({name})\n\n"
        for name, title in pictures.items()
    )
    return text + (
        f"{shown}{decided}## Without labels\n\n{label_free_tables(run, histories, pair.classes.names)}\n"
        f"{verdict(run, histories)}"
    )


def headlines(history: dict[str, Any]) -> list[float]:
    """The mean that counts, of every net of a size to deploy at every evaluation of a stage."""
    nets = [net for entry in history["scores"] for net in entry["nets"].items() if can_be_deployed(net[0])]
    found = [net["means"][headline(net["means"])] for _, net in nets]
    return [mean for mean in found if mean is not None]


def domains(data: DataConfig) -> str:
    """The pair in a title; of a user's own data, the two folders."""
    if data.pair != "folder":
        return data.pair
    places = places_of(data.pair, root_of(data.data_root), data.source_root, data.target_root)
    return " → ".join("/".join(first.absolute().parts[-2:]) for first, *_ in places)


def compared(run: Run, names: list[str]) -> dict[str, str]:
    """Title -> net of the two to compare: where the run began and what was chosen.

    If both are the source-only net, the last student takes the place of the second, so that one sees why.
    """
    first, chosen = report.start_of(names), names[-1]
    assert run.choice is not None
    named = run.choice.net.replace(choosing.SOURCE_ONLY, "source-only net")
    named += ", target statistics" if run.choice.target_statistics else ""
    if run.choice.net != choosing.SOURCE_ONLY or run.choice.stage == 0 or run.choice.target_statistics:
        return {first: first, f"{chosen}: {named}": chosen}
    last = next((name for name in reversed(names[:-1]) if name.endswith(", student")), names[-2])
    return {f"{chosen}: {named}": chosen, last: last}


def panels_of(run: Run, nets: dict[str, nn.Module]) -> list[dict[str, np.ndarray]]:
    """Panels of up to four target images: truth, two predictions, and the confidence of the chosen net."""
    pair = run.pair
    count = len(pair.target_train if pair.target_val is None else pair.target_val)
    panels = []
    for i in picked(count, 4):
        if pair.target_val is None:
            image = pair.target_train[i]
            row = {"image": viewable(image)}
        else:
            image, label = pair.target_val[i]
            row = {"image": viewable(image), "truth": label.numpy()}
        for title, name in compared(run, list(nets)).items():
            probabilities = predict(nets[name].eval(), image, run.device, pair.target_train.image_format).cpu()
            row[title] = probabilities.argmax(0).byte().numpy()
            if name == choosing.CHOSEN:
                confidence = probabilities.amax(0).numpy()
        row["confidence of the chosen"] = confidence
        panels.append(row)
    return panels
