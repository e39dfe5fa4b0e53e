"""Scores of a net on unlabelled images, which show whether adaptation helps without target labels."""

from udakit.validation.confidence_threshold import ConfidenceThreshold, fit_temperature
from udakit.validation.consistency import ConsistencyScore, consistency_score
from udakit.validation.ensemble import EnsembleAgreement, ensemble_agreement
from udakit.validation.label_free import LabelFreeScores
from udakit.validation.under_views import mirror_consistency, view_consistency
from udakit.validation.views import View, crop_view, mirror_view, rotation_view, shift_view

__all__ = [
    "ConfidenceThreshold",
    "ConsistencyScore",
    "EnsembleAgreement",
    "LabelFreeScores",
    "View",
    "consistency_score",
    "crop_view",
    "ensemble_agreement",
    "fit_temperature",
    "mirror_consistency",
    "mirror_view",
    "rotation_view",
    "shift_view",
    "view_consistency",
]
