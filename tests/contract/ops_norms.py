"""Entries of udakit.norms: functions of nets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import udakit
from contract.registry import Call, Operation, Sample


def _example(s: Sample) -> Call:
    return Call((nn.Sequential(nn.BatchNorm2d(3, dtype=s.dtype)), [s.images(), s.images()]), {}, {"source_share": 0.25})


def _adapt(model: nn.Module, batches: Sequence[Tensor], *, source_share: float) -> tuple[Tensor, ...]:
    adapted = udakit.adapt_batch_norm(model, batches, source_share=source_share)
    return adapted[0].running_mean, adapted[0].running_var, *(p.detach() for p in udakit.norm_parameters(adapted))


OPERATIONS = [
    Operation(
        "adapt_batch_norm",
        _example,
        _adapt,
        kind="map",
        grad=(),
        output="other",
        covers=("norm_parameters",),
        space="none",
        exempt={
            "module": "a function of a net, with no state of its own",
            "half": "the net keeps its dtype, and wants images of it",
            "compile": "the net is copied and its modes change: compile the net that comes back",
            "shape_errors": "the net looks at its inputs, not the function",
            "batch_permutation": "statistics have no place in the batch, and tests/test_norms.py compares them",
        },
    ),
]
