"""Boxes, blocks and boundary bands against loops."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit


def textbook_band(mask: Tensor, size: int) -> Tensor:
    """Dilation unequal erosion, a loop over pixels and their windows."""
    before, after = size // 2, (size - 1) // 2
    band = torch.zeros_like(mask)
    for place in torch.cartesian_prod(*(torch.arange(side) for side in mask.shape)).tolist():
        window = mask[(place[0], *(slice(max(p - before, 0), p + after + 1) for p in place[1:]))]
        band[tuple(place)] = bool(window.any()) != bool(window.all())
    return band


@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 2), size=st.integers(1, 9),
    space=st.lists(st.integers(1, 7), min_size=1, max_size=3),
)  # fmt: skip
def test_boundary_band(seed, n, size, space):
    mask = torch.rand(n, *space, generator=torch.Generator().manual_seed(seed)) < 0.7
    assert torch.equal(udakit.boundary_band(mask, kernel_size=size), textbook_band(mask, size))


def test_boundary_band_released_kernel():
    """EHTDI's 2x2 element marks the pixels right of and below an edge, one pixel wide, and not the image border."""
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 2:, 2:] = True
    band = udakit.boundary_band(mask, kernel_size=2)[0].int().tolist()
    assert band == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]


def test_uniform_mask_has_no_band():
    for value in (True, False):
        assert not udakit.boundary_band(torch.full((2, 5, 5), value), kernel_size=5).any()


def test_boundary_band_errors():
    with pytest.raises(TypeError, match=r"Expected `mask` to be a bool tensor, but got torch\.int64"):
        udakit.boundary_band(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Expected `kernel_size` to be at least 1, but got 0"):
        udakit.boundary_band(torch.zeros(1, 2, 2, dtype=torch.bool), kernel_size=0)


@given(seed=st.integers(0, 2**31), size=st.lists(st.integers(1, 30), min_size=1, max_size=3), area=st.floats(0.05, 1.0))
def test_box_is_one_box_of_the_area(seed, size, area):
    g = torch.Generator().manual_seed(seed)
    for mask in udakit.draw_box_mask(3, size, area=(area, area), generator=g):
        lines = [mask.movedim(axis, 0).reshape(size[axis], -1).any(1) for axis in range(len(size))]
        box = lines[0]
        for line in lines[1:]:
            box = box.unsqueeze(-1) & line
        assert torch.equal(mask, box)
        sides = [int(line.sum()) for line in lines]
        for line in lines:
            assert (line.int().diff() != 0).sum() <= 2
        if 0 not in sides:
            # Each side is rounded by at most half a pixel.
            low, high = (math.prod(max(side + d, 0) for side in sides) for d in (-0.5, 0.5))
            assert low - 1e-3 <= area * math.prod(size) <= high + 1e-3


def test_box_of_a_volume_is_of_any_shape():
    """Exponents of sides: each of three is small as often as the others, and they add up to 1."""
    masks = udakit.draw_box_mask(2000, (40, 40, 40), area=(0.1, 0.1), generator=torch.Generator().manual_seed(0))
    sides = torch.stack(
        [masks.flatten(1).any(1) * 1.0, *(masks.amax(dim=axes).sum(1) for axes in ((2, 3), (1, 3), (1, 2)))]
    )
    exponents = (sides[1:] / 40).log() / math.log(0.1)
    assert (exponents.mean(1) - 1 / 3).abs().max() < 0.02
    assert (exponents.std(1) - math.sqrt(1 / 18)).abs().max() < 0.02  # a gap of two uniform numbers


def test_two_dimensional_boxes_are_those_of_before():
    """The order of random numbers of images has not changed."""
    g = torch.Generator().manual_seed(3)
    mask = udakit.draw_box_mask(4, (12, 20), area=(0.2, 0.6), generator=g)
    u = torch.rand(4, 4, 1, generator=torch.Generator().manual_seed(3))
    share = 0.2 + (0.6 - 0.2) * u[0]
    for length, exponent, axis in ((12, u[1], 2), (20, 1 - u[1], 1)):
        assert torch.equal(mask.any(axis).sum(1), (length * share**exponent).round().long().flatten())


def test_box_reaches_every_edge():
    masks = udakit.draw_box_mask(500, (6, 9), area=(0.3, 0.6), generator=torch.Generator().manual_seed(0))
    for edge in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert 0 < edge.any(1).float().mean() < 1


@pytest.mark.parametrize(("size", "cells"), [((13, 22), (3, 6)), ((22,), (6,)), ((5, 13, 22), (1, 3, 6))])
def test_blocks_follow_mic(size, cells):
    """Nearest-neighbour stretching of a round(H / b) x round(W / b) grid; 5.5 rounds to the even 6."""
    g = torch.Generator().manual_seed(0)
    mask = udakit.draw_block_mask(3, size, block_size=4, ratio=0.6, generator=g)
    grid = torch.rand(3, *cells, generator=torch.Generator().manual_seed(0)) < 0.6
    expected = torch.nn.functional.interpolate(grid[:, None].float(), size, mode="nearest")[:, 0] > 0
    assert torch.equal(mask, expected)


def test_block_ratio_is_the_share_removed():
    g = torch.Generator().manual_seed(0)
    share = udakit.draw_block_mask(200, (64, 64), block_size=8, ratio=0.7, generator=g).float().mean()
    assert abs(share.item() - 0.7) < 0.02
    assert udakit.draw_block_mask(2, (4, 4)).shape == (2, 4, 4)


@pytest.mark.parametrize("draw", [udakit.draw_box_mask, udakit.draw_block_mask])
def test_draw_errors(draw):
    with pytest.raises(ValueError, match=r"Expected `size` to be \(height, width\)"):
        draw(2, (0, 4))
    for size in ((), (2, 2, 2, 2), (0,), (4, 4, -1), 4.0):
        with pytest.raises(ValueError, match="Expected `size` to be"):
            draw(2, size)
    with pytest.raises(ValueError, match="Expected `n` to be at least 0, but got -1"):
        draw(-1, (4, 4))
    with pytest.raises(ValueError, match="Expected `generator` to be on the input's device 'meta'"):
        draw(2, (4, 4), generator=torch.Generator(), device="meta")


@pytest.mark.slow
def test_a_compiled_draw_can_be_used_at_once() -> None:
    """Inductor fuses the mask with what uses it, which a view of its bytes does not allow."""
    zeros, ones = torch.zeros(2, 3, 9, 11), torch.ones(2, 3, 9, 11)

    def cut(n: int) -> Tensor:
        return torch.where(udakit.draw_box_mask(n, (9, 11)).unsqueeze(1), ones, zeros)

    for mask in torch.compile(cut, fullgraph=True)(2)[:, 0]:  # torch's own random numbers are others when compiled
        rows, columns = mask.amax(1), mask.amax(0)
        assert torch.equal(mask, rows[:, None] * columns)
        assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("draw", [udakit.draw_box_mask, udakit.draw_block_mask])
def test_a_shape_in_place_of_a_size_hears_which_part_to_take(draw: Callable[..., Tensor]) -> None:
    volume = torch.zeros(2, 1, 4, 6, 8)
    with pytest.raises(ValueError, match=r"\.shape\[-2:\]; of signals and volumes with tuple\(x\.shape\[2:\]\)"):
        draw(2, volume.shape[2:])
    assert draw(2, tuple(volume.shape[2:])).shape == (2, 4, 6, 8)
    assert draw(2, volume.shape[-2:]).shape == (2, 6, 8)


@pytest.mark.parametrize("size", [(7,), (6, 9), (4, 5, 6)])
def test_many_boxes_are_those_of_few(size: tuple[int, ...]) -> None:
    """The CPU draws up to some masks in another way: the boxes are the same."""
    generators = [torch.Generator().manual_seed(i) for i in range(80)]
    many = udakit.draw_box_mask(80, size, area=(0.2, 0.8), generator=generators)
    for i, mask in enumerate(many):
        alone = udakit.draw_box_mask(1, size, area=(0.2, 0.8), generator=[torch.Generator().manual_seed(i)])
        assert torch.equal(mask, alone[0])
