"""Lists and classes.yaml as people write them: paths compared as paths, UTF-8 alone, every fault names its file."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from gta2cs.datasets import ClassSet, build_pair, check_data, cityscapes, dark_zurich, folder, gta5
from gta2cs.layouts import load_classes
from gta2cs.lists import Known, find_names, read_list, read_text
from odd_files import noise, save
from udakit import read_class_stats

TWO = ClassSet(("thing", "stuff"), np.array([[1, 2, 3], [4, 5, 6]], np.uint8))


def make_folder(root: Path, *names: str) -> Path:
    for name in names:
        save(root / "images" / name, noise(3))
        save((root / "labels" / name).with_suffix(".png"), noise(high=2))
    return root


def listed(root: Path, text: str | bytes, strict: bool = True) -> list[str]:
    """The names that train.txt of a folder comes to."""
    (root / "train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [item.name for item in folder(root, "train", TWO, strict=strict).items]


# -------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("seq1/0001.png", ["seq1/0001"]),  # and not seq2/0001
        ("seq2/0001\nseq1/0001", ["seq2/0001", "seq1/0001"]),
        ("img.001\nimg.002.png", ["img.001", "img.002"]),
        ("./images/img.001.png", ["img.001"]),
        ("seq1\\0001.png", ["seq1/0001"]),
        ("C:\\data\\set\\images\\seq2\\0001.png\r\n", ["seq2/0001"]),
        ("/elsewhere/images/img.001.png", ["img.001"]),
        ("\ufeffimg.001\n\n  img.002  \n", ["img.001", "img.002"]),
        ("images/img.001.png\tlabels/img.001.png", ["img.001"]),
        ("images/img.001.png labels/img.001.png", ["img.001"]),
        ("my photo.jpg", ["my photo"]),
        (unicodedata.normalize("NFD", "straße é.png"), ["straße é"]),
        ("both.png", ["both"]),
    ],
)
def test_names_of_a_list(tmp_path: Path, text: str, names: list[str]) -> None:
    files = ["seq1/0001.png", "seq2/0001.png", "img.001.png", "img.002.png", "my photo.jpg", "straße é.png"]
    root = make_folder(tmp_path, *files, "both.png", "both.jpg")
    assert listed(root, text) == names


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("0001", ValueError, r"train\.txt to mean one image in .*, but 1 mean several: 0001 \(images/seq1/0001"),
        ("seq3/0001", FileNotFoundError, r"train\.txt to be an image in .*images, but 1 of 1 are missing: seq3/0001"),
        ("a\nseq1/0001\na.png", ValueError, r"train\.txt to name each image once, but 1 are repeated: a\.png"),
        ("\n \n", ValueError, r"Expected .*train\.txt to name one image a line, but it is empty"),
        ("a".encode("utf-16"), ValueError, r"train\.txt to be UTF-8 text, but it is UTF-16\. Save it as UTF-8"),
        ("a".encode("utf-16-le"), ValueError, r"train\.txt to be UTF-8 text, but it holds zero bytes"),
        ("a\nstraße".encode("latin-1"), ValueError, r"train\.txt to be UTF-8 text, but line 2 holds the byte 0xdf"),
    ],
)
def test_faults_of_a_list(tmp_path: Path, text: str | bytes, error: type[Exception], message: str) -> None:
    root = make_folder(tmp_path, "seq1/0001.png", "seq2/0001.png", "a.png")
    with pytest.raises(error, match=message):
        listed(root, text)


def test_the_check_reports_the_faults_of_a_list_and_goes_on(tmp_path: Path) -> None:
    root = make_folder(tmp_path, "seq1/0001.png", "seq2/0001.png", "a.png")
    assert listed(root, "a\na.png\n0001\ngone", strict=False) == ["a"]
    report = check_data(folder(root, "train", TWO, strict=False).labelled(strict=False))
    assert "images/gone: no such image, but train.txt names it" in report.problems["missing"][0]
    assert len(report.problems["list"]) == 2
    assert any("a.png is named more than once" in what for what in report.problems["list"])
    assert check_data(folder(root, "train", TWO, strict=False).unlabelled()).problems.keys() == {"missing", "list"}


@pytest.mark.parametrize("text", [b"\n", b"\xff\xfea\0"])
def test_the_check_looks_at_all_images_where_a_list_names_none(tmp_path: Path, text: bytes) -> None:
    root = make_folder(tmp_path, "a.png", "b.png")
    assert listed(root, text, strict=False) == ["a", "b"]
    report = check_data(folder(root, "train", TWO, strict=False).unlabelled())
    assert str(root / "train.txt") in report.problems["list"][0]
    assert report.rows[0][1] == 2


def test_two_images_or_two_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", "a.png", "a.jpg")
    with pytest.raises(ValueError, match=r"one file for each name, but found .*a\.jpg and .*a\.png: which one is 'a'"):
        folder(root, "train", TWO)
    assert any(
        "which one is 'a'" in line for line in check_data(folder(root, "train", TWO, strict=False).labelled()).lines()
    )
    assert listed(root, "a.jpg") == ["a"]
    assert folder(root, "train", TWO).items[0].image.name == "a.jpg"
    root = make_folder(tmp_path / "labels", "a.png")
    save(root / "labels" / "a.tif", noise(high=2))
    with pytest.raises(ValueError, match=r"labels/a\.png and .*labels/a\.tif"):
        folder(root, "train", TWO)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    root = make_folder(tmp_path, "a.png")
    (root / "images" / "._a.png").write_bytes(b"left by macOS")
    assert [item.name for item in folder(root, "train", TWO).items] == ["a"]


def test_published_lists_of_cityscapes(tmp_path: Path) -> None:
    for city in ("aachen", "ulm"):
        name = f"{city}_000000_000019"
        save(tmp_path / "leftImg8bit" / "train" / city / f"{name}_leftImg8bit.png", noise(3))
        save(tmp_path / "gtFine" / "train" / city / f"{name}_gtFine_labelIds.png", noise(high=2))
    listing = cityscapes(tmp_path, "train")
    image = "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    for line in (
        image,
        f"{image}\tgtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png",
        f"{image} gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png",
        image.replace("/", "\\"),
        "ulm/ulm_000000_000019_leftImg8bit.png",
        "ulm/ulm_000000_000019",
        "ulm_000000_000019",
    ):
        assert [item.name for item in listing.restrict([line], root=tmp_path).items] == ["ulm_000000_000019"], line
    with pytest.raises(FileNotFoundError, match="1 of 1 are missing"):
        listing.restrict(["aachen/ulm_000000_000019"], root=tmp_path)


def test_suffixes_of_any_case(tmp_path: Path) -> None:
    save(tmp_path / "images" / "00001.PNG", noise(3))
    save(tmp_path / "labels" / "00001.png", noise(high=2))
    save(tmp_path / "images" / "00002.png", noise(3))
    save(tmp_path / "labels" / "00002.PNG", noise(high=2))
    assert len(gta5(tmp_path).labelled()) == 2


def test_dark_zurich_without_night_never_trains_on_day(tmp_path: Path) -> None:
    save(tmp_path / "rgb_anon" / "train" / "day" / "GOPR1" / "a_rgb_anon.png", noise(3))
    with pytest.raises(FileNotFoundError, match=r"images like .*rgb_anon/train/night/\*\*/\*_rgb_anon\.png, but found"):
        dark_zurich(tmp_path, "train")
    assert [item.name for item in dark_zurich(tmp_path, "train", time="day").items] == ["a"]
    flat = tmp_path / "flat"
    save(flat / "rgb_anon" / "train" / "b_rgb_anon.png", noise(3))
    assert [item.name for item in dark_zurich(flat, "train").items] == ["b"]


def test_an_exact_name_is_preferred_to_the_end_of_a_path() -> None:
    files = [Known(("b",), ("images/b",)), Known(("city/b",), ("images/city/b",))]
    assert find_names(["b", "city/b"], files).positions == [0, 1]
    assert find_names(["other/b"], files).absent == ["other/b"]


def test_text_is_read_as_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffstraße\n".encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    assert read_list(path) == ["straße"]
    assert read_text(path) == "straße\n"
    stats = tmp_path / "sample_class_stats.json"
    stats.write_bytes('\ufeff[{"0": 5, "file": "straße.png"}]'.encode())
    names, counts = read_class_stats(stats, num_classes=2)
    assert names == ["straße.png"]
    assert torch.equal(counts, torch.tensor([[5, 0]]))
    stats.write_bytes('[{"0": 5, "file": "straße.png"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"sample_class_stats\.json"):
        read_class_stats(stats, num_classes=2)


# -------------------------------------------------------------------------------------------------------- classes.yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping with `names`"),
        ("- road", "a mapping with `names`"),
        ("names: [a, b", "to be YAML"),
        ("names: [a, b]\nclass: 3", "only"),
        ("names:", "a mapping with `names`"),
        ("names: road", "`names` to list at least two classes"),
        ("names: [road]", "`names` to list at least two classes"),
        ("names: {1: a, 2: b}", "a mapping of the ids 0, 1, 2"),
        ("names: {road: 0, car: 1}", "a mapping of the ids 0, 1, 2"),
        ("names: [road, no]", r"`names` to be text \(YAML takes a bare no.* but got \[False\]"),
        ("names: [road, 12]", "`names` to be text"),
        ("names: [road, ~]", "`names` to be text"),
        ("names: [road, [car]]", "`names` to be text"),
        ("names: [road, '']", "`names` to be text"),
        ("names: [road, car, road]", "`names` to differ in .* but got road more than once"),
        (f"names: {[f'c{i}' for i in range(256)]}", "at most 255 `names`.* but got 256"),
        ("names: [a, b]\npalette: red", "`palette` to list 2 colours"),
        ("names: [a, b]\npalette: [[0, 0, 0]]", "`palette` to list 2 colours"),
        ("names: [a, b]\npalette: [[0, 0, 300], [0, 0, 0]]", "`palette` to list 2 colours"),
        ("names: [a, b]\npalette: [[0, 0, 0.5], [0, 0, 0]]", "`palette` to list 2 colours"),
        ("names: [a, b]\npalette: {a: [0, 0, 0], b: [1, 1, 1]}", "`palette` to list 2 colours"),
        ("names: [a, b]\nids: [0, 1]", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {x: 0}", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {0: a}", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {300: 0}", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {0: 2}", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {0: 0.5}", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {0: yes}", "`ids` to map 0..255"),
        ("names: [a, b]\nids: {7: 0, 7: 1}", "each key once in .* but got 7 twice"),
        ("names: [a, b]\nscores: mIoU", "`scores` to map names to lists"),
        ("names: [a, b]\nscores: {m: 1}", "`scores` 'm' to list class ids"),
        ("names: [a, b]\nscores: {m: []}", "`scores` 'm' to list class ids"),
        ("names: [a, b]\nscores: {m: [0, 2]}", "`scores` 'm' to list class ids"),
        ("names: [a, b]\nscores: {m: [a]}", "`scores` 'm' to list class ids"),
        ("names: [a, b]\nscores: {m: [0, 0]}", "`scores` 'm' to list each class once"),
        ("names: [a, b]\ncolors: [[0, 0, 0]]", "`colors` to map names to colours"),
        ("names: [a, b]\ncolors: palette", "a `palette` for `colors: palette`"),
        ("names: [a, b]\ncolors: {c: [0, 0, 0]}", "`colors` to be of classes in `names`, or of `ignore` in"),
        ("names: [a, b]\ncolors: {a: [0, 0]}", r"`colors` of 'a' to be \[r, g, b\]"),
        ("names: [a, b]\ncolors: {a: [0, 0, 0], b: [0, 0, 0]}", "`colors` to give a colour to one class"),
        ("names: [a, b]\nids: {0: 0}\ncolors: {a: [0, 0, 0]}", "`ids` or `colors` in .* but got both"),
        ("names: [a, b]\nx: !!python/object/apply:os.system ['exit']", "to be YAML"),
        ("a: &a [x]\nb: &b [*a, *a]\nnames: {0: *b, 1: *b}", "only"),
        ("names: [straße, b]".encode("latin-1"), "UTF-8 text"),
        ("names: [a, b]\x00", "UTF-8 text"),
    ],
)
def test_every_fault_of_classes_yaml_names_the_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "classes.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_classes(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_aliases_that_multiply_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 40)),
    ]
    path.write_text("\n".join([*lines, "names: *a39"]))
    with pytest.raises(ValueError, match=r"classes\.yaml"):
        load_classes(path)


def test_a_folder_for_classes_yaml(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"to be a text file, but it is a folder"):
        load_classes(tmp_path)


@pytest.mark.parametrize("name", ["source/train.txt", "target/train.txt", "target/val.txt", "classes.yaml"])
@pytest.mark.parametrize("kind", ["a folder", "a link that leads nowhere"])
def test_what_is_no_file_does_not_pass_for_nothing(tmp_path: Path, name: str, kind: str) -> None:
    for side in ("source", "target"):
        make_folder(tmp_path / side, "a.png", "b.png")
        (tmp_path / side / "train.txt").write_text("a\n")
    (tmp_path / "classes.yaml").write_text("names: [thing, stuff]\n")
    build_pair("folder", data_root=tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(OSError, match=f"{path} to be a text file, but it is {kind}"):
        build_pair("folder", data_root=tmp_path)
    lines = check_data(build_pair("folder", data_root=tmp_path, strict=False)).lines()
    assert any(str(path) in line for line in lines)


def test_a_list_of_another_case_is_that_list(tmp_path: Path) -> None:
    root = make_folder(tmp_path, "a.png", "b.png")
    (root / "Train.TXT").write_text("b\n")
    assert [item.name for item in folder(root, "train", TWO).items] == ["b"]


def test_names_by_id_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_bytes("\ufeffnames: {0: Straße, 1: Auto}\nscores: {m: [1]}\n".encode())
    known, ids = load_classes(path)
    assert known.names == ("Straße", "Auto")
    assert known.scores == {"m": (1,)}
    assert ids is None
    for side in ("source", "target"):
        make_folder(tmp_path / side, "a.png")
    assert build_pair("folder", data_root=tmp_path).classes.names == known.names
