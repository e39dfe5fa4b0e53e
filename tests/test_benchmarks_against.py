"""The benchmark of one checkout against another: the table, and a row of this checkout against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import against, harness


def _row(low: float, ratio: float, high: float) -> dict[str, Any]:
    return {"before": 0.001, "now": 0.001 * ratio, "ratio": ratio, "low": low, "high": high}


def test_the_table_marks_what_is_slower_beyond_its_spread() -> None:
    rows = {
        "kd_loss/tiny/forward": _row(0.4, 0.5, 0.6),
        "class_mask/tiny/forward": _row(1.01, 1.08, 1.2),  # within the spread
        "paste/tiny/forward": _row(1.07, 1.1, 1.2),
    }
    text = against.table(rows)
    assert "3 rows. The median ratio is 1.08. 1 are slower by more than 5%" in text
    assert "| `paste`, tiny, forward | 1 | 1.1 | **1.10 (1.07 to 1.20)** |" in text
    assert "| `class_mask`, tiny, forward | 1 | 1.08 | 1.08 (1.01 to 1.20) |" in text


def test_the_page_is_that_of_the_json() -> None:
    written = harness.section("against", against.both_processors())
    assert written in against.PAGE.read_text(encoding="utf-8"), "run benchmarks/against.py --page"


def test_the_summary_counts_each_size_and_sorts_by_what_is_lost() -> None:
    rows = {
        "kd_loss/tiny/forward": _row(0.4, 0.5, 0.6),
        "paste/tiny/forward": _row(1.07, 1.1, 1.2),
        "class_mask/medium/forward": _row(1.3, 1.4, 1.5),
    }
    lines = against.by_size(rows).splitlines()
    assert "| tiny | 2 | 0.80 | 1 | 1 |" in lines
    assert "| medium | 1 | 1.40 | 0 | 1 |" in lines
    worst = [line for line in lines if line.startswith("| `")][:2]
    assert worst[0] == "| `class_mask`, medium, forward | 1 | 0.4 | 1.40 |"
    assert worst[1] == "| `paste`, tiny, forward | 1 | 0.1 | 1.10 |"


@pytest.mark.slow
def test_a_checkout_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ops", "row_mask", "--sizes", "tiny", "--pairs", "3", "--results", str(tmp_path / "rows.json")]
    against.main([str(against.ROOT), *options])
    printed = capsys.readouterr().out
    assert "row_mask/tiny/forward" in printed
    assert "forward+backward" not in printed  # it has no gradient
    assert "1 rows. The median ratio is" in printed
