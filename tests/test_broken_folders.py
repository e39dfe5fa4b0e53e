"""Every kind of broken folder: training ends in one line that names the file, and --check-data has it as a row.

`predict.py` reads by the same reader: `test_predict.py` has it look at the same odd images.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import odd_files
import train_gta2cs
from odd_files import Odd, noise, save, save_turned
from tiny import ARGUMENTS


@dataclass(frozen=True)
class Broken:
    """What is done to a good pair, and what is said of it."""

    name: str
    spoil: Callable[[Path], object]
    said: str  # by training
    options: tuple[str, ...] = ()
    row: str = ""  # of the check, where it says something else
    channels: int = 3


def good(root: Path, channels: int = 3) -> Path:
    """Two images of each domain, one of target with a label for validation."""
    for side in ("source", "target"):
        for name in "ab":
            save(root / side / "images" / f"{name}.png", noise(3) if channels == 3 else noise())
            save(root / side / "labels" / f"{name}.png", noise(high=2))
        (root / side / "train.txt").write_text("a\n")
    (root / "target" / "val.txt").write_text("b\n")
    (root / "classes.yaml").write_text("names: [thing, stuff]\n")
    return root


def put(part: str, odd: Odd) -> Callable[[Path], object]:
    """An odd file in the place of the image or label that the first step reads."""

    def spoil(root: Path) -> None:
        (root / "source" / part / "a.png").unlink()
        odd.write((root / "source" / part / "a").with_suffix(Path(odd.name).suffix))

    return spoil


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def folder_for(name: str) -> Callable[[Path], object]:
    return lambda root: ((root / name).unlink(), (root / name).mkdir())


def labels(a: np.ndarray, b: np.ndarray) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        for name, ids in (("a", a), ("b", b)):
            save(root / "source" / "labels" / f"{name}.png", ids.astype(np.uint8))
        (root / "source" / "train.txt").write_text("a\nb\n")

    return spoil


def image_options(odd: Odd) -> tuple[str, ...]:
    stated = () if odd.value_range is None else (f"--data.source_range={list(odd.value_range)}",)
    return (f"--data.channels={odd.channels}", *stated)


HALF = noise(high=2)
OTHER_IDS = r"unexpected ids: source train: .*labels/a\.png holds \["
CASES = [
    *(
        Broken(f"image {odd.name}", put("images", odd), str(odd.value), image_options(odd), channels=odd.channels)
        for odd in odd_files.REFUSED
    ),
    *(
        Broken(f"label {odd.name}", put("labels", odd), odd.value, row=OTHER_IDS if " ids " in odd.value else "")
        for odd in odd_files.LABELS
        if isinstance(odd.value, str)
    ),
    Broken("masks", labels(HALF * 255, HALF * 255), "only 0 and 255, and 255 is ignored: masks"),
    Broken("masks in part", labels(HALF, HALF * 255), r"agree on what 255 means, but 1 of 2 .*labels/b\.png"),
    Broken(
        "label of another size",
        lambda root: save(root / "source" / "labels" / "a.png", np.zeros((9, 9), np.uint8)),
        r"image and label 'a' to have one size, but got \(5, 7\) and \(9, 9\)",
        row=r"size differs: source train: .*images/a\.png is 7x5, .*labels/a\.png is 9x9",
    ),
    Broken(
        "image alone turned",
        lambda root: save_turned(root / "source" / "images" / "a.png", noise(3), 6),
        r"image and label 'a' to have one size, but got \(7, 5\) and \(5, 7\)",
        row="before its EXIF orientation turns it: turn the label, too",
    ),
    Broken(
        "no label",
        lambda root: (root / "source" / "labels" / "a.png").unlink(),
        r"images of .* to have labels, but none of 1 has one \(looked for .*labels/a\.png",
        row=r"missing: source train: .*images/a\.png: no label .*labels/a\.png",
    ),
    Broken(
        "two images of a name",
        lambda root: (save(root / "source" / "images" / "a.jpg", noise(3)), (root / "source" / "train.txt").unlink()),
        r"a\.jpg and .*a\.png: which one is 'a'",
    ),
    Broken(
        "a name twice",
        write("source/train.txt", "a\na.png\n"),
        r"train\.txt to name each image once",
        row=r"a\.png is named more than once",
    ),
    Broken("no such name", write("target/train.txt", "gone\n"), r"1 are missing: gone", row="gone: no such image"),
    Broken("an empty list", write("source/train.txt", "\n \n"), r"train\.txt to name one image .*, but it is empty"),
    Broken("UTF-16", write("target/train.txt", "a".encode("utf-16")), r"train\.txt to be UTF-8 text, but it is UTF-16"),
    Broken("Latin-1", write("target/val.txt", "straße".encode("latin-1")), r"val\.txt to be UTF-8 text, but line 1"),
    *(
        Broken(f"a folder for {name}", folder_for(name), rf"{name} to be a text file, but it is a folder")
        for name in ("source/train.txt", "target/val.txt", "classes.yaml")
    ),
    Broken("one name for classes", write("classes.yaml", "names: road"), r"at least two classes .*classes\.yaml"),
    Broken("a class twice", write("classes.yaml", "names: [a, a]"), r"`names` to differ in .*classes\.yaml"),
    Broken("no classes", lambda root: (root / "classes.yaml").unlink(), "a classes.yaml with `names`"),
    Broken(
        "an id that the table lacks",
        write("classes.yaml", "names: [a, b]\nids: {0: 0}"),
        r"labels/a\.png also holds 1\. Map them with `ids`",
        row=OTHER_IDS,
    ),
    Broken("no source", lambda root: (root / "source").rename(root / "other"), "Expected a folder .*source"),
    Broken("no option", lambda root: None, "Expected `select` to be one of", ("--select=unknown",)),
    Broken("a range that is none", lambda root: None, r"low < high, but got \(5", ("--data.source_range=[5,5]",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_ends_in_a_line_and_the_check_in_a_row(
    case: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = good(tmp_path / "pair", case.channels), tmp_path / "out"
    case.spoil(root)
    arguments = [*ARGUMENTS, "--data.pair=folder", f"--data.data_root={root}", "--data.crop=[64,64]", f"--out={out}"]
    stages = ['--stages=[{"recipe": "source_only", "steps": 2}]', "--batch_size=1", *case.options]

    monkeypatch.setattr(sys, "argv", ["train", *arguments, *stages])
    assert train_gta2cs.command() == 2
    said = capsys.readouterr().err
    assert said.startswith(("Expected", "Cannot"))
    assert re.search(case.said, said), said
    assert not list(out.rglob("*.pt"))

    report = train_gta2cs.checked(train_gta2cs.parse([*arguments, *stages, "--check_data=true"]))
    lines = report.lines(limit=1000)
    assert any(re.search(case.row or case.said, line) for line in lines), lines
    assert not report.ok


def test_a_bad_file_that_is_met_on_the_way_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = good(tmp_path / "pair")
    (root / "source" / "images" / "a.png").write_text("hello")
    stages = ['--stages=[{"recipe": "source_only", "steps": 2}]', "--batch_size=1"]
    arguments = [*ARGUMENTS, "--data.pair=folder", f"--data.data_root={root}", "--data.crop=[64,64]", *stages]
    for workers in (0, 1):
        out = f"--out={tmp_path / str(workers)}"
        monkeypatch.setattr(sys, "argv", ["train", *arguments, out, f"--data.workers={workers}"])
        assert train_gta2cs.command() == 2
        said = capsys.readouterr().err
        assert re.match(
            r"Cannot read .*images/a\.png: it is no image of a known kind, whatever its name says\. --check-data lists "
            r"all such files\. Stopped in stage 1 of 1 \(source_only\) after step 0 of 2; no checkpoint was due yet\.",
            said,
        ), said


def test_a_batch_too_small_for_the_net_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = good(tmp_path / "pair")
    arguments = ["--data.pair=folder", f"--data.data_root={root}", "--data.crop=[32,32]", f"--out={tmp_path / 'out'}"]
    net = ["--net.arch=deeplabv3plus", "--net.encoder=tu-test_efficientnet", "--net.weights=random", "--net.options={}"]
    stages = ['--stages=[{"recipe": "source_only", "steps": 2}]', "--batch_size=1"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *net, *stages])
    assert train_gta2cs.command() == 2
    assert "larger crop or, where a net is scored, larger images. Stopped in stage 1 of 1" in capsys.readouterr().err


def test_a_good_pair_is_good(tmp_path: Path) -> None:
    arguments = ["--data.pair=folder", f"--data.data_root={good(tmp_path)}", "--check_data=true"]
    report = train_gta2cs.checked(train_gta2cs.parse(arguments))
    assert report.ok, report.lines()


def test_data_is_checked_without_the_stages_of_the_toy_pair(tmp_path: Path) -> None:
    """Its DACS takes colours, which images of four channels have not: nobody has asked for it."""
    tiff = pytest.importorskip("tifffile")
    for side in ("source", "target"):
        (tmp_path / side / "images").mkdir(parents=True)
        tiff.imwrite(tmp_path / side / "images" / "a.tif", noise(4), photometric="minisblack", planarconfig="contig")
    save(tmp_path / "source" / "labels" / "a.png", noise(high=2))
    (tmp_path / "classes.yaml").write_text("names: [a, b]\n")
    arguments = ["--data.pair=folder", f"--data.data_root={tmp_path}", "--data.channels=4", "--check_data=true"]
    report = train_gta2cs.checked(train_gta2cs.parse(arguments))
    (line,) = report.lines()
    assert line.startswith("refused: Expected `data.mean` and `data.std` for images of 4 channels")
    (option,) = report.normalisation()
    assert re.fullmatch(r'Those of all images: --data\.mean "\[(0\.\d+, ){3}0\.\d+\]" --data\.std "\[.*\]"', option)
    four = "[0.1,0.1,0.1,0.1]"
    known = [*arguments, f"--data.mean={four}", f"--data.std={four}"]
    assert train_gta2cs.checked(train_gta2cs.parse(known)).ok
    toys = Path(train_gta2cs.__file__).parent / "configs" / "dacs_toy.yaml"
    report = train_gta2cs.checked(train_gta2cs.parse([f"--config={toys}", *known]))
    (line,) = report.lines()
    assert line.startswith("refused: Expected `translate` of dacs to be")
