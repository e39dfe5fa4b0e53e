"""Large images: windows that slide over them, detail crops, and two scales made one (HRDA)."""

from udakit.resolution.detail import DetailBox, crop_detail, draw_detail_box
from udakit.resolution.fusion import fuse_scales
from udakit.resolution.sliding import sliding_bands, sliding_logits

__all__ = ["DetailBox", "crop_detail", "draw_detail_box", "fuse_scales", "sliding_bands", "sliding_logits"]
