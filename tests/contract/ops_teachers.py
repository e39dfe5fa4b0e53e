"""Entries of udakit.teachers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import udakit
from contract.registry import Call, Operation, Sample

NO_MODULE = {"module": "it has no state to hold, and its options are per call"}


def _fuse(**options: Any) -> Callable[[Sample], Call]:
    return lambda s: Call(([s.logits(), s.logits(), s.logits()],), {}, {"weights": [1.0, 2.0, 0.5], **options})


class _Student(nn.Module):
    """One of each: a parameter, a float buffer, an integer buffer (BatchNorm copies its counter from the host)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("shift", weight.new_full((weight.shape[0], 1, 1), 0.5))
        self.register_buffer("count", torch.full((), 3, dtype=torch.int64, device=weight.device))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.weight) + self.shift


class _Normed(_Student):
    """With BatchNorm, whose running statistics are other than those of the images (its own come from the host)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.norm = nn.BatchNorm2d(len(weight), track_running_stats=False, dtype=weight.dtype, device=weight.device)
        self.norm.running_mean, self.norm.running_var = weight.new_full((2, len(weight)), 0.5).unbind()
        self.norm.num_batches_tracked, self.norm.track_running_stats = self.count.clone(), True

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(super().forward(images))


def _average(**options: Any) -> Callable[[Sample], Call]:
    return lambda s: Call((s.tag(s.normal(5, 3, 1, 1), "other"), s.images()), {}, {"decay": 0.7, **options})


def _use(teacher: udakit.EMATeacher, students: list[nn.Module], images: Tensor) -> tuple[Tensor, ...]:
    """Follow three students one after the other, and run the result."""
    for student in students:
        teacher.update(student)
    return teacher.module.weight.clone(), teacher.module.shift.clone(), teacher.step.clone(), teacher(images)


def _parts(weight: Tensor, options: dict[str, Any]) -> tuple[udakit.EMATeacher, list[nn.Module]]:
    student = _Normed if "running_share" in options else _Student
    students = [student(weight * k) for k in (1, -2, 3)]
    return udakit.EMATeacher(students[0], **options), students


def _ema(weight: Tensor, images: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return _use(*_parts(weight, options), images)


def _build(call: Call) -> Callable[..., Any]:
    teacher, students = _parts(call.args[0], call.options)
    return lambda weight, images: _use(teacher, students, images)


STATE: dict[str, Any] = {
    "kind": "state",
    "space": "none",
    "grad": (),
    "output": ("other", "other", "other", "features"),
    "build": _build,
}
NET = {
    "module": "it wraps a net: there is no function of tensors to compare with",
    "autocast": "its last output is a net's, which autocast rightly casts down",
    "shape_errors": "its arguments are nets, not tensors of a fixed shape",
}

COVERS = ("copy_net", "keep_statistics", "unwrap_model")

OPERATIONS = [
    Operation(
        "fuse_teachers",
        _fuse(),
        udakit.fuse_teachers,
        kind="map",
        grad=(),
        output="probabilities",
        exempt=NO_MODULE,
        inductor=True,
    ),
    Operation(
        "fuse_teachers[max_confidence]",
        _fuse(mode="max_confidence", size=(4, 6)),
        udakit.fuse_teachers,
        kind="map",
        grad=(),
        output="probabilities",
        space="test_teachers_fusion.py::test_volumes_and_signals_are_fused_at_one_size",
        exempt={**NO_MODULE, "shape_errors.size": "with `size` the teachers may have any size"},
    ),
    Operation(
        "fuse_teachers[agreement]",
        _fuse(mode="agreement"),
        udakit.fuse_teachers,
        kind="map",
        grad=(),
        output="probabilities",
        exempt=NO_MODULE,
    ),
    Operation(
        "teacher_agreement",
        lambda s: Call(([s.logits(), s.logits()],)),
        udakit.teacher_agreement,
        kind="map",
        grad=(),
        output="valid",
        exempt=NO_MODULE,
    ),
    Operation("EMATeacher", _average(), _ema, covers=COVERS, **STATE, exempt=NET),
    Operation("EMATeacher[ema]", _average(buffers="ema", warmup=False, mode="train"), _ema, **STATE, exempt=NET),
    Operation("EMATeacher[blended]", _average(buffers="ema", running_share=0.5), _ema, **STATE, exempt=NET),
    Operation("EMATeacher[keep]", _average(buffers="keep", mode="eval"), _ema, **STATE, exempt=NET),
]
