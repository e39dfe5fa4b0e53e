"""Draws under torch.compile(dynamic=True): one graph for every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import udakit

SCORES = udakit.LabelFreeScores(3, samples=8)


def _density(n: int, side: int) -> Tensor:
    SCORES.density.zero_()
    SCORES.update(torch.linspace(-2, 2, n * 3 * side * side).sin().view(n, 3, side, side))
    return SCORES.density.clone()


DRAWS: dict[str, Callable[..., Any]] = {
    "draw_classes": lambda n, side: udakit.draw_classes(
        torch.arange(n * side * side).view(n, side, -1) % 5, num_classes=5
    ),
    "draw_box_mask": lambda n, side: udakit.draw_box_mask(n, (side, side)),
    "draw_block_mask": lambda n, side: udakit.draw_block_mask(n, (side, side), block_size=4),
    "draw_token_mask": lambda n, side: udakit.draw_token_mask(n, side),
    "draw_strong_augment": lambda n, side: udakit.draw_strong_augment(n).brightness,
    "LabelFreeScores": _density,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_compiles_for_sizes_that_are_not_known(name: str) -> None:
    """torch's own draws fail there when `generator=None` is passed on."""
    torch._dynamo.reset()
    compiled = torch.compile(DRAWS[name], dynamic=True, fullgraph=True, backend="eager")
    for n, side in ((2, 8), (3, 12)):
        torch.manual_seed(0)
        expected = DRAWS[name](n, side)
        torch.manual_seed(0)
        assert torch.equal(compiled(n, side), expected)
