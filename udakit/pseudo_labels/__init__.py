"""Pseudo-label selectors: they take logits and return labels, confidences and weights."""

from udakit.pseudo_labels.adaptive_threshold import AdaptiveThresholdSelector
from udakit.pseudo_labels.argmax import ArgmaxSelector
from udakit.pseudo_labels.class_quantile import ClassQuantileSelector
from udakit.pseudo_labels.confident_ratio import ConfidentRatioSelector, confident_ratio
from udakit.pseudo_labels.consensus import BilateralConsensus, bilateral_consensus
from udakit.pseudo_labels.distribution import DistributionAlignment, align_distribution
from udakit.pseudo_labels.flip import hflip_average
from udakit.pseudo_labels.masks import row_mask
from udakit.pseudo_labels.rectified import RectifiedSelector, rectify_probabilities
from udakit.pseudo_labels.selection import PseudoLabels
from udakit.pseudo_labels.threshold import ThresholdSelector

__all__ = [
    "AdaptiveThresholdSelector",
    "ArgmaxSelector",
    "BilateralConsensus",
    "ClassQuantileSelector",
    "ConfidentRatioSelector",
    "DistributionAlignment",
    "PseudoLabels",
    "RectifiedSelector",
    "ThresholdSelector",
    "align_distribution",
    "bilateral_consensus",
    "confident_ratio",
    "hflip_average",
    "rectify_probabilities",
    "row_mask",
]
