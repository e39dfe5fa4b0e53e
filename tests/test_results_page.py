"""The summary of results: gains seed by seed, over whatever pairs the JSON has."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from statistics import mean, stdev

import pytest

from benchmarks import adaptation_rows, adaptation_tables, harness, main_job, parts, results_page, unseen_pair
from contract.registry import CHECKS
from gta2cs.label_free import RELIABILITY

ROOT = Path(__file__).resolve().parent.parent
HOMES = ("README.md", "docs/index.md")  # one text


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
    assert text.startswith("| | game → camera | nuclei, backwards |\n|---|---:|---:|\n")
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
        "- **DiGA** gains on nuclei, backwards, loses on game → camera. "
        "Against DACS: ahead on nuclei, backwards, behind on game → camera."
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
        assert harness.section(name, text) in pages, f"run {results_page.__file__}"


def test_the_unseen_pair_is_on_its_page() -> None:
    results = json.loads(unseen_pair.RESULTS.read_text(encoding="utf-8"))
    page = unseen_pair.PAGE.read_text(encoding="utf-8")
    assert harness.section("unseen_pair", unseen_pair.table(results)) in page, f"run {unseen_pair.__file__} --table"


def numbers_of_prose() -> list[tuple[str, str, str, bool]]:
    """Page, what stands around a number in its prose, the number by the JSON or a script's table, must it be there."""
    pairs, policy, single, unseen = (
        json.loads((ROOT / f"benchmarks/results/{n}.json").read_text())
        for n in ("real_pairs", "adaptation", "parts", "unseen_pair")
    )
    lost, kept, won, deployed = map(str, parts.guard_counts([*policy.values(), *single.values()]))
    dacs = [pairs[f"toy/dacs/{seed}"]["rows"]["dacs, student"]["means"]["mIoU"] for seed in range(3)]
    job = json.loads((ROOT / "benchmarks/results/main_job.json").read_text())["rows"]
    starts = [job[name]["mIoU"] for name in main_job.STARTS]
    reached, start = mean(dacs), mean(starts)
    gains = {
        pair: mean(adaptation_tables.final(policy, pair, "combined"))
        - mean(adaptation_tables.final(policy, pair, "source_only"))
        for pair in adaptation_rows.PAIRS
    }
    unseen_means = {title: mean(unseen_pair.values(unseen, title)) for title in unseen_pair.ROWS}
    begun, _, source, statistics, _, combined, deployed_unseen, _ = unseen_means.values()
    changes = [
        net["target"]["miou"] - net["training"]["miou"]
        for pair in (*adaptation_rows.PAIRS, *adaptation_rows.FURTHER)
        for net in adaptation_tables.with_statistics(policy, pair)
    ]
    running, decided = (policy[f"day2carla/{row}/0"] for row in ("running_at_once", "decided"))
    misled = parts.last(running) - parts.last(decided)
    found = [
        *numbers_of_the_home_page(starts, dacs, (kept, lost)),
        ("docs/results/scores.md", r"That gains up to (\d+) points", f"{max(changes):.0f}", True),
        ("docs/results/scores.md", r"and loses up to (\d+)", f"{-min(changes):.0f}", True),
        ("docs/results/scores.md", r"(\d+) ended with a student that is worse", lost, True),
        ("docs/results/scores.md", r"In (\d+) of them the loop kept the start", kept, True),
        ("docs/results/scores.md", r"of (\d+) runs whose student was better", won, True),
        ("docs/results/scores.md", r"kept the start in (\d+) of \d+ runs", str(int(won) - int(deployed)), True),
        ("docs/results.md", r"source-only net, at (\d+\.\d ± \d\.\d)", f"{start:.1f} ± {stdev(starts):.1f}", True),
        ("docs/results.md", r"from there DACS gains (\d+) points", f"{reached - start:.0f}", True),
        ("docs/results/per_class.md", r"300 steps, at (\d+\.\d) ±", f"{start:.1f}", True),
        ("docs/results/one_policy.md", r"`combined` is (\d+) points ahead on nuclei", f"{gains['nuclei']:.0f}", True),
        ("docs/results/one_policy.md", r"(\d+) on CARLA → day", f"{gains['carla2camvid']:.0f}", True),
        ("docs/results/one_policy.md", r"(\d+) on the built-in pair", f"{gains['toy']:.0f}", True),
        ("docs/results/one_policy.md", r"(\d+) on day → dusk", f"{gains['camvid']:.0f}", True),
        ("docs/results/one_policy.md", r"wrong by (\d+) points", f"{misled:.0f}", True),
        ("docs/results/one_policy.md", r"gains (\S+) points over the net", f"{combined - begun:.1f}", True),
        ("docs/results/one_policy.md", r"only (\S+) points over training on", f"{combined - source:.1f}", True),
        (
            "docs/results/one_policy.md",
            r"cost no training, bring (\S+) to source-only",
            f"{statistics - source:.1f}",
            True,
        ),
        ("docs/results/one_policy.md", r"ends (\S+) points above source-only", f"{deployed_unseen - source:.1f}", True),
        ("docs/results.md", r"deploys is (\d\.\d) points above source-only", f"{deployed_unseen - source:.1f}", True),
    ]
    text = (ROOT / "docs/results/scores.md").read_text(encoding="utf-8")
    for score in ("balanced consistency", "confident consistency", "mirror consistency"):
        row = re.search(rf"^\| {score} \|(.*?)\|$", text, re.MULTILINE)
        rho = [float(cell) for cell in row[1].split("|")[:2]]  # of the first table: the lowest and the highest
        said = f"{min(rho):.2f} to {max(rho):.2f}"
        assert f"was {said}" in RELIABILITY[score.replace(" ", "_")]
        if score == "balanced consistency":
            found.append(("docs/results/scores.md", r"correlation between (\d\.\d+) \(day", f"{min(rho):.2f}", False))
            found.append(("docs/results/scores.md", r"CARLA\) and (\d\.\d+)\.", f"{max(rho):.2f}", False))
    return found


def numbers_of_the_home_page(
    starts: list[float], dacs: list[float], kept: tuple[str, str]
) -> list[tuple[str, str, str, bool]]:
    """The same of the home page, as README and in docs/."""
    job = json.loads((ROOT / "benchmarks/results/main_job.json").read_text())["rows"]["one thread"]
    seconds = sum(main_job.lines_of(job).values())
    rows = json.loads((ROOT / "benchmarks/results/operators.json").read_text())["rows"]
    contrast = rows["pixel_contrast_loss/medium/float32/forward+backward/eager"]["contestants"]
    ratio = {what: contrast["udakit"][what] / contrast["textbook"][what] for what in ("median", "peak_bytes")}
    clock = json.loads((ROOT / "benchmarks/results/gpu_clock.json").read_text())["rows"]
    timed = clock["pixel_contrast_loss/forward+backward"]["contestants"]
    on_gpu = {what: timed["udakit"][what] / timed["textbook"][what] for what in ("ms", "peak_bytes")}
    loops = len(list((ROOT / "examples/integrations").glob("*.py")))
    numbers = {
        r"\+(\d+) mIoU on the built-in": f"{mean(dacs) - mean(starts):.0f}",
        r"\((\d+\.\d ± \d\.\d) to": f"{mean(starts):.1f} ± {stdev(starts):.1f}",
        r"to (\d+\.\d ± \d\.\d)\)": f"{mean(dacs):.1f} ± {stdev(dacs):.1f}",
        r"in (\d+) minutes on one CPU core": f"{seconds / 60:.0f}",
        r"started from: in (\d+) of": kept[0],
        r"of (\d+) such runs": kept[1],
        r"contrast takes (\S+) × the time": f"{ratio['median']:.1f}",
        r"the time and (\S+) × the memory": f"{ratio['peak_bytes']:.2f}",
        r"NVIDIA H(\d+)": clock["card"]["name"].removeprefix("NVIDIA H"),
        r"it took (\S+) × the memory": f"{on_gpu['peak_bytes']:.2f}",
        r"the memory and (\S+) × the time": f"{on_gpu['ms']:.1f}",
        r"There are (\d+) for every operation": str(len(CHECKS)),
        r"\[(\w+) loops\]": ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen")[loops - 10],
    }
    return [(page, around, number, True) for page in HOMES for around, number in numbers.items()]


def test_the_home_page_has_no_number_that_nothing_stands_behind() -> None:
    """Without the numbers above, what a script writes, code and links, it has those of Python and torch."""
    headline = results_page.headline(json.loads(results_page.RESULTS.read_text(encoding="utf-8")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = {project["requires-python"].removeprefix(">="), project["dependencies"][0].removeprefix("torch>=")}
    known = {around for _, around, _, _ in numbers_of_the_home_page([1.0, 2.0], [1.0, 2.0], ("1", "2"))}
    for page, folder in zip(HOMES, ("docs/", ""), strict=True):
        text = (ROOT / page).read_text(encoding="utf-8")
        written = headline.replace("](", f"]({folder}")
        assert written in text, f"run {results_page.__file__}"
        text = text.replace(written, "")
        for around in known:
            text = re.sub(around, lambda m: m[0].replace(m[1], ""), text)
        for left_out in (r"(?s)```.*?```", r"`[^`\n]*`", r"\]\(.*?\)", r"Apache-2\.0"):
            text = re.sub(left_out, "", text)
        assert set(re.findall(r"\d+(?:\.\d+)*", text)) == versions, page


def test_numbers_in_prose_are_those_of_the_json() -> None:
    for page, around, number, needed in numbers_of_prose():
        found = re.search(around, (ROOT / page).read_text(encoding="utf-8"))
        assert found or not needed, f"{page}: {around}"
        assert not found or found[1] == number, f"{page}: {found[0]!r}, but the JSON says {number}"
