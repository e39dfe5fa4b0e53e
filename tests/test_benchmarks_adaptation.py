"""The benchmark of one policy: what is left out when a setting is chosen, what is deployed, what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_gta2cs
from benchmarks import adaptation, adaptation_rows, adaptation_tables, harness
from gta2cs.recipes import RECIPES


def run_of(pair: str, recipe: str, seed: int, miou: float, score: float = 0.5, start: float | None = None) -> dict:
    nets = [
        {"step": step, "net": net, "miou": value, "scores": {adaptation_rows.SCORE: score + shift}, "shares": [1.0]}
        for step, shift in ((100, 0.2), (200, 0.0))
        for net, value in (("student", miou + 10 * shift), ("teacher", miou - 1))
    ]
    source_only = None if start is None else {"miou": start, "scores": {adaptation_rows.SCORE: 0.6}, "shares": [1.0]}
    return {
        "rows": {adaptation_rows.STATISTICS: {"means": {"mIoU": miou + 1}}},
        "pair": pair,
        "recipe": recipe,
        "seed": seed,
        "bad": False,
        "steps": 200,
        "source_only": source_only,
        "checkpoints": nets,
    }


def results_of(runs: list[dict]) -> dict[str, dict]:
    return {f"{r['pair']}/{r['recipe']}/{r['seed']}": r for r in runs}


def test_a_setting_is_chosen_on_pairs_that_share_no_images():
    best = {
        "toy": "batch",
        "nuclei": "batch",
        "nuclei_backwards": "batch",
        "camvid": "running",
        "carla2camvid": "running",
    }
    runs = [run_of(pair, "source_only", 0, 50.0) for pair in best]
    for pair, wanted in best.items():
        runs += [run_of(pair, f"dacs_{name}", 0, 70.0 if name == wanted else 51.0) for name in adaptation_rows.SETTINGS]
    results = results_of(runs)
    assert adaptation_tables.choose("toy", results) in ("batch", "running")  # two pairs each
    for pair in sorted(adaptation_rows.STREETS):  # they share images: all are left out
        assert adaptation_tables.choose(pair, results) == "batch"
    assert adaptation_tables.gains_elsewhere("toy", {}) == {"batch": [], "running": []}


def test_the_guard_and_the_choice_look_at_scores_alone():
    better, worse = run_of("toy", "combined", 0, 60.0, 0.7, 50.0), run_of("toy", "combined", 1, 40.0, 0.5, 50.0)
    assert adaptation_tables.guarded(better)["miou"] == 60.0
    assert adaptation_tables.guarded(worse)["miou"] == 50.0
    assert adaptation_tables.chosen(better) == better["checkpoints"][0]  # of step 100
    assert adaptation_tables.guarded(run_of("toy", "source_only", 0, 50.0)) is None
    for net in better["checkpoints"]:
        net["shares"] = [0.99, 0.01]
    better["source_only"]["shares"] = [0.9, 0.1]  # a class is lost: whatever the score, the start stays
    assert adaptation_tables.guarded(better) is adaptation_tables.chosen(better) is better["source_only"]


def test_table_has_gain_spread_and_share_of_the_gap():
    runs = [run_of("nuclei", "source_only", s, 50.0) for s in (0, 1)] + [run_of("nuclei", "oracle", 0, 90.0)]
    runs += [run_of("nuclei", "combined", s, 78.0 + 4 * s, 0.7, 50.0) for s in (0, 1)]
    text = adaptation_tables.table(results_of(runs))
    assert "| source-only | 50.0 ± 0.0 [2] |" in text
    assert "| source-only, BatchNorm's statistics of target | 51.0 ± 0.0 [2] (2 %) |" in text
    assert "| combined | 80.0 ± 2.8 [2] (75 %) |" in text
    assert "| oracle | 90.0 [1] |" in text
    assert "DiGA" not in text
    assert adaptation_tables.table({}) == "Not measured yet.\n"


def test_what_was_tried_shows_both_gains_and_what_the_score_would_choose():
    runs = [run_of("toy", "decided", s, 63.0, 0.7) for s in (0, 1, 2)] + [run_of("nuclei", "decided", 0, 90.0, 0.9)]
    runs += [run_of("toy", "tried_ratio", s, 66.0 + s, 0.75) for s in (0, 1)] + [run_of("toy", "tried_late", 0, 80.0)]
    text = adaptation_tables.tried(results_of(runs))
    assert "| | game → camera |\n" in text
    assert "| nothing changed | 63.0 (70.0) [2] |" in text  # on the seeds that something was tried with
    assert "| a weight by confidence in place of class balance | +3.5 (+5.0) |" in text
    assert "| half of the steps on source first | +17.0 (−20.0) |" in text
    assert "| **highest score of all lines** | 66.5 ± 0.7 [2] |" in text
    assert "| **best of all lines** | 73.5 ± 9.2 [2] |" in text
    assert "| **chosen on the other pairs** | nothing changed: 63.0 (70.0) [2] |" in text  # there is no other pair
    assert adaptation_tables.tried({}) == "Not measured yet.\n"


def test_a_change_is_chosen_on_pairs_that_share_no_images():
    gains = {"toy": (2.0, 1.0), "nuclei": (1.0, 3.0), "camvid": (-1.0, 0.0), "carla2camvid": (-5.0, 0.0)}
    runs = [run_of(pair, "decided", 0, 50.0) for pair in gains]
    runs += [
        run_of(pair, f"tried_{name}", 0, 50.0 + gain)
        for pair, g in gains.items()
        for name, gain in zip(("late", "half"), g, strict=True)
    ]
    runs += [run_of("toy", "tried_share", 0, 99.0)]  # not on every pair
    text = adaptation_tables.tried(results_of(runs))
    half = "half of the weight on the mixture"
    cells = [f"{half}: +1.0 (+0.0)", f"{half}: +3.0 (+0.0)", f"{half}: +0.0 (+0.0)", f"{half}: +0.0 (+0.0)"]
    assert f"| **chosen on the other pairs** | {' | '.join(cells)} |" in text


def test_longer_runs_stand_beside_those_of_the_same_seeds():
    runs = [run_of("toy", "combined", s, 60.0 + s) for s in (0, 1)] + [run_of("toy", "longer_combined", 0, 65.0)]
    runs += [run_of("toy", "source_only", 0, 56.0), run_of("toy", "longer_source_only", 0, 61.0)]
    runs += [run_of("toy", "oracle", 0, 66.0)]
    text = adaptation_tables.longer(results_of(runs))
    assert "| | game → camera, 450 steps | game → camera, 1800 steps |" in text
    assert "| source-only | 56.0 [1] | 61.0 [1] |" in text
    assert "| combined | 60.0 [1] (40 %) | 65.0 [1] (80 %) |" in text
    assert "| oracle | 66.0 [1] | – |" in text
    assert "DiGA" not in text
    assert "not measured yet" in adaptation_tables.longer({})


def test_other_labels_stand_beside_runs_of_the_same_start():
    runs = [run_of("toy", "combined", s, 60.0 + s) for s in (0, 1)] + [run_of("toy", "weighed", 1, 63.0)]
    runs += [run_of("toy", "rising", s, 59.0) for s in (0, 1)]
    runs += [run_of("nuclei", "weighed", 0, 80.0), {**run_of("nuclei", "combined", 0, 90.0), "device": "another"}]
    text = adaptation_tables.weighed(results_of(runs))
    assert text.splitlines()[0] == "| labels | game → camera |"
    assert "| 60 % of each class, full weight | 60.5 ± 0.7 [2] |" in text
    assert "| 90 % of each class, weighed by confidence | +2.0 [1] |" in text
    assert "| from 60 to 90 % of each class, weighed by confidence | −1.5 ± 0.7 [2] |" in text
    assert adaptation_tables.weighed({}) == "Not measured yet.\n"


def test_runs_of_a_seed_that_began_at_different_nets_are_not_compared():
    def run(row, miou, *, start=None, init=None, recipe="source_only"):
        known = {} if init is None else {"target_statistics": {"start": {"training": {"miou": init}}}}
        return {**run_of("toy", row, 1, miou, start=start), "stages": [{"recipe": recipe}], **known}

    older, newer = run("combined", 60.0, start=53.3), run("combined", 61.0, start=52.9, init=45.2)
    at_once = run("dacs_defaults", 64.0, start=45.2, recipe="dacs")
    others = [run("weighed", 62.0, start=53.3), run("rising", 63.0, start=50.0), at_once]
    results = {str(k): found for k, found in enumerate((older, newer, *others))}
    found = {row: [x[1:] for x in adaptation_tables.beside(results, "toy", row)] for row in ("weighed", "rising")}
    assert found == {"weighed": [(60.0, 62.0)], "rising": []}
    assert [x[1:] for x in adaptation_tables.beside(results, "toy", "dacs_defaults")] == [(61.0, 64.0)]
    assert [x[1:] for x in adaptation_tables.beside({"0": older, "1": at_once}, "toy", "dacs_defaults")] == [
        (60.0, 64.0)
    ]


def test_combined_without_a_part_stands_beside_runs_of_the_same_start():
    runs = [
        run_of("nuclei", row, s, miou - s) for s in (1, 2) for row, miou in (("combined", 92.0), ("source_only", 70))
    ]
    runs += [run_of("nuclei", "without_balance", 1, 80.0), run_of("nuclei", "without_balance", 2, 82.0)]
    text = adaptation_tables.without(results_of(runs))
    assert text.splitlines() == [
        "| without | nuclei |",
        "|---|---:|",
        "| nothing: `combined` | 90.5 ± 0.7 [2] |",
        f"| {adaptation_rows.WITHOUT['balance'][0]} | −9.5 ± 2.1 [2] |",
    ]
    assert adaptation_tables.without({}) == "Not measured yet.\n"


@pytest.mark.parametrize("name", adaptation_rows.WITHOUT)
def test_a_row_without_a_part_trains_what_combined_trains_but_for_it(tmp_path, name):
    whole, part = (adaptation.configure("toy", row, 1, None, tmp_path) for row in ("combined", f"without_{name}"))
    assert sum(stage.steps for stage in part.stages) == sum(stage.steps for stage in whole.stages)
    differing = {field for field, value in vars(part).items() if value != getattr(whole, field)}
    assert differing == {"out", "data" if name in ("match", "scales") else "stages"}


def test_of_two_methods_from_one_start_a_score_keeps_one():
    scores = ("balanced_consistency", "confident_consistency")
    runs = [run_of("toy", row, s, miou) for s in (0, 1) for row, miou in (("combined", 60.0), ("dacs_defaults", 62.0))]
    runs.append({**run_of("toy", "dacs_defaults", 2, 90.0), "device": "another"})  # no run of `combined` beside it
    for run, values in zip(runs, ((0.7, 0.7), (0.8, 0.6), (0.7, 0.7), (0.6, 0.6)), strict=False):
        run["checkpoints"][-2]["scores"] = dict(zip(scores, values, strict=True))
    lines = adaptation_tables.either(results_of(runs)).splitlines()
    assert lines[0] == "| | game → camera | mean |"
    assert lines[2] == "| combined | 60.0 ± 0.0 [2] | 60.0 |"
    assert lines[4] == "| the one with the higher balanced consistency | 61.0 ± 1.4 [2] | 61.0 |"
    assert lines[5] == "| the one with the higher confident consistency | 60.0 ± 0.0 [2] | 60.0 |"
    assert lines[6] == "| the better one | 62.0 ± 0.0 [2] | 62.0 |"
    assert adaptation_tables.either({}) == "Not measured yet.\n"


def test_the_study_has_every_scored_run_with_the_truth_of_its_start():
    runs = [run_of("nuclei", "combined", 0, 60.0, 0.7, 50.0), run_of("nuclei", "source_only", 0, 50.0)]
    (only,) = adaptation_tables.study(results_of(runs))
    assert only["start"]["truth_miou"] == 50.0
    assert [c["truth_miou"] for c in only["checkpoints"]] == [62.0, 59.0, 60.0, 59.0]


@pytest.mark.parametrize("row", sorted(adaptation_rows.rows_of()))
@pytest.mark.parametrize("pair", sorted(adaptation_rows.PAIRS | adaptation_rows.FURTHER))
def test_rows_differ_between_pairs_by_nothing_but_data_net_and_steps(pair, row):
    config = adaptation.configure(pair, row, 3, None, Path("cache"))
    reference = adaptation.configure("toy", row, 3, None, Path("cache"))
    starts = [s.options.pop("large_init", "") for s in (*config.stages, *reference.stages)]  # DUDA's, of the pair
    assert not any(starts) or row == "duda"
    assert [s.options for s in config.stages] == [s.options for s in reference.stages]
    assert [s.lr for s in config.stages] == [s.lr for s in reference.stages]
    for name in ("source_scale", "target_scale"):
        assert getattr(config.data, name) == getattr(reference.data, name)
    times = adaptation_rows.LONGER if row.startswith("longer_") else 1
    steps = (adaptation_rows.PAIRS | adaptation_rows.FURTHER)[pair]["steps"]
    assert sum(s.steps for s in config.stages) == steps * times
    assert config.init == Path("cache") / pair / "seed3" / "warm" / "stage1_source_only" / "last.pt"
    for stage in config.stages:
        RECIPES[stage.recipe].parse(stage.options)
    assert isinstance(config, train_gta2cs.Config)


def test_duda_has_a_larger_net_with_a_start_of_its_own():
    large = adaptation.configure("nuclei", "warm_large", 1, None, Path("cache"))
    assert large.net.encoder != adaptation.configure("nuclei", "warm", 1, None, Path("cache")).net.encoder
    (stage,) = adaptation.configure("nuclei", "duda", 1, None, Path("cache")).stages
    assert Path(stage.options["large_init"]) == large.out / "stage1_source_only" / "last.pt"
    assert stage.options["large"]["encoder"] == large.net.encoder
    run = run_of("nuclei", "duda", 0, 60.0, 0.7, 50.0)
    run["checkpoints"] += [{"step": 200, "net": f"large {net}", "miou": 99.0} for net in ("teacher", "student")]
    assert adaptation_tables.final(results_of([run]), "nuclei", "duda") == [60.0]
    (entry,) = adaptation_tables.study(results_of([run]))
    assert {c["net"] for c in entry["checkpoints"]} == {"student", "teacher"}
    assert adaptation_tables.chosen(run)["miou"] < 99.0


def test_domains_that_change_places_are_folders_of_each_other():
    config = adaptation.configure("dusk2day", "combined", 0, Path("data"), Path("cache"))
    assert config.data.pair == "camvid"
    assert config.data.source_root == Path("data/camvid/target")
    assert config.data.target_root == Path("data/camvid/source")
    assert adaptation.configure("camvid", "combined", 0, Path("data"), Path("cache")).data.source_root is None


def test_the_further_street_pairs_have_a_table_of_their_own_and_enter_the_study():
    ours = run_of("carla2dusk", "combined", 0, 60.0, 0.7, 50.0)
    results = results_of([run_of("carla2dusk", "source_only", 0, 50.0), run_of("carla2dusk", "oracle", 0, 70.0), ours])
    assert adaptation_tables.table(results) == "Not measured yet.\n"
    assert len(adaptation_tables.study(results)) == 1
    lines = adaptation_tables.further(results).splitlines()
    assert lines[0] == "| | CARLA → dusk |"
    assert "| combined | 60.0 [1] (50 %) |" in lines
    assert "| combined, chosen over all evaluations | 62.0 [1] |" in lines


def test_how_the_teacher_labels_is_chosen_without_the_street_pairs_and_without_the_others():
    runs = [run_of(pair, "source_only", 0, 40.0) for pair in ("toy", "nuclei", "camvid")]
    for pair, values in {"toy": (50, 40), "nuclei": (30, 60), "camvid": (20, 90)}.items():
        rows = ("batch_at_once", "combined")
        runs += [run_of(pair, row, 0, float(value)) for row, value in zip(rows, values, strict=True)]
    runs.append(run_of("toy", "running_at_once", 0, 99.0))  # not on every pair
    text = adaptation_tables.labelling(results_of(runs))
    assert "| statistics of the target batch | 50.0 [1] | 30.0 [1] | 20.0 [1] |" in text
    late = "half of each, after half of the steps on source"
    assert f"without street pairs: {late}; without the others: {late}." in text
    assert adaptation_tables.preferred(adaptation.load(Path("none")), []) is None


def test_a_run_starts_where_its_first_adapting_stage_does(monkeypatch):
    score = {"means": {"mIoU": 55.0}, "iou": {}}
    source = {"steps": 10, "scores": [{"step": 10, "nets": {"student": score}}]}
    adapting = {"steps": 10, "scores": [], "source_only": {"shares": [1.0]}}
    monkeypatch.setattr(adaptation, "truth_of", lambda path: 44.0)
    assert adaptation.start_of([source, adapting], Path("warm")) == {"shares": [1.0], "miou": 55.0}
    assert adaptation.start_of([adapting], Path("warm")) == {"shares": [1.0], "miou": 44.0}
    assert adaptation.start_of([source], Path("warm")) is None


def test_statistics_of_target_are_counted_once_a_net_and_as_the_score_says():
    def net(*pairs: tuple[float, float]) -> dict:
        return {
            kind: {"miou": miou, "scores": {adaptation_tables.BY_CLASS: score, "confidence": -score}}
            for kind, (miou, score) in zip(adaptation_tables.STATISTICS_OF, pairs, strict=True)
        }

    start = net((50, 0.5), (52, 0.6), (58, 0.7))
    runs = [run_of("toy", row, 0, 60.0) | {"target_statistics": {"start": start, "last": last}} for row, last in (
        ("combined", net((60, 0.8), (61, 0.9), (57, 0.7))), ("dacs_batch", net((60, 0.8), (70, 0.8), (40, 0.8))),
    )]  # fmt: skip
    runs.append(
        run_of("nuclei", "combined", 0, 60.0) | {"target_statistics": {"last": net((60, 0.5), (59, 0.6), (61, 0.4))}}
    )
    text = adaptation_tables.target_statistics(results_of(runs))
    assert "| game → camera | 3 | −5.0 | +4.3 | +3.0 | +6.3 | +0.0 |" in text
    assert "| nuclei | 1 | +1.0 | −1.0 | −1.0 | +1.0 | −1.0 |" in text
    assert "game → camera: confidence, nuclei: confident consistency; by it, all 4 nets gain " in text
    assert adaptation_tables.target_statistics({}) == "Not measured yet.\n"
    assert adaptation_tables.deployed(runs[0] | {"rows": {"chosen without labels": {"means": {"mIoU": 61.5}}}}) == {
        "miou": 61.5
    }
    assert adaptation_tables.deployed(run_of("toy", "combined", 0, 60.0)) is None


@pytest.mark.parametrize(
    ("name", "write", "page"),
    [
        ("policy_summary", adaptation_tables.summary, adaptation.SUMMARY),
        ("one_policy", adaptation_tables.table, adaptation.PAGE),
        ("further", adaptation_tables.further, adaptation.PAGE),
        ("labelling", adaptation_tables.labelling, adaptation.COMBINED_PAGE),
        ("either", adaptation_tables.either, adaptation.PAGE),
        ("longer", adaptation_tables.longer, adaptation.PAGE),
        ("weighed", adaptation_tables.weighed, adaptation.COMBINED_PAGE),
        ("without", adaptation_tables.without, adaptation.COMBINED_PAGE),
        ("tried", adaptation_tables.tried, adaptation.COMBINED_PAGE),
        ("target_statistics", adaptation_tables.target_statistics, adaptation.SCORES_PAGE),
    ],
)
def test_the_pages_are_those_of_the_json(name, write, page):
    written = harness.section(name, write(adaptation.load(adaptation.RESULTS)))
    assert written in page.read_text(encoding="utf-8"), "run benchmarks/adaptation.py --table"
