"""Entries of the contrastive losses."""

import torch

import udakit
from contract.registry import Call, Operation, Sample
from contract.wrong_options import NOT_NEGATIVE


def _pixel_contrast_loss(s: Sample) -> Call:
    return Call((s.features(), s.features()), {"valid": s.valid()}, {"temperature": 0.5, "chunk_size": 40})


def _prototype_contrast_loss(s: Sample) -> Call:
    return Call((s.logits(), s.logits(), s.labels()), {}, {"num_classes": s.c})


def _pixel_prototype_contrast_loss(s: Sample) -> Call:
    return Call(
        (s.features(), s.labels(), s.class_vectors()),
        {"pixel_weight": s.weight()},
        {"class_weight": s.class_values()},
    )


def _pixel_prototype_contrast_loss_seen(s: Sample) -> Call:
    seen = s.tag(torch.arange(s.c) != 1, "class_values")
    return Call((s.features(), s.labels(), s.class_vectors()), {"seen": seen}, {"normalize": False})


def _distribution_contrast_loss(s: Sample) -> Call:
    variances = s.tag(s.normal(s.c, s.d).abs(), "class_vectors")
    return Call(
        (s.features(), s.labels(), s.class_vectors(), variances),
        {"pixel_weight": s.weight()},
        {"temperature": 0.7, "ratio": 0.5},
    )


def _distribution_contrast_loss_seen(s: Sample) -> Call:
    call = _distribution_contrast_loss(s)
    call.tensors["seen"] = s.tag(torch.arange(s.c) != 1, "class_values")
    return call


def _supervised_pixel_contrast_loss(s: Sample) -> Call:
    return Call((s.features(), s.labels()), {}, {"num_classes": s.c, "max_anchors": 12})


OPERATIONS: list[Operation] = [
    Operation(
        "pixel_contrast_loss",
        _pixel_contrast_loss,
        udakit.pixel_contrast_loss,
        udakit.PixelContrastLoss,
        covers=("PixelContrastLoss",),
        grad=(0, 1),
        inductor=True,
    ),
    Operation(
        "prototype_contrast_loss",
        _prototype_contrast_loss,
        udakit.prototype_contrast_loss,
        udakit.PrototypeContrastLoss,
        covers=("PrototypeContrastLoss",),
        grad=(0, 1),
    ),
    Operation(
        "pixel_prototype_contrast_loss",
        _pixel_prototype_contrast_loss,
        udakit.pixel_prototype_contrast_loss,
        udakit.PixelPrototypeContrastLoss,
        covers=("PixelPrototypeContrastLoss",),
        grad=(0, 2),
    ),
    Operation(
        "pixel_prototype_contrast_loss[seen]",
        _pixel_prototype_contrast_loss_seen,
        udakit.pixel_prototype_contrast_loss,
        udakit.PixelPrototypeContrastLoss,
        grad=(0, 2),
    ),
    Operation(
        "distribution_contrast_loss",
        _distribution_contrast_loss,
        udakit.distribution_contrast_loss,
        udakit.DistributionContrastLoss,
        wrong={"ratio": NOT_NEGATIVE},
        covers=("DistributionContrastLoss",),
        grad=(0, 2, 3),
    ),
    Operation(
        "distribution_contrast_loss[seen]",
        _distribution_contrast_loss_seen,
        udakit.distribution_contrast_loss,
        udakit.DistributionContrastLoss,
        wrong={"ratio": NOT_NEGATIVE},
        grad=(0, 2, 3),
    ),
    Operation(
        "supervised_pixel_contrast_loss",
        _supervised_pixel_contrast_loss,
        udakit.supervised_pixel_contrast_loss,
        udakit.SupervisedPixelContrastLoss,
        covers=("SupervisedPixelContrastLoss",),
        exempt={"batch_permutation": "which pixels are drawn depends on their place in the batch"},
    ),
]
