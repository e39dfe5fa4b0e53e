"""Boxes, blocks and boundary bands against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit


def textbook_band(mask: Tensor, size: int) -> Tensor:
    """Dilation unequal erosion, a loop over pixels and their windows."""
    n, h, w = mask.shape
    before, after = size // 2, (size - 1) // 2
    band = torch.zeros_like(mask)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                window = mask[i, max(y - before, 0) : y + after + 1, max(x - before, 0) : x + after + 1]
                band[i, y, x] = bool(window.any()) != bool(window.all())
    return band


@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 2), h=st.integers(1, 7), w=st.integers(1, 7), size=st.integers(1, 9)
)
def test_boundary_band(seed, n, h, w, size):
    mask = torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed)) < 0.7
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


@given(seed=st.integers(0, 2**31), h=st.integers(1, 30), w=st.integers(1, 30), area=st.floats(0.05, 1.0))
def test_box_is_one_rectangle_of_the_area(seed, h, w, area):
    g = torch.Generator().manual_seed(seed)
    for mask in udakit.draw_box_mask(3, (h, w), area=(area, area), generator=g):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert (line.int().diff() != 0).sum() <= 2
        # Each side is rounded by at most half a pixel.
        assert abs(int(mask.sum()) - area * h * w) <= 0.5 * (h + w) + 0.25


def test_box_reaches_every_edge():
    masks = udakit.draw_box_mask(500, (6, 9), area=(0.3, 0.6), generator=torch.Generator().manual_seed(0))
    for edge in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert 0 < edge.any(1).float().mean() < 1


def test_blocks_follow_mic():
    """Nearest-neighbour stretching of a round(H / b) x round(W / b) grid."""
    g = torch.Generator().manual_seed(0)
    mask = udakit.draw_block_mask(3, (13, 22), block_size=4, ratio=0.6, generator=g)
    grid = torch.rand(3, 3, 6, generator=torch.Generator().manual_seed(0)) < 0.6  # 5.5 rounds to the even 6
    expected = torch.nn.functional.interpolate(grid[:, None].float(), (13, 22), mode="nearest")[:, 0] > 0
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
    with pytest.raises(ValueError, match="Expected `generator` to be on the input's device 'meta'"):
        draw(2, (4, 4), generator=torch.Generator(), device="meta")
