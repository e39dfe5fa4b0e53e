"""Label tables, checks and sizes, against loops over pixels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit import check_labels, downscale_labels, map_ids, resize_labels


def textbook_downscale(labels: Tensor, factor: int, num_classes: int, min_ratio: float, ignore: int) -> Tensor:
    n, height, width = labels.shape
    out = torch.full((n, height // factor, width // factor), ignore, dtype=labels.dtype)
    for i in range(n):
        for y in range(height // factor):
            for x in range(width // factor):
                cell = labels[i, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].flatten().tolist()
                votes = Counter(c if 0 <= c < num_classes and c != ignore else num_classes for c in cell)
                winner = min(votes, key=lambda c: (-votes[c], c))
                if winner < num_classes and votes[winner] / len(cell) >= min_ratio - 1e-12:
                    out[i, y, x] = winner
    return out


# --- tables ------------------------------------------------------------------------------------------------------


def test_tables_of_the_three_data_sets() -> None:
    names = udakit.CITYSCAPES_CLASSES
    assert len(names) == 19
    assert udakit.CITYSCAPES_PALETTE.shape == (19, 3)
    assert sorted(udakit.CITYSCAPES_IDS.values()) == list(range(19))
    assert {names[t]: i for i, t in udakit.CITYSCAPES_IDS.items()} == {
        "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
        "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
        "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
    }  # fmt: skip
    assert udakit.GTA5_IDS == udakit.CITYSCAPES_IDS
    assert {names[t]: i for i, t in udakit.SYNTHIA_IDS.items()} == {
        "road": 3, "sidewalk": 4, "building": 2, "wall": 21, "fence": 5, "pole": 7, "traffic light": 15,
        "traffic sign": 9, "vegetation": 6, "terrain": 16, "sky": 1, "person": 10, "rider": 17, "car": 8, "truck": 18,
        "bus": 19, "train": 20, "motorcycle": 12, "bicycle": 11,
    }  # fmt: skip
    assert {names[t] for t in set(range(19)) - set(udakit.SYNTHIA_16_CLASSES)} == {"terrain", "truck", "train"}
    left_out = set(udakit.SYNTHIA_16_CLASSES) - set(udakit.SYNTHIA_13_CLASSES)
    assert {names[t] for t in left_out} == {"wall", "fence", "pole"}


def test_palette_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        udakit.CITYSCAPES_PALETTE[0, 0] = 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_map_ids_on_every_id(dtype: torch.dtype) -> None:
    ids = torch.arange(256 if dtype == torch.uint8 else 3000).to(dtype)
    if dtype != torch.uint8:
        ids = torch.cat([ids, torch.tensor([-1, -5], dtype=dtype)])
    expected = torch.tensor([udakit.SYNTHIA_IDS.get(int(i), 255) for i in ids]).to(dtype)
    out = map_ids(ids, udakit.SYNTHIA_IDS)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    array = map_ids(ids.numpy(), udakit.SYNTHIA_IDS)
    assert array.dtype == ids.numpy().dtype
    assert np.array_equal(array, expected.numpy())


def test_map_ids_takes_the_16_bit_labels_of_synthia_and_negative_keys() -> None:
    raw = np.array([[3, 26001, 65535]], dtype=np.uint16)
    assert map_ids(raw, udakit.SYNTHIA_IDS).tolist() == [[0, 255, 255]]
    assert map_ids(torch.tensor([-1, 0, 7, -2]), {-1: 4, 7: 5}, default=9).tolist() == [4, 9, 5, 9]
    assert map_ids(torch.tensor([3, 4]), {}).tolist() == [255, 255]
    # Keys that the dtype cannot hold are no error: the licence plate, -1, occurs in no 8-bit file.
    for labels in (torch.tensor([7, 255], dtype=torch.uint8), np.array([7, 255], dtype=np.uint8)):
        assert map_ids(labels, {-1: 9, 7: 0, 26001: 9}).tolist() == [0, 255]


def test_map_ids_twice_is_a_head_of_16_classes() -> None:
    train_ids = map_ids(torch.arange(22), udakit.SYNTHIA_IDS)
    of_sixteen = map_ids(train_ids, {t: k for k, t in enumerate(udakit.SYNTHIA_16_CLASSES)})
    assert sorted(set(of_sixteen.tolist())) == [*range(16), 255]
    assert of_sixteen[10] == udakit.SYNTHIA_16_CLASSES.index(11)
    assert of_sixteen[18] == 255  # SYNTHIA's truck is none of the 16


def test_map_ids_errors() -> None:
    with pytest.raises(ValueError, match=r"dtype that holds the new ids 0\.\.300, but got uint8"):
        map_ids(torch.zeros(2, dtype=torch.uint8), {0: 300, 1: 0})
    with pytest.raises(ValueError, match=r"dtype that holds the new ids -1\.\.0, but got uint8"):
        map_ids(np.zeros(2, dtype=np.uint8), {0: 0}, default=-1)
    with pytest.raises(TypeError, match=r"`labels` to be an integer tensor, but got torch\.float32"):
        map_ids(torch.zeros(2), {})
    with pytest.raises(TypeError, match="`labels` to be an integer array, but got float64"):
        map_ids(np.zeros(2), {})


# --- check_labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_check_labels_names_ids_and_counts(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 18, 255], [33, 33, 26]]).to(dtype)
    check_labels(labels[:1], num_classes=19)
    with pytest.raises(ValueError, match=r"`a\.png` to hold ids 0\.\.18 or 255, but got 26 \(1 pixel\), 33 \(2 pix"):
        check_labels(labels, num_classes=19, name="a.png")
    with pytest.raises(ValueError, match=r"0\.\.18 or 250, but got 255 \(1 pixel\)"):
        check_labels(labels[:1], num_classes=19, ignore_index=250)


def test_check_labels_negative_many_and_float() -> None:
    check_labels(torch.tensor([-1, 0]), num_classes=2, ignore_index=-1)
    with pytest.raises(ValueError, match=r"got -1 \(1 pixel\)\."):
        check_labels(torch.tensor([-1, 0]), num_classes=2)
    with pytest.raises(ValueError, match=r"and 12 more ids\."):
        check_labels(torch.arange(30), num_classes=10)
    with pytest.raises(TypeError, match=r"integer tensor, but got torch\.float32"):
        check_labels(torch.zeros(3), num_classes=2)


# --- downscale ---------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    factor=st.integers(1, 5),
    num_classes=st.integers(1, 5),
    min_ratio=st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.75, 1.0]),
    ignore=st.sampled_from([255, 0, 2]),
    dtype=st.sampled_from([torch.int64, torch.uint8]),
)
def test_downscale_is_the_loop(seed, factor, num_classes, min_ratio, ignore, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes + 1, (2, 2 * factor, 3 * factor), generator=generator)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.5, labels[:, :1, :1], labels)
    labels = torch.where(labels == num_classes, ignore, labels).to(dtype)
    out = downscale_labels(labels, factor, num_classes=num_classes, min_ratio=min_ratio, ignore_index=ignore)
    assert out.dtype == dtype
    assert torch.equal(out, textbook_downscale(labels, factor, num_classes, min_ratio, ignore))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([1, 1, 1, 0], 1),  # three quarters are enough
        ([1, 1, 0, 0], 255),  # a half is not
        ([255, 255, 255, 1], 255),  # ignored pixels compete
        ([1, 1, 1, 255], 1),
        ([1, 1, 1, 7], 1),  # an id >= C is an ignored pixel
        ([7, 7, 7, 7], 255),
    ],
)
def test_downscale_of_a_cell(cell: list[int], expected: int) -> None:
    labels = torch.tensor(cell).view(1, 2, 2)
    assert downscale_labels(labels, 2, num_classes=3).item() == expected


def test_downscale_ties() -> None:
    options = {"num_classes": 3, "min_ratio": 0.5}
    assert downscale_labels(torch.tensor([[[2, 1], [1, 2]]]), 2, **options).item() == 1  # the lowest id
    assert downscale_labels(torch.tensor([[[255, 2], [2, 255]]]), 2, **options).item() == 2  # ignored pixels lose


@pytest.mark.parametrize("factor", [3, 7, 10])
def test_downscale_share_is_not_lost_to_rounding(factor: int) -> None:
    """A share of exactly min_ratio is kept, although k / f^2 is no binary fraction."""
    area = factor * factor
    for count in range(area // 2 + 1, area + 1):
        labels = torch.zeros(area, dtype=torch.int64)
        labels[:count] = 1
        out = downscale_labels(labels.view(1, factor, factor), factor, num_classes=2, min_ratio=count / area)
        assert out.item() == 1, count


def test_downscale_errors() -> None:
    labels = torch.zeros(1, 6, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`labels` to have sides that `factor` 2 divides, but got \(1, 6, 9\)"):
        downscale_labels(labels, 2, num_classes=2)
    with pytest.raises(ValueError, match=r"`factor` to be at least 1, but got 0"):
        downscale_labels(labels, 0, num_classes=2)
    with pytest.raises(ValueError, match=r"`min_ratio` to be in \[0, 1\], but got 75"):
        downscale_labels(labels, 3, num_classes=2, min_ratio=75)
    with pytest.raises(ValueError, match=r"`ignore_index` to be in \[0, 255\], but got -1"):
        downscale_labels(labels.byte(), 3, num_classes=2, ignore_index=-1)
    with pytest.raises(TypeError, match="`labels` to be an int64 or uint8 tensor"):
        downscale_labels(labels.float(), 3, num_classes=2)


# --- resize ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), size=st.tuples(*[st.integers(1, 80)] * 4))
def test_resize_takes_the_pixels_of_interpolate(seed: int, size: tuple[int, int, int, int]) -> None:
    labels = torch.randint(256, (2, *size[:2]), generator=torch.Generator().manual_seed(seed))
    expected = F.interpolate(labels[:, None].double(), size[2:], mode="nearest")[:, 0].long()
    assert torch.equal(resize_labels(labels, size[2:]), expected)
    assert torch.equal(resize_labels(labels.byte(), size[2:]), expected.byte())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_resize_invents_no_id(dtype: torch.dtype) -> None:
    """Through a half-precision image dtype 26001 becomes 26000; here ids are never computed with."""
    top = 255 if dtype == torch.uint8 else 26001
    labels = torch.tensor([[[0, top], [254, 255]]]).to(dtype)
    out = resize_labels(labels, (7, 5))
    assert out.dtype == dtype
    assert set(out.flatten().tolist()) == {0, top, 254, 255}


def test_resize_errors() -> None:
    with pytest.raises(TypeError, match=r"integer tensor, but got torch\.float32"):
        resize_labels(torch.zeros(1, 2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"`size` to be \(length,\), .* for `labels` \(2, 2\), but got \(2, 2\)"):
        resize_labels(torch.zeros(2, 2, dtype=torch.int64), (2, 2))
    with pytest.raises(
        ValueError, match=r"`size` to be \(height, width\), two positive integers for `labels` .*, but got \(0, 2\)"
    ):
        resize_labels(torch.zeros(1, 2, 2, dtype=torch.int64), (0, 2))
