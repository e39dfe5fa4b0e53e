"""Entries of udakit.prototypes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample
from contract.wrong_options import SHARE


def _means(**options: Any) -> Callable[[Sample], Call]:
    return lambda s: Call((s.features(), s.labels()), {}, {"num_classes": s.c, "min_pixels": 2, **options})


def _prototypes(mode: str) -> Callable[[Sample], Call]:
    def example(s: Sample) -> Call:
        options = {"num_classes": s.c, "dim": s.d, "mode": mode, "momentum": 0.3, "min_pixels": 2}
        return Call((s.features(3, 5), s.features(), s.labels()), {}, options)

    return example


def _use(module: udakit.ClassPrototypes, query: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Two updates, and what is asked of the result."""
    module.update(features, labels)
    module.update(2 * features, labels)
    return module.prototypes.clone(), module.counts.clone(), module.distances(query), module.assign(query)


def _update(query: Tensor, features: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with query.device:
        module = udakit.ClassPrototypes(**options)
    return _use(module, query, features, labels)


def _build(call: Call) -> Callable[..., Any]:
    module = udakit.ClassPrototypes(**call.options)
    return lambda query, features, labels: _use(module, query, features, labels)


def _distributions(momentum: float | None) -> Callable[[Sample], Call]:
    def example(s: Sample) -> Call:
        return Call((s.features(), s.labels()), {}, {"num_classes": s.c, "dim": s.d, "momentum": momentum})

    return example


def _follow(module: udakit.ClassDistributions, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Two updates, the second of other statistics."""
    module.update(features, labels)
    module.update(0.5 * features, labels)
    return module.means.clone(), module.variances.clone(), module.counts.clone()


def _followed(features: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with features.device:
        module = udakit.ClassDistributions(**options)
    return _follow(module, features, labels)


def _build_distributions(call: Call) -> Callable[..., Any]:
    module = udakit.ClassDistributions(**call.options)
    return lambda features, labels: _follow(module, features, labels)


STATE: dict[str, Any] = {
    "kind": "state",
    "output": ("class_vectors", "class_values", "logits", "labels"),
    "build": _build,
}
METHODS = {
    "module": "update, distances and assign are methods; forward is distances alone",
    "shape_errors.axes": "without its last axis a map to ask about is a signal, and no label map goes with it",
}

MOMENTUM = {"momentum": SHARE}  # of the new vector: 1 takes it alone

OPERATIONS = [
    Operation(
        "class_means",
        _means(),
        udakit.class_means,
        kind="map",
        output=("class_vectors", "class_values"),
        exempt={"module": "it has no state and no option but the number of classes"},
    ),
    Operation(
        "class_means[per_image]",
        _means(per_image=True),
        udakit.class_means,
        kind="map",
        output=("batch_class_vectors", "batch_class_values"),
        exempt={"module": "it has no state and no option but the number of classes"},
    ),
    Operation(
        "ClassPrototypes",
        _prototypes("ema"),
        _update,
        **STATE,
        wrong=MOMENTUM,
        exempt={**METHODS, "batch_permutation": "the images of a batch are averaged in their order"},
    ),
    Operation("ClassPrototypes[mean]", _prototypes("mean"), _update, **STATE, wrong=MOMENTUM, exempt=METHODS),
    *(
        Operation(
            name,
            _distributions(momentum),
            _followed,
            kind="state",
            grad=(),
            output=("class_vectors", "class_vectors", "class_values"),
            build=_build_distributions,
            wrong={"momentum": (-0.1, 1.5, float("nan"), float("inf"), "0.5")},  # None is the exact statistics
            exempt={"module": "it has no forward: update is a method, and the buffers are the result"},
        )
        for name, momentum in (("ClassDistributions", None), ("ClassDistributions[momentum]", 0.3))
    ),
]
