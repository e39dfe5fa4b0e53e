"""Masks, pasting, class mix, style transfer and strong augmentation on batches. True in a mask takes the first side."""

from udakit.mixing.batch import SegBatch, paste
from udakit.mixing.class_mix import ClassMix, class_mask, class_mix, draw_classes

__all__ = [
    "ClassMix",
    "SegBatch",
    "class_mask",
    "class_mix",
    "draw_classes",
    "paste",
]
