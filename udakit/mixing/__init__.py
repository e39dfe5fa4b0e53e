"""Masks, pasting, class mix, style transfer and strong augmentation of batches. True in a mask takes the first side."""

from udakit.mixing.augment_draw import StrongAugmentDraw, draw_strong_augment
from udakit.mixing.batch import SegBatch, paste
from udakit.mixing.class_mix import ClassMix, class_mix
from udakit.mixing.classes import class_mask, draw_classes
from udakit.mixing.cross_domain import CrossDomainMix, cross_domain_mix
from udakit.mixing.histogram import histogram_transfer
from udakit.mixing.images import check_images
from udakit.mixing.masks import boundary_band, draw_block_mask, draw_box_mask
from udakit.mixing.strong_augment import StrongAugment, strong_augment
from udakit.mixing.style import color_transfer, fourier_transfer
from udakit.mixing.target_paste import TargetPaste, target_paste
from udakit.mixing.tokens import draw_token_mask, mask_tokens

__all__ = [
    "ClassMix",
    "CrossDomainMix",
    "SegBatch",
    "StrongAugment",
    "StrongAugmentDraw",
    "TargetPaste",
    "boundary_band",
    "check_images",
    "class_mask",
    "class_mix",
    "color_transfer",
    "cross_domain_mix",
    "draw_block_mask",
    "draw_box_mask",
    "draw_classes",
    "draw_strong_augment",
    "draw_token_mask",
    "fourier_transfer",
    "histogram_transfer",
    "mask_tokens",
    "paste",
    "strong_augment",
    "target_paste",
]
