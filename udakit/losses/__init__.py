"""Losses on tensors, each as a function and as a Module."""

from udakit.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from udakit.losses.distribution_contrast import DistributionContrastLoss, distribution_contrast_loss
from udakit.losses.entropy import EntropyLoss, entropy_loss
from udakit.losses.feature_distance import FeatureDistanceLoss, feature_distance_loss
from udakit.losses.feature_distillation import FeatureDistillationLoss, feature_distillation_loss
from udakit.losses.inconsistency import class_inconsistency, inconsistency_loss
from udakit.losses.inconsistency_module import InconsistencyLoss
from udakit.losses.kd import KDLoss, kd_loss
from udakit.losses.max_square import MaxSquareLoss, max_square_loss
from udakit.losses.pixel_contrast import PixelContrastLoss, pixel_contrast_loss
from udakit.losses.pixel_prototype_contrast import PixelPrototypeContrastLoss, pixel_prototype_contrast_loss
from udakit.losses.projected_feature import ProjectedFeatureLoss
from udakit.losses.prototype_contrast import PrototypeContrastLoss, prototype_contrast_loss
from udakit.losses.supervised_pixel_contrast import SupervisedPixelContrastLoss, supervised_pixel_contrast_loss
from udakit.losses.symmetric_cross_entropy import SymmetricCrossEntropyLoss, symmetric_cross_entropy
from udakit.losses.symmetric_kd import SymmetricKDLoss, symmetric_kd_loss
from udakit.losses.upsampled_cross_entropy import UpsampledCrossEntropyLoss, upsampled_cross_entropy
from udakit.losses.upsampled_kd import UpsampledKDLoss, upsampled_kd_loss

__all__ = [
    "CrossEntropyLoss",
    "DistributionContrastLoss",
    "EntropyLoss",
    "FeatureDistanceLoss",
    "FeatureDistillationLoss",
    "InconsistencyLoss",
    "KDLoss",
    "MaxSquareLoss",
    "PixelContrastLoss",
    "PixelPrototypeContrastLoss",
    "ProjectedFeatureLoss",
    "PrototypeContrastLoss",
    "SupervisedPixelContrastLoss",
    "SymmetricCrossEntropyLoss",
    "SymmetricKDLoss",
    "UpsampledCrossEntropyLoss",
    "UpsampledKDLoss",
    "class_inconsistency",
    "cross_entropy",
    "distribution_contrast_loss",
    "entropy_loss",
    "feature_distance_loss",
    "feature_distillation_loss",
    "inconsistency_loss",
    "kd_loss",
    "max_square_loss",
    "pixel_contrast_loss",
    "pixel_prototype_contrast_loss",
    "prototype_contrast_loss",
    "supervised_pixel_contrast_loss",
    "symmetric_cross_entropy",
    "symmetric_kd_loss",
    "upsampled_cross_entropy",
    "upsampled_kd_loss",
]
