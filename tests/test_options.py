"""Options explain themselves, trackers get what the report shows, and a run starts from a foreign net."""

from __future__ import annotations

import dataclasses
import inspect
import re
import struct
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch

import export
import predict
import train_gta2cs
from gta2cs import config as options
from gta2cs.options import read_yaml
from gta2cs.tracking import flat, start_tracking
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
    assert "Number of images of each domain per process. (type: int, default: 4)" in text
    assert "(height, width) of the training crops." in text


@pytest.mark.parametrize("spelling", ["--dry-run", "--dry_run", "--dry-run=true", "--dry_run=True"])
@pytest.mark.parametrize("following", [[], ["true"], ["--seed", "3"]])
def test_flags_with_and_without_a_value_in_both_spellings(spelling: str, following: list[str]) -> None:
    if "=" in spelling and following == ["true"]:
        return
    assert train_gta2cs.parse([spelling, *following]).dry_run
    off = train_gta2cs.parse(["--check-data", "false", "--overwrite", "false", "--resume"])
    assert (off.check_data, off.overwrite, off.resume) == (False, False, True)


def test_one_value_of_one_stage(tmp_path: Path) -> None:
    file = Path(train_gta2cs.__file__).parent / "configs" / "combined_folder.yaml"
    as_it_is = train_gta2cs.parse(["--config", str(file)])
    given = ["--config", str(file), "--stages.0.steps", "20", "--stages.1.options.images=8", "--stages.1.lr", "3e-5"]
    config = train_gta2cs.parse([*given, "--seed", "3"])
    first, second = config.stages
    assert (first.steps, first.lr, second.steps, second.lr, second.options) == (20, 3e-4, 300, 3e-5, {"images": 8})
    assert config.seed == 3
    assert dataclasses.replace(config, stages=as_it_is.stages, seed=0) == as_it_is
    assert [s.steps for s in train_gta2cs.parse(["--stages.1.steps=7"]).stages] == [300, 7], "of the toy pair"
    asked = {"folder": ["--data.pair", "folder"], "nuclei": ["--data.pair=nuclei", "--stages.1.steps=7"]}
    assert train_gta2cs.parse([]).stages[1].recipe == "dacs"
    for pair, given in asked.items():
        config = train_gta2cs.parse(given)
        assert [s.recipe for s in config.stages] == ["source_only", "combined"], "the policy for any pair"
        assert (config.data.pair, config.data.target_scale) == (pair, (0.8, 1.25))
    listed = train_gta2cs.parse(["--config", str(file), '--stages=[{"recipe": "dacs"}]', "--stages.0.steps=9"])
    assert [(s.recipe, s.steps) for s in listed.stages] == [("dacs", 9)]


@pytest.mark.parametrize("more", [[], ["--stages.1.steps=9"]])
def test_a_list_of_stages_takes_nothing_from_the_one_that_it_replaces(tmp_path: Path, more: list[str]) -> None:
    """As many stages as before, of which each had a rate and options of its own."""
    file, other = tmp_path / "my.yaml", tmp_path / "other.yaml"
    file.write_text("stages: [{recipe: dacs, lr: 0.5, steps: 9}, {recipe: dacs, lr: 0.5, options: {jitter: 0.7}}]\n")
    other.write_text(text := "stages: [{recipe: source_only, steps: 3}, {recipe: ehtdi, steps: 9}]\n")
    for given in ([f"--config={other}"], [f"--stages={text.removeprefix('stages:').strip()}"]):
        first, second = train_gta2cs.parse([f"--config={file}", *given, *more]).stages
        assert first == train_gta2cs.Stage("source_only", steps=3)
        assert second == train_gta2cs.Stage("ehtdi", steps=9)


def test_a_power_of_ten_is_a_number_however_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "powers.yaml"
    file.write_text("stages: [{recipe: dacs, steps: 3, options: {share: 1e-1, ema: 9E-1, translate: color}}]\n")
    for more in ([], ["--stages.0.lr=1e-4"], ["--stages.0.options.jitter", "2e-1"]):
        stage = train_gta2cs.parse(["--config", str(file), *more]).stages[0]
        assert {"share": 0.1, "ema": 0.9, "translate": "color"}.items() <= stage.options.items()
        assert isinstance(stage.lr, float)
        train_gta2cs.RECIPES["dacs"].parse(stage.options)
    assert read_yaml("[1e-4, +2.E3, 1e, e1, 0x1e4, 12, '1e-4']") == [1e-4, 2000.0, "1e", "e1", 0x1E4, 12, "1e-4"]


@pytest.mark.parametrize("place", ["stages.5.lr", "stages.0.lr.x"])
def test_a_stage_that_is_not_there(place: str) -> None:
    with pytest.raises(ValueError, match=f"Expected '{place}' to be a path in the configuration"):
        train_gta2cs.parse([f"--{place}=1"])


def test_data_of_ones_own_without_its_pair_is_not_left_out_silently(capsys: pytest.CaptureFixture[str]) -> None:
    train_gta2cs.parse(["--data.data_root", "mine"])
    assert (
        "The pair 'toy' is rendered: mine is not read. For your own data: --data.pair folder."
        in capsys.readouterr().out
    )
    train_gta2cs.parse(["--data.data_root", "mine", "--data.pair", "folder"])
    assert "not read" not in capsys.readouterr().out


def test_a_wrong_option_is_said_in_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gta2cs.parse(["--batchsize", "3"])
    said = capsys.readouterr().err
    assert "unrecognized arguments: --batchsize" in said
    assert len(said.splitlines()) <= 4
    with pytest.raises(FileNotFoundError, match=r"Expected `config` to be a YAML file, but there is no nothere\.yaml"):
        train_gta2cs.parse(["--config", "nothere.yaml", "--stages.0.steps", "3"])


def test_predict_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, predict.parse, "--help").split())
    assert "An image, or a folder of images, including its subfolders." in text


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


def test_wandb_gets_losses_scores_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = train_gta2cs.main(tiny(tmp_path / "run", log_with="wandb"))
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert {path.name.split("_")[0] for path in folder.glob("files/media/images/*.png")} == {"panels", "curves"}
    summary, steps = read_wandb(next(folder.glob("*.wandb")))
    assert steps[:2] == [1, 2]
    assert steps[-1] == 402
    assert float(summary["mIoU/teacher"]) == pytest.approx(rows["dacs, teacher"].miou, abs=0.01)
    assert {"loss/source", "IoU/teacher/road", "share/student/road"} <= set(summary)


def read_wandb(path: Path) -> tuple[dict[str, str], list[int]]:
    """Last values, and the steps at which a loss was logged, of the file of an offline run (LevelDB's log format)."""
    from wandb.proto import wandb_internal_pb2

    last, steps, data = {}, [], path.read_bytes()
    place, pieces, header, block = 7, b"", 7, 2**15  # the file's own header is as long as a record's
    while place + header <= len(data):
        if (left := block - place % block) < header:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + header])
        pieces += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            values = {".".join([x.key, *x.nested_key]).strip("."): x.value_json for x in record.history.item}
            last |= values
            steps += [record.history.step.num] if "loss/source" in values else []
            pieces = b""
    return last, steps


def test_mlflow_gets_losses_scores_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    rows = train_gta2cs.main(tiny(tmp_path / "run", log_with="mlflow"))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("udakit").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["net.arch"] == tiny_net().arch
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {"panels.png", "curves.png"}
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "loss/source")] == [1, 2, 401, 402]
    assert run.data.metrics["mIoU/teacher"] == pytest.approx(rows["dacs, teacher"].miou, abs=0.01)


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import accelerator

    monkeypatch.setattr(accelerator, "filter_trackers", lambda *_: [])
    with pytest.raises(ModuleNotFoundError, match=r"Expected the package of `log_with: wandb` .*: pip install wandb"):
        train_gta2cs.main(tiny(tmp_path, log_with="wandb"))


def test_a_tracker_that_does_not_open_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ForeignError(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise ForeignError("no account")

    monkeypatch.setattr(train_gta2cs.Accelerator, "init_trackers", refuse)
    with pytest.raises(ValueError, match=r"^Cannot open the tracker of `log_with: tensorboard`: no account$"):
        start_tracking(train_gta2cs.Accelerator(), train_gta2cs.Config(out=tmp_path, log_with="tensorboard"))


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
