"""Names that mean something to rich, Markdown, HTML or matplotlib break nothing, and no report costs a run."""

from __future__ import annotations

import html as html_module
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import train_gta2cs
from gta2cs import report
from gta2cs.evaluation import Score
from gta2cs.html import render
from gta2cs.samples import ClassSet
from tiny import tiny_net

NAMES = (
    *("lane [/solid]", "a|b", "$x_{$", "<b>bold", "`code`", "**strong**", "back\\slash", "[link](http://x)"),
    *("[red]", "tail\\", "%s {}"),
)
CLASSES = ClassSet(NAMES, np.arange(3 * len(NAMES), dtype=np.uint8).reshape(-1, 3))
ROWS = {f"net {i}": Score(dict.fromkeys(NAMES, 10.0 * i), {"mIoU": 10.0 * i, "m|[/x]$": 1.0}) for i in (1, 2)}


def test_tables_keep_every_name(tmp_path: Path) -> None:
    classes = ClassSet(NAMES, CLASSES.palette, {"mIoU": (0, 1), "m|[/x]$": (0,)})
    console = Console(width=400, record=True, file=(tmp_path / "terminal.txt").open("w", encoding="utf-8"))
    console.print(report.rich_table(ROWS, classes))
    shown = console.export_text()
    text = f"# Title\n\n{report.markdown_table(ROWS, classes)}"
    page = render(text, tmp_path, classes)
    heads = [html_module.unescape(re.sub(r"<[^>]+>", "", head)) for head in re.findall(r"<th .*?</th>", page)]
    assert heads[3:] == list(NAMES)
    assert heads[1:3] == ["mIoU", "m|[/x]$"]
    assert page.count('class="swatch"') == len(NAMES)
    assert "<b>" not in page
    for name in NAMES:
        assert name in shown


def test_pictures_with_every_name(tmp_path: Path) -> None:
    label = np.resize(np.arange(len(NAMES), dtype=np.uint8), (8, 8))
    report.save_panels(tmp_path / "panels.png", [{"image": np.zeros((8, 8, 3), np.uint8), "a $x_{$": label}], CLASSES)
    entry = {"step": 1, "terms": {"loss": 1.0}, "kept": dict.fromkeys(NAMES, 0.5)}
    entry["per_class"] = {"weight": dict.fromkeys(NAMES, 1.0)}
    scores = {"step": 1, "miou": 1.0, "nets": {"student": {"means": {"m$_{$": 1.0}}}}
    stage = {"name": "dacs", "steps": 1, "losses": [entry], "scores": [scores]}
    report.save_curves(tmp_path / "curves.png", [stage])
    for name in ("panels.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_with_such_names_whose_report_fails_keeps_its_results(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("gta2cs.toy.CLASSES", NAMES)

    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"of other nets")  # of before the run was resumed, or half of the new one
        raise RuntimeError("no room for [/this] picture")

    monkeypatch.setattr("gta2cs.report.save_panels", fail)
    config = train_gta2cs.Config(
        data=train_gta2cs.DataConfig(crop=(64, 64)),
        net=tiny_net(),
        stages=[train_gta2cs.Stage("dacs")],
        batch_size=1,
        log_every=1,
        out=tmp_path,
        dry_run=True,
    )
    rows = train_gta2cs.main(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "panels.png could not be written: RuntimeError: no room for [/this] picture" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == rows.keys()
    assert list(results["dacs, student"]["iou"]) == list(NAMES)
    assert (tmp_path / "stage1_dacs" / "last.pt").is_file()
    assert not (tmp_path / "panels.png").exists()
    text = (tmp_path / "report.md").read_text()
    assert "`panels.png` could not be drawn; the log says why." in text
    assert "![" not in text.replace("![Losses", "")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 1
    assert (tmp_path / "curves.png").is_file()
