"""Entries of udakit.losses, but for the contrastive ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample


def _cross_entropy(s: Sample) -> Call:
    return Call(
        (s.logits(), s.labels()),
        {"pixel_weight": s.weight()},
        {"class_weight": s.class_values(), "reduction": "mean"},
    )


def _kd_loss(s: Sample) -> Call:
    return Call(
        (s.logits(), s.logits()),
        {"valid": s.valid(), "pixel_weight": s.weight()},
        {"temperature": 2.0, "divergence": "kl"},
    )


def _upsampled_cross_entropy(s: Sample) -> Call:
    return Call(
        (s.logits(s.h // 2, s.w // 2 - 1), s.labels()),
        {"pixel_weight": s.weight()},
        {"class_weight": s.class_values(), "chunk_rows": 3},
    )


def _upsampled_kd_loss(s: Sample) -> Call:
    return Call(
        (s.logits(s.h // 2, s.w // 2 - 1), s.logits()),
        {"valid": s.valid(), "pixel_weight": s.weight()},
        {"temperature": 2.0, "divergence": "kl", "chunk_rows": 3},
    )


def _upsampled_kd_loss_sizes(s: Sample) -> Call:
    return Call(
        (s.logits(s.h // 2, s.w // 2 - 1), s.logits(s.h // 4, s.w // 4)),
        {"valid": s.valid()},
        {"size": (s.h, s.w), "align_corners": True},
    )


def _feature_distance_loss(s: Sample) -> Call:
    return Call((s.features(), s.features()), {"valid": s.valid()}, {"reduction": "mean"})


def _feature_distillation_loss(s: Sample) -> Call:
    return Call((s.features(), s.features()), {"valid": s.valid()}, {"cosine_weight": 0.7})


def _entropy_loss(s: Sample) -> Call:
    return Call((s.logits(),), {"valid": s.valid(), "pixel_weight": s.weight()}, {"normalize": True})


def _max_square_loss(s: Sample) -> Call:
    return Call((s.logits(),), {"valid": s.valid(), "pixel_weight": s.weight()}, {"balance": 0.2})


def _symmetric_cross_entropy(s: Sample) -> Call:
    return Call((s.logits(), s.labels()), {"pixel_weight": s.weight()}, {"ce_weight": 0.2})


def _symmetric_kd_loss(s: Sample) -> Call:
    return Call(
        (s.logits(), s.logits(), s.logits(), s.logits()),
        {"valid": s.valid()},
        {"reverse_weight": 0.25, "temperature": 2.0},
    )


def _class_inconsistency(s: Sample) -> Call:
    return Call((s.logits(), s.logits()), {"valid": s.valid()})


def _inconsistency_loss(s: Sample) -> Call:
    return Call((s.logits(), s.logits(), s.class_values()), {"valid": s.valid()}, {"weight_temperature": 0.5})


def _inconsistency_module(s: Sample) -> Call:
    return Call((s.logits(), s.logits()), {"valid": s.valid()}, {"num_classes": s.c, "momentum": 0.5})


def _build_inconsistency(call: Call) -> Callable[..., Any]:
    return udakit.InconsistencyLoss(**call.options)


def _use_inconsistency(student: Tensor, teacher: Tensor, valid: Tensor, **options: Any) -> Tensor:
    with student.device:
        criterion = udakit.InconsistencyLoss(**options)
    loss: Tensor = criterion(student, teacher, valid=valid)
    return loss


def _projected_feature_loss(s: Sample) -> Call:
    reference = s.tag(s.normal(s.n, 3, s.h, s.w), "features")
    return Call((s.features(), reference), {"valid": s.valid()}, {"dim": s.d, "reference_dim": 3})


def _projection(call: Call) -> udakit.ProjectedFeatureLoss:
    """With the same weights every time."""
    criterion = udakit.ProjectedFeatureLoss(**call.options)
    with torch.no_grad():
        for x in criterion.parameters():
            x.copy_(torch.linspace(-1, 1, x.numel()).view_as(x))
    return criterion


def _use_projection(features: Tensor, reference_features: Tensor, valid: Tensor, **options: Any) -> Tensor:
    with features.device:
        criterion = _projection(Call((), {}, options))
    loss: Tensor = criterion(features, reference_features, valid=valid)
    return loss


OPERATIONS = [
    Operation(
        "cross_entropy",
        _cross_entropy,
        udakit.cross_entropy,
        udakit.CrossEntropyLoss,
        covers=("CrossEntropyLoss",),
        inductor=True,
    ),
    Operation("kd_loss", _kd_loss, udakit.kd_loss, udakit.KDLoss, covers=("KDLoss",), inductor=True),
    Operation(
        "upsampled_cross_entropy",
        _upsampled_cross_entropy,
        udakit.upsampled_cross_entropy,
        udakit.UpsampledCrossEntropyLoss,
        space="two",
        covers=("UpsampledCrossEntropyLoss",),
        inductor=True,
    ),
    Operation(
        "upsampled_kd_loss",
        _upsampled_kd_loss,
        udakit.upsampled_kd_loss,
        udakit.UpsampledKDLoss,
        space="two",
        covers=("UpsampledKDLoss",),
    ),
    Operation(
        "upsampled_kd_loss[sizes]",
        _upsampled_kd_loss_sizes,
        udakit.upsampled_kd_loss,
        udakit.UpsampledKDLoss,
        space="two",
    ),
    Operation(
        "feature_distance_loss",
        _feature_distance_loss,
        udakit.feature_distance_loss,
        udakit.FeatureDistanceLoss,
        covers=("FeatureDistanceLoss",),
    ),
    Operation(
        "feature_distillation_loss",
        _feature_distillation_loss,
        udakit.feature_distillation_loss,
        udakit.FeatureDistillationLoss,
        covers=("FeatureDistillationLoss",),
    ),
    Operation("entropy_loss", _entropy_loss, udakit.entropy_loss, udakit.EntropyLoss, covers=("EntropyLoss",)),
    Operation(
        "max_square_loss", _max_square_loss, udakit.max_square_loss, udakit.MaxSquareLoss, covers=("MaxSquareLoss",)
    ),
    Operation(
        "symmetric_cross_entropy",
        _symmetric_cross_entropy,
        udakit.symmetric_cross_entropy,
        udakit.SymmetricCrossEntropyLoss,
        covers=("SymmetricCrossEntropyLoss",),
    ),
    Operation(
        "symmetric_kd_loss",
        _symmetric_kd_loss,
        udakit.symmetric_kd_loss,
        udakit.SymmetricKDLoss,
        covers=("SymmetricKDLoss",),
        grad=(0, 1),
        inductor=True,
    ),
    Operation(
        "class_inconsistency",
        _class_inconsistency,
        udakit.class_inconsistency,
        kind="map",
        grad=(),
        output="class_values",
        exempt={"module": "InconsistencyLoss is its stateful form"},
    ),
    Operation(
        "inconsistency_loss",
        _inconsistency_loss,
        udakit.inconsistency_loss,
        exempt={"module": "InconsistencyLoss measures the inconsistency itself: an entry of its own"},
    ),
    Operation(
        "InconsistencyLoss",
        _inconsistency_module,
        _use_inconsistency,
        udakit.InconsistencyLoss,
        build=_build_inconsistency,
    ),
    Operation(
        "ProjectedFeatureLoss",
        _projected_feature_loss,
        _use_projection,
        build=_projection,
        exempt={
            "module": "its function would be feature_distance_loss: the parameters are what it adds",
            "defaults": "its projection is a layer of torch, whose weights have the default dtype",
        },
    ),
]
