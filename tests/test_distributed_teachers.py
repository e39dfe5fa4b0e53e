"""Teachers of equal students stay equal over real ranks, without a word between them."""

from __future__ import annotations

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


def test_equal_students_make_equal_teachers(tmp_path) -> None:
    first, second = run_ranks(_train, 2, 4, tmp_path=tmp_path)
    assert not torch.equal(first.pop("images"), second.pop("images"))
    assert list(first) == ["step", "module.0.weight", "module.0.bias", "module.2.weight", "module.2.bias", "student"]
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
    assert int(first["step"]) == 4
    assert not torch.equal(first["module.0.weight"], first["student"])
