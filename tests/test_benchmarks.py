"""The benchmark harness itself: what it reports of calls whose cost is known, and what it keeps in its files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import growth, harness, operators, performance_page, step_overhead, workloads

ROWS = {w.name: w for w in workloads.workloads()}
TIMING = {"min_run_time": 0.002, "min_runs": 3, "max_time": 1.0}
MARKED = "before\n<!-- {0}: begin -->\nold\n<!-- {0}: end -->\nafter\n"


@pytest.fixture
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> float:
    """The copy bandwidth takes a second to measure, and half a gigabyte."""
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e10)
    return 1e10


def seconds(duration: float) -> Callable[[], None]:
    return lambda: time.sleep(duration)


# --- meters ---------------------------------------------------------------------------------------


def test_the_clock_knows_a_sleep() -> None:
    found = harness.time_together({"short": seconds(0.002), "long": seconds(0.02)}, min_run_time=0.02, min_runs=4)
    assert found["long"]["median"] >= 0.02
    assert 0.002 <= found["short"]["median"] < found["long"]["median"]
    assert all(f["runs"] >= 4 and f["iqr"] >= 0 for f in found.values())


def test_contestants_take_turns() -> None:
    order: list[str] = []
    harness.time_together({k: lambda k=k: (order.append(k), time.sleep(0.01)) for k in "ab"}, **TIMING)
    assert order == ["a", "b", *["a", "b"] * 3]  # a trial of each, then three runs


def test_a_slow_call_has_few_runs() -> None:
    found = harness.time_together({"slow": seconds(0.05)}, min_run_time=9, min_runs=99, max_time=0.1)
    assert found["slow"]["runs"] == 3


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    code = """
import resource
import numpy as np
from benchmarks import harness

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(3_000_000)  # 23 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh, settled = faults(), harness.settle_memory()
faults()
print(harness.environment()["freed_memory_kept"] == ("up to 32 MiB" if settled else "by chance"))
print(not settled or faults() < fresh / 10)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_the_meter_finds_a_known_allocation() -> None:
    held = torch.zeros(1000)
    assert harness.peak_extra_bytes(lambda: torch.zeros(1000, 250)) == 1_000_000
    assert harness.peak_extra_bytes(lambda: held.mul_(2)) < 1000

    def two_of_three() -> Tensor:
        first = torch.zeros(250_000)
        second = first + 1
        del first
        return second + 1

    assert harness.peak_extra_bytes(two_of_three) == pytest.approx(2_000_000, abs=100)  # and the number 1
    assert harness.peak_extra_bytes(lambda: held.view(-1)) == 0


def test_the_meter_sees_inside_an_operator() -> None:
    """A dispatch mode would not: the blocks of pixel contrast are allocated inside of its operator."""
    views = torch.randn(2, 1, 4, 16, 16)
    small, large = (
        harness.peak_extra_bytes(lambda k=k: workloads.udakit.pixel_contrast_loss(*views, chunk_size=k))
        for k in (16, 256)
    )
    assert large >= 2 * 256**2 * 4
    assert small < large / 10


def test_the_bandwidth_counts_both_directions() -> None:
    harness.copy_bandwidth.cache_clear()
    assert 1e8 < harness.copy_bandwidth(4) < 1e13
    harness.copy_bandwidth.cache_clear()


def test_moved_bytes() -> None:
    """Logits and labels read; with the backward pass the gradient is written and what arrives, a scalar, is read."""
    case = {
        backward: workloads.build_case(ROWS["cross_entropy"], "tiny", backward=backward, rivals=False).bytes
        for backward in (False, True)
    }
    pixels = 2 * 32 * 32
    weights = 4 * pixels + 4 * 19  # pixel_weight and class_weight
    assert case[False] == 4 * 19 * pixels + 8 * pixels + weights + 4
    assert case[True] == case[False] + 4 * 19 * pixels + 4


# --- rows -----------------------------------------------------------------------------------------


def test_a_slow_textbook_gives_a_ratio_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = workloads.TEXTBOOK["boundary_band"]

    def slow(*args: Any, **options: Any) -> Tensor:
        time.sleep(0.05)
        return right(*args, **options)

    monkeypatch.setitem(workloads.TEXTBOOK, "boundary_band", slow)
    row = operators.measure(ROWS["boundary_band"], "tiny", "float32", "forward", **TIMING)
    assert operators.ratio(row) < 0.9
    assert operators.ratio(row, what="peak_bytes") > 0


def test_a_rival_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        raise NotImplementedError("no bfloat16 here")

    monkeypatch.setitem(workloads.TEXTBOOK, "entropy_loss", broken)
    case = workloads.build_case(ROWS["entropy_loss"], "tiny", torch.bfloat16)
    assert case.skipped == {"textbook": "NotImplementedError: no bfloat16 here"}
    assert set(case.contestants) == {"udakit", "F.cross_entropy"}


def test_dense_rivals_are_left_out_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "DENSE_LIMIT", 1000)
    case = workloads.build_case(ROWS["pixel_contrast_loss"], "tiny")
    assert set(case.contestants) == {"udakit"}
    assert len(case.skipped) == 2  # the peer is left out even where its package is not there
    assert "GiB" in case.skipped["textbook"]


def test_the_sizes_of_the_contrast() -> None:
    """2 x 1024, 2 x 4096 and 2 x 16384 pixels; the dense matrices of the largest do not fit."""
    samples = [ROWS["pixel_contrast_loss"].sample(size, torch.float32) for size in operators.MEASURED]
    assert [s.h * s.w for s in samples] == [1024, 4096, 16384]
    held = [s.n * (2 * s.h * s.w) ** 2 * 12 for s in samples]
    assert [bytes_ > workloads.DENSE_LIMIT for bytes_ in held] == [False, False, True]


def test_wanted_names_exist() -> None:
    assert {name for name, *_ in operators.WANTED} | set(operators.COMPILED) | set(growth.MAIN) <= set(ROWS)
    assert set(workloads.REALISTIC) | {*workloads.CONTRAST, *workloads.FEATURES, *workloads.CONSTANT} <= set(ROWS)


@pytest.mark.slow
def test_a_compiled_row() -> None:
    row = operators.measure(ROWS["entropy_loss"], "tiny", "float32", "forward+backward", compiled=True, **TIMING)
    assert set(row["contestants"]) == {"udakit", "textbook", "textbook, eager"}
    assert operators.ratio(row, "textbook, eager") > 0


# --- files ----------------------------------------------------------------------------------------


def quick(tmp_path: Path, *more: str) -> dict[str, Any]:
    path = tmp_path / "results" / "operators.json"
    operators.main(["--quick", "--no-table", "--results", str(path), "--ops", "paste", "RareClassSampler", *more])
    return json.loads(path.read_text())


def test_schema(tmp_path: Path, quick_bandwidth: float) -> None:
    content = quick(tmp_path)
    assert set(content) == {"environments", "rows"}
    (machine,) = content["environments"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["copy_bandwidth"] == quick_bandwidth
    assert {"cpu", "capability", "seed", "python"} <= set(machine)
    modes = [f"paste/tiny/{d}/{m}/eager" for d in ("float32", "bfloat16") for m in ("forward", "forward+backward")]
    assert list(content["rows"]) == [*modes, "RareClassSampler/tiny/float32/forward/eager"]
    row = content["rows"]["paste/tiny/float32/forward/eager"]
    assert set(row["contestants"]) == {"udakit", "textbook"}
    for found in row["contestants"].values():
        assert set(found) == {"median", "iqr", "runs", "calls", "peak_bytes"}
        assert found["median"] > 0 <= found["iqr"]
    assert row["moved_bytes"] == 3 * 2 * 3 * 32 * 32 * 4 + 2 * 32 * 32
    last = content["rows"]["RareClassSampler/tiny/float32/forward/eager"]
    assert list(last["skipped"]) == ["textbook"]


def test_rows_to_measure_again_stay_until_they_are(tmp_path: Path, quick_bandwidth: float) -> None:
    """A run with --again that was stopped knows what is left, and the table has its old rows meanwhile."""
    results = harness.Results(tmp_path / "rows.json")
    for key in "ab":
        results.add(key, {"seconds": 1})
    results.forget(["a", "b", "c"])
    results.add("a", {"seconds": 2})
    read = harness.Results(results.path)
    assert [read.is_there(key) for key in "abc"] == [True, False, False]
    assert [read.rows[key]["seconds"] for key in "ab"] == [2, 1]
    assert list(read.waiting("abc")) == ["b", "c"]
    assert list(read.waiting("abc", again=True)) == ["a", "b", "c"]


def test_resumes(tmp_path: Path, quick_bandwidth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quick(tmp_path)
    missing = "paste/tiny/bfloat16/forward/eager"
    kept = {**first, "rows": {k: r for k, r in first["rows"].items() if k != missing}}
    (tmp_path / "results" / "operators.json").write_text(json.dumps(kept))
    measured: list[str] = []
    measure = operators.measure

    def watched(workload: Any, size: str, dtype: str, mode: str, **options: Any) -> dict[str, Any]:
        row = measure(workload, size, dtype, mode, **options)
        measured.append(operators.row_key(workload.name, size, dtype, mode, False))
        return row

    monkeypatch.setattr(operators, "measure", watched)
    second = quick(tmp_path)
    assert measured == [missing]
    assert {k: second["rows"][k] for k in kept["rows"]} == kept["rows"]
    quick(tmp_path, "--again")
    assert len(measured) == 1 + len(first["rows"])


def test_a_stopped_run_leaves_a_whole_file(
    tmp_path: Path, quick_bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = harness.Results(tmp_path / "results.json")
    results.add("a", {"x": 1})

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        results.add("b", {"x": 2})
    assert list(harness.Results(tmp_path / "results.json").rows) == ["a"]


def test_rows_name_their_machine(tmp_path: Path, quick_bandwidth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    harness.Results(path).add("a", {})
    monkeypatch.setattr(harness, "environment", lambda: {"cpu": "another"})
    harness.Results(path).add("b", {})
    again = harness.Results(path)
    assert [again.rows[k]["environment"] for k in "ab"] == [0, 1]
    assert again.environments[1] == {"cpu": "another", "copy_bandwidth": quick_bandwidth}


def test_a_quick_run_does_not_touch_the_results() -> None:
    for main in (operators.main, growth.main):
        with pytest.raises(SystemExit):
            main(["--quick"])


# --- pages ----------------------------------------------------------------------------------------


def row(name: str, ours: float, theirs: float, **more: Any) -> dict[str, Any]:
    contestants = {
        "udakit": {"median": ours, "iqr": 0.1 * ours, "runs": 5, "calls": 1, "peak_bytes": 100},
        "textbook": {"median": theirs, "iqr": 0.1 * theirs, "runs": 5, "calls": 1, "peak_bytes": 400},
    }
    return {
        "operation": name,
        "family": "losses",
        "size": "medium",
        "shape": "-",
        "dtype": "float32",
        "mode": "forward",
        "compiled": False,
        "contestants": contestants,
        "skipped": {},
        "moved_bytes": 10**7,
        **more,
    }


def test_table(tmp_path: Path, quick_bandwidth: float) -> None:
    results, page = harness.Results(tmp_path / "results.json"), tmp_path / "page.md"
    results.add("symmetric_kd_loss/medium/float32/forward/eager", row("symmetric_kd_loss", 0.002, 0.004))
    results.add("class_means/medium/float32/forward/eager", row("class_means", 0.004, 0.002, skipped={"peer": "gone"}))
    page.write_text(MARKED.format("operators"))
    operators.main(["--table", "--results", str(results.path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- operators: begin -->")
    assert text.endswith("<!-- operators: end -->\nafter\n")
    assert "old" not in text
    assert "| symmetric_kd_loss, eager | ≤ 0.85 | 0.50 | yes |" in text
    assert "| class_means, eager | ≤ 0.25 | 2.00 | **no** |" in text
    assert "| pixel_contrast_loss, eager | ≤ 0.35 | – | – |" in text
    assert "| rows slower than the textbook | 0 | 1 of 2, 1 by more than 0.1 ms and the spread | **no** |" in text
    assert "| `symmetric_kd_loss` | 2 ± 0.1 | 0.50 | 0.25 |" in text  # 10 MB at 10 GB/s are 1 ms
    assert "| `class_means` | medium | float32 | forward | 2.00 | 2 | 0.25 |" in text
    assert "`class_means` against peer (medium float32): gone." in text
    once = page.read_text()
    operators.main(["--table", "--results", str(results.path), "--page", str(page)])
    assert page.read_text() == once


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="operators: begin"):
        harness.write_section("operators", "text", tmp_path / "page.md")


def test_the_pages_have_all_sections() -> None:
    sections = {
        "operators": "operators",
        "growth": "growth",
        "step": "step",
        "data": "step",
        "decoding": "step",
        "main job": "step",
        "fresh processes": "operators",
        "highres": "losses",
        "gpu cost": "gpu",
        "gpu step": "gpu",
        "gpu clock": "gpu",
        "distributed": "processes",
    }
    for name, page in sections.items():
        text = (harness.PAGES / f"{page}.md").read_text(encoding="utf-8")
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1, name


def test_the_short_page(tmp_path: Path, quick_bandwidth: float) -> None:
    operators_json, steps_json = tmp_path / "operators.json", tmp_path / "steps.json"
    contrast = row("pixel_contrast_loss", 0.002, 0.004, mode="forward+backward")
    harness.Results(operators_json).add("pixel_contrast_loss/medium/float32/forward+backward/eager", contrast)
    harness.Results(operators_json).add("class_mask/medium/float32/forward/eager", row("class_mask", 0.004, 0.002))
    step = {"seconds": 4.0, "parts": {step_overhead.INSIDE[0]: 3.8, "blur": 0.2}}
    harness.Results(steps_json).add("dacs", step)
    page = tmp_path / "page.md"
    page.write_text(MARKED.format("short"))
    where = ["--page", str(page), "--pictures", str(tmp_path)]
    performance_page.main(["--operators", str(operators_json), "--steps", str(steps_json), *where])
    text = page.read_text()
    assert "**0.5 × the time, 0.25 × the memory**" in text
    assert "**5 % of a DACS step**" in text
    assert "**1 of 2 rows**" in text
    assert "Slower: `class_mask`." in text
    assert (tmp_path / performance_page.PICTURE).stat().st_size < 200_000


def test_the_short_page_is_that_of_the_json() -> None:
    operators_, steps = (harness.Results(harness.RESULTS / f"{n}.json") for n in ("operators", "step_overhead"))
    assert performance_page.summarize(operators_, steps) in harness.PAGE.read_text(encoding="utf-8")


# --- growth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slope(power: float) -> None:
    x = [float(2**k) for k in range(6)]
    assert growth.fit_slope(x, [3 * v**power for v in x]) == pytest.approx(power)
    # A fixed cost that the first points show is not in the last four.
    assert growth.fit_slope(x, [9.0, 9.0, *(3 * v**power for v in x[2:])]) == pytest.approx(power)
    assert growth.fit_slope([1.0], [1.0]) is None


def test_growth(tmp_path: Path, quick_bandwidth: float) -> None:
    page, path = tmp_path / "page.md", tmp_path / "growth.json"
    page.write_text(MARKED.format("growth"))
    where = ["--results", str(path), "--page", str(page), "--pictures", str(tmp_path / "pictures")]
    growth.main(["--quick", "--ops", "pixel_contrast_loss", *where])
    content = json.loads(path.read_text())
    slopes = {k: r for k, r in content["rows"].items() if k.endswith("/slope")}
    assert set(slopes) == {f"pixel_contrast_loss/{axis}/slope" for axis in ("pixels", "batch", "width")}
    assert [r["x"] for k, r in content["rows"].items() if "/pixels/" in k and "x" in r] == [256, 576, 1024]
    text = page.read_text()
    assert "| `pixel_contrast_loss` |" in text
    for title in ("time", "memory"):
        picture = tmp_path / "pictures" / f"performance_growth_{title}.png"
        assert 5_000 < picture.stat().st_size < 200_000
        assert f"](../pictures/{picture.name})" in text


def test_memory_of_pixel_contrast_is_linear() -> None:
    """Beyond two blocks of fixed size; the dense formula would be quadratic, 16 times for 4 times the pixels."""

    def peak(side: int) -> int:
        views = torch.randn(2, 1, 19, side, side, requires_grad=True)

        def step() -> Any:
            return torch.autograd.grad(workloads.udakit.pixel_contrast_loss(*views, chunk_size=64), views)

        return harness.peak_extra_bytes(step)

    assert peak(32) / peak(16) < 4.2
