"""The study of label-free scores: rank statistics against known values, questions, signs, pairs left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks import selection
from benchmarks.selection import Score, kendall, ranks, spearman


def net(step, truth, good, *, name="student", noise=0.0, flipped=0.0):
    return {
        "step": step,
        "net": name,
        "truth_miou": truth,
        "scores": {"good": good, "noise": noise, "flipped": flipped},
        "shares": [0.5, 0.5],
    }


def make_run(pair, seed, truths, *, start=50.0, recipe="dacs", sign=1, bad=False):
    """`good` follows the truth on every pair, `flipped` with a sign of the pair's own, `noise` not at all."""
    generator = np.random.default_rng(seed + len(pair))
    nets = [
        net(50 * (k + 1), truth, truth / 100, noise=float(generator.random()), flipped=sign * truth)
        for k, truth in enumerate(truths)
    ]
    first = net(0, start, start / 100, name="source_only", noise=0.5, flipped=sign * start)
    return {"pair": pair, "recipe": recipe, "seed": seed, "bad": bad, "start": first, "checkpoints": nets}


RUNS = [
    make_run("toy", 0, [52, 60, 55], sign=1),
    make_run("toy", 0, [40, 45, 44], sign=1, recipe="diga", bad=True),
    make_run("nuclei", 0, [70, 65, 61], sign=-1, start=66),
    make_run("nuclei", 0, [72, 75, 80], sign=-1, start=66, recipe="diga"),
    make_run("camvid", 0, [55, 56, 57], sign=1),
    make_run("carla2camvid", 0, [30, 31, 29], sign=1, start=28),
]


def test_rank_statistics_against_known_values():
    assert ranks([10, 20, 10, 30]).tolist() == [1.5, 3, 1.5, 4]
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173)
    for statistic in (spearman, kendall):
        assert statistic([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
        assert statistic([1, 2, None, 3], [1, 2, 9, 3]) == pytest.approx(1)
        assert math.isnan(statistic([1, 1, 1], [1, 2, 3]))
        assert math.isnan(statistic([1], [1]))


def test_regret_of_each_question():
    runs = RUNS[2:4]
    good = selection.by_score(Score("good"), {"good": 1})
    wrong = selection.by_score(Score("good"), {"good": -1})
    assert selection.regrets(runs, "checkpoint", good) == [0, 0]
    assert selection.regrets(runs, "checkpoint", wrong) == [9, 8]
    assert selection.regrets(runs, "checkpoint", selection.always_last) == [9, 0]
    assert selection.regrets(runs, "checkpoint", selection.at_random) == pytest.approx([14 / 3, 13 / 3])
    assert selection.regrets(runs, "setting", wrong) == [19]  # the last nets: 61 and 80
    assert selection.regrets(runs, "setting", selection.always_last) == [9.5]
    assert selection.regrets(runs, "guard", selection.always_last) == [5, 0]
    assert selection.source_only_regrets(runs, "guard") == [0, 14]
    assert selection.source_only_regrets(runs, "checkpoint") == [4, 14]


def test_ties_and_missing_scores():
    nets = [net(1, 10.0, 0.5), net(2, 20.0, 0.5), net(3, 90.0, None)]
    assert selection.by_score(Score("good"), {"good": 1})(nets, "checkpoint") == 15
    assert Score("good", "noise").values([net(1, 0, 3, noise=1), net(2, 0, 2, noise=5)], {"good": 1, "noise": 1}) == [
        3,
        3,
    ]


def test_sign_and_score_are_fixed_on_the_other_pairs():
    """Nothing of the pair itself: its flipped score has the sign of the others, and so the wrong one."""
    study = selection.Study(RUNS)
    assert set(study.rest["camvid"]) == {"toy", "nuclei"}
    assert set(study.rest["carla2camvid"]) == {"toy", "nuclei"}
    assert set(study.rest["toy"]) == {"nuclei", "camvid", "carla2camvid"}
    assert study.signs["nuclei"]["flipped"] == 1
    assert study.correlations("flipped")["pairs"]["nuclei"] == pytest.approx(-1)
    assert {score.names for score in study.elected.values()} == {("good",)}
    found = selection.row(study.pairs, study.policies()["flipped"], "checkpoint")
    assert selection.mean(found["nuclei"]) == pytest.approx(8.5)
    assert selection.mean(found["toy"]) == 0
    assert selection.mean_over_pairs(found) == pytest.approx(8.5 / 4)


def test_interval_is_of_the_runs():
    assert selection.interval({"toy": [3.0, 3.0], "nuclei": [1.0]}) == (2, 2)
    low, high = selection.interval({"toy": [0.0, 10.0]})
    assert (low, high) == (0, 10)
    assert all(math.isnan(v) for v in selection.interval({}))


def test_table_and_picture(tmp_path):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(RUNS))
    selection.main([str(path), "--markdown", str(tmp_path / "t.md"), "--picture", str(tmp_path / "p.png")])
    lines = (tmp_path / "t.md").read_text().splitlines()
    folded = lines.index("<details markdown>")
    short, whole = (
        {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in part if "|" in line}
        for part in (lines[:folded], lines[folded:])
    )
    assert short["good"] == ["1.00", "1.00", "1.00", "0.0", "0.0", "0.0"]
    assert short["random"][:3] == ["–"] * 3
    assert whole["good"][:5] == ["1.00"] * 5
    assert whole["good"][5] == "0.0 [0.0, 0.0]"
    assert whole["**chosen on the other pairs**"][5] == "0.0 [0.0, 0.0]"
    assert whole["impossible best"][5] == "0.0 [0.0, 0.0]"
    assert short["source-only"][4] == whole["source-only"][7] == "–"
    assert "without bad runs" in whole["score"]
    assert lines[-1] == "</details>"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "1 runs made bad" in "\n".join(lines)


def test_guard_counts():
    study = selection.Study(RUNS)
    lines = selection.guard_table(study, "good").splitlines()
    nuclei = [c.strip() for c in next(x for x in lines if x.startswith("| nuclei")).split("|")[2:-1]]
    # The last students are 61 and 80, the source-only net 66; best.pt takes 70 and 80.
    assert nuclei == ["2", "+4.5", "1", "+7.0", "0", "+9.0", "2"]


def test_the_weight_of_a_class_decides_what_the_guard_takes():
    """The rare class becomes more consistent at the cost of the other: a gain by classes, a loss by pixels."""

    def seen(truth, first, second, shares=(0.9, 0.1)):
        mirror = {"class_iou": {"mirror": [first, second]}, "scores": {"confidence": 1.0}}
        return {"step": 10, "net": "student", "truth_miou": truth, "shares": list(shares), **mirror}

    harmful = [{"start": seen(50.0, 0.9, 0.3), "checkpoints": [seen(40.0, 0.8, 0.6)]}]
    collapsed = [{"start": seen(50.0, 0.9, 0.3), "checkpoints": [seen(20.0, 1.0, 0.5, (0.98, 0.02))]}]
    assert [selection.guarded_gain(harmful, power) for power in (0.0, 1.0)] == [-10.0, 0.0]
    assert [selection.guarded_gain(collapsed, power) for power in (0.0, 1.0)] == [0.0, 0.0]
    assert selection.weighted(seen(50.0, 0.9, 0.3), 0.5) == pytest.approx(
        (0.9**0.5 * 0.9 + 0.1**0.5 * 0.3) / (0.9**0.5 + 0.1**0.5)
    )
    text = selection.weights_table({"toy": harmful, "nuclei": collapsed})
    assert "| 0 | −10.00 | +0.00 | −5.00 |" in text
    assert "nuclei: 0.5" in text or "nuclei: 0.75" in text or "nuclei: 1" in text  # the toy pair's harm decides


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "at least one run"),
        ([{"pair": "toy"}], "run 0 to have checkpoints"),
        ([{**RUNS[0], "checkpoints": [{"step": 1}]}], "every net of run 0"),
    ],
)
def test_bad_input_is_named(runs, message):
    with pytest.raises(ValueError, match=message):
        selection.Study(runs)


def test_results_of_adaptation_are_read(tmp_path):
    """The oracle is no candidate; CARLA's headline is mIoU10; the warm start's truth may lie in the cache."""
    found = {"scores": {"mirror_consistency": 0.5}, "shares": [1.0], "class_iou": {"mirror": [0.4, None]}}
    common = {"pair": "toy", "seed": 1, "bad": False, "source_only": found}
    checkpoint = {"step": 10, "net": "student", "miou": 40.0, **found}
    saved = {
        "a": {
            **common,
            "recipe": "dacs",
            "checkpoints": [checkpoint],
            "source_only": {**found, "miou": 31},
        },
        "b": {**common, "recipe": "diga", "checkpoints": [checkpoint]},
        "c": {**common, "recipe": "oracle", "checkpoints": [checkpoint]},
    }
    path = tmp_path / "adaptation.json"
    path.write_text(json.dumps(saved))
    warm = tmp_path / "cache" / "toy" / "seed1" / "warm"
    warm.mkdir(parents=True)
    (warm / "results.json").write_text(
        json.dumps({"source_only": {"iou": {}, "means": {"mIoU": 30.0, "mIoU10": 32.0}}})
    )
    first, second = selection.read(path, tmp_path / "cache")
    assert (first["start"]["truth_miou"], second["start"]["truth_miou"]) == (31, 32)
    assert first["checkpoints"][0]["scores"] == {"mirror_consistency": 0.5, "mirror_present": 0.4}
    assert selection.read(path)[1]["start"] is None
    assert "dacs" in first["recipe"]


def test_collecting_a_run(tmp_path):
    def entry(step, **scores):
        nets = {
            name: {
                "scores": {"mirror_consistency": value},
                "shares": [0.5, 0.5],
                "class_iou": {"mirror": [value, None]},
            }
            for name, value in scores.items()
        }
        return {"step": step, "nets": nets}

    def truth(step, **scores):
        return {"step": step, "nets": {k: {"iou": {}, "means": {"mIoU": v}} for k, v in scores.items()}}

    stages = [
        {"name": "source_only", "steps": 100, "scores": [truth(100, student=50.0)], "label_free": []},
        {
            "name": "dacs",
            "steps": 20,
            "source_only": entry(0, student=0.4)["nets"]["student"],
            "scores": [truth(10, student=51.0, teacher=52.0), truth(20, student=53.0, teacher=54.0)],
            "label_free": [entry(10, student=0.5, teacher=0.6), entry(20, student=0.7, teacher=0.8)],
        },
    ]
    saved = {"config": {"data": {"pair": "toy"}, "seed": 3}, "stages": stages, "choice": None}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.json").write_text(json.dumps(saved))
    into = tmp_path / "runs.json"
    for _ in range(2):  # a run that is collected again is replaced
        selection.main(["--collect", str(tmp_path / "run"), "--into", str(into), "--bad"])
    (found,) = json.loads(into.read_text())
    assert (found["pair"], found["recipe"], found["seed"], found["bad"]) == ("toy", "dacs", 3, True)
    assert found["start"]["truth_miou"] == 50
    assert [(n["step"], n["net"], n["truth_miou"]) for n in found["checkpoints"]] == [
        (110, "student", 51.0), (110, "teacher", 52.0), (120, "student", 53.0), (120, "teacher", 54.0),
    ]  # fmt: skip
    assert found["checkpoints"][0]["scores"] == {"mirror_consistency": 0.5, "mirror_present": 0.5}
    with pytest.raises(FileNotFoundError, match="to be the folder of a run"):
        selection.main(["--collect", str(tmp_path), "--into", str(into)])
