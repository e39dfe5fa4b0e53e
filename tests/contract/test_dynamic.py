"""Draws and operations on labels under torch.compile(dynamic=True): one graph for every size."""

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
    SCORES.update(torch.arange(n * 3 * side * side).sin().view(n, 3, side, side))
    return SCORES.density.clone()


def _labels(n: int, side: int) -> Tensor:
    labels = torch.arange(n * side * side).view(n, side, side)
    return (labels // 3 % 5).where(labels % 7 != 0, 255)


def _odd(n: int, side: int) -> Tensor:
    return _labels(n, side) % 2 == 1


def _detail(n: int, side: int) -> udakit.DetailBox:
    return udakit.draw_detail_box(n, (side, side), detail=(side // 2, side // 4), divisor=2)


def _mix(n: int, side: int) -> Tensor:
    source, target = (udakit.SegBatch(x[:, None] / 5, x) for x in (_labels(n, side), _labels(n, side).flip(1)))
    mask = udakit.class_mask(source.labels, torch.arange(5).expand(n, 5) % 2 == 0)
    return torch.cat([x.flatten() for x in udakit.class_mix(source, target, mask)[:2]])


DRAWS: dict[str, Callable[..., Any]] = {
    "draw_classes": lambda n, side: udakit.draw_classes(
        torch.arange(n * side * side).view(n, side, -1) % 5, num_classes=5
    ),
    "draw_box_mask": lambda n, side: udakit.draw_box_mask(n, (side, side)),
    "draw_block_mask": lambda n, side: udakit.draw_block_mask(n, (side, side), block_size=4),
    "draw_token_mask": lambda n, side: udakit.draw_token_mask(n, side),
    "draw_strong_augment": lambda n, side: udakit.draw_strong_augment(n).brightness,
    "draw_detail_box": lambda n, side: _detail(n, side).start,
    "LabelFreeScores": _density,
}
LABELS: dict[str, Callable[..., Any]] = {
    "resize_labels": lambda n, side: udakit.resize_labels(_labels(n, side), (side // 2, side + 3)),
    "downscale_labels": lambda n, side: udakit.downscale_labels(_labels(n, side), 4, num_classes=5),
    "map_ids": lambda n, side: udakit.map_ids(_labels(n, side), {0: 3, 1: 0, 3: 7}),
    "class_mask": lambda n, side: udakit.class_mask(_labels(n, side), torch.eye(5)[:1].expand(n, 5) == 1),
    "class_mix": _mix,
    "paste": lambda n, side: udakit.paste(_odd(n, side), _labels(n, side), _labels(n, side) + 1),
    "boundary_band": lambda n, side: udakit.boundary_band(_odd(n, side)),
    "row_mask": lambda n, side: udakit.row_mask(side, side + 1, 1, side // 4),
    "bilateral_consensus": lambda n, side: udakit.bilateral_consensus(_labels(n, side), _labels(n, side).flip(1)),
    "crop_detail": lambda n, side: udakit.crop_detail(_labels(n, side), _detail(n, side)),
}
READS = {"check_labels"}  # and so does not compile


@pytest.mark.parametrize("name", [*DRAWS, *LABELS])
def test_one_graph_serves_sizes_that_are_not_known(name: str) -> None:
    """torch's own draws fail there when `generator=None` is passed on, and so does a shape that is put into words."""
    operation = (DRAWS | LABELS)[name]
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(operation, dynamic=True, fullgraph=True, backend=backend)
    for n, side in ((2, 8), (3, 12), (4, 20)):
        torch.manual_seed(0)
        expected = operation(n, side)
        torch.manual_seed(0)
        assert torch.equal(compiled(n, side), expected)
    assert len(graphs) == 1


def test_every_draw_and_every_operation_of_the_labels_is_here() -> None:
    draws = {name for name in udakit.__all__ if name.startswith("draw_")}
    labels = {name for name in udakit.labels.__all__ if name[0].islower()}
    assert draws <= DRAWS.keys()
    assert labels <= LABELS.keys() | READS
