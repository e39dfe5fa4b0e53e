"""The benchmark of the losses of a step, and of contrast beside pytorch-metric-learning, at a size of seconds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, loss_costs
from benchmarks.loss_costs import COMPARISONS, LIMIT, NOTHING, QUICK_COMPARISONS, Comparison, Size

MARKED = "before\n{}after\n".format(
    "".join(f"<!-- {n}: begin -->\nold\n<!-- {n}: end -->\n" for n in ("loss_costs", "contrast_peers"))
)
LOSSES = list(loss_costs.step_losses(Size(1, 8, 8, 2)))
with_peers = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_metric_learning") is None,
    reason="pytorch-metric-learning (the extra `bench`) is not there",
)


@pytest.fixture(autouse=True)
def _quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e10)


def run(folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    page, path = folder / "page.md", folder / "results.json"
    page.write_text(MARKED)
    loss_costs.main(["--results", str(path), "--page", str(page), *more])
    return json.loads(path.read_text())["rows"] if path.is_file() else {}, page.read_text()


def test_every_loss_has_a_value_a_time_and_a_peak(tmp_path: Path) -> None:
    rows, text = run(tmp_path, "--quick", "--rows", *LOSSES)
    assert [row["loss"] for row in rows.values()] == LOSSES
    for row in rows.values():
        assert row["median"] > 0
        assert row["peak_bytes"] > 0
        assert row["value"] > 0 or row["loss"] == "shrinking one view"
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    for name in LOSSES:
        assert f"| {name} |" in text
    assert text.count(NOTHING) == 1  # beside the other library


def test_a_second_run_measures_what_is_missing(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "--quick", "--rows", "cross-entropy")
    second, _ = run(tmp_path, "--quick", "--rows", "cross-entropy", "shrinking one view")
    assert len(first) == 1
    assert len(second) == 2
    assert second.items() >= first.items()
    again, _ = run(tmp_path, "--quick", "--rows", "cross-entropy", "--again")
    assert list(again) == list(second)
    assert again != second


def test_nothing_is_measured_for_the_tables(tmp_path: Path) -> None:
    rows, text = run(tmp_path, "--table")
    assert not rows
    assert text.count(NOTHING) == 2


def test_a_quick_run_does_not_touch_the_results() -> None:
    with pytest.raises(SystemExit):
        loss_costs.main(["--quick"])


@with_peers
@pytest.mark.parametrize("comparison", QUICK_COMPARISONS, ids=lambda c: c.name)
def test_contestants_are_equal(comparison: Comparison) -> None:
    calls, skipped = loss_costs.contestants(comparison)
    assert not skipped
    ours = calls.pop("udakit")()
    assert list(calls) == list(comparison.peers)
    for call in calls.values():
        assert call().item() == pytest.approx(ours.item(), rel=1e-5)


def test_a_contestant_that_would_hold_too_much_is_named(tmp_path: Path) -> None:
    left_out = [(c.key, name) for c in COMPARISONS for name in c.peers if c.bytes(name) > LIMIT]
    assert ("two views, 1024 × 2", "NTXentLoss") in left_out
    assert not any(name == "SupConLoss" for _, name in left_out)
    big = Comparison(loss_costs.NEGATIVES, 19, 64, ("NTXentLoss",))
    calls, skipped = loss_costs.contestants(big)
    assert list(calls) == ["udakit"]
    assert "GiB" in skipped["NTXentLoss"]

    results = harness.Results(tmp_path / "results.json")
    found = {"value": 1.0, "median": 0.002, "iqr": 0.0002, "peak_bytes": 2**20}
    results.add("a", {"comparison": big.key, "contestants": {"udakit": found}, "skipped": skipped})
    both = {"udakit": found, "SupConLoss": {**found, "value": 1.01}}
    results.add("b", {"comparison": "b", "contestants": both, "skipped": {}})
    text = loss_costs.peer_table(results)
    assert f"| {big.key} | 2 ± 0.1 | 1 | – | – | – | – | – |" in text
    assert "| b | 2 ± 0.1 | 1 | 2 ± 0.1 | 1 | – | – | 1e-02 |" in text
    assert f"- {big.key}, `NTXentLoss`: its pairs would take" in text


def test_the_page_has_both_sections() -> None:
    text = (harness.PAGES / "losses.md").read_text(encoding="utf-8")
    for name in ("loss_costs", "contrast_peers"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1, name
