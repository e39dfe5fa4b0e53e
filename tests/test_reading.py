"""One reader: what each kind of file becomes, and that training, --check-data and predict.py refuse the same ones."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import odd_files
from gta2cs.datasets import ClassSet, build_pair, check_data, folder
from gta2cs.layouts import load_classes
from gta2cs.nets import build_net, take_channels
from gta2cs.reading import MEAN, STD, ColourTable, ImageFormat, decode, read_ids, turn, viewable
from odd_files import IMAGES, LABELS, READ, REFUSED, Odd, noise, save, save_turned

TWO = ClassSet(("thing", "stuff"), np.array([[1, 2, 3], [4, 5, 6]], np.uint8))


def make_folder(root: Path, odd: Odd | None = None, label: Odd | None = None) -> Path:
    """A folder pair whose first image or label is an odd one."""
    for i, name in enumerate("ab"):
        save(root / "images" / f"{name}.png", noise(3))
        save(root / "labels" / f"{name}.png", noise(high=2))
        for part, file in (("images", odd), ("labels", label)):
            if i == 0 and file is not None:
                (root / part / "a.png").unlink()
                file.write((root / part / "a").with_suffix(Path(file.name).suffix))
    return root


@pytest.mark.parametrize("odd", READ, ids=lambda odd: odd.name)
def test_images_that_are_read(tmp_path: Path, odd: Odd) -> None:
    path = tmp_path / odd.name
    odd.write(path)
    image = ImageFormat(odd.channels, odd.value_range).read(path)
    assert image.dtype == (torch.uint8 if odd.value_range is None else torch.float32)
    tolerance = 4 if path.suffix == ".jpg" else 0 if odd.value_range is None else 1e-3
    np.testing.assert_allclose(image.numpy(), odd.value, rtol=0, atol=tolerance)
    assert viewable(image).shape == (*image.shape[-2:], 3)


def test_very_dark_images_are_brighter_in_a_picture() -> None:
    assert [int(viewable(torch.full((4, 2, 2), value)).max()) for value in (0, 40, 100)] == [0, 255, 100]


@pytest.mark.parametrize("odd", REFUSED, ids=lambda odd: odd.name)
def test_images_that_are_refused_by_name(tmp_path: Path, odd: Odd) -> None:
    root = make_folder(tmp_path, odd)
    listing = folder(root, "train", TWO)
    format = ImageFormat(odd.channels, odd.value_range)
    data = listing.labelled(image_format=format)
    bad = [path for path, _ in data.paths].index(next(p for p, _ in data.paths if p.stem == "a"))
    with pytest.raises((OSError, ValueError), match=str(odd.value)) as caught:
        data[bad]
    assert "images/a." in str(caught.value)
    for part in (data, listing.unlabelled(image_format=format)):
        report = check_data(part)
        found = [what for kind in ("unreadable", "refused") for what in report.problems.get(kind, [])]
        assert any(str(caught.value) in what for what in found)
        assert report.lines()


@pytest.mark.parametrize("odd", LABELS, ids=lambda odd: odd.name)
def test_labels(tmp_path: Path, odd: Odd) -> None:
    data = folder(make_folder(tmp_path, label=odd), "train", TWO).labelled()
    path = data.paths[0][1]
    assert path.stem == "a"
    assert data.format is not None
    if isinstance(odd.value, str):
        with pytest.raises((OSError, ValueError), match=odd.value) as caught:
            data[0]
        assert "labels/a." in str(caught.value)
        report = check_data(data)
        assert not report.ok
        assert any("labels/a." in line for line in report.lines())
    else:
        assert data.format.read(path).tolist() == odd.value.tolist()


def test_colour_coded_labels(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(
        "names: [road, lane]\ncolors: {road: [1, 2, 3], lane: [[9, 9, 9], [8, 0, 0]], ignore: [0, 0, 0]}\n"
    )
    colours = np.array([[1, 2, 3], [9, 9, 9], [8, 0, 0], [0, 0, 0]], np.uint8)
    root = make_folder(tmp_path / "set")
    for name in "ab":
        save(root / "labels" / f"{name}.png", colours[noise(high=4)])
    known, ids = load_classes(tmp_path / "classes.yaml")
    data = folder(root, "train", known, ids=ids).labelled()
    assert data[0][1].tolist() == np.array([0, 1, 1, 255])[noise(high=4)].tolist()
    assert check_data(data, known).ok
    save(root / "labels" / "a.png", np.full((*odd_files.SIZE, 3), 77, np.uint8))
    with pytest.raises(ValueError, match=r"labels/a\.png to hold only the colours .* 1 other: \[77, 77, 77\] at 35"):
        data[0]
    assert "labels/a.png" in check_data(data).problems["refused"][0]


def test_the_palette_may_be_the_table_of_colours(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("names: [road, lane]\npalette: [[1, 2, 3], [4, 5, 6]]\ncolors: palette\n")
    table = ColourTable(load_classes(path).ids)  # type: ignore[arg-type]
    ids = noise(high=2)
    save(tmp_path / "a.png", TWO.palette[ids])
    assert table(tmp_path / "a.png").tolist() == ids.tolist()


def test_an_id_that_a_stated_table_lacks_is_refused_with_the_line_that_ignores_it(tmp_path: Path) -> None:
    listing = folder(make_folder(tmp_path), "train", TWO, ids={0: 1})
    with pytest.raises(
        ValueError, match=r"a\.png also holds 1\. Map them with `ids` in classes\.yaml \(`ids: \{1: 255\}`"
    ):
        listing.labelled()[0]
    assert folder(tmp_path, "train", TWO, ids={0: 1, 1: 255}).labelled()[0][1].unique().tolist() == [1, 255]


@pytest.mark.parametrize("text", [None, "names: [a, b", "names: road", "names: [a, b]\nids: {x: 0}"])
def test_the_check_looks_at_the_files_although_classes_yaml_is_wrong(tmp_path: Path, text: str | None) -> None:
    for domain in ("source", "target"):
        make_folder(tmp_path / domain)
    (tmp_path / "source" / "images" / "b.png").write_text("no image")
    if text is not None:
        (tmp_path / "classes.yaml").write_text(text)
    report = check_data(build_pair("folder", data_root=tmp_path, strict=False))
    assert "classes.yaml" in report.problems["refused"][0]
    assert "source train: Cannot read" in report.problems["unreadable"][0]
    assert report.lines()
    assert [row[:2] for row in report.rows] == [("source train", 2), ("target train", 2)]


def test_the_check_reports_a_validation_list_that_names_nothing_there(tmp_path: Path) -> None:
    for domain in ("source", "target"):
        make_folder(tmp_path / domain)
        (tmp_path / domain / "train.txt").write_text("a\nb\n")
    (tmp_path / "target" / "val.txt").write_text("gone\n")
    (tmp_path / "classes.yaml").write_text("names: [thing, stuff]\n")
    with pytest.raises(FileNotFoundError, match=r"val\.txt to be an image .* missing: gone"):
        build_pair("folder", data_root=tmp_path)
    report = check_data(build_pair("folder", data_root=tmp_path, strict=False))
    assert "target val: " in report.problems["missing"][0]
    assert "images/gone: no such image, but val.txt names it" in report.problems["missing"][0]


def test_masks_of_0_and_255_are_refused_unless_a_table_says_what_255_is(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for name in "ab":
        save(root / "labels" / f"{name}.png", noise(high=2) * 255)
    with pytest.raises(ValueError, match=r"only 0 and 255, .* `ids: \{0: 0, 255: 1\}` in classes\.yaml makes 255 the"):
        folder(root, "train", TWO).labelled()
    assert "masks" in check_data(folder(root, "train", TWO).labelled(strict=False)).problems
    with pytest.raises(ValueError, match="only 0 and 255"):
        folder(root, "train", TWO, ids={0: 0, 1: 1}).labelled()
    for ids, meant in (({0: 0, 255: 1}, 1), ({0: 0, 255: 255}, 255)):
        data = folder(root, "train", TWO, ids=ids).labelled()
        assert data[0][1].tolist() == (noise(high=2) * np.uint8(meant)).tolist()
        assert check_data(data).ok


MORE = ClassSet(("a", "b", "c"), np.zeros((3, 3), np.uint8))


@pytest.mark.parametrize(
    ("files", "classes", "fault", "note"),
    [  # what each file holds
        ([{0, 1}, {0, 255}, {0}], TWO, "1 of 3 hold only 0 and 255, for example .*1.png, and the others never", False),
        ([{0, 1}, {0, 255}, {0, 1, 255}], TWO, None, True),  # 255 is ignored, as one file shows
        ([{0, 1}, {255}], TWO, None, False),  # nobody labelled that image
        ([{0}, {255}], TWO, "they hold only 0 and 255", False),
        ([{0, 1}, {1, 255}], TWO, None, False),
        ([{0, 1}, {0, 255}], MORE, None, False),  # masks of three classes: nobody makes them
        ([{0}, {0, 255}], MORE, "they hold only 0 and 255", False),
    ],
)
def test_masks_in_some_files_of_a_set(
    tmp_path: Path, files: list[set[int]], classes: ClassSet, fault: str | None, note: bool
) -> None:
    for i, ids in enumerate(files):
        save(tmp_path / "images" / f"{i}.png", noise(3))
        save(tmp_path / "labels" / f"{i}.png", np.resize(sorted(ids), odd_files.SIZE).astype(np.uint8))
    listing = folder(tmp_path, "train", classes)
    report = check_data(listing.labelled(strict=False), classes)
    assert any("stands beside 1" in line for line in report.notes) == note
    if fault is None:
        listing.labelled()
        assert report.ok
        return
    with pytest.raises(ValueError, match=fault):
        listing.labelled()
    assert report.problems.keys() == {"masks"}
    if "others" in fault:
        stated = folder(tmp_path, "train", classes, ids={0: 0, 1: 1, 255: 1}).labelled()
        assert stated[1][1].unique().tolist() == [0, 1]
        assert check_data(stated).ok


def test_an_orientation_of_the_image_alone_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    save_turned(root / "images" / "a.png", noise(3), 6)
    report = check_data(folder(root, "train", TWO).labelled())
    assert "a.png is 5x7" in report.problems["size differs"][0]
    assert "before its EXIF orientation turns it" in report.problems["size differs"][0]
    assert report.seen["data"].turned == 1
    save_turned(root / "labels" / "a.png", noise(high=2), 6)  # a label that carries the same orientation fits
    assert check_data(folder(root, "train", TWO).labelled()).ok


def test_the_check_tells_what_the_files_are_like(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    save(root / "images" / "a.png", np.full((*odd_files.SIZE, 3), 20, np.uint8))
    save(root / "images" / "b.png", np.full((*odd_files.SIZE, 3), 10, np.uint8))
    save(root / "images" / "c.png", np.zeros((8, 9, 3), np.uint8))
    save(root / "labels" / "c.png", noise(high=2))
    report = check_data(folder(root, "train", TWO).labelled(), TWO)
    seen = report.seen["data"]
    assert (seen.low, seen.high, dict(seen.depths), dict(seen.bands)) == (0, 20, {"8 bit": 3}, {3: 3})
    assert seen.sizes == {(5, 7): 2, (8, 9): 1}
    np.testing.assert_allclose(np.mean(seen.mean, 0), 10 / 255)
    assert seen.pixels[:2].sum() == 105
    assert any("no value of any image is above 20 of 255" in note for note in report.notes)
    assert any("1 labels have the size of other images" in note for note in report.notes)
    deep = tmp_path / "deep"
    save(deep / "images" / "a.png", noise(high=4000, dtype=np.uint16))
    report = check_data(folder(deep, "train", TWO).unlabelled(image_format=ImageFormat(value_range=(0, 4000))))
    assert report.ok
    assert report.seen["data"].depths == {"16 bit": 1}


@pytest.mark.parametrize("how", ["", "mirrored", "upside down", "by half a turn"])
def test_labels_that_are_stored_turned_are_noticed(tmp_path: Path, how: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        ids = np.zeros((40, 50), np.uint8)
        top, left = rng.integers(2, 12), rng.integers(2, 12)
        ids[top : top + 12, left : left + 14] = 1
        save(tmp_path / "images" / f"{i}.png", (ids * 90 + rng.integers(0, 30, ids.shape)).astype(np.uint8))
        rows, columns = (-1 if how in (one, "by half a turn") else 1 for one in ("upside down", "mirrored"))
        save(tmp_path / "labels" / f"{i}.png", ids[::rows, ::columns])
    report = check_data(folder(tmp_path, "train", TWO).labelled())
    found = [note for note in report.notes if "would fit" in note]
    assert found == ([f"data: 6 of 6 labels would fit their images better {how}: are they stored so?"] if how else [])


def test_ranges_of_a_pair(tmp_path: Path) -> None:
    for side in ("source", "target"):
        deep = noise(high=1000, dtype=np.uint16)
        save(tmp_path / side / "images" / "a.png", deep if side == "target" else noise())
        save(tmp_path / side / "labels" / "a.png", noise(high=2))
    pair = build_pair("folder", data_root=tmp_path, classes=TWO, channels=1, target_range=(0, 1000))
    assert pair.channels == 1
    assert pair.source_train[0][0].dtype == torch.uint8
    assert pair.source_train[0][0].shape == (1, *odd_files.SIZE)
    np.testing.assert_allclose(pair.target_train[0][0].numpy(), deep * 0.255, rtol=1e-6)
    with pytest.raises(ValueError, match=r"a value range \(low, high\) with low < high, but got \(5, 5\)"):
        build_pair("folder", data_root=tmp_path, classes=TWO, target_range=(5, 5))


def test_every_orientation_by_the_words_of_the_standard() -> None:
    for orientation in range(1, 9):
        for pixels in (noise(), noise(3)):
            assert (turn(pixels, orientation) == odd_files.upright(pixels, orientation)).all()


def test_the_generator_covers_what_it_says() -> None:
    assert len({odd.name for odd in IMAGES}) == len(IMAGES)
    assert len(READ) >= 20
    assert len(REFUSED) >= 15


def test_palette_indices_and_depth(tmp_path: Path) -> None:
    from PIL import Image

    ids = noise(high=5)
    picture = Image.fromarray(ids)
    picture.putpalette([(7 * i + 3) % 256 for i in range(768)])
    picture.save(tmp_path / "a.png")
    assert read_ids(tmp_path / "a.png").tolist() == ids.tolist()
    assert decode(tmp_path / "a.png").pixels.shape == (*odd_files.SIZE, 3)


# ------------------------------------------------------------------------------------------------ channels and nets


def test_statistics_are_stated_or_those_of_imagenet() -> None:
    assert ImageFormat().statistics == (MEAN, STD)
    assert ImageFormat(1).statistics == ((0.449,), (0.226,))
    assert ImageFormat(2, mean=(0.1, 0.2), std=(1, 2)).statistics == ((0.1, 0.2), (1, 2))
    with pytest.raises(ValueError, match=r"`data.mean` and `data.std` for images of 5 channels"):
        ImageFormat(5).statistics  # noqa: B018
    with pytest.raises(ValueError, match=r"Expected `mean` to hold 2 numbers, one per channel, but got \(0.1,\)"):
        ImageFormat(2, mean=(0.1,))
    with pytest.raises(ValueError, match=r"Expected `std` to be positive"):
        ImageFormat(1, std=(0.0,))


def test_a_net_of_one_channel_sees_what_three_equal_ones_see() -> None:
    three = build_net("fpn", "tu-tf_efficientnet_lite0", num_classes=2, weights="random").eval()
    one = copy.deepcopy(three)
    take_channels(one, 1)
    grey = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for net in (three, one):  # the encoder's own normalisation differs by channel
        net.image_scale.fill_(0.5)
        net.image_shift.fill_(0.1)
    with torch.no_grad():
        torch.testing.assert_close(one(grey).logits, three(grey.expand(-1, 3, -1, -1)).logits)
    five = copy.deepcopy(three)
    take_channels(five, 5)
    five(torch.rand(2, 5, 40, 33)).logits.sum().backward()
    assert next(five.encoder.parameters()).grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 5])
def test_training_and_prediction_with_other_channels(tmp_path: Path, channels: int) -> None:
    """16-bit target of 1 or 5 bands: trained, saved, resumed into predict.py, which reads with the run's range."""
    import predict
    import train_gta2cs

    rng = np.random.default_rng(0)
    for side, high, kind in (("source", 256, np.uint8), ("target", 4000, np.uint16)):
        for name in "abcd":
            pixels = rng.integers(0, high, (64, 64, channels)).astype(kind)
            odd_files.tiff(tmp_path / side / "images" / f"{name}.tif", pixels.squeeze(), planarconfig="contig")
            save(tmp_path / side / "labels" / f"{name}.png", rng.integers(0, 2, (64, 64)).astype(np.uint8))
        (tmp_path / side / "train.txt").write_text("a\nb\nc\n")
        (tmp_path / side / "val.txt").write_text("d\n")
    (tmp_path / "classes.yaml").write_text("names: [a, b]\n")
    data = train_gta2cs.DataConfig(
        pair="folder", data_root=tmp_path, crop=(64, 64), channels=channels, target_range=(0, 4000),
        mean=(0.5,) * channels, std=(0.3,) * channels,
    )  # fmt: skip
    config = train_gta2cs.Config(
        data=data,
        net=train_gta2cs.NetConfig(weights="random"),
        stages=[train_gta2cs.Stage("dacs")],
        batch_size=2,
        out=tmp_path / "run",
        dry_run=True,
    )
    train_gta2cs.main(config)
    out = tmp_path / "out"
    arguments = ["--checkpoint", tmp_path / "run" / "stage1_dacs" / "last.pt", "--images", tmp_path / "target/images"]
    assert predict.main(predict.parse([str(a) for a in [*arguments, "--out", out]])) == 0
    assert read_ids(out / "labels" / "a.png").shape == (64, 64)
