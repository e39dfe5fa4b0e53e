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


def _shard(net: nn.Module) -> nn.Module:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fsdp.fully_shard(net[0], mesh=mesh)
    return fsdp.fully_shard(net, mesh=mesh, reshard_after_forward=True)


def _sharded(rank: int, world_size: int, way: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Average sharded nets, and the same nets whole, on equal images."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).to(dtype)

    whole = make()
    reference = EMATeacher(whole, decay=0.5)
    if way == "module":
        student = _shard(make())
        with pytest.raises(ValueError, match=r"is sharded \(FSDP\)"):
            EMATeacher(student)
        teacher = EMATeacher(student, decay=0.5, module=_shard(make()))
    else:  # the teacher is made first, and both are sharded alike
        student = make()
        teacher = EMATeacher(student, decay=0.5)
        _shard(student)
        _shard(teacher.module)
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    for net, average in ((student, teacher), (whole, reference)):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            loss = (net(images) - average(images) - 1).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average.update(net)
    names = [name for name, _ in reference.module.named_parameters()]
    full = {name: x.full_tensor() for name, x in teacher.module.named_parameters()}
    assert all(type(x).__name__ == "DTensor" for x in teacher.module.parameters())
    found = {name: full[name].float() for name in names}
    found |= {f"{name} whole": x.float() for name, x in reference.module.named_parameters()}
    return {**found, "start": make()[0].weight.float(), "output": teacher(images).float()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["module", "first"])
def test_a_sharded_teacher_is_the_whole_one(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = run_ranks(_sharded, 2, way, dtype, tmp_path=tmp_path)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    for name in ("0.weight", "0.bias", "1.weight", "3.weight"):
        torch.testing.assert_close(
            first[name], first[f"{name} whole"], rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 0.01
        )
    assert not torch.allclose(first["0.weight"], first["start"], atol=1e-4)
