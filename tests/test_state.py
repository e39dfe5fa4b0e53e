"""What all parts with state or random numbers keep to, whatever the process has as its defaults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import udakit


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("bfloat16_by_default")
@pytest.mark.parametrize(
    "make",
    [
        lambda: udakit.ClassPrototypes(2, 3),
        lambda: udakit.InconsistencyLoss(2),
        lambda: udakit.ClassQuantileSelector(2, 0.5),
    ],
)
def test_state_is_float32_whatever_the_default(make) -> None:
    assert {x.dtype for x in make().buffers() if x.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: udakit.draw_box_mask(4, (64, 64), generator=g),
        lambda g: udakit.draw_block_mask(4, (64, 64), block_size=4, generator=g),
        lambda g: udakit.draw_classes(torch.arange(64).view(1, 8, 8), num_classes=64, generator=g),
        lambda g: udakit.draw_strong_augment(8, generator=g).hue,
    ],
)
def test_draws_do_not_depend_on_the_default_dtype(draw, request: pytest.FixtureRequest) -> None:
    expected = draw(torch.Generator().manual_seed(0))
    request.getfixturevalue("bfloat16_by_default")
    assert torch.equal(draw(torch.Generator().manual_seed(0)), expected)


def test_the_sampler_draws_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        sampler = udakit.RareClassSampler([[5, 0], [1, 4]], min_pixels=1)
        assert sampler.at(0, 3)[0] in (0, 1)


@pytest.mark.parametrize("temperature", [nn.Parameter(torch.tensor(0.5)), torch.empty((), device="meta")])
def test_a_number_that_cannot_be_read_or_learned_is_refused(temperature: torch.Tensor) -> None:
    x = torch.randn(1, 3, 2, 2)
    with pytest.raises(TypeError, match="`temperature` to be a number, but got a tensor that"):
        udakit.kd_loss(x, x, temperature=temperature)


def test_what_a_subclass_adds_follows_the_dtype() -> None:
    class Scaled(udakit.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__(class_weight=torch.tensor([0.1, 0.9]))
            self.scale = nn.Parameter(torch.ones(()))
            self.head = nn.BatchNorm2d(2)

    made = nn.Sequential(Scaled()).half()[0]
    assert {x.dtype for x in made.parameters()} == {torch.float16}
    assert made.head.running_mean.dtype == torch.float16
    assert torch.equal(made.class_weight, torch.tensor([0.1, 0.9]))
