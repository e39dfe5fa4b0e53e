"""A generator for each image: what each image draws does not depend on its batch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import udakit

LABELS = torch.arange(12).view(3, 1, 4) % 5


def seeded(n: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + i) for i in range(n)]


def tensors(drawn: Any) -> list[Tensor]:
    return [drawn] if isinstance(drawn, Tensor) else [x for x in drawn if isinstance(x, Tensor)]


DRAWS: dict[str, Callable[[slice, Any], Any]] = {
    "draw_classes": lambda at, g: udakit.draw_classes(LABELS[at], num_classes=5, generator=g),
    "draw_box_mask": lambda at, g: udakit.draw_box_mask(len(LABELS[at]), (9, 7), generator=g),
    "draw_block_mask": lambda at, g: udakit.draw_block_mask(len(LABELS[at]), (9, 7), block_size=2, generator=g),
    "draw_token_mask": lambda at, g: udakit.draw_token_mask(len(LABELS[at]), 11, generator=g),
    "draw_strong_augment": lambda at, g: udakit.draw_strong_augment(
        len(LABELS[at]), gamma=(0.5, 2), noise_probability=0.9, sharpness_probability=0.5, generator=g
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_batch_draws_what_its_images_draw_alone(name: str) -> None:
    together = tensors(DRAWS[name](slice(None), seeded()))
    alone = [tensors(DRAWS[name](slice(i, i + 1), g)) for i, g in enumerate(seeded())]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("given", [seeded(2), ()])
def test_another_number_of_generators_is_refused(name: str, given: Sequence[torch.Generator]) -> None:
    with pytest.raises(ValueError, match=r"Expected `generator` to be one generator or a list of 3, .* but got"):
        DRAWS[name](slice(None), given)


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_no_generator_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"Expected `generator` to be a torch\.Generator or None, but got 0"):
        DRAWS[name](slice(None), [0, 1, 2])


def test_modules_hand_the_generators_on() -> None:
    images = torch.rand(3, 3, 1, 4)
    source, target = udakit.SegBatch(images, LABELS), udakit.SegBatch(-images, LABELS)
    augment = udakit.StrongAugment(mean=None, std=None)
    together = augment(images, generator=seeded()), udakit.ClassMix(5)(source, target, generator=seeded())[1]
    for i in range(3):
        one = udakit.SegBatch(*(x[i : i + 1] for x in source[:2])), udakit.SegBatch(*(x[i : i + 1] for x in target[:2]))
        assert torch.equal(together[0][i], augment(images[i : i + 1], generator=seeded()[i])[0])
        assert torch.equal(together[1][i], udakit.ClassMix(5)(*one, generator=seeded()[i])[1][0])
