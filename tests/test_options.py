"""Options explain themselves, trackers get what the report shows, and a run starts from a foreign net."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch

import export
import predict
import train_gta2cs
from gta2cs import config as options
from gta2cs.tracking import flat
from tiny import tiny_net


def help_of(capsys: pytest.CaptureFixture[str], script, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        script(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [options.Config, options.DataConfig, options.NetConfig, options.Stage, export.Config, predict.Config]
)
def test_every_option_has_a_sentence(kind: type) -> None:
    source = inspect.getsource(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default_factory):
            continue  # a group of options with a docstring of its own
        found = re.search(rf'^    {field.name}: .*\n    """([^"]|"(?!""))+[.?]"""$', source, re.MULTILINE)
        assert found, f"{kind.__name__}.{field.name}"


def test_help_explains_and_prints_no_internals(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, train_gta2cs.parse, "--help").split())
    assert "Namespace(" not in text
    assert "<class" not in text
    assert "default: source_only for 300 steps, then dacs for 450 steps)" in text
    assert "Images of each domain per process. (type: int, default: 4)" in text
    assert "(height, width) of the training crops." in text


def test_predict_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, predict.parse, "--help").split())
    assert "A folder of images, searched with its subfolders, or one image." in text


def tiny(out: Path, **changes: object) -> train_gta2cs.Config:
    stages = [train_gta2cs.Stage("source_only"), train_gta2cs.Stage("dacs")]
    settings = {
        "data": train_gta2cs.DataConfig(crop=(64, 64)),
        "net": tiny_net(),
        "stages": stages,
        "batch_size": 2,
        "log_every": 1,
        "dry_run": True,
        "out": out,
    }
    return train_gta2cs.Config(**{**settings, **changes})


def test_tensorboard_gets_losses_scores_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train_gta2cs.main(tiny(tmp_path, log_with="tensorboard"))
    (file,) = (tmp_path / "udakit").glob("events.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"panels", "curves"}
    assert [event.step for event in events.Scalars("loss/source")] == [1, 2, 401, 402]
    assert any(tag.startswith("kept/") for tag in tags["scalars"])
    last = events.Scalars("mIoU/teacher")[-1]
    assert last.value == pytest.approx(rows["dacs, teacher"].miou, abs=0.01)
    assert "IoU/teacher/road" in tags["scalars"]


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import accelerator

    monkeypatch.setattr(accelerator, "filter_trackers", lambda *_: [])
    with pytest.raises(ModuleNotFoundError, match=r"`log_with: wandb` needs a package .*: pip install wandb"):
        train_gta2cs.main(tiny(tmp_path, log_with="wandb"))


def test_settings_are_flat_and_plain() -> None:
    found = flat({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": {}})
    assert found == {"a.b": 1, "a.c.d": "[1, 2]", "e": "None", "f": "{}"}


def test_a_run_starts_from_a_foreign_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = smp.FPN("resnet18", encoder_weights=None, classes=11)
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    net = train_gta2cs.NetConfig(encoder="resnet18", weights="random")
    run = tiny(tmp_path / "run", net=net, init=tmp_path / "net.pth", stages=[train_gta2cs.Stage("source_only", lr=0.0)])
    train_gta2cs.main(run)
    assert "loaded encoder 100 of 100, decoder 29 of 29, head 2 of 2 tensors" in capsys.readouterr().out
    assert not list(tmp_path.rglob("events.*")), "a tracker nobody asked for"
    saved = torch.load(tmp_path / "run" / "stage1_source_only" / "last.pt", weights_only=True)["recipe"]
    assert torch.equal(saved["student.encoder.conv1.weight"], whole.encoder.conv1.weight)
