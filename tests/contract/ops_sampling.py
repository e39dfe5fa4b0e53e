"""Entries of udakit.sampling."""

from typing import Any

import torch
from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample

HOST = "counts label files and draws image indices before and beside training, on the CPU"
# torch 2.5 to 2.9 do not trace bincount; later versions do, and there the check holds.
COUNTING = {"compile": HOST} if torch.__version__ < "2.10" else {}


def _counts(s: Sample) -> Call:
    return Call((s.tag(torch.randint(1, 500, (s.c,), generator=s.generator).to(s.dtype), "class_values"),), {}, {})


def _count(labels: Tensor, **options: Any) -> Tensor:
    return udakit.count_classes(labels, **options)


def _sample(class_pixels: Tensor, **options: Any) -> Tensor:
    sampler = udakit.RareClassSampler(class_pixels, **options)
    return torch.tensor([sampler.at(3, k) for k in range(50)] + [(i, -1) for i in sampler], device="cpu")


def _table(s: Sample) -> Call:
    table = s.tag(torch.randint(0, 500, (8, s.c), generator=s.generator), "other")
    return Call((table,), {}, {"min_pixels": 100, "generator": None, "temperature": 0.1})


def _seeded(class_pixels: Tensor, *, generator: torch.Generator | None, **options: Any) -> Tensor:
    return _sample(class_pixels, generator=generator, **options)


OPERATIONS = [
    Operation(
        "rare_class_probabilities",
        _counts,
        lambda class_pixels, **options: udakit.rare_class_probabilities(class_pixels, **options),
        space="none",
        kind="map",
        grad=(),
        output="class_values",
        exempt={"module": "it has no state, and is called once"},
    ),
    Operation(
        "count_classes",
        lambda s: Call((s.labels(),), {}, {"num_classes": s.c}),
        _count,
        covers=("read_class_stats",),
        kind="map",
        grad=(),
        output="batch_class_values",
        exempt={
            "module": "it has no state, and is called once",
            "fake_tensors": HOST,
            "no_device_copy": HOST,
            "shape_errors.axes": "a label map of any shape is counted",
            **COUNTING,
        },
    ),
    Operation(
        "RareClassSampler",
        _table,
        _seeded,
        space="none",
        kind="draw",
        grad=(),
        output="other",
        exempt={
            "module": "it is a torch Sampler, not a Module",
            "fake_tensors": HOST,
            "no_device_copy": HOST,
            "compile": HOST,
            "seed.device": HOST,
        },
    ),
]
