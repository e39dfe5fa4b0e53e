"""export.py: what is written computes what the net computes, and the card says what it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import export
import train_gta2cs
from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.choosing import CHOSEN, Choice
from gta2cs.inference import Trained
from gta2cs.nets import build_net
from gta2cs.pretrained import load_weights
from gta2cs.toy import CLASSES
from gta2cs.verdict import EXPLAINED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the built-in pair with its own net, as train_gta2cs.py leaves it."""
    torch.manual_seed(0)
    config = train_gta2cs.parse([])
    net = config.net.build(len(CLASSES))
    score = {"iou": dict.fromkeys(CLASSES, 50.0) | {CLASSES[0]: None}, "means": {"mIoU": 50.0}}
    history = {"name": "dacs", "steps": 1, "losses": [], "seconds": 0.0}
    history["scores"] = [{"step": 1, "miou": 50.0, "nets": {"student": score, "teacher": score}}]
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(
        folder / "stage2_dacs" / "last.pt",
        {
            "recipe": {f"student.{k}": v for k, v in net.state_dict().items()},
            "config": json.dumps(train_gta2cs.plain(config)),
            "history": json.dumps(history),
        },
    )
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    tables = f"{EXPLAINED}\n\n{table}\n<details><summary>All scores</summary>\n\n{table}\n\n</details>\n"
    text = f"# toy\n\n## Without labels\n\n{tables}\nAdapted, by a score of 0.8.\n\n## More\n\nOther.\n"
    (folder / "report.md").write_text(text)
    return folder / "stage2_dacs" / "last.pt"


@pytest.mark.parametrize(
    "name",
    [
        "safetensors",
        pytest.param("torch_export", marks=pytest.mark.slow),
        pytest.param("torchscript", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_agrees_with_the_net(checkpoint: Path, tmp_path: Path, name: str) -> None:
    found = export.main(export.Config(checkpoint, tmp_path, [name]))
    assert found[name] <= 1e-4
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Adapted, by a score of 0.8." in text
    assert "Other." not in text
    assert "| 1 | 2 |" not in text
    assert EXPLAINED not in text
    assert "details>" not in text
    assert text.startswith("# fpn / tu-tf_efficientnet_lite0, adapted on toy\n")
    assert ("model.safetensors" in text) == (name == "safetensors")
    assert "Method: source_only (300 steps), then dacs (450 steps)" in text
    assert "float32 (N, 3, 128, 192)" in text
    assert f"| {CLASSES[0]} | – |" in text


@pytest.mark.slow
def test_onnxruntime_agrees_with_the_net(checkpoint: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[export]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[export]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[export]'")
    found = export.main(export.Config(checkpoint, tmp_path, ["onnx"], size=(64, 80)))
    assert found["onnx"] <= 1e-4
    graph = onnx.load(tmp_path / "model.onnx").graph
    shape = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert isinstance(shape[0], str), "N is fixed"
    assert shape[1:] == [3, 64, 80]


def test_the_card_says_which_values_are_black_and_white(checkpoint: Path) -> None:
    trained = Trained.open(checkpoint)
    trained.config["data"]["target_range"] = [0, 4095]
    trained.config["dry_run"] = True
    net = torch.nn.Conv2d(3, len(CLASSES), 1)
    text = export.model_card(export.Config(checkpoint, Path()), trained, net, (64, 64))
    assert "RGB in [0, 1], where 0 is 0 and 1 is 4095 in the files of target; they are" in text
    assert "Method: source_only (2 steps), then dacs (2 steps)" in text, "what has run, not what is planned"


def test_the_card_of_the_chosen_net_has_its_own_score(checkpoint: Path, tmp_path: Path) -> None:
    choice = dataclasses.asdict(Choice("dacs", 1, 1, "teacher", "confidence", 0.5, target_statistics=1.0))
    save_checkpoint(tmp_path / "best.pt", {**load_checkpoint(checkpoint), "choice": json.dumps(choice)})

    def card() -> str:
        trained, net = Trained.open(tmp_path), torch.nn.Conv2d(3, len(CLASSES), 1)
        return export.model_card(export.Config(tmp_path / "best.pt", Path()), trained, net, (64, 64))

    assert "It was not scored on labelled target images." in card(), "the student's 50.0 is another net's"
    score = {"iou": dict.fromkeys(CLASSES, 62.5), "means": {"mIoU": 62.5}}
    (tmp_path / "results.json").write_text(json.dumps({"dacs, teacher": {}, CHOSEN: score}))
    (tmp_path / "history.json").write_text(json.dumps({"choice": choice}))
    assert "images that no step saw: mIoU 62.5." in card()
    assert "The net is the teacher of dacs, step 1, with BatchNorm statistics of target of `" in card()
    (tmp_path / "history.json").write_text(json.dumps({"choice": {**choice, "step": 2}}))
    assert "62.5" not in card(), "of an earlier end of the run"


def test_exported_tensors_start_a_new_run(checkpoint: Path, tmp_path: Path) -> None:
    export.main(export.Config(checkpoint, tmp_path, ["safetensors"]))
    config = train_gta2cs.parse([])
    net = build_net(**config.net.options, arch=config.net.arch, encoder=config.net.encoder, num_classes=len(CLASSES))
    assert load_weights(net, tmp_path / "model.safetensors").share() == 1
    assert torch.equal(net.head.weight, load_file(tmp_path / "model.safetensors")["head.weight"])


def test_a_file_that_computes_something_else_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(net, example, out):
        return out / "model.bin", lambda images: net(images) * 1.001

    monkeypatch.setitem(export.WRITERS, "safetensors", wrong)
    with pytest.raises(RuntimeError, match=r"Expected .*model\.bin to agree with the net to 0\.0001"):
        export.main(export.Config(checkpoint, tmp_path, ["safetensors"]))
