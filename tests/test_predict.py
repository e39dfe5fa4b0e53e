"""predict.py: against whole images, slow averages and the table of training; bad files; nothing overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import odd_files
import predict
import train_gta2cs
from gta2cs import evaluation
from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.choosing import CHOSEN, Choice
from gta2cs.inference import Logits, SlidingWindow, Trained, check_window, probability_bands, segment
from gta2cs.layouts import load_classes
from gta2cs.loading import normalise
from gta2cs.nets import build_net
from gta2cs.reading import read_ids, read_image
from gta2cs.toy import CLASSES
from tiny import tiny_net

SCRIPT = Path(predict.__file__)


class Tiny(nn.Module):
    """Looks 2 pixels far, so that what a window cuts off matters."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 5, padding=2)

    def forward(self, images):
        return Logits(self.conv(images))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What train_gta2cs.py leaves, with a random student and another random net as its teacher."""
    torch.manual_seed(0)
    config = train_gta2cs.Config(stages=[train_gta2cs.Stage("dacs")], net=train_gta2cs.NetConfig(weights="imagenet"))
    recipe = {}
    for prefix in ("student", "teacher.module"):
        net = build_net(config.net.arch, config.net.encoder, num_classes=len(CLASSES), weights="random")
        recipe |= {f"{prefix}.{name}": value for name, value in net.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "last.pt"
    history = {"name": "dacs", "steps": 1, "losses": [], "scores": [], "seconds": 0.0}
    save_checkpoint(
        path, {"recipe": recipe, "config": json.dumps(train_gta2cs.plain(config)), "history": json.dumps(history)}
    )
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Three good images, one of them in a subfolder and no multiple of the stride, and three kinds of bad ones."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (64, 96), "b.webp": (40, 50), "sub/a.jpg": (33, 70)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.jpg").write_bytes((folder / "sub" / "a.jpg").read_bytes()[:600])
    Image.fromarray(rng.integers(0, 65536, (8, 8), np.uint16)).save(folder / "deep.png")
    (folder / "notes.txt").write_text("no image, and not taken for one")
    return folder


def test_a_checkpoint_names_its_classes_where_the_folders_are_gone(tmp_path):
    history = {"scores": [], "classes": {"names": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]}}
    found = Trained(tmp_path, {"data": {"pair": "folder", "data_root": str(tmp_path)}}, history, ("student",)).classes
    assert found.names == ("a", "b")
    assert found.palette.tolist() == [[1, 2, 3], [4, 5, 6]]


def run(*arguments: object) -> int:
    return predict.main(predict.parse([str(a) for a in arguments]))


def test_a_folder_becomes_labels_overlays_and_confidence(checkpoint, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--checkpoint", checkpoint, "--images", images, "--out", out) == 1  # some were bad
    trained = Trained.open(checkpoint)
    net = trained.net("student")
    for name in ("a.png", "b.webp", "sub/a.jpg"):
        image = read_image(images / name)
        expected = evaluation.predict(net, image)
        png = Path(name).with_suffix(".png")
        with Image.open(out / "labels" / png) as labels:
            assert labels.mode == "P"
            colours = np.asarray(labels.convert("RGB"))
        ids = read_ids(out / "labels" / png)
        assert ids.dtype == np.uint8
        assert (ids == expected.argmax(0).numpy()).mean() > 0.999  # two forward passes may round a tie differently
        assert (colours == trained.classes.palette[ids]).all()
        overlay = np.asarray(Image.open(out / "overlays" / png), float)
        assert np.abs(overlay - (image.permute(1, 2, 0).numpy() / 2 + colours / 2)).max() <= 0.5
        confidence = np.asarray(Image.open(out / "confidence" / png), float)
        assert np.abs(confidence - 255 * expected.amax(0).numpy()).max() <= 0.51
    assert load_classes(out / "classes.yaml").known.names == trained.classes.names

    printed = capsys.readouterr().out
    listed = printed[printed.index("Skipped 3 bad files") :]
    for bad in ("broken.png", "cut.jpg", "deep.png"):
        assert printed.count(f"images/{bad}") >= 2, "named when it is met, and again at the end"
        assert bad in listed
    assert "holds uint16 from" in listed
    assert not list(out.rglob("*.tmp"))
    assert len(list(out.rglob("*.png"))) == 9


def test_the_other_nets_of_a_checkpoint(checkpoint, images, tmp_path):
    found = {}
    for net in ("student", "teacher", "teacher.module"):
        out = tmp_path / net
        assert run("--checkpoint", checkpoint, "--images", images / "a.png", "--out", out, "--net", net) == 0
        found[net] = read_ids(out / "labels" / "a.png")
    assert (found["teacher"] == found["teacher.module"]).all()
    assert (found["teacher"] != found["student"]).any()
    with pytest.raises(ValueError, match=r"to hold the net 'base\.student', but it holds student, teacher\. The nets"):
        run("--checkpoint", checkpoint, "--images", images, "--out", tmp_path / "x", "--net", "base.student")


def test_the_large_nets_of_duda_are_built_as_its_options_say(checkpoint, tmp_path):
    saved = load_checkpoint(checkpoint)
    config = json.loads(saved["config"])
    large = {"arch": "fpn", "options": {"decoder_pyramid_channels": 32}}
    config["stages"] = [{"recipe": "duda_pre", "options": {"large": large}}]
    net = build_net("fpn", config["net"]["encoder"], num_classes=len(CLASSES), weights="random", **large["options"])
    recipe = {f"base.student.{name}": value for name, value in net.state_dict().items()} | saved["recipe"]
    history = {**json.loads(saved["history"]), "name": "duda_pre"}
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"recipe": recipe, "config": json.dumps(config), "history": json.dumps(history)})
    trained = Trained.open(path)
    assert trained.names == ("student", "teacher", "large student")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(trained.net("large student")(x).logits, net.eval()(x).logits)


def test_nothing_is_overwritten_unasked(checkpoint, images, tmp_path):
    out, one = tmp_path / "out", images / "a.png"
    before = one.read_bytes()
    arguments = ("--checkpoint", checkpoint, "--images", one, "--out", out)
    assert run(*arguments) == 0
    with pytest.raises(FileExistsError, match=r"4 files exist, for example .*labels/a\.png"):
        run(*arguments)
    (out / "labels" / "a.png").write_bytes(b"old")
    assert run(*arguments, "--overwrite") == 0
    assert read_ids(out / "labels" / "a.png").shape == (64, 96)

    with pytest.raises(ValueError, match="outside of the image folder"):
        run("--checkpoint", checkpoint, "--images", images, "--out", images / "out")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.png").write_bytes(before)
    with pytest.raises(ValueError, match=r"images apart, but .*labels/a\.png is an image"):
        run("--checkpoint", checkpoint, "--images", tmp_path / "labels", "--out", tmp_path, "--overwrite")
    assert one.read_bytes() == before == (tmp_path / "labels" / "a.png").read_bytes()


def test_two_images_of_one_stem(checkpoint, images, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(images / "a.bmp")
    for bad in ("broken.png", "cut.jpg", "deep.png"):
        (images / bad).unlink()
    assert run("--checkpoint", checkpoint, "--images", images, "--out", tmp_path / "out") == 1
    assert "images/a.png: its results would have the name of those of a.bmp" in capsys.readouterr().out
    assert read_ids(tmp_path / "out" / "labels" / "a.png").shape == (40, 40)


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    old = tmp_path / "a.png"
    old.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        predict.save_png(old, Image.new("L", (2, 2)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert old.read_bytes() == b"old"


def averaged(net, images, window, stride):
    """Every window by itself, sums and counts at full size."""
    height, width = images.shape[-2:]
    h, w = min(window[0], height), min(window[1], width)
    total, count = 0, torch.zeros(height, width)
    for y in sorted({min(y, height - h) for y in range(0, height, stride[0])}):
        for x in sorted({min(x, width - w) for x in range(0, width, stride[1])}):
            z = torch.zeros(len(images), 5, height, width)
            z[..., y : y + h, x : x + w] = net(images[..., y : y + h, x : x + w]).logits
            total = total + z
            count[y : y + h, x : x + w] += 1
    return (total / count).softmax(1)


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((20, 30), (8, 8), (4, 4)),
        ((20, 30), (8, 12), (8, 12)),  # windows that meet only where the last one is pushed back
        ((23, 17), (9, 7), (2, 3)),  # more than two windows over a pixel
        ((23, 17), (23, 5), (1, 5)),
        ((6, 5), (8, 8), (3, 3)),  # smaller than a window
        ((8, 9), (8, 8), (4, 4)),
    ],
)
def test_bands_are_the_average_over_windows(size, window, stride):
    torch.manual_seed(0)
    net, images = Tiny(), torch.randn(2, 3, *size)
    bands = list(probability_bands(net, images, window=window, stride=stride))
    tops = [top for top, _ in bands]
    assert tops == list(np.cumsum([0, *(p.shape[2] for _, p in bands)])[:-1])
    assert all(p.shape[2] <= window[0] for _, p in bands)
    with torch.no_grad():
        expected = averaged(net, images, window, stride)
        torch.testing.assert_close(torch.cat([p for _, p in bands], 2), expected)
        whole = SlidingWindow(net, window, stride)(images).logits.softmax(1)
        torch.testing.assert_close(whole, expected)


def test_segment_of_windows_and_of_another_size():
    torch.manual_seed(0)
    net, image = Tiny(), torch.randint(256, (3, 21, 26), dtype=torch.uint8)
    with torch.no_grad():
        expected = averaged(net, normalise(image[None]), (8, 8), (4, 4))[0]
    labels, confidence = segment(net, image, window=(8, 8))
    assert (labels == expected.argmax(0).numpy()).all()
    np.testing.assert_allclose(confidence, expected.amax(0).numpy(), rtol=1e-5)

    labels, confidence = segment(net, image, size=(12, 40))
    small = evaluation.predict(net, predict_size(image, (12, 40)))
    full = nn.functional.interpolate(small[None], (21, 26), mode="bilinear", align_corners=False)[0]
    assert (labels == full.argmax(0).numpy()).all()
    np.testing.assert_allclose(confidence, full.amax(0).numpy(), rtol=1e-5)


def predict_size(image, size):
    return nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def test_windows_are_checked():
    assert check_window((8, 5), None) == (4, 2)
    with pytest.raises(ValueError, match=r"`stride` to be in \[1, window\] .*\(9, 4\)"):
        check_window((8, 8), (9, 4))
    with pytest.raises(ValueError, match="`window` with `stride`"):
        check_window(None, (4, 4))
    with pytest.raises(ValueError, match="two positive numbers"):
        check_window((0, 8), None)


def test_evaluate_prints_the_table_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gta2cs.console, "width", 200)
    monkeypatch.setattr(predict.console, "width", 200)
    config = train_gta2cs.Config(
        data=train_gta2cs.DataConfig(crop=(64, 64)),
        net=tiny_net(),
        stages=[train_gta2cs.Stage("dacs", steps=1)],
        batch_size=1,
        out=tmp_path,
        dry_run=True,
    )
    rows = train_gta2cs.main(config)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2
    trained = capsys.readouterr().out
    checkpoint = tmp_path / "stage1_dacs" / "last.pt"
    assert run("--checkpoint", checkpoint, "--evaluate", "--limit", 2) == 0
    table = capsys.readouterr().out.strip()
    assert "dacs, teacher" in table
    cells = [[c.split() for c in line.split("│")[1:4]] for line in table.splitlines() if line.startswith("│")]
    of_training = [[c.split() for c in line.split("│")[1:4]] for line in trained.splitlines() if line.startswith("│")]
    assert len(cells) == 12
    assert cells == of_training  # whose last column, the net that was chosen, is no net of this checkpoint
    score = predict.score(predict.parse([f"--checkpoint={checkpoint}", "--limit=2"]), Trained.open(checkpoint))
    assert score["dacs, teacher"].to_json() == rows["dacs, teacher"].to_json()
    best = Trained.open(tmp_path)
    assert best.choice is not None
    score = predict.score(predict.parse([f"--checkpoint={tmp_path}", "--limit=2"]), best)
    assert score == {Choice(**best.choice).title: rows[CHOSEN]}, "to the last digit"
    capsys.readouterr()

    capsys.readouterr()  # the table that `score` printed
    run("--checkpoint", checkpoint, "--evaluate", "--limit", 1, "--net", "student", "--window", "[64,128]")
    table = capsys.readouterr().out
    assert "dacs, student" in table
    assert "teacher" not in table


def test_the_folder_of_an_unfinished_run_says_so(checkpoint, images, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(checkpoint, run / "best.pt")
    arguments = f"--checkpoint {run} --images {images / 'a.png'} --overwrite --out {tmp_path}/"
    predict.main(predict.parse((arguments + "early").split()))
    assert "has not finished" in capsys.readouterr().out
    (run / "history.json").write_text("[]")
    predict.main(predict.parse((arguments + "late").split()))
    assert "has not finished" not in capsys.readouterr().out


def test_classes_of_a_pair_whose_folders_are_gone(tmp_path):
    config = train_gta2cs.plain(train_gta2cs.Config(data=train_gta2cs.DataConfig(pair="folder", data_root=tmp_path)))
    nets = {"student": {"iou": {"sky": 1.0, "ground": 2.0}, "means": {"mIoU": 1.5}}}
    opened = Trained(Path("last.pt"), config, {"scores": [{"nets": nets}]}, ("student",))
    assert opened.classes.names == ("sky", "ground")
    with pytest.raises(ValueError, match=r"`classes` to name the classes\.yaml .*'folder'"):
        _ = Trained(Path("last.pt"), config, {"scores": []}, ("student",)).classes
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "classes.yaml").write_text(yaml.safe_dump({"names": ["a", "b"], "palette": [[1, 2, 3]] * 2}))
    assert Trained(Path("last.pt"), config, {"scores": []}, ("student",)).classes.palette[1].tolist() == [1, 2, 3]
    other = tmp_path / "other.yaml"
    other.write_text("names: [x, y]")
    assert Trained(Path("last.pt"), config, {"scores": []}, ("student",), other).classes.names == ("x", "y")
    config["data"]["pair"] = "synthia2cs"
    real = Trained(Path("last.pt"), config, {"scores": []}, ("student",))
    assert len(real.classes.names) == 16
    assert real.seen_size == (512, 1024)


def test_from_the_command_line(checkpoint, images, tmp_path):
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--checkpoint", checkpoint, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)

    done = call("--images", images, "--out", tmp_path / "out", "--window", "[32,32]", "--stride", "[16,32]")
    assert done.returncode == 1
    assert "3 of 6 images labelled" in done.stdout
    done = call("--images", tmp_path / "nowhere", "--out", tmp_path / "out2")
    assert done.returncode == 2
    assert "there is no" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"`images` and `out`, or `evaluate`, but got no `out`\."):
        run("--checkpoint", checkpoint, "--images", tmp_path)
    with pytest.raises(FileNotFoundError, match="found none"):
        run("--checkpoint", checkpoint, "--images", tmp_path, "--out", tmp_path.parent / "elsewhere")
    (tmp_path / "stopped" / "stage1_source_only").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "stopped" / "stage1_source_only" / "last.pt")
    with pytest.raises(FileNotFoundError, match=r"stopped before\. .* checkpoints: .*stage1_source_only/last\.pt\."):
        Trained.open(tmp_path / "stopped")
    with pytest.raises(FileNotFoundError, match=r"no file .*no\.pt"):
        run("--checkpoint", tmp_path / "no.pt", "--evaluate")
    old = tmp_path / "old.pt"
    torch.save({"recipe": {}}, old)
    with pytest.raises(ValueError, match="no key 'config'"):
        run("--checkpoint", old, "--evaluate")


# ------------------------------------------------------------------------------------------- hostile and foreign files


def spoil(checkpoint: Path, path: Path, **parts: object) -> Path:
    """Another checkpoint with some parts replaced; None takes a part away."""
    saved = {**load_checkpoint(checkpoint), **parts}
    torch.save({key: value for key, value in saved.items() if value is not None}, path)
    return path


def changed(checkpoint: Path, key: str, part: str, value: object) -> str:
    """The JSON of `config` or `history` with one part replaced."""
    content = json.loads(load_checkpoint(checkpoint)[key])
    return json.dumps({**content, part: value})


class Runs:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/udakit_was_here",)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"recipe": None},
        {"config": None},
        {"history": None},
        {"recipe": [1]},
        {"recipe": {"student.x": 3}},
        {"recipe": {}},
        {"config": 3},
        {"config": "no JSON"},
        {"config": "[]"},
        {"config": "{}"},
        {"history": "{}"},
        {"config": ("data", {})},
        {"config": ("data", {"pair": "folder"})},
        {"config": ("data", {"pair": "toy", "channels": "x"})},
        {"config": ("data", {"pair": "toy", "target_range": [5]})},
        {"config": ("net", {"arch": "fpn", "encoder": "nothing", "weights": "random"})},
        {"config": ("net", {"arch": [], "encoder": "tu-tf_efficientnet_lite0", "weights": "random"})},
        {"config": ("net", {"arch": "fpn", "encoder": "tu-tf_efficientnet_lite0", "weights": "random", "x": 1})},
        {"config": ("stages", [3])},
        {"history": ("scores", 3)},
    ],
    ids=repr,
)
def test_foreign_checkpoints_are_refused_by_name(checkpoint, images, tmp_path, spoilt):
    (key, value), *_ = spoilt.items()
    if isinstance(value, tuple):
        value = changed(checkpoint, key, *value)
    path = spoil(checkpoint, tmp_path / "foreign.pt", **{key: value})
    with pytest.raises((OSError, ValueError), match=r"foreign\.pt|Expected `(encoder|arch)`") as caught:
        run("--checkpoint", path, "--images", images / "a.png", "--out", tmp_path / "out")
    assert "weights_only" not in str(caught.value)


def test_hostile_and_broken_files_say_nothing_of_weights_only(checkpoint, images, tmp_path, capsys):
    hostile = tmp_path / "hostile.pt"
    torch.save({"recipe": Runs()}, hostile)
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    for name in ("hostile.pt", "text.pt", "empty.pt", "cut.pt"):
        with pytest.raises(
            ValueError, match=rf"{name} to hold tensors saved by torch, but it cannot be read: "
        ) as caught:
            run("--checkpoint", tmp_path / name, "--images", images, "--out", tmp_path / "out")
        shown = "".join(traceback.format_exception(caught.value))
        assert "weights_only" not in str(caught.value)
        assert "Weights only load failed" not in shown.split("During handling")[-1]
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not Path("/tmp/udakit_was_here").exists()


def test_odd_files_are_named_and_skipped(checkpoint, tmp_path, capsys):
    """What training refuses, prediction refuses, too; links in a circle stop nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    odd = [file for file in odd_files.REFUSED if file.channels == 3 and file.value_range is None]
    for file in odd:
        file.write(folder / file.name)
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    odd_files.save(folder / "good.png", odd_files.noise(3))
    assert run("--checkpoint", checkpoint, "--images", folder, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().out
    listed = said[said.index(f"Skipped {len(odd)} bad files") :]
    for file in odd:
        assert file.name in listed
    assert (tmp_path / "out" / "labels" / "good.png").is_file()


def test_sixteen_bits_with_a_stated_range(checkpoint, tmp_path):
    deep = odd_files.noise(3, high=65536, dtype=np.uint16)
    odd_files.save_png16(tmp_path / "images" / "a.png", deep)
    arguments = ("--checkpoint", checkpoint, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert run(*arguments, "--value_range", "[0,65535]") == 0
    overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / "a.png"), float)
    colours = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png").convert("RGB"), float)
    assert np.abs(overlay - ((deep / 257).round() + colours) / 2).max() <= 0.51


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "`limit` to be at least 1, but got 0"),
        ({"limit": -1}, "`limit` to be at least 1, but got -1"),
        ({"size": (0, 5)}, r"`size` to be native, training or \(height, width\), but got \(0, 5\)"),
        ({"overlay": 2.0}, r"`overlay` to be in \[0, 1\], but got 2\.0"),
        ({"device": "cuda:77"}, "`device` to be one of this machine, such as cpu, but got 'cuda:77'"),
        ({"device": "gpu"}, "`device` to be one of this machine, such as cpu, but got 'gpu'"),
    ],
)
def test_values_that_nothing_can_be_predicted_with(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict.main(predict.Config(tmp_path / "none.pt", **changes))  # type: ignore[arg-type]
