"""Entries of udakit.losses, but for the contrastive ones."""

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


def _feature_distance_loss(s: Sample) -> Call:
    return Call((s.features(), s.features()), {"valid": s.valid()}, {"reduction": "mean"})


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
        "feature_distance_loss",
        _feature_distance_loss,
        udakit.feature_distance_loss,
        udakit.FeatureDistanceLoss,
        covers=("FeatureDistanceLoss",),
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
]
