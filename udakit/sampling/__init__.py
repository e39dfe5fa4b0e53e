"""Rare-class sampling: count the classes once, then draw images with rare classes more often."""

from udakit.sampling.counts import count_classes, read_class_stats
from udakit.sampling.rare_classes import RareClassSampler, rare_class_probabilities

__all__ = ["RareClassSampler", "count_classes", "rare_class_probabilities", "read_class_stats"]
