"""Masks, pasting, class mix, style transfer and strong augmentation on batches. True in a mask takes the first side."""

from udakit.mixing.batch import SegBatch, paste
from udakit.mixing.class_mix import ClassMix, class_mask, class_mix, draw_classes
from udakit.mixing.strong_augment import StrongAugment, StrongAugmentDraw, draw_strong_augment, strong_augment
from udakit.mixing.style import color_transfer, fourier_transfer, histogram_transfer

__all__ = [
    "ClassMix",
    "SegBatch",
    "StrongAugment",
    "StrongAugmentDraw",
    "class_mask",
    "class_mix",
    "color_transfer",
    "draw_classes",
    "draw_strong_augment",
    "fourier_transfer",
    "histogram_transfer",
    "paste",
    "strong_augment",
]
