"""The benchmark of one checkout against another: the table, and a row of this checkout against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import against


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


@pytest.mark.slow
def test_a_checkout_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ops", "row_mask", "--sizes", "tiny", "--pairs", "3", "--results", str(tmp_path / "rows.json")]
    against.main([str(against.ROOT), *options])
    printed = capsys.readouterr().out
    assert "row_mask/tiny/forward" in printed
    assert "forward+backward" not in printed  # it has no gradient
    assert "1 rows. The median ratio is" in printed
