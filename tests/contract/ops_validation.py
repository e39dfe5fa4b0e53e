"""Entries of udakit.validation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample

# --- LabelFreeScores: what `compute` reads from the device is its state ---------------------------

STATE = ("class_pixels", "pixels", "images", "probabilities", "gram", "sums", "density")
STATE_ROLES = ("class_values", "scalar", "scalar", "class_values", "other", "scalar", "other", "class_values")


def _take_in(scores: udakit.LabelFreeScores, logits: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
    scores.reset()  # a benchmark calls the same Module again
    scores.update(logits, valid=valid)
    scores.update(2 * logits, valid=valid)
    return *(getattr(scores, name).float() for name in STATE), scores.class_share.float()


def _scores(
    logits: Tensor, *, valid: Tensor | None = None, generator: torch.Generator | None = None, **options: Any
) -> tuple[Tensor, ...]:
    with logits.device:
        scores = udakit.LabelFreeScores(**options, generator=generator)
    return _take_in(scores, logits, valid)


def _build_scores(call: Call) -> Callable[..., Any]:
    scores = udakit.LabelFreeScores(**call.options)
    return lambda logits, *, valid: _take_in(scores, logits, valid)


# --- models and views -----------------------------------------------------------------------------


def _net(images: Tensor) -> Tensor:
    return torch.cat([images, 2 * images.roll(1, -1)], dim=1)  # roll: no mirror symmetry


def _view(make: Callable[..., udakit.View]) -> Callable[..., Any]:
    def apply(images: Tensor, **options: Any) -> Any:
        view = make(**options)
        return view.transform(images), view.inverse(images)

    return apply


def _view_entry(make: Callable[..., udakit.View], output: Any, **options: Any) -> Operation:
    return Operation(
        make.__name__,
        lambda s: Call((s.images(),), {}, options),
        _view(make),
        kind="map",
        grad=(),
        output=output,
        space="two" if make is udakit.rotation_view else f"test_space.py::test_{make.__name__}",
        covers=("View",) if make is udakit.rotation_view else (),
        makes=True,
        exempt={"module": "it makes two functions"},
    )


VIEWED = ("images", "images", "valid")
BACKGROUND = {"background": (1.5, "0", -1, 99, True)}
NO_STATE = {"module": "a function of a net, with no state of its own"}


# --- ConfidenceThreshold --------------------------------------------------------------------------


def _atc(source: Tensor, labels: Tensor, logits: Tensor, *, valid: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with source.device:
        module = udakit.ConfidenceThreshold(**options)
    return _use_atc(module, source, labels, logits, valid)


def _use_atc(
    module: udakit.ConfidenceThreshold, source: Tensor, labels: Tensor, logits: Tensor, valid: Tensor
) -> tuple[Tensor, ...]:
    module.reset()
    module.fit(source, labels)
    return module.accuracy, module.threshold, module.estimate(logits, valid=valid)


def _build_atc(call: Call) -> Callable[..., Any]:
    module = udakit.ConfidenceThreshold(**call.options)
    return lambda source, labels, logits, *, valid: _use_atc(module, source, labels, logits, valid)


def _candidates(s: Sample) -> Call:
    return Call(([s.probabilities(), s.probabilities(), s.probabilities()],), {"valid": s.valid()})


OPERATIONS = [
    Operation(
        "LabelFreeScores",
        lambda s: Call((s.logits(),), {"valid": s.valid()}, {"num_classes": s.c, "samples": 5}),
        _scores,
        kind="state",
        grad=(),
        output=STATE_ROLES,
        build=_build_scores,
        exempt={
            "module": "update and compute are methods, and compute reads from the device",
        },
    ),
    Operation(
        "consistency_score",
        lambda s: Call((s.logits(), s.logits()), {"valid": s.valid()}, {}),
        udakit.consistency_score,
        udakit.ConsistencyScore,
        module_options=lambda call: {"num_classes": call.args[0].shape[1]},
        covers=("ConsistencyScore",),
        kind="map",
        grad=(),
        output="batch_values",
        wrong=BACKGROUND,
    ),
    Operation(
        "consistency_score[background]",
        lambda s: Call((s.logits(), s.logits()), {"valid": s.valid()}, {"background": 0, "scope": "batch"}),
        udakit.consistency_score,
        udakit.ConsistencyScore,
        module_options=lambda call: {"num_classes": call.args[0].shape[1], **call.options},
        kind="map",
        grad=(),
        wrong=BACKGROUND,
        exempt={
            "class_permutation": "the background is an option and keeps its id",
            "extreme_values": "a batch of background alone is NaN, as documented: there is nothing to compare",
        },
    ),
    Operation(
        "view_consistency",
        lambda s: Call((_net, s.images(), *udakit.mirror_view()), {"valid": s.valid()}),
        udakit.view_consistency,
        kind="map",
        grad=(),
        output="batch_values",
        space="none",
        wrong=BACKGROUND,
        exempt=NO_STATE,
    ),
    Operation(
        "mirror_consistency",
        lambda s: Call((_net, s.images()), {"valid": s.valid()}),
        udakit.mirror_consistency,
        kind="map",
        grad=(),
        output="batch_values",
        space="none",
        wrong={**BACKGROUND, "axis": (1.5, "1", None, True, 0, 1, 9)},
        exempt=NO_STATE,
    ),
    _view_entry(udakit.mirror_view, ("images", "images"), axis=-2),
    _view_entry(udakit.shift_view, VIEWED, offset=(1, -2)),
    _view_entry(udakit.crop_view, VIEWED, margin=((1, 2), (0, 3))),
    _view_entry(udakit.rotation_view, VIEWED, degrees=10.0),
    Operation(
        "ensemble_agreement",
        _candidates,
        udakit.ensemble_agreement,
        udakit.EnsembleAgreement,
        module_options=lambda call: {"candidates": len(call.args[0])},
        wrong={"probabilities": (3, "p", None, []), "candidates": (0, -1, 2.5, "3", None, True)},
        covers=("EnsembleAgreement",),
        kind="map",
        grad=(),
        output="scalar",
    ),
    Operation(
        "ConfidenceThreshold",
        lambda s: Call((s.logits(), s.labels(), s.logits()), {"valid": s.valid()}, {"temperature": 1.5, "bins": 64}),
        _atc,
        kind="state",
        grad=(),
        output=("scalar", "scalar", "scalar"),
        build=_build_atc,
        exempt={
            "module": "fit and estimate are methods",
        },
    ),
    Operation(
        "fit_temperature",
        lambda s: Call((s.logits(), s.labels())),
        udakit.fit_temperature,
        kind="map",
        grad=(),
        output="scalar",
        exempt={
            "module": "its result is an option of ConfidenceThreshold",
        },
    ),
]
