"""Tiny data sets in the true formats, and everything that can be wrong with them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gta2cs.datasets import (
    ClassSet,
    Labelled,
    Pair,
    Unlabelled,
    acdc,
    build_pair,
    check_data,
    cityscapes,
    dark_zurich,
    folder,
    gta5,
    read_synthia_ids,
    synthia,
)
from gta2cs.evaluation import evaluate
from gta2cs.nets import SegOutput
from gta2cs.samples import resize_image, resize_label
from udakit.labels import CITYSCAPES_IDS, SYNTHIA_16_CLASSES, SYNTHIA_IDS

TWO = ClassSet(("thing", "stuff"), np.array([[1, 2, 3], [4, 5, 6]], np.uint8))


def write_image(path: Path, size: tuple[int, int] = (4, 6), seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_grey(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def write_palette(path: Path, ids: np.ndarray) -> None:
    """A palette PNG whose colours have nothing to do with the ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette([(7 * i + 3) % 256 for i in range(768)])
    image.save(path)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """A 16-bit RGB PNG by hand: (H, W, 3) uint16, big-endian, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def grid(values: list[int], size: tuple[int, int] = (4, 6)) -> np.ndarray:
    return np.resize(np.array(values), size)


def make_folder(root: Path, names: dict[str, list[int]], lists: dict[str, list[str]]) -> Path:
    for seed, (name, ids) in enumerate(names.items()):
        write_image(root / "images" / f"{name}.png", seed=seed)
        write_grey(root / "labels" / f"{name}.png", grid(ids))
    for split, listed in lists.items():
        (root / f"{split}.txt").write_text("\n".join(listed) + "\n")
    return root


def make_cityscapes(root: Path, *, splits: tuple[str, ...] = ("train", "val"), train_ids: bool = False) -> Path:
    for split in splits:
        for city in ("aachen", "ulm"):
            name = f"{city}_000000_000019"
            write_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            labels = root / "gtFine" / split / city
            write_grey(labels / f"{name}_gtFine_labelIds.png", grid([7, 26, 0, 24, 255, 3]))
            write_grey(labels / f"{name}_gtFine_instanceIds.png", grid([1]))
            if train_ids:
                write_grey(labels / f"{name}_gtFine_labelTrainIds.png", grid([18, 255, 1]))
    return root


# ------------------------------------------------------------------------------------------------------------ layouts


def test_gta5_palette_indices_are_read_as_stored(tmp_path: Path) -> None:
    ids = grid([7, 8, 26, 33, 34, 0, 19])
    pixels = write_image(tmp_path / "images" / "00001.png")
    write_palette(tmp_path / "labels" / "00001.png", ids)
    write_grey(tmp_path / "labels" / "00001_labelTrainIds.png", ids)
    data = gta5(tmp_path).labelled()
    assert data.names == ("00001",)
    image, label = data[0]
    assert image.dtype == label.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    expected = [[CITYSCAPES_IDS.get(int(i), 255) for i in row] for row in ids]
    assert label.tolist() == expected
    assert check_data(data).ok


def test_synthia_reads_the_first_channel_of_sixteen_bits(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint16)
    pixels[..., 0] = grid(list(range(23)))
    pixels[..., 1] = 700  # instance ids, beyond a byte
    write_image(tmp_path / "RGB" / "0000000.png")
    write_png16(tmp_path / "GT" / "LABELS" / "0000000.png", pixels)
    # The trap: Pillow opens the file without complaint and every id is gone.
    with Image.open(tmp_path / "GT" / "LABELS" / "0000000.png") as image:
        assert np.asarray(image)[..., 0].max() == 0
    data = synthia(tmp_path).labelled()
    wanted = [
        SYNTHIA_16_CLASSES.index(SYNTHIA_IDS[i]) if SYNTHIA_IDS.get(i, 255) in SYNTHIA_16_CLASSES else 255
        for i in range(23)
    ]
    assert data[0][1].flatten().tolist() == [wanted[i % 23] for i in range(24)]
    assert set(wanted) == {*range(16), 255}
    assert check_data(data).ok
    assert synthia(tmp_path, keep=None).labelled()[0][1][0, 1] == SYNTHIA_IDS[1]


def test_synthia_refuses_labels_cut_to_eight_bits(tmp_path: Path) -> None:
    write_image(tmp_path / "RGB" / "0000000.png")
    path = tmp_path / "GT" / "LABELS" / "0000000.png"
    pixels = np.zeros((4, 6, 3), np.uint16)
    pixels[..., 0], pixels[..., 1] = 10, 700
    write_png16(path, pixels)
    with Image.open(path) as image:
        image.save(path)  # what a careless conversion does
    with pytest.raises(ValueError, match=r"0000000\.png to hold SYNTHIA class ids in 16 bits, but it has 8 bits"):
        read_synthia_ids(path)
    report = check_data(synthia(tmp_path).labelled())
    assert not report.ok
    assert "0000000.png" in report.problems["refused"][0]


def test_synthia_blames_an_old_decoder_and_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png16(tmp_path / "a.png", np.full((2, 2, 3), 9, np.uint16))
    monkeypatch.setattr("torchvision.io.decode_png", lambda data, mode: torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"a\.png has 16 bits, but this torchvision decodes 8: version 0\.21"):
        read_synthia_ids(tmp_path / "a.png")


def test_synthia_keeps_small_ids_of_true_sixteen_bit_files(tmp_path: Path) -> None:
    pixels = np.full((2, 2, 3), 3, np.uint16)
    write_png16(tmp_path / "a.png", pixels)
    assert read_synthia_ids(tmp_path / "a.png").tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize("train_ids", [False, True])
def test_cityscapes(tmp_path: Path, train_ids: bool) -> None:
    data = cityscapes(make_cityscapes(tmp_path, train_ids=train_ids), "train").labelled()
    assert data.names == ("aachen_000000_000019", "ulm_000000_000019")
    expected = [18, 255, 1] if train_ids else [0, 13, 255, 11, 255, 255]
    assert data[1][1].flatten()[: len(expected)].tolist() == expected
    assert check_data(data).ok


def test_cityscapes_ids_follow_the_sixteen_class_protocol(tmp_path: Path) -> None:
    for train_ids in (False, True):
        root = make_cityscapes(tmp_path / str(train_ids), train_ids=train_ids)
        label = cityscapes(root, "val", keep=SYNTHIA_16_CLASSES).labelled()[0][1].flatten()
        # car 13 -> 12, person 11 -> 10, bicycle 18 -> 15
        assert label[:4].tolist() == ([15, 255, 1, 15] if train_ids else [0, 12, 255, 10])


@pytest.mark.parametrize("flat", [False, True])
def test_acdc_nested_and_flattened(tmp_path: Path, flat: bool) -> None:
    for split in ("train", "val"):
        for condition in ("fog", "night"):
            part = Path(split) if flat else Path(condition) / split / "GOPR0475"
            name = f"GOPR0475_frame_{condition}"
            write_image(tmp_path / "rgb_anon" / part / f"{name}_rgb_anon.png")
            write_grey(tmp_path / "gt" / part / f"{name}_gt_labelTrainIds.png", grid([0, 10, 255]))
    write_image(tmp_path / "rgb_anon" / "fog" / "train_ref" / "GOPR0475" / "GOPR0475_x_rgb_ref_anon.png")
    data = acdc(tmp_path, "train").labelled()
    assert data.names == ("GOPR0475_frame_fog", "GOPR0475_frame_night")
    assert data[0][1].flatten()[:3].tolist() == [0, 10, 255]
    if not flat:
        assert acdc(tmp_path, "val", condition="night").labelled().names == ("GOPR0475_frame_night",)


def test_dark_zurich_trains_without_labels(tmp_path: Path) -> None:
    zurich, night = tmp_path / "dark_zurich", Path("night") / "GOPR0351"
    for split, time in (("train", "night"), ("train", "day"), ("val", "night")):
        write_image(zurich / "rgb_anon" / split / time / "GOPR0351" / f"{split}_{time}_rgb_anon.png")
    write_grey(zurich / "gt" / "val" / night / "val_night_gt_labelTrainIds.png", grid([0, 18]))
    assert dark_zurich(zurich, "train").unlabelled().names == ("train_night",)
    with pytest.raises(FileNotFoundError, match=r"to have labels, but none of 1 has one \(looked for .*train_night"):
        dark_zurich(zurich, "train").labelled()
    make_cityscapes(tmp_path / "cityscapes")
    pair = build_pair("cs2darkzurich", data_root=tmp_path, source_size=(8, 12))
    assert pair.target_train_labelled is None
    assert pair.source_train[0][0].shape == (3, 8, 12)
    image, label = pair.target_val[0]
    assert image.shape == (3, 540, 960)  # the published setting
    assert label.shape == (4, 6)  # evaluation keeps the label's own size


def test_gta2cs_and_synthia2cs(tmp_path: Path) -> None:
    make_cityscapes(tmp_path / "cityscapes")
    write_image(tmp_path / "gta" / "images" / "00001.png")
    write_palette(tmp_path / "gta" / "labels" / "00001.png", grid([7]))
    write_image(tmp_path / "synthia" / "RGB" / "0000000.png")
    write_png16(tmp_path / "synthia" / "GT" / "LABELS" / "0000000.png", np.full((4, 6, 3), 11, np.uint16))
    pair = build_pair("gta2cs", data_root=tmp_path)
    assert pair.source_train[0][0].shape == (3, 720, 1280)
    assert pair.source_train[0][1].unique().tolist() == [0]
    assert pair.target_train[0].shape == (3, 512, 1024)
    assert len(pair.classes) == 19
    pair = build_pair("synthia2cs", data_root=tmp_path, source_size="native", target_size=(8, 16))
    assert pair.source_train[0][1].unique().tolist() == [15]  # bicycle, the last of the sixteen
    assert list(pair.classes.scores) == ["mIoU16", "mIoU13"]
    left_out = {pair.classes.names[i] for i in pair.classes.scores["mIoU16"]} - {
        pair.classes.names[i] for i in pair.classes.scores["mIoU13"]
    }
    assert left_out == {"wall", "fence", "pole"}
    assert pair.target_train_labelled is not None
    assert pair.target_train_labelled()[0][1].shape == (8, 16)


def test_resized_images_are_scored_on_labels_of_their_own_size(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0, 0, 1, 1, 255, 255]}, {})
    data = folder(tmp_path, "train", TWO).labelled(size=(8, 12), native_labels=True)

    class Always(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> SegOutput:
            logits = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(len(images), 2, *images.shape[-2:])
            return SegOutput(logits, logits, logits)

    assert evaluate(Always(), data, TWO).iou == {"thing": 50.0, "stuff": 0.0}


def test_acdc_pair(tmp_path: Path) -> None:
    make_cityscapes(tmp_path / "cityscapes")
    for split in ("train", "val"):
        write_image(tmp_path / "acdc" / "rgb_anon" / split / "a_rgb_anon.png")
        write_grey(tmp_path / "acdc" / "gt" / split / "a_gt_labelTrainIds.png", grid([1]))
    pair = build_pair("cs2acdc", data_root=tmp_path, source_size="native", target_size="native")
    assert pair.target_val[0][1].unique().tolist() == [1]
    assert check_data(pair).ok


# --------------------------------------------------------------------------------------------------------- own folders


def test_folder_lists_and_endings(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "city/b": [1, 255], "c": [0]}, {"train": ["a", "city/b.png"], "val": ["c", ""]})
    data = folder(tmp_path, "train", TWO).labelled()
    assert data.names == ("a", "city/b")
    assert data[1][1].unique().tolist() == [1, 255]
    assert folder(tmp_path, "val", TWO).labelled().names == ("c",)


def test_folder_without_lists_is_all_training(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "b": [1]}, {})
    assert folder(tmp_path, "train", TWO).labelled().names == ("a", "b")
    with pytest.raises(FileNotFoundError, match=r"Expected the list .*val\.txt"):
        folder(tmp_path, "val", TWO)


def test_folder_pair_with_classes_yaml(tmp_path: Path) -> None:
    for side in ("source", "target"):
        make_folder(tmp_path / side, {"a": [7, 8, 0], "b": [7, 8, 0]}, {"train": ["a"], "val": ["b"]})
    (tmp_path / "classes.yaml").write_text("names: [road, car]\nids: {7: 0, 8: 1, 0: 255}\nscores: {mIoU: [0, 1]}\n")
    pair = build_pair("folder", data_root=tmp_path)
    assert pair.classes.names == ("road", "car")
    assert pair.classes.palette.shape == (2, 3)
    assert pair.source_train[0][1].flatten()[:3].tolist() == [0, 1, 255]
    assert pair.source_val is not None
    assert check_data(pair).ok
    write_grey(tmp_path / "target" / "labels" / "b.png", grid([7, 9]))
    report = check_data(build_pair("folder", data_root=tmp_path))
    assert "b.png holds [9]" in report.problems["unexpected ids"][0]


def test_each_domain_has_its_own_ids(tmp_path: Path) -> None:
    for side, ids in (("source", (7, 8)), ("target", (8, 7))):
        make_folder(tmp_path / side, {"a": [*ids], "b": [*ids]}, {"train": ["a"], "val": ["b"]})
        (tmp_path / side / "classes.yaml").write_text(f"names: [road, car]\nids: {{{ids[0]}: 0, {ids[1]}: 1}}\n")
    pair = build_pair("folder", data_root=tmp_path)
    for data in (pair.source_train, pair.target_val):
        assert data[0][1].flatten()[:2].tolist() == [0, 1]
    (tmp_path / "target" / "classes.yaml").write_text("names: [car, road]\n")
    with pytest.raises(ValueError, match="to have the same `names`, but got"):
        build_pair("folder", data_root=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("palette: []", r"classes\.yaml to be a mapping with `names`"),
        ("names: [a, b]\nclasses: 3", r"only \['colors', 'ids', 'names', 'palette', 'scores'\]"),
        ("names: [a, b]\nids: {7: 2}", r"`ids` to map 0..255 to 0..1 or 255 in .*classes\.yaml, but got \{7: 2\}"),
        (
            "names: [a, b]\nscores: {m: [0, 2]}",
            r"Expected `scores` 'm' to list class ids in \[0, 2\) in .*classes\.yaml",
        ),
        (
            "names: [a, b]\npalette: [[0, 0, 0]]",
            r"`palette` to list 2 colours .* in .*classes\.yaml, but got \[\[0, 0, 0\]\]",
        ),
    ],
)
def test_wrong_classes_yaml(tmp_path: Path, text: str, message: str) -> None:
    for side in ("source", "target"):
        make_folder(tmp_path / side, {"a": [0]}, {"train": ["a"], "val": ["a"]})
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        build_pair("folder", data_root=tmp_path)


def test_folder_without_classes_says_so(tmp_path: Path) -> None:
    for side in ("source", "target"):
        make_folder(tmp_path / side, {"a": [0]}, {"train": ["a"], "val": ["a"]})
    with pytest.raises(FileNotFoundError, match=r"Expected `classes`, or a classes\.yaml with `names`"):
        build_pair("folder", data_root=tmp_path)


def test_source_list_takes_a_published_subset(tmp_path: Path) -> None:
    for name in ("00001", "00002", "00003"):
        write_image(tmp_path / "images" / f"{name}.png")
        write_palette(tmp_path / "labels" / f"{name}.png", grid([7]))
    (tmp_path / "subset.txt").write_text("images/00003.png\nimages/00001.png\n")
    assert gta5(tmp_path).restrict(tmp_path / "subset.txt").labelled().names == ("00001", "00003")
    with pytest.raises(FileNotFoundError, match=r"but 1 of 1 are missing: 00009"):
        gta5(tmp_path).restrict(["00009"])


# ----------------------------------------------------------------------------------------------------------- bad input


def test_unlabelled_cannot_return_labels(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "b": [1]}, {})
    labelled = folder(tmp_path, "train", TWO).labelled()
    for data in (labelled.without_labels(), folder(tmp_path, "train", TWO).unlabelled()):
        assert isinstance(data, Unlabelled)
        assert not isinstance(data, Labelled)
        assert data[0].shape == (3, 4, 6)
        assert "labels" not in repr(vars(data))
        assert not hasattr(data, "labels")


def test_empty_and_absent_folders(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "leftImg8bit" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"Expected files \*\.png in .*images, but found none"):
        gta5(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected images \(\.png, .* in .*images, but found none"):
        folder(tmp_path, "train", TWO)
    with pytest.raises(FileNotFoundError, match=r"Expected a folder .*RGB with files \*\.png, but it does not exist"):
        synthia(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected files \*/\*_leftImg8bit\.png in .*train, but found none"):
        cityscapes(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"Expected images like .*rgb_anon/\*/train/\*\*/\*_rgb_anon\.png or"):
        acdc(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"Expected a folder .*gta or .*GTA5 for 'gta2cs', but found none"):
        build_pair("gta2cs", data_root=tmp_path)


def test_root_and_name_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UDAKIT_DATA", raising=False)
    with pytest.raises(ValueError, match=r"Expected `data_root` \(or .*UDAKIT_DATA\).* camvid/source/ .*but got None"):
        build_pair("camvid")
    with pytest.raises(ValueError, match=r"Expected `name` to be one of \('toy', .* but got 'gta'"):
        build_pair("gta")
    with pytest.raises(ValueError, match=r"`source_size` to be \(height, width\) or \"native\", but got"):
        build_pair("folder", source_root=".", target_root=".", classes=TWO, source_size=(0, 3))


def test_missing_image_and_label(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "b": [1]}, {"train": ["a", "b", "gone"]})
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"every name in .*train\.txt to be an image in .*: gone"):
        folder(tmp_path, "train", TWO)
    listing = folder(tmp_path, "train", TWO, strict=False)
    with pytest.raises(
        FileNotFoundError, match=r"Expected all 2 images of .* to have labels, but 1 do not: b .* or val\.txt"
    ):
        listing.labelled()
    report = check_data(listing.labelled(strict=False))
    assert not report.ok
    assert any("gone: no such image" in what for what in report.problems["missing"])
    assert any("b.png: no label" in what for what in report.problems["missing"])


def test_label_without_image_is_reported(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0]}, {})
    write_grey(tmp_path / "labels" / "lonely.png", grid([0]))
    report = check_data(folder(tmp_path, "train", TWO).labelled())
    assert "lonely.png: no image" in report.problems["missing"][0]


def test_size_mismatch_is_reported_and_raised_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "b": [0]}, {})
    write_grey(tmp_path / "labels" / "b.png", grid([0], (5, 6)))
    data = folder(tmp_path, "train", TWO).labelled()
    with pytest.raises(ValueError, match=r"image and label 'b' to have one size, but got \(4, 6\) and \(5, 6\)"):
        data[1]
    report = check_data(data)
    assert list(report.problems) == ["size differs"]
    assert "b.png is 6x4" in report.problems["size differs"][0]
    assert "is 6x5" in report.problems["size differs"][0]


def test_unexpected_ids_are_reported_and_raised_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0, 2, 7], "b": [1]}, {})
    data = folder(tmp_path, "train", TWO).labelled()
    with pytest.raises(ValueError, match=r"Expected label ids 0-1 or 255, but .*a\.png also holds 2, 7"):
        data[0]
    report = check_data(data, TWO)
    assert list(report.problems) == ["unexpected ids"]
    assert "a.png holds [2, 7]" in report.problems["unexpected ids"][0]


def test_unreadable_files_are_reported_and_raised_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "b": [1], "c": [1]}, {})
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "labels" / "b.png").write_text("no picture")
    Image.new("RGB", (6, 4)).save(tmp_path / "labels" / "c.png")
    data = folder(tmp_path, "train", TWO).labelled()
    for index, message in ((0, r"Cannot read .*images/a\.png"), (1, r"Cannot read .*labels/b\.png")):
        with pytest.raises(OSError, match=message):
            data[index]
    with pytest.raises(ValueError, match=r"c\.png to hold one class id per pixel .* but its mode is RGB"):
        data[2]
    report = check_data(data)
    assert {kind: len(found) for kind, found in report.problems.items()} == {"unreadable": 2, "refused": 1}
    assert len(report.lines(limit=1)) == 3
    assert report.lines(limit=1)[1] == "unreadable: and 1 more"


def test_problems_that_differ_by_the_file_are_told_once(tmp_path: Path) -> None:
    make_folder(tmp_path, {name: [7] for name in "abcd"} | {"e": [9]}, {})
    lines = check_data(folder(tmp_path, "train", TWO).labelled()).lines(limit=2)
    assert [line.split(str(tmp_path))[0] for line in lines] == [
        "unexpected ids: data: ",
        "unexpected ids: the same of b.png, c.png and 1 more",
        "unexpected ids: data: ",
    ]
    assert lines[0].endswith("a.png holds [7]. Map them with `ids` in classes.yaml (`ids: {7: 255}` ignores them).")
    assert "e.png holds [9]" in lines[2]


def test_names_of_missing_labels_end_with_the_name(tmp_path: Path) -> None:
    for name in "ab":
        write_image(tmp_path / "images" / f"{name}.png")
    lines = check_data(folder(tmp_path, "train", TWO).labelled(strict=False)).lines()
    assert lines[1] == "missing: the same of b.png"


def test_refusals_that_differ_by_numbers_are_told_once_with_the_largest(tmp_path: Path) -> None:
    for name, high in {"a": 900, "b": 4000, "c": 30}.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), high, np.uint16)).save(tmp_path / "images" / f"{name}.png")
    lines = check_data(folder(tmp_path, "train", TWO).unlabelled()).lines()
    assert len(lines) == 2
    assert "b.png to have 8 bits per channel or a given range, but it holds uint16 from 0 to 4000." in lines[0]
    assert "[0, 4095] of a camera of 12 bits" in lines[0]
    assert lines[1] == "refused: the same, with other numbers, of a.png, c.png"


def test_target_images_are_checked_without_labels(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0]}, {})
    data = folder(tmp_path, "train", TWO).unlabelled()
    assert check_data(data).ok
    (tmp_path / "images" / "a.png").write_text("no picture")
    assert not check_data(data).ok


# -------------------------------------------------------------------------------------------------- resizing, toy, real


def test_labels_resize_by_index_and_images_in_uint8() -> None:
    label = torch.tensor([[0, 255], [254, 7]], dtype=torch.uint8)
    assert resize_label(label, (4, 4)).tolist() == [[0, 0, 255, 255]] * 2 + [[254, 254, 7, 7]] * 2
    assert resize_label(label, (1, 1)).tolist() == [[7]]
    shape = (7, 13)
    random = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(random[None, None], (5, 9), mode="nearest-exact")[0, 0]
    assert torch.equal(resize_label(random, (5, 9)), wanted)
    image = resize_image(torch.full((3, 8, 8), 200, dtype=torch.uint8), (3, 5))
    assert image.dtype == torch.uint8
    assert image.unique().tolist() == [200]


def test_cache_returns_the_same_pixels(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": [0], "b": [1]}, {})
    plain, cached = (folder(tmp_path, "train", TWO).labelled(cache=cache) for cache in (False, True))
    cached.preload()
    (tmp_path / "later").mkdir()
    for path in (tmp_path / "images" / "a.png", tmp_path / "labels" / "a.png"):
        expected = plain[0]
        path.rename(tmp_path / "later" / path.parent.name)
        assert all(torch.equal(x, y) for x, y in zip(cached[0], expected, strict=True))
        (tmp_path / "later" / path.parent.name).rename(path)


@pytest.mark.parametrize("name", ["toy", "toy_backwards"])
def test_toy_pair_is_drawn_the_same_each_time(name: str) -> None:
    for option in ("source_root", "target_root", "source_list"):
        with pytest.raises(
            ValueError, match=f"no `{option}` for .* {name!r}, but got 'mine'. The pair 'folder' reads your"
        ):
            build_pair(name, **{option: Path("mine")})
    first, second = (build_pair(name, toy_counts=(3, 2, 2), toy_size=(32, 48)) for _ in range(2))
    for i in (2, 0):
        assert all(torch.equal(x, y) for x, y in zip(first.source_train[i], second.source_train[i], strict=True))
    assert first.target_train_labelled is not None
    image, label = first.target_train_labelled()[1]
    assert torch.equal(image, second.target_train[1])
    assert image.shape == (3, 32, 48)
    assert label.shape == (32, 48)
    assert not torch.equal(first.target_val[0][0], first.target_train[0])
    assert set(label.unique().tolist()) <= {*range(len(first.classes)), 255}
    assert check_data(first).ok


def test_toy_backwards_changes_the_domains_and_nothing_else() -> None:
    there, back = (build_pair(name, toy_counts=(2, 2, 1), toy_size=(32, 48)) for name in ("toy", "toy_backwards"))
    assert torch.equal(there.source_train[1][0], back.target_train[1])
    assert torch.equal(there.target_train[1], back.source_train[1][0])
    assert not torch.equal(there.target_val[0][0], back.target_val[0][0])
    assert there.classes.names == back.classes.names


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("camvid", (520, 62, 62)),
        ("carla2camvid", (431, 520, 57)),
        ("carla2dusk", (431, 62, 62)),
        ("nuclei", (226, 60, 30)),
        ("nuclei_backwards", (60, 226, 112)),
    ],
)
def test_real_pairs(data_root: Path, name: str, counts: tuple[int, int, int]) -> None:
    pair = build_pair(name, data_root=data_root)
    assert (len(pair.source_train), len(pair.target_train), len(pair.target_val)) == counts
    image, label = pair.source_train[0]
    size = (192, 192) if "nuclei" in name else (180, 240)
    assert image.shape == (3, *size)
    assert label.shape == size
    report = check_data(pair)
    assert report.ok, report.lines()
    assert report.rows[0][3] == (["Bicyclist"] if "carla" in name else [])


def test_a_target_without_labels_is_no_fault(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", {"a": [0, 1], "b": [0, 1]}, {"train": ["a"], "val": ["b"]})
    make_folder(tmp_path / "target", {"a": [0], "b": [1]}, {"train": ["a"], "val": ["b"]})

    def opened() -> Pair:
        return build_pair("folder", source_root=tmp_path / "source", target_root=tmp_path / "target", classes=TWO)

    assert opened().target_val is not None
    (tmp_path / "target" / "labels" / "b.png").unlink()
    assert opened().target_val is None
    (tmp_path / "target" / "val.txt").write_text("\n")
    assert opened().target_val is None
    (tmp_path / "target" / "val.txt").unlink()
    pair = opened()
    assert pair.target_val is None
    assert pair.source_val is not None
    assert set(pair.sets()) == {"source train", "target train", "source val"}
    report = check_data(pair)
    assert report.ok
    assert report.notes == ["target val: no target image has a label, so the run reports no IoU on target."]
