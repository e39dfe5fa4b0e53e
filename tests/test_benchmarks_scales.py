"""The scripts whose runs are pairs and seeds: what is left is run once, and the table of scales shows what is taken."""

from __future__ import annotations

import argparse

from benchmarks import adaptation, scales


def test_what_is_in_the_json_or_has_no_data_is_not_run(tmp_path, capsys):
    path, ran = tmp_path / "results.json", []

    def run(pair, seed, root, cache):
        ran.append((pair, seed, root, cache))
        return {"pair": pair, "seed": seed}

    options = argparse.Namespace(data_root=None, results=path, cache=tmp_path / "cache")
    adaptation.run_missing([("toy", 0), ("nuclei", 0), ("toy", 1)], run, options)
    assert ran == [("toy", 0, None, tmp_path / "cache"), ("toy", 1, None, tmp_path / "cache")]
    assert "skipped nuclei/0: no --data-root" in capsys.readouterr().out
    options.data_root = tmp_path
    adaptation.run_missing([("toy", 0), ("nuclei", 0), ("toy", 1)], run, options)
    assert ran[2:] == [("nuclei", 0, tmp_path, tmp_path / "cache")]
    assert [*adaptation.load(path)] == ["toy/0", "toy/1", "nuclei/0"]


def test_the_scale_in_bold_is_the_one_that_the_loop_takes():
    def found(*scores):
        return [{"position": k - 3, "score": s, "miou": 50.0 + k} for k, s in enumerate(scores)]

    smaller = found(0.70, 0.83, 0.81, 0.69, 0.66, 0.65, 0.64)
    both_ways = found(0.30, 0.45, 0.53, 0.51, 0.54, 0.52, 0.40)
    assert (scales.climbed(smaller), scales.climbed(both_ways)) == (-2, 0)
    text = scales.table({"nuclei/0": smaller, "carla2camvid/1": both_ways})
    assert "| nuclei, seed 0 | 70 / 50.0 | **83 / 51.0** | 81 / 52.0 | 69 / 53.0 |" in text
    assert "| CARLA → day, seed 1 | 30 / 50.0 | 45 / 51.0 | 53 / 52.0 | **51 / 53.0** |" in text
    assert scales.table({}) == "Not measured yet.\n"
