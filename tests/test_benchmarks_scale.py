"""The benchmarks of label-size losses and of several processes, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import (
    data_path,
    decoding,
    distributed,
    fresh_processes,
    growth,
    harness,
    highres,
    loss_costs,
    main_job,
    operators,
    step_cost,
    step_overhead,
)

SCRIPTS = [
    data_path,
    decoding,
    distributed,
    fresh_processes,
    growth,
    highres,
    loss_costs,
    main_job,
    operators,
    step_cost,
    step_overhead,
]


def page(folder: Path, name: str) -> Path:
    path = folder / "page.md"
    path.write_text(f"before\n<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nafter\n")
    return path


def test_both_ways_of_a_row_are_equal_and_the_banded_one_holds_less(tmp_path: Path) -> None:
    rows = {loss: highres.measure(loss, 1, 32, "cpu") for loss in highres.LOSSES}
    for row in rows.values():
        assert row["difference"] < 1e-4
        assert row["peak_bytes"]["banded"] > 0
        assert row["seconds"]["plain"]["median"] > 0
    path, where = tmp_path / "rows.json", page(tmp_path, "highres")
    path.write_text(json.dumps({"environments": [], "rows": rows}))
    highres.main(["--table", "--results", str(path), "--page", str(where)])
    text = where.read_text()
    assert "| `upsampled_kd_loss`, 1 x 19 x 32² → 128² |" in text
    assert "old" not in text


def test_the_table_counts_a_ring() -> None:
    assert distributed.traffic("all_gather", 100, 64) == 6300
    assert distributed.traffic("all_reduce", 100, 4) == 150
    rows = {name: {"largest_difference": 0.0} for name in distributed.FORMULAS}
    assert "| `InconsistencyLoss` | 1 `all_reduce` | 16 C = 304 |" in distributed.table({"2": rows})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_same_options(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--again", "--table", "--no-table", "--results", "--page"))
    assert script.__doc__.splitlines()[0] in text


@pytest.mark.parametrize("again", [[], ["--again"]])
def test_a_measured_number_of_ranks_is_kept(again: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(ranks: int) -> dict[str, dict[str, float]]:
        return {name: {"largest_difference": ranks / 10} for name in distributed.FORMULAS}

    monkeypatch.setattr(distributed, "measure", measure)
    path, where = tmp_path / "found.json", page(tmp_path, "distributed")
    kept = {name: {"largest_difference": 0.7} for name in distributed.FORMULAS}
    path.write_text(json.dumps({"2": kept}))
    arguments = ["--results", str(path), "--page", str(where)]
    distributed.main([*arguments, *again, "--no-table"])
    assert "old" in where.read_text()
    distributed.main([*arguments, "--table"])
    assert ("| 0.2 | 0.4 |" if again else "| 0.7 | 0.4 |") in where.read_text()
    assert json.loads(path.read_text())["4"] == measure(4)


def test_another_number_of_bytes_is_seen() -> None:
    alone = distributed.run(0, 1)
    wrong = {name: {**alone[name], "sent": [("all_gather", 1)]} for name in distributed.FORMULAS}
    with pytest.raises(AssertionError, match="ClassPrototypes: sent"):
        distributed.compare([wrong], alone)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_follow_the_formula_and_states_are_those_of_one_process(world_size: int) -> None:
    rows = distributed.measure(world_size)
    assert set(rows) == set(distributed.FORMULAS)


def test_every_way_of_decoding_gives_the_same_pixels(tmp_path: Path) -> None:
    ways = {name: way for name, way in decoding.WAYS.items() if name != "Albumentations"}
    row = decoding.measure(count=2, rounds=1, shrink=16, ways=ways)
    assert set(row["seconds"]) == set(ways)
    path, where = tmp_path / "rows.json", page(tmp_path, "decoding")
    path.write_text(json.dumps({"environments": [], "rows": {"decoding": row}}))
    decoding.main(["--table", "--results", str(path), "--page", str(where)])
    assert "| udakit's loop |" in where.read_text()
    with pytest.raises(AssertionError, match="other returned other pixels"):
        decoding.measure(count=1, rounds=0, shrink=16, ways={**ways, "other": lambda *_, crop: torch.zeros(3, *crop)})


def test_processes_that_ran_are_kept_and_the_spread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, where = tmp_path / "rows.json", page(tmp_path, "fresh processes")
    kept = {name: {"size": "tiny", "seconds": [0.5]} for name in fresh_processes.NAMES}
    path.write_text(json.dumps({"environments": [], "rows": kept}))
    monkeypatch.setattr(fresh_processes, "seconds_in_a_fresh_process", lambda name, size: 1.0)
    monkeypatch.setattr(harness.Results, "here", lambda self: 0)
    fresh_processes.main(["--processes", "2", "--results", str(path), "--page", str(where)])
    assert where.read_text().count("| 2 | 500.0 | 750.0 | 1000.0 | **2.00** |") == len(fresh_processes.NAMES)


@pytest.mark.parametrize("name", fresh_processes.NAMES)
def test_one_process_times_a_call(name: str) -> None:
    assert fresh_processes.seconds_here(name, "tiny") > 0
