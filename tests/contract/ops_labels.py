"""Entries of udakit.labels."""

from typing import Any

from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample

NO_MODULE = "it has no state, and its options belong to a data set or a layer"
READS = "reads values because it is asked to, to name the wrong ids"


def _downscale(s: Sample) -> Call:
    # Blocks of one class with noise in between: some cells are clear, some undecided.
    blocks = s.labels()[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels = s.labels()
    labels = s.tag(blocks.where(s.valid(0.7), labels), "labels")
    return Call((labels,), {}, {"factor": 4, "num_classes": s.c, "min_ratio": 0.6})


def _check(labels: Tensor, **options: Any) -> Tensor:
    udakit.check_labels(labels, **options)
    return labels


def _one_channel(s: Sample) -> Call:
    # No class axis yet: to the checks it is a map of features.
    return Call((s.tag(s.normal(s.n, 1, s.h, s.w), "features"),))


OPERATIONS = [
    Operation(
        "binary_logits", _one_channel, udakit.binary_logits, kind="map", output="features", exempt={"module": NO_MODULE}
    ),
    Operation(
        "binary_probabilities",
        _one_channel,
        udakit.binary_probabilities,
        kind="map",
        output="features",
        exempt={"module": NO_MODULE},
    ),
    Operation(
        "downscale_labels",
        _downscale,
        udakit.downscale_labels,
        space="test_space.py::test_downscale_labels_is_the_majority_of_each_cell",
        kind="map",
        grad=(),
        output="labels",
        exempt={"module": NO_MODULE},
        inductor=True,
    ),
    Operation(
        "resize_labels",
        lambda s: Call((s.labels(),), {}, {"size": (5, 30)}),
        udakit.resize_labels,
        space="test_space.py::test_resize_labels_is_nearest_interpolation",
        kind="map",
        grad=(),
        output="labels",
        exempt={"module": NO_MODULE},
    ),
    Operation(
        "map_ids",
        lambda s: Call((s.labels(),), {}, {"table": {0: 3, 1: 0, 3: 7}}),
        udakit.map_ids,
        kind="map",
        grad=(),
        output="labels",
        exempt={
            "module": NO_MODULE,
            "class_permutation": "the table itself names ids",
            "shape_errors.axes": "labels of any shape are mapped",
        },
    ),
    Operation(
        "check_labels",
        lambda s: Call((s.labels(),), {}, {"num_classes": s.c}),
        _check,
        kind="map",
        grad=(),
        output="labels",
        exempt={
            "module": NO_MODULE,
            "fake_tensors": READS,
            "no_device_copy": READS,
            "compile": READS,
            "shape_errors.axes": "labels of any shape are checked",
        },
    ),
]
