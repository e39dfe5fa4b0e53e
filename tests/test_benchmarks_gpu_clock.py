"""The clock of a card: the order of the work, what a run keeps, and the page. The script itself runs on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_clock, gpu_cost, harness
from benchmarks.gpu_clock import COMPILED, MARK, MODES, STEP

MARKED = "before\n<!-- gpu clock: begin -->\nold\n<!-- gpu clock: end -->\nafter\n"
ROWS = gpu_cost.rows()
COUNTS = gpu_cost.Counts(harness.RESULTS / "gpu_cost.json")
CARD = {"name": "H100", "size": "large", "bandwidth": 2e12, "flops": 5e13, "launch": 5e-6, "memory": 1, "cuda": "13"}


@pytest.fixture(autouse=True)
def _quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e10)


def op(name: str, mode: str = MODES[0], **contestants: tuple[float, float | None]) -> dict[str, Any]:
    found = {
        who: {"ms": ms, "all_ms": [ms], "busy_ms": busy, "no_graph": "", "peak_bytes": 2**20}
        for who, (ms, busy) in contestants.items()
    }
    return {"operation": name, "mode": mode, "compiled": False, "contestants": found, "skipped": {}}


def test_steps_come_first_then_defaults_then_operations() -> None:
    keys = gpu_clock.order(ROWS)
    assert len(set(keys)) == len(keys)
    assert keys[: len(gpu_clock.COUNTED)] == [STEP + name for name in gpu_clock.COUNTED]
    at = {key: i for i, key in enumerate(keys)}
    default, both = f"kd_loss{MARK}/{MODES[0]}", f"kd_loss/{MODES[1]}"
    assert at["step/combined"] < at[default] < at[both] < at[default + COMPILED] < at[f"kd_loss/{MODES[0]}"]
    eager = {f"{w.name}/{mode}" for w in ROWS for mode in MODES[: 1 + bool(w.grad)]}
    assert eager == {key for key in keys if not key.startswith(STEP) and not key.endswith(COMPILED)}


def test_a_run_stops_at_its_limit_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [f"boundary_band{MARK}/forward", "paste/forward+backward", "kd_loss/forward", "paste/forward"]
    monkeypatch.setattr(gpu_clock, "order", lambda found: wanted)
    path, page = tmp_path / "clock.json", tmp_path / "page.md"
    page.write_text(MARKED)
    line = ["--device", "cpu", "--size", "tiny", "--results", str(path), "--page", str(page)]
    gpu_clock.main([*line, "--limit", "0"])
    assert list(json.loads(path.read_text())["rows"]) == ["card"]
    gpu_clock.main([*line, "--limit", "100"])
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["card", *wanted]
    for key in wanted[1:]:
        assert set(rows[key]["contestants"]) == {"udakit", "textbook"}, rows[key]
        assert all(
            c["ms"] > 0 and c["peak_bytes"] > 0 and c["busy_ms"] is None for c in rows[key]["contestants"].values()
        )
    assert "| `paste`, with backward |" in page.read_text()
    with pytest.raises(SystemExit, match="was measured on CPU at size tiny"):
        gpu_clock.main([*line, "--size", "small"])
    with pytest.raises(SystemExit):  # never into the card's own JSON
        gpu_clock.main(["--device", "cpu"])


def test_what_fails_or_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {w.name: w for w in ROWS}

    def hang(*args: Any, **options: Any) -> None:
        time.sleep(5)

    monkeypatch.setattr(gpu_clock, "ROW_LIMIT", 0.05)
    monkeypatch.setattr(gpu_clock, "measure_row", hang)
    row = gpu_clock.measure("paste/forward", found, "cpu", "tiny")
    assert row["skipped"] == {"udakit": "TimeoutError: more than 0.05 s"}
    assert gpu_clock.said(row) == "TimeoutError: more than 0.05 s"
    monkeypatch.undo()
    monkeypatch.setattr(gpu_clock, "measure_step", lambda *args: 1 / 0)
    assert gpu_clock.measure("step/dacs", found, "cpu", "tiny")["skipped"]["udakit"].startswith("ZeroDivisionError")


@pytest.mark.slow
def test_a_step_on_the_clock() -> None:
    row = gpu_clock.measure("step/dacs", {}, "cpu", "tiny")
    assert row["image_side"] == 64
    assert row["passes"] == 3
    assert 0 < row["net_only_ms"] < 2 * row["ms"]
    assert row["peak_bytes"] > 0


def test_the_page(tmp_path: Path) -> None:
    results = harness.Results(tmp_path / "clock.json")
    results.add("card", CARD)
    step = {"recipe": "dacs", "image_side": 512, "passes": 3, "ms": 50.0, "net_only_ms": 40.0}
    results.add("step/dacs", {**step, "all_ms": [50.0], "peak_bytes": 2**31, "net_only_peak_bytes": 2**30})
    results.add(f"kd_loss/{MODES[1]}", op("kd_loss", MODES[1], udakit=(1.0, 0.5), textbook=(2.0, None)))
    results.add(f"kd_loss{MARK}/forward{COMPILED}", op("kd_loss" + MARK, udakit=(0.25, 0.2)))
    old = {
        **op("ArgmaxSelector", udakit=(3.0, 2.0), textbook=(1.0, None)),
        "roofline_ms": 1.5,
        "changed_since": "faster",
    }
    results.add("ArgmaxSelector/forward", old)
    results.add("ClassMix/forward", {**op("ClassMix"), "skipped": {"udakit": "RuntimeError: no"}})
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    gpu_clock.main(["--table", "--results", str(results.path), "--page", str(page)])
    text = page.read_text()
    assert "Measured on one H100 with torch" in text
    assert "moves 2000 GB/s, a large float32 product makes 50.0 TFLOP/s" in text
    assert "| dacs, 512 × 512 | 3 | 50.0 | 40.0 | 20% | 2.00 | 1.00 |" in text
    card = gpu_cost.Card("H100", 2e12, 5e13, 5e-6)
    expected = gpu_clock.estimate(f"kd_loss/{MODES[1]}", COUNTS, card)
    assert expected == pytest.approx(
        1e3 * card.seconds(COUNTS.rows["kd_loss/forward+backward"]["contestants"]["udakit, eager"]["each"])
    )
    assert f"| `kd_loss`, with backward | {expected:.3g} | 1 | 0.5 | {1 / expected:.2f} |" in text
    assert "| `kd_loss`, with backward | 1 / 2 | 0.5 / – |" in text
    assert "| `kd_loss`, defaults, compiled | 0.25 / – |" in text
    assert "| time | 1.75 | 1 | 0 | 1 |" in text
    assert "| `ArgmaxSelector` | 1.5 | 3 | 2 | 2.00 |" in text  # the roofline of the day
    assert text.count("| `ArgmaxSelector` † | 3 / 1 | 2 / – |") == 2
    assert "- `ArgmaxSelector`: faster." in text
    assert "- `ClassMix`: RuntimeError: no." in text


def test_the_page_without_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    gpu_clock.main(["--table", "--results", str(tmp_path / "none.json"), "--page", str(page)])
    assert "Not measured yet." in page.read_text()


def test_times_are_of_single_calls() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.002)

    times = gpu_clock.milliseconds(call, "cpu", repeats=20, budget=0.01)
    assert 3 <= len(times) <= 5
    assert all(2 <= t < 100 for t in times)
    assert len(calls) == 1 + len(times)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_what_waits_is_refused() -> None:
    x = torch.ones(1000, device="cuda")
    busy, why = gpu_clock.busy_milliseconds(lambda: x.sum().item(), "cuda")
    assert (busy, why) == (None, "waits for the device")
    busy, why = gpu_clock.busy_milliseconds(lambda: x + 1, "cuda")
    assert busy is not None
    assert busy > 0
