"""The benchmarks of a training step and of the loaders: their clocks, their sums, and what they keep and write."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import data_path, harness, main_job, step_overhead
from benchmarks.step_overhead import INSIDE, REST, ROWS, Clock, Stretch, outside
from gta2cs import outputs
from gta2cs.samples import image_files, read_image, resize_image
from tiny import tiny_net

MARKED = "before\n<!-- {0}: begin -->\nold\n<!-- {0}: end -->\nafter\n"


@pytest.fixture(autouse=True)
def _quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1e10)


class Slow(torch.autograd.Function):
    """Doubles; known times forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        time.sleep(0.04)
        return 2 * grad


def test_clock_sees_both_directions() -> None:
    clock = Clock()
    slow, scale = clock.wrap("slow", Slow.apply), clock.wrap("scale", lambda x: 3 * x)
    x = torch.ones(3, requires_grad=True)
    y = scale(slow(scale(x)))
    with clock.around("backward"):
        y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 18.0))
    found = clock.exclusive()
    assert 0.06 <= found["slow"] < 0.5
    assert 0 < found["scale"] < found["slow"]
    assert found["backward"] < 0.04  # what is left of it


def test_clock_without_a_graph() -> None:
    clock = Clock()
    with torch.no_grad():
        clock.wrap("slow", lambda x: time.sleep(0.01))(torch.ones(1, requires_grad=True))
    assert clock.exclusive()["slow"] >= 0.01
    clock.wrap("data", lambda x: x + 1)(torch.ones(1))
    assert set(clock.exclusive()) == {"slow", "data"}


def test_parts_inside_parts_count_once() -> None:
    clock = Clock()
    clock.stretches = [Stretch("a", 0, 10), Stretch("c", 12, 13), Stretch("b", 2, 6), Stretch("a", 3, 4)]
    assert clock.exclusive() == {"a": 7, "b": 3, "c": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dacs", "ehtdi"])
def test_step(name: str, tmp_path: Path) -> None:
    net = {"arch": "fpn", "encoder": "tu-tf_efficientnet_lite0", "weights": "random"}
    untouched = outputs.upsampled_cross_entropy
    row = step_overhead.measure(dataclasses.replace(ROWS[name], size=64, net=net), steps=1, classes=4)
    assert outputs.upsampled_cross_entropy is untouched
    parts = row["parts"]
    assert all(seconds >= 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(row["seconds"])
    assert 0 < outside(row) < 1
    assert row["net_only_seconds"] > 0
    wanted = {"augmentation", "blur", "mixing", "selection", "cross-entropy", "enlarging logits", "EMA", *INSIDE, REST}
    contrasts = {"pixel contrast", "prototype contrast", "label resizing", "shrinking logits"}
    assert set(parts) == (wanted | contrasts if name == "ehtdi" else wanted)
    assert row["passes"] == (5 if name == "ehtdi" else 3)

    results = harness.Results(tmp_path / "results.json")
    results.add(name, row)
    page = tmp_path / "page.md"
    page.write_text(MARKED.format("step"))
    step_overhead.main(["--table", "--results", str(results.path), "--page", str(page)])
    text = page.read_text()
    assert f"| {name}, 64 × 64, fpn / tu-tf_efficientnet_lite0 | {row['passes']} |" in text
    assert "\nold\n" not in text
    assert json.loads(results.path.read_text())["rows"][name]["parts"] == parts


def test_the_main_job_is_its_steps_and_evaluations(tmp_path: Path) -> None:
    measured = {"step 0/nets": 1.0, "step 0/backward": 2.0, "step 0/blur": 0.5, "step 1/nets": 4.0}
    measured |= {"evaluation 0/scores": 1.0, "evaluation 1/scores": 2.0, f"scenes/{main_job.SCENES}": 3.0}
    measured["once/import"] = 7.0
    times = {"once": 1, "scenes": 2, "step 0": 10, "step 1": 20, "evaluation 0": 2, "evaluation 1": 3}
    stages = [{"recipe": "source_only", "steps": 30}, {"recipe": "dacs", "steps": 60}]
    row = {"measured": measured, "times": times, "stages": stages, "steps": 3, "scenes": 1}
    results = harness.Results(tmp_path / "results.json")
    results.add("one thread", row)
    results.add(main_job.WAYS, {"milliseconds": {"fused": 4.25}})
    page = tmp_path / "page.md"
    page.write_text(MARKED.format("main job"))
    main_job.main(["--table", "--results", str(results.path), "--page", str(page)])
    text = page.read_text()
    total = 10 + 20 + 5 + 80 + 8 + 6 + 7
    assert f"| all | {total} |" in text
    assert f"| source_only, 30 steps: nets, backward | 20.0 ({20 / total:.0%}) |" in text
    assert f"| source_only, 30 steps: parts of udakit and the rest | 5.0 ({5 / total:.0%}) |" in text
    assert f"| scores, during training | 8.0 ({8 / total:.0%}) |" in text
    assert f"| rendering the scenes | 6.0 ({6 / total:.0%}) |" in text
    assert "optimiser" not in text
    assert "| fused | 4.2 |" in text


def test_scenes_of_few_draws_are_each_drawn_once() -> None:
    assert main_job.scenes(1, each=400, validation=0) == pytest.approx(2)
    assert main_job.scenes(10**5, each=400, validation=60) == pytest.approx(860)


@pytest.mark.slow
def test_other_ways_of_the_main_job() -> None:
    threads = torch.get_num_threads()
    try:
        found = main_job.ways(1)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 5
    assert all(ms > 0 for ms in found.values())


@pytest.mark.slow
def test_a_short_main_job(monkeypatch: pytest.MonkeyPatch) -> None:
    full = main_job.job.parse([])
    small = dataclasses.replace(full, net=tiny_net(), data=dataclasses.replace(full.data, crop=(64, 64)))
    monkeypatch.setattr(main_job.job, "parse", lambda arguments: small)
    row = main_job.profile(2, time.perf_counter)
    found = main_job.whole_job(row)
    assert set(found) == {"step 0", "step 1", "evaluation", "scenes", "once"}
    assert all(seconds >= 0 for parts in found.values() for seconds in parts.values())
    assert {"nets", "backward", "optimiser", "crops", "cross-entropy", "EMA", "mixing"} <= set(found["step 1"])
    assert "EMA" not in found["step 0"]
    assert set(found["evaluation"]) == {"scores against truth", "scores without labels", "checkpoints"}
    del row["times"]["scenes"]
    assert row["times"] == {"once": 1, "step 0": 150, "evaluation 0": 2, "step 1": 225, "evaluation 1": 3}


def test_tables_without_results(tmp_path: Path) -> None:
    for module, name in ((step_overhead, "step"), (data_path, "data"), (main_job, "main job")):
        page = tmp_path / f"{name}.md"
        page.write_text(MARKED.format(name))
        module.main(["--table", "--results", str(tmp_path / "none.json"), "--page", str(page)])
        assert "Not measured yet." in page.read_text()


def test_data_path(tmp_path: Path) -> None:
    row = data_path.measure(count=2, steps=2, workers=(0,), shrink=8)
    assert row["images_per_second"]["0"] > 0
    assert set(row["milliseconds"]["source"]) > set(row["milliseconds"]["target"])
    assert all(ms >= 0 for domain in row["milliseconds"].values() for ms in domain.values())
    assert all(size > 0 for size in row["megabytes"].values())

    results = harness.Results(tmp_path / "results.json")
    results.add("gta2cs", {**row, "images_per_second": {"0": 30.0, "1": 16.0, "2": 30.0}})
    page = tmp_path / "page.md"
    page.write_text(MARKED.format("data"))
    data_path.main(["--table", "--results", str(results.path), "--page", str(page)])
    text = page.read_text()
    assert "| 1 | 16.0 | 250 |" in text
    assert "A GPU step of 0.3 s needs 4 / 16.0 / 0.3 = 0.8, so 1 worker." in text
    assert "A GPU step of 0.1 s needs 4 / 16.0 / 0.1 = 2.5, so 3 workers." in text


@pytest.mark.parametrize(("speed", "step", "workers"), [(20.0, 0.2, 1), (20.0, 0.1, 2), (19.9, 0.2, 2), (4.0, 0.1, 10)])
def test_workers_needed(speed: float, step: float, workers: int) -> None:
    assert data_path.workers_needed(speed, 2, step) == workers


def test_files_have_the_real_format(tmp_path: Path) -> None:
    data_path.make_files(tmp_path, 1, shrink=16)
    from PIL import Image

    with Image.open(tmp_path / "gta/labels/00000.png") as label, Image.open(tmp_path / "gta/images/00000.png") as image:
        assert (label.mode, image.mode) == ("P", "RGB")
        assert label.size == image.size == (1914 // 16, 1052 // 16)


def test_resizing_with_the_channels_innermost_changes_nothing(tmp_path: Path) -> None:
    data_path.make_files(tmp_path, 1, shrink=8)
    path = tmp_path / "gta/images/00000.png"
    image = image_files([path], size=(90, 160))[0]
    assert image.is_contiguous()
    assert torch.equal(image, resize_image(read_image(path).contiguous(), (90, 160)))
