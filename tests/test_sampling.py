"""Rare-class sampling: probabilities against the formula, draws against their distribution, resuming without state."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from udakit import GTA5_IDS, RareClassSampler, count_classes, map_ids, rare_class_probabilities, read_class_stats


def textbook_probabilities(pixels: list[float], temperature: float) -> list[float]:
    total = sum(pixels)
    if not total:
        return [0.0] * len(pixels)
    weights = [math.exp((1 - n / total) / temperature) if n else 0.0 for n in pixels]
    return [w / sum(weights) for w in weights]


# --- probabilities -----------------------------------------------------------------------------------------------


@given(
    pixels=st.lists(st.integers(0, 10**9), min_size=1, max_size=8), temperature=st.sampled_from([0.01, 0.1, 1.0, 50.0])
)
def test_probabilities_are_the_formula(pixels: list[int], temperature: float) -> None:
    out = rare_class_probabilities(torch.tensor(pixels).double(), temperature=temperature)
    expected = torch.tensor(textbook_probabilities(pixels, temperature), dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    single = rare_class_probabilities(torch.tensor(pixels), temperature=temperature)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-6)


def test_a_class_that_never_occurs_is_dropped_not_favoured() -> None:
    out = rare_class_probabilities(torch.tensor([100, 0, 50]))
    assert out[1] == 0
    assert out.sum().item() == pytest.approx(1)
    assert rare_class_probabilities(torch.zeros(3)).tolist() == [0, 0, 0]
    assert rare_class_probabilities(torch.tensor([1e308, 1e308], dtype=torch.float64)).tolist() == [
        0.5,
        0.5,
    ]  # each is finite


@pytest.mark.parametrize("temperature", [1e-8, 1e-3, 1e6])
def test_no_temperature_overflows(temperature: float) -> None:
    out = rare_class_probabilities(torch.tensor([10**11, 1, 500]), temperature=temperature)
    assert bool(out.isfinite().all())
    assert out.sum().item() == pytest.approx(1)


def test_probabilities_under_vmap() -> None:
    counts = torch.tensor([[5, 0, 20], [1, 1, 2]])
    expected = torch.stack([rare_class_probabilities(row, temperature=0.5) for row in counts])
    found = torch.vmap(lambda row: rare_class_probabilities(row, temperature=0.5))(counts)
    torch.testing.assert_close(found, expected)


def test_probabilities_errors() -> None:
    with pytest.raises(ValueError, match=r"`class_pixels` to be \(C,\), but got \(2, 3\)\. .*\.sum\(0\)"):
        rare_class_probabilities(torch.ones(2, 3))
    for counts in ([-1.0, 2.0], [float("nan"), 2.0], [float("inf"), 2.0]):
        with pytest.raises(ValueError, match=r"`class_pixels` to be pixel counts, finite and at least 0"):
            rare_class_probabilities(torch.tensor(counts))
        with pytest.raises(ValueError, match=r"`class_pixels` to be pixel counts, finite and at least 0"):
            RareClassSampler(torch.tensor([counts]))
    with pytest.raises(ValueError, match=r"`class_pixels` to have at least one class, but got \(0,\)"):
        rare_class_probabilities(torch.ones(0))
    with pytest.raises(ValueError, match=r"`temperature` to be above 0, but got 0"):
        rare_class_probabilities(torch.ones(3), temperature=0.0)


# --- counting ----------------------------------------------------------------------------------------------------


class _Endless:
    """A map-style data set that never raises IndexError, as many do."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        return "image", torch.full((2, 2), index % 2)


def test_count_of_tensors_arrays_generators_and_data_sets() -> None:
    a, b = torch.tensor([[0, 2], [2, 255]]), torch.tensor([[1, 1], [-1, 7]])
    expected = [[1, 0, 2], [0, 2, 0]]
    for maps in ([a, b], [a.numpy(), b.numpy().astype(np.int16)], iter([a, b]), torch.stack([a, b])):
        counts = count_classes(maps, num_classes=3)
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected
    assert count_classes([], num_classes=3).shape == (0, 3)
    done: list[int] = []
    counts = count_classes(_Endless(), num_classes=2, load=lambda item: item[1], progress=done.append)
    assert counts.tolist() == [[4, 0], [0, 4], [4, 0]]
    assert done == [1, 2, 3]


def test_count_of_files_as_they_are_shipped(tmp_path: Path) -> None:
    """A palette PNG (GTA5) is read as indices, and mapped by `load`; a plain one needs nothing."""
    ids = np.array([[7, 26], [26, 0]], dtype=np.uint8)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    palette.save(tmp_path / "1.png")
    Image.fromarray(np.array([[0, 1], [1, 255]], dtype=np.uint8)).save(tmp_path / "2.png")
    mapped = count_classes(
        [tmp_path / "1.png"], num_classes=19, load=lambda path: map_ids(np.asarray(Image.open(path)), GTA5_IDS)
    )
    assert mapped[0].nonzero().flatten().tolist() == [0, 13]
    assert mapped[0, [0, 13]].tolist() == [1, 2]
    assert count_classes([str(tmp_path / "2.png")], num_classes=2).tolist() == [[1, 2]]


def test_count_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"integer maps, but got torch\.float32 in item 1"):
        count_classes([torch.zeros(2, dtype=torch.int64), torch.zeros(2)], num_classes=2)
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb\.png' to be a one-channel label image, but got shape \(2, 2, 3\)"):
        count_classes([tmp_path / "rgb.png"], num_classes=2)


def test_class_statistics_of_daformer(tmp_path: Path) -> None:
    stats = {"a/1.png": {"0": 5, "18": 7}, "a/2.png": {"2": 9, "255": 3}}
    listed = [{**counts, "file": name} for name, counts in stats.items()]
    for content in (stats, listed):
        file = tmp_path / "stats.json"
        file.write_text(json.dumps(content))
        names, counts = read_class_stats(file, num_classes=19)
        assert names == ["a/1.png", "a/2.png"]
        assert counts.shape == (2, 19)
        assert {(i, c): int(counts[i, c]) for i, c in counts.nonzero().tolist()} == {(0, 0): 5, (0, 18): 7, (1, 2): 9}
    file.write_text(json.dumps([[1, 2]]))
    with pytest.raises(ValueError, match=r"stats\.json' to be a list of"):
        read_class_stats(file, num_classes=19)


# --- the sampler -------------------------------------------------------------------------------------------------

TABLE = torch.tensor([[9000, 0, 0, 0], [8000, 3500, 0, 0], [7000, 0, 20, 0], [9000, 4000, 10, 0]])


def test_draws_follow_the_probabilities() -> None:
    sampler = RareClassSampler(TABLE, temperature=0.5)
    assert sampler.class_probabilities.tolist() == pytest.approx(
        textbook_probabilities(TABLE.sum(0).tolist(), 0.5), rel=1e-9
    )
    draws = [sampler.at(0, k) for k in range(4000)]
    share = Counter(class_id for _, class_id in draws)
    for class_id, p in enumerate(sampler.class_probabilities.tolist()):
        assert share[class_id] / 4000 == pytest.approx(p, abs=0.04)
    shown = {c: {image for image, k in draws if k == c} for c in range(4)}
    # Class 1 from the images over 3000 pixels; class 2, nowhere over it, from any that shows it; class 3 from none.
    assert shown == {0: {0, 1, 2, 3}, 1: {1, 3}, 2: {2, 3}, 3: set()}
    among = Counter(image for image, k in draws if k == 0)
    assert min(among.values()) > 0.8 * sum(among.values()) / 4


@pytest.mark.parametrize(
    ("min_pixels", "images"), [(4000, {3}), (3500, {1, 3}), (0.3, {1, 3}), (0.305, {3}), (0, {1, 3})]
)
def test_min_pixels_in_pixels_and_as_a_share(min_pixels: float, images: set[int]) -> None:
    sampler = RareClassSampler(TABLE, temperature=0.5, min_pixels=min_pixels)
    assert {image for image, k in (sampler.at(0, k) for k in range(500)) if k == 1} == images


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    """What was drawn before, in which order and by which object plays no part: resuming needs no loader state."""
    whole = [RareClassSampler(TABLE, temperature=0.5).at(7, k) for k in range(40)]
    other = RareClassSampler(TABLE, temperature=0.5)
    list(other)
    assert [other.at(7, k) for k in reversed(range(40))] == whole[::-1]
    assert [other.at(8, k) for k in range(40)] != whole
    assert [other.at(7, k) for k in range(1, 41)] != whole
    # A seed one higher is not the same run one sample later.
    assert [other.at(8, k) for k in range(39)] != whole[1:]
    state = torch.random.get_rng_state()
    other.at(7, 3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_iterating_is_a_plain_sampler() -> None:
    sampler = RareClassSampler(TABLE, num_samples=11, generator=torch.Generator().manual_seed(3))
    assert len(sampler) == 11
    first, second = list(sampler), list(sampler)
    assert first != second  # one stream, not the same epoch again
    again = RareClassSampler(TABLE, num_samples=11, generator=torch.Generator().manual_seed(3))
    assert list(again) == first
    loader = DataLoader(torch.arange(4), sampler=RareClassSampler(TABLE), batch_size=2)  # type: ignore[arg-type]
    assert sum(len(batch) for batch in loader) == 4
    torch.manual_seed(5)
    a = list(RareClassSampler(TABLE, num_samples=20))
    torch.manual_seed(5)
    assert list(RareClassSampler(TABLE, num_samples=20)) == a


@given(seed=st.integers(0, 2**31), images=st.integers(1, 6), classes=st.integers(1, 5))
def test_a_drawn_image_shows_the_drawn_class(seed: int, images: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 3, (images, classes), generator=generator) * torch.randint(
        1, 9000, (images, classes), generator=generator
    )
    table[0, 0] += 1
    sampler = RareClassSampler(table)
    for _ in range(20):
        image, class_id = sampler.draw(generator)
        assert table[image, class_id] > 0


def test_sampler_errors() -> None:
    with pytest.raises(ValueError, match=r"`class_pixels` to be \(images, C\), but got \(4,\)"):
        RareClassSampler(TABLE[0])
    with pytest.raises(ValueError, match="to have a positive count, but got only zeros"):
        RareClassSampler(torch.zeros(3, 2))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(
            ValueError, match="`class_pixels` to be pixel counts, finite and at least 0, but got other values"
        ):
            RareClassSampler(torch.tensor([[wrong, 2.0]]))
    with pytest.raises(ValueError, match=r"`min_pixels` to be at least 0, but got -1"):
        RareClassSampler(TABLE, min_pixels=-1)
    with pytest.raises(ValueError, match=r"`num_samples` to be at least 1, but got 0"):
        RareClassSampler(TABLE, num_samples=0)
