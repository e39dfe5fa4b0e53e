"""The benchmarks of label-size losses and of several processes, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import distributed, highres


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
    highres.write_section("highres", highres.table(rows), page(tmp_path, "highres"))
    text = (tmp_path / "page.md").read_text()
    assert "| `upsampled_kd_loss`, 1 x 19 x 32² → 128² |" in text
    assert "old" not in text


def test_the_table_counts_a_ring() -> None:
    assert distributed.traffic("all_gather", 100, 64) == 6300
    assert distributed.traffic("all_reduce", 100, 4) == 150
    rows = {name: {"largest_difference": 0.0} for name in distributed.FORMULAS}
    assert "| `InconsistencyLoss` | 1 `all_reduce` | 16 C = 304 |" in distributed.table({"2": rows})


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
