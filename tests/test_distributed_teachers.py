"""Teachers of equal students stay equal over real ranks, without a word between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distributed import run_ranks
from udakit import EMATeacher

pytestmark = pytest.mark.slow


def _train(rank: int, world_size: int, steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    student = nn.parallel.DistributedDataParallel(net)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher = EMATeacher(student, decay=0.9)
    for k in range(steps):
        # Each rank sees images of its own; the gradients are averaged, so the students stay equal.
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(100 * k + rank))
        loss = (student(images) - teacher(images) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        teacher.update(student)
    return {**teacher.state_dict(), "student": net[0].weight.detach(), "images": images}


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_students_make_equal_teachers(world_size: int, tmp_path: Path) -> None:
    first, *others = run_ranks(_train, world_size, 4, tmp_path=tmp_path)
    images = first.pop("images")
    assert not any(torch.equal(images, other.pop("images")) for other in others)
    assert list(first) == ["step", "module.0.weight", "module.0.bias", "module.2.weight", "module.2.bias", "student"]
    for name, x in first.items():
        assert all(torch.equal(x, other[name]) for other in others), name
    assert int(first["step"]) == 4
    assert not torch.equal(first["module.0.weight"], first["student"])
