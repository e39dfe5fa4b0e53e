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
]
