"""The scripts whose runs are pairs and seeds: what is left is run once, and the table of scales shows what is taken."""

from __future__ import annotations

import argparse

import torch

from benchmarks import adaptation, colours, scales
from gta2cs.datasets import Labelled


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


def test_images_in_the_colours_of_source_keep_their_labels_and_the_table_says_what_the_loop_would_take():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 12, 10, generator=generator) * 255 for _ in range(4)]
    labels = [torch.full((12, 10), i, dtype=torch.uint8) for i in range(4)]
    names = ["a", "b", "c", "d"]
    target = Labelled(names, images, labels)
    source = Labelled(names, [40 + image / 8 for image in images], labels)
    found = colours.restyled(target, source, "color")
    for index in range(4):
        image, label = found[index]
        assert torch.equal(label, labels[index])
        assert float(image.mean()) < 70 < float(images[index].mean())  # as dark as source
        torch.testing.assert_close(colours.restyled(target, source, "none")[index][0], images[index])
    assert target.images is images

    entry = {"none": {"score": 0.50, "miou": 30.0}, "color": {"score": 0.55, "miou": 31.0}}
    text = colours.table({"toy/0": entry, "camvid/1": {"none": entry["color"], "color": entry["none"]}})
    assert "| game → camera, seed 0 | 50.0 / 30.0 | 55.0 / 31.0 | target's |" in text
    assert "| day → dusk, seed 1 | 55.0 / 31.0 | 50.0 / 30.0 | its own |" in text
    assert colours.table({}) == "Not measured yet.\n"
