"""The summary of results: gains seed by seed, over whatever pairs the JSON has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results_page


def run(pair: str, recipe: str, seed: int, miou: float, last: str, *, student: bool = True) -> dict[str, object]:
    rows = {f"{last}, student" if student else last: {"iou": {}, "means": {"mIoU": miou, "other": 1.0}}}
    stages = [{"recipe": last}]
    return {f"{pair}/{recipe}/{seed}": {"pair": pair, "recipe": recipe, "seed": seed, "rows": rows, "stages": stages}}


@pytest.fixture
def results() -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in ("toy", "nuclei_backwards"):  # the second has no entry of its own anywhere
        for seed, (source, dacs) in enumerate([(40.0, 50.0), (42.0, 50.0), (44.0, 57.0)]):
            found |= run(pair, "source_only", seed, source, "source_only", student=False)
            found |= run(pair, "dacs", seed, dacs, "dacs")
    return found | run("toy", "oracle", 0, 62.0, "source_only", student=False) | run("toy", "diga", 0, 39.0, "diga")


def test_gains_are_paired_by_seed(results: dict[str, object]) -> None:
    gain = results_page.gain_of(results, "toy", "dacs")
    assert gain.by_seed == (10.0, 8.0, 13.0)
    assert gain.mean == pytest.approx(31 / 3)
    assert gain.closed == pytest.approx(31 / 3 / 20)
    assert str(gain) == "+10.3 ± 2.5 (52 %)"
    assert str(results_page.gain_of(results, "toy", "diga")) == "−1.0 (−5 %)"
    assert results_page.gain_of(results, "toy", "ehtdi") is None
    assert results_page.gain_of(results, "nuclei_backwards", "dacs").closed is None


def test_the_small_net_is_compared_with_itself() -> None:
    assert results_page.baseline_of("toy", "duda_pre") == "small_source_only"
    assert results_page.baseline_of("toy", "dacs") == "source_only"


def test_table_and_picture_have_every_pair(results: dict[str, object], tmp_path: Path) -> None:
    text = results_page.table(results)
    assert text.startswith("| | game → camera | nuclei backwards |\n|---|---:|---:|\n")
    assert "| source-only, mIoU | 42.0 ± 2.0 | 42.0 ± 2.0 |" in text
    assert "| DACS | **+10.3 ± 2.5 (52 %)** | **+10.3 ± 2.5** |" in text
    assert "| oracle, mIoU | 62.0 | – |" in text
    assert "EHTDI" not in text
    results_page.plot(results, tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert results_page.table({}) == "Not measured yet.\n"


def test_differences_count_the_seeds_ahead(results: dict[str, object]) -> None:
    text = results_page.against(results, (("dacs", "source_only"), ("diga", "dacs")))
    assert "| game → camera | `dacs` | `source_only` | **+10.3 ± 2.5** | 3 of 3 seeds |" in text
    assert "| game → camera | `diga` | `dacs` | −11.0 | 0 of 1 seeds |" in text


def test_the_verdict_says_what_the_rows_say(results: dict[str, object]) -> None:
    lines = results_page.verdict(results).splitlines()
    assert lines[0] == "- **DACS** gains on every pair. It is the simplest one: start with it."
    one_seed = "- **DiGA** changes little on game → camera. Against DACS: level on game → camera."
    assert lines[1] == one_seed
    for seed, (diga, score) in enumerate([(30.0, 20.0), (31.0, 24.0), (39.0, 49.0)]):
        results |= run("toy", "diga", seed, diga, "diga") | run("nuclei_backwards", "diga", seed, 57.5, "diga")
        results[f"toy/source_only/{seed}"]["rows"][results_page.STATISTICS] = {"means": {"mIoU": score}}
    lines = results_page.verdict(results).splitlines()
    assert lines[1] == (
        "- **DiGA** gains on nuclei backwards, loses on game → camera. "
        "Against DACS: ahead on nuclei backwards, behind on game → camera."
    )
    assert lines[2].startswith("- **BatchNorm statistics of target**")
    assert "changes little on game → camera. The rows" in lines[2]  # -20, -18, +5
    assert results_page.verdict({}).startswith("\n")


def test_a_text_goes_to_the_page_that_has_its_markers(tmp_path: Path) -> None:
    page, sub = tmp_path / "results.md", tmp_path / "results" / "more.md"
    sub.parent.mkdir()
    page.write_text("<!-- a: begin -->\n<!-- a: end -->\n")
    sub.write_text("<!-- b: begin -->\n<!-- b: end -->\n")
    results_page.write("a", "![x](pictures/x.png)", page)
    results_page.write("b", "![x](pictures/x.png)", page)
    assert "(pictures/x.png)" in page.read_text()
    assert "(../pictures/x.png)" in sub.read_text()


def test_the_pages_are_those_of_the_json() -> None:
    results = json.loads(results_page.RESULTS.read_text(encoding="utf-8"))
    pages = "".join(p.read_text(encoding="utf-8") for p in results_page.pages_of(results_page.DOCS / "results.md"))
    for name, text in results_page.sections(results).items():
        assert f"<!-- {name}: begin -->\n\n{text.strip()}\n\n<!-- {name}: end -->" in pages, (
            f"run {results_page.__file__}"
        )
