"""The data of step k depends on (seed, k, sample) alone: not on workers, ranks, resuming or the global generators."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gta2cs.loading import (
    MEAN,
    STD,
    Batch,
    StepData,
    crop_image,
    crop_label,
    draw_window,
    evaluation_batches,
    normalise,
    sample_generator,
    step_loader,
)
from gta2cs.samples import Labelled, Remembered, Unlabelled

SIZES = [(20, 30), (24, 18), (9, 40)]


def pixels(index: int, size: tuple[int, int] | None = None) -> Tensor:
    g = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (3, *(size or SIZES[index % 3])), dtype=torch.uint8, generator=g)


def first_channel(index: int) -> Tensor:
    return pixels(index)[0] % 5


def domain(count: int = 7) -> Labelled:
    """Labels are a function of the image, so that a geometry that differs between the two is seen."""
    names = [str(i) for i in range(count)]
    return Labelled(names, Remembered(count, pixels), Remembered(count, first_channel))


def target_domain(count: int = 5) -> Unlabelled:
    return Unlabelled([str(i) for i in range(count)], Remembered(count, pixels))


class Rare:
    """A stand-in for a rare-class sampler."""

    def __init__(self, wanted: int = 3) -> None:
        self.wanted = wanted

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        return int(torch.randint(7, (), generator=generator)), self.wanted


def steps(**options: object) -> StepData:
    defaults = {"batch_size": 2, "crop": (12, 16), "seed": 3, "source_scale": (0.5, 2.0), "target_scale": (0.9, 1.3)}
    return StepData(domain(), target_domain(), **{**defaults, **options})  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batch() -> None:
    batch = steps()[0]
    assert batch.source_images.shape == (2, 3, 12, 16)
    assert batch.source_images.dtype == torch.float32
    assert batch.source_labels.dtype == torch.int64
    assert batch.target_images is not None
    assert batch.target_images.shape == (2, 3, 12, 16)
    assert batch.samples.tolist() == [0, 1]
    assert StepData(domain(), batch_size=1, crop=(4, 4))[0].target_images is None


@pytest.mark.parametrize("sampler", [None, Rare()])
def test_workers_and_resuming_change_nothing(sampler: Rare | None) -> None:
    data = steps(sampler=sampler, rare_class_pixels=5)
    whole = list(step_loader(data, stop=6))
    assert len(whole) == 6
    assert not same(whole[0], whole[1])
    for workers, start in ((0, 3), (2, 0), (2, 4)):
        part = list(step_loader(data, start=start, stop=6, workers=workers))
        assert len(part) == 6 - start
        assert all(same(a, b) for a, b in zip(part, whole[start:], strict=True))


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = list(step_loader(steps(), stop=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert all(same(a, b) for a, b in zip(first, step_loader(steps(), stop=2), strict=True))


def test_ranks_split_the_global_batch() -> None:
    whole = steps(batch_size=4)[5]
    parts = [steps(batch_size=2, rank=rank)[5] for rank in (0, 1)]
    assert same(whole, Batch(*(torch.cat(both) for both in zip(*parts, strict=True))))


def test_seed_and_stream_matter() -> None:
    assert not same(steps(seed=3)[0], steps(seed=4)[0])
    numbers = {
        float(torch.rand((), generator=sample_generator(*key), dtype=torch.float64))
        for key in [(0, 0, 0, "a"), (0, 0, 1, "a"), (0, 1, 0, "a"), (1, 0, 0, "a"), (0, 0, 0, "b"), (0, 11, 1, "a")]
    }
    assert len(numbers) == 6
    first, second = sample_generator(1, 11, 1, ""), sample_generator(1, 1, 11, "")
    assert first.initial_seed() != second.initial_seed()


def test_source_draws_do_not_depend_on_target() -> None:
    alone = StepData(domain(), batch_size=2, crop=(12, 16), seed=3, source_scale=(0.5, 2.0))[4]
    assert torch.equal(alone.source_images, steps()[4].source_images)


def test_source_and_target_are_drawn_independently() -> None:
    data = StepData(domain(7), target_domain(7), batch_size=4, crop=(4, 4))
    pairs = [(a, b) for k in range(100) for a, b in zip(data[k].source_ids, data[k].target_ids, strict=True)]
    together = sum(int(a == b) for a, b in pairs) / len(pairs)
    assert abs(together - 1 / 7) < 0.06


def test_rare_class_crops_show_the_class_when_they_can() -> None:
    base = [Labelled(["0"], Remembered(1, lambda i: pixels(0, (30, 30))), Remembered(1, corner))]
    plain = StepData(base[0], batch_size=1, crop=(8, 8), sampler=Rare(4), rare_class_pixels=1, recrops=1)
    eager = StepData(base[0], batch_size=1, crop=(8, 8), sampler=Rare(4), rare_class_pixels=1, recrops=50)
    for data in (plain, eager):
        data.sampler = One(4)
    shown = [sum(bool((data[k].source_labels == 4).any()) for k in range(40)) for data in (plain, eager)]
    assert shown[0] < 20
    assert shown[1] > 35
    eager.sampler = One(99)  # nowhere: the last crop counts, and nothing hangs
    assert eager[0].source_labels.shape == (1, 8, 8)


class One:
    def __init__(self, wanted: int) -> None:
        self.wanted = wanted

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        return 0, self.wanted


def corner(index: int) -> Tensor:
    label = torch.zeros(30, 30, dtype=torch.uint8)
    label[:6, :6] = 4
    return label


# ------------------------------------------------------------------------------------------------------------- geometry

sides = st.integers(1, 24)


@given(sides, sides, sides, sides, st.booleans(), st.integers(0, 99))
def test_without_scaling_pixels_are_copied_in_step_with_labels(
    h: int, w: int, ch: int, cw: int, flip: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    ids = torch.arange(h * w).reshape(h, w) % 251
    image, label = ids.byte().expand(3, h, w), ids.byte()
    window = draw_window((h, w), (ch, cw), (1.0, 1.0), flip, g)
    cut, labels = crop_image(image, window, (ch, cw)), crop_label(label, window, (ch, cw))
    assert cut.shape == (3, ch, cw)
    assert labels.shape == (ch, cw)
    inside = labels != 255
    assert int(inside.sum()) == min(h, ch) * min(w, cw)
    assert torch.equal(cut[0][inside], labels[inside])
    if ch <= h and cw <= w:
        straight = labels.flip(-1) if window.flip else labels
        assert torch.equal(straight, label[window.top : window.top + ch, window.left : window.left + cw])


@given(sides, sides, sides, sides, st.floats(0.3, 3), st.integers(0, 99))
def test_scaled_crops_invent_no_label(h: int, w: int, ch: int, cw: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (h, w), dtype=torch.uint8, generator=g) * 200 + 7
    window = draw_window((h, w), (ch, cw), (scale, scale), True, g)
    labels = crop_label(label, window, (ch, cw))
    assert labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) <= {7, 207, 255}
    assert crop_image(label.expand(3, h, w), window, (ch, cw)).shape == (3, ch, cw)


def test_scaled_image_and_label_are_aligned() -> None:
    """A left-right edge ends up at the same column in both, within half a pixel of the interpolation."""
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, :, 20:] = 255
    label = (image[0] > 0).byte()
    for seed in range(30):
        window = draw_window((40, 40), (24, 24), (0.6, 2.5), True, torch.Generator().manual_seed(seed))
        cut, labels = crop_image(image, window, (24, 24)), crop_label(label, window, (24, 24))
        inside = labels != 255
        clear = inside & ((cut[0] < 100) | (cut[0] > 155))
        assert torch.equal((cut[0] > 127)[clear], (labels == 1)[clear])


def test_small_images_are_reflected_and_their_labels_ignored() -> None:
    image = torch.arange(3, dtype=torch.uint8).expand(3, 1, 3)
    window = draw_window((1, 3), (1, 8), (1.0, 1.0), False, torch.Generator().manual_seed(0))
    row = crop_image(image, window, (1, 8))[0, 0]
    offset = window.offset[1]
    expected = np.pad(np.arange(3), (offset, 5 - offset), mode="reflect")
    assert row.tolist() == expected.tolist()
    labels = crop_label(torch.zeros(1, 3, dtype=torch.uint8), window, (1, 8))
    assert labels.tolist() == [[255] * offset + [0] * 3 + [255] * (5 - offset)]


def test_scale_range_is_covered_and_flips_are_half() -> None:
    g = torch.Generator().manual_seed(0)
    windows = [draw_window((100, 100), (20, 20), (0.5, 2.0), True, g) for _ in range(400)]
    heights = [w.height for w in windows]
    assert min(heights) <= 11
    assert max(heights) >= 38
    assert 150 < sum(w.flip for w in windows) < 250
    assert {0, 80} <= {draw_window((100, 100), (20, 20), (1, 1), False, g).top for _ in range(2000)}


# ---------------------------------------------------------------------------------------------- the rest, and errors


def test_normalise() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(normalise(images), (images / 255 - mean) / std)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_never_mix_sizes(workers: int) -> None:
    def image_at(index: int) -> Tensor:
        return pixels(index, (8, 8) if index < 3 else (6, 8))

    def label_at(index: int) -> Tensor:
        return image_at(index)[0]

    data = Labelled(list("abcde"), Remembered(5, image_at), Remembered(5, label_at))
    batches = list(evaluation_batches(data, batch_size=2, workers=workers))
    assert [indices for *_, indices in batches] == [[0, 1], [2], [3, 4]]
    for images, labels, indices in batches:
        assert labels is not None
        assert labels.dtype == torch.int64
        assert torch.equal(labels[0], data[indices[0]][1].long())
        torch.testing.assert_close(images[-1:], normalise(data[indices[-1]][0][None]))
    unlabelled = list(evaluation_batches(data.without_labels(), batch_size=5, indices=range(1, 3)))
    assert unlabelled[0][1] is None
    assert unlabelled[0][2] == [1, 2]


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="Expected `target` to be Unlabelled, but got Labelled"):
        StepData(domain(), domain(), batch_size=1, crop=(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected `target_scale` to be \(low, high\) .* but got \(2.0, 1.0\)"):
        steps(target_scale=(2.0, 1.0))
    with pytest.raises(ValueError, match="Expected `crop` to be two positive numbers"):
        steps(crop=(0, 4))
    with pytest.raises(ValueError, match="Expected `source` to hold at least one image, but it is empty"):
        StepData(domain(0), batch_size=1, crop=(4, 4))


def test_resizing_agrees_with_interpolate_on_the_whole_image() -> None:
    image = pixels(0, (16, 16))
    window = draw_window((16, 16), (32, 32), (2.0, 2.0), False, torch.Generator().manual_seed(0))
    expected = F.interpolate(image[None], (32, 32), mode="bilinear", antialias=True)[0]
    assert torch.equal(crop_image(image, window, (32, 32)), expected)
