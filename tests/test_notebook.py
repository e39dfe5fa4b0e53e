"""The notebook runs from top to bottom, shortened, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "notebooks" / "toy_pair.ipynb"


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code"), "committed with outputs"
    assert sum("WARM, STEPS, IMAGES = 100, 100, 30" in cell for cell in code) == 1
    shown = []
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    namespace: dict[str, object] = {"__name__": "__notebook__"}
    with torch.random.fork_rng(devices=[]):
        for cell in code:
            short = cell.replace("WARM, STEPS, IMAGES = 100, 100, 30", "WARM, STEPS, IMAGES = 1, 1, 2")
            exec(short.replace("batch_size=4, crop=(128, 192)", "batch_size=2, crop=(64, 64)"), namespace)
    assert len(shown) == 1
    plt.close("all")
    found = capsys.readouterr().out
    assert "source-only: " in found
    assert "adapted: " in found
