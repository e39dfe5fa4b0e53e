"""What a finished run leaves: the table in the terminal, results.json, report.md and .html, panels and curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from gta2cs import html, report
from gta2cs.evaluation import Score, predict
from gta2cs.stage import Run


def write_report(run: Run, rows: dict[str, Score], nets: dict[str, nn.Module], histories: list[dict[str, Any]]) -> None:
    """Write table, curves and panels into the run's folder, and the table to the terminal."""
    config, pair = run.config, run.pair
    report.save_panels(config.out / "panels.png", panels_of(run, nets), pair.classes)
    report.save_curves(config.out / "curves.png", histories)
    report.write_json(config.out / "results.json", {name: score.to_json() for name, score in rows.items()})
    seconds = sum(h["seconds"] for h in histories)
    best = max((s["miou"] for h in histories[-1:] for s in h["scores"]), default=float("nan"))
    report.write_text(
        config.out / "report.md",
        f"# {config.data.pair}: {' → '.join(s.recipe for s in config.stages)}\n\n"
        f"Seed {config.seed}, {sum(h['steps'] for h in histories)} steps, {seconds:.0f} s. IoU in percent on "
        f"{len(pair.target_val)} target images, one confusion matrix, last checkpoint.\n\n"
        f"{report.markdown_table(rows, pair.classes)}\n"
        f"Best of the last stage's evaluations, for information only (it was chosen on this very set): {best:.1f}.\n\n"
        "![Target images and their truth, what the nets predict, and how sure the last one is](panels.png)\n\n"
        "![Losses, mIoU on target and, with pseudo-labels, the share that was kept](curves.png)\n",
    )
    html.write_html(config.out / "report.md", pair.classes)
    run.console.print(report.rich_table(rows, pair.classes))
    run.console.print(f"Report, panels and curves: {config.out / 'report.md'}")


def panels_of(run: Run, nets: dict[str, nn.Module]) -> list[dict[str, np.ndarray]]:
    """Four target images: truth, where the run began, what it came to, and how sure that is."""
    pair = run.pair
    count = len(pair.target_val)
    picked = [count * (2 * i + 1) // 8 for i in range(4)]
    panels = []
    for i in picked:
        image, label = pair.target_val[i]
        row = {"image": image.permute(1, 2, 0).numpy(), "truth": label.numpy()}
        for name in dict.fromkeys((next(iter(nets)), list(nets)[-1])):  # where the run began, and what it came to
            probabilities = predict(nets[name].eval(), image, run.device).cpu()
            row[name] = probabilities.argmax(0).byte().numpy()
        row["confidence"] = probabilities.amax(0).numpy()
        panels.append(row)
    return panels
