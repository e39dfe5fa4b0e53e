"""Losses on tensors: a function and a Module each."""

from udakit.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from udakit.losses.entropy import EntropyLoss, entropy_loss
from udakit.losses.feature_distance import FeatureDistanceLoss, feature_distance_loss
from udakit.losses.inconsistency import InconsistencyLoss, class_inconsistency, inconsistency_loss
from udakit.losses.kd import KDLoss, kd_loss
from udakit.losses.max_square import MaxSquareLoss, max_square_loss
from udakit.losses.pixel_contrast import PixelContrastLoss, pixel_contrast_loss
from udakit.losses.symmetric_cross_entropy import SymmetricCrossEntropyLoss, symmetric_cross_entropy
from udakit.losses.symmetric_kd import SymmetricKDLoss, symmetric_kd_loss

__all__ = [
    "CrossEntropyLoss",
    "EntropyLoss",
    "FeatureDistanceLoss",
    "InconsistencyLoss",
    "KDLoss",
    "MaxSquareLoss",
    "PixelContrastLoss",
    "SymmetricCrossEntropyLoss",
    "SymmetricKDLoss",
    "class_inconsistency",
    "cross_entropy",
    "entropy_loss",
    "feature_distance_loss",
    "inconsistency_loss",
    "kd_loss",
    "max_square_loss",
    "pixel_contrast_loss",
    "symmetric_cross_entropy",
    "symmetric_kd_loss",
]
