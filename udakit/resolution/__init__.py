"""Large images: sliding windows, detail crops, and the fusion of two scales (HRDA)."""

from udakit.resolution.detail import DetailBox, crop_detail, draw_detail_box
from udakit.resolution.fusion import fuse_scales
from udakit.resolution.sliding import sliding_bands, sliding_logits

__all__ = ["DetailBox", "crop_detail", "draw_detail_box", "fuse_scales", "sliding_bands", "sliding_logits"]
