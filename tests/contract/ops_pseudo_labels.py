"""Entries of udakit.pseudo_labels. A selector is a Module: the function of its entry makes it and calls it once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample
from contract.wrong_options import SHARE

SELECTION = ("labels", "weight", "weight", "class_values")  # labels, confidence, weight, accepted


def _selector(make: Callable[..., Any]) -> Callable[..., Any]:
    def select(
        logits: Tensor,
        features: Tensor | None = None,
        *,
        kind: str = "logits",
        valid: Tensor | None = None,
        **options: Any,
    ) -> Any:
        with logits.device:
            selector = make(**options)
        return selector(logits, features, kind=kind, valid=valid)

    return select


def _select(**options: Any) -> Callable[[Sample], Call]:
    return lambda s: Call((s.logits(),), {"valid": s.valid()}, options)


def _quantile(s: Sample) -> Call:
    return Call((s.logits(),), {"valid": s.valid()}, {"num_classes": s.c, "share": 0.4, "bins": 64})


def _build(make: Callable[..., Any]) -> Callable[[Call], Callable[..., Any]]:
    return lambda call: make(**call.options)


def _consensus(s: Sample) -> Call:
    return Call((s.logits(), s.features(4, 6), s.class_vectors()), {"valid": s.valid()}, {})


def _consensus_of(logits: Tensor, features: Tensor, prototypes: Tensor, *, valid: Tensor) -> Any:
    with logits.device:
        held = udakit.ClassPrototypes(len(prototypes), features.shape[1]).set_(prototypes)
        return udakit.BilateralConsensus(held)(logits, features, valid=valid)


def _build_consensus(call: Call) -> Callable[..., Any]:
    held = udakit.ClassPrototypes(*call.args[2].shape).set_(call.args[2])
    selector = udakit.BilateralConsensus(held)
    return lambda logits, features, prototypes, *, valid: selector(logits, features, valid=valid)


def _align(s: Sample) -> Call:
    return Call((s.probabilities(), s.class_values(), s.class_values()))


def _alignment(s: Sample) -> Call:
    return Call((s.logits(),), {"valid": s.valid()}, {"num_classes": s.c, "source_share": s.class_values()})


def _aligned(logits: Tensor, *, valid: Tensor, num_classes: int, source_share: Tensor) -> Tensor:
    """As if done by hand: after one batch target's share is that of the batch."""
    p = (logits.float() if logits.element_size() == 2 else logits).detach().softmax(1)
    share = torch.where(valid[:, None], p, 0).sum((0, *range(2, p.ndim))) / valid.sum()
    return udakit.align_distribution(p, source_share, share)


def _distances(s: Sample) -> Tensor:
    return s.tag(s.normal(s.n, s.c, s.h, s.w).abs() * 3, "logits")


def _rectified_of(logits: Tensor, features: Tensor, prototypes: Tensor, *, valid: Tensor) -> Any:
    with logits.device:
        held = udakit.ClassPrototypes(len(prototypes), features.shape[1]).set_(prototypes)
        return udakit.RectifiedSelector(held, threshold=0.3)(logits, features, valid=valid)


def _build_rectified(call: Call) -> Callable[..., Any]:
    held = udakit.ClassPrototypes(*call.args[2].shape).set_(call.args[2])
    selector = udakit.RectifiedSelector(held, threshold=0.3)
    return lambda logits, features, prototypes, *, valid: selector(logits, features, valid=valid)


def _flip(s: Sample) -> Call:
    def model(images: Tensor) -> Tensor:
        return torch.cat([images, 2 * images.roll(1, -1)], dim=1)  # roll: no mirror symmetry

    return Call((model, s.images()))


OPERATIONS = [
    Operation(
        "ArgmaxSelector",
        _select(),
        _selector(udakit.ArgmaxSelector),
        udakit.ArgmaxSelector,
        build=_build(udakit.ArgmaxSelector),
        covers=("PseudoLabels",),
        kind="map",
        grad=(),
        output=SELECTION,
    ),
    Operation(
        "ThresholdSelector",
        _select(threshold=0.6),
        _selector(udakit.ThresholdSelector),
        udakit.ThresholdSelector,
        build=_build(udakit.ThresholdSelector),
        kind="map",
        grad=(),
        output=SELECTION,
    ),
    Operation(
        "ConfidentRatioSelector",
        _select(threshold=0.6, scope="image", ratio_over="valid"),
        _selector(udakit.ConfidentRatioSelector),
        udakit.ConfidentRatioSelector,
        build=_build(udakit.ConfidentRatioSelector),
        kind="map",
        grad=(),
        output=SELECTION,
    ),
    Operation(
        "ClassQuantileSelector",
        _quantile,
        _selector(udakit.ClassQuantileSelector),
        udakit.ClassQuantileSelector,
        kind="state",
        grad=(),
        output=SELECTION,
        build=_build(udakit.ClassQuantileSelector),
    ),
    Operation(
        "AdaptiveThresholdSelector",
        lambda s: Call((s.logits(),), {"valid": s.valid()}, {"num_classes": s.c, "momentum": 0.2}),
        _selector(udakit.AdaptiveThresholdSelector),
        udakit.AdaptiveThresholdSelector,
        kind="state",
        grad=(),
        output=SELECTION,
        build=_build(udakit.AdaptiveThresholdSelector),
        wrong={"momentum": SHARE},
    ),
    Operation(
        "align_distribution",
        _align,
        udakit.align_distribution,
        kind="map",
        output="probabilities",
        exempt={
            "module": "DistributionAlignment keeps the shares and has an entry of its own",
        },
    ),
    Operation(
        "DistributionAlignment",
        _alignment,
        _aligned,
        udakit.DistributionAlignment,
        kind="state",
        grad=(),
        output="probabilities",
        build=_build(udakit.DistributionAlignment),
    ),
    Operation(
        "BilateralConsensus",
        _consensus,
        _consensus_of,
        space="test_space.py::test_consensus_upsamples_the_similarities",
        kind="state",
        grad=(),
        output=SELECTION,
        build=_build_consensus,
        exempt={"module": "it refers to another Module, and the function makes both"},
    ),
    Operation(
        "rectify_probabilities",
        lambda s: Call((s.probabilities(), _distances(s)), {}, {"temperature": 0.7}),
        udakit.rectify_probabilities,
        kind="map",
        grad=(0, 1),
        output="probabilities",
        exempt={
            "module": "RectifiedSelector takes logits and features and has an entry of its own",
        },
    ),
    Operation(
        "RectifiedSelector",
        _consensus,
        _rectified_of,
        space="test_space.py::test_rectified_selector_upsamples_the_similarities",
        kind="state",
        grad=(),
        output=SELECTION,
        build=_build_rectified,
        exempt={"module": "it refers to another Module, and the function makes both"},
    ),
    Operation(
        "bilateral_consensus",
        lambda s: Call((s.labels(), s.labels())),
        udakit.bilateral_consensus,
        kind="map",
        grad=(),
        output="labels",
        exempt={"module": "BilateralConsensus takes logits and features and has an entry of its own"},
    ),
    Operation(
        "confident_ratio",
        lambda s: Call((s.weight(),), {"valid": s.valid()}, {"threshold": 0.4, "scope": "image"}),
        udakit.confident_ratio,
        kind="map",
        grad=(),
        output="batch_values",
        exempt={"module": "ConfidentRatioSelector takes logits and has an entry of its own"},
    ),
    Operation(
        "hflip_average",
        _flip,
        udakit.hflip_average,
        space="test_space.py::test_hflip_average_mirrors_the_last_axis",
        kind="map",
        grad=(),
        output="probabilities",
        exempt={"module": "a function of a net, with no state of its own"},
    ),
    Operation(
        "row_mask",
        lambda s: Call((s.h, s.w, 1, 2), {}, {"device": "cpu"}),
        udakit.row_mask,
        space="none",
        kind="map",
        grad=(),
        output="other",
        exempt={
            "module": "it makes a constant that a user keeps",
            "batch_permutation": "it takes no batch, and returns one mask for all images",
        },
    ),
]
