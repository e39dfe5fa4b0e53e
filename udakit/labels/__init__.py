"""Label maps: id tables of the street data sets, checks of ids, and resizing that never invents a class."""

from udakit.labels.ids import check_labels, map_ids
from udakit.labels.sizes import downscale_labels, resize_labels
from udakit.labels.tables import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_IDS,
    CITYSCAPES_PALETTE,
    GTA5_IDS,
    SYNTHIA_13_CLASSES,
    SYNTHIA_16_CLASSES,
    SYNTHIA_IDS,
)

__all__ = [
    "CITYSCAPES_CLASSES",
    "CITYSCAPES_IDS",
    "CITYSCAPES_PALETTE",
    "GTA5_IDS",
    "SYNTHIA_13_CLASSES",
    "SYNTHIA_16_CLASSES",
    "SYNTHIA_IDS",
    "check_labels",
    "downscale_labels",
    "map_ids",
    "resize_labels",
]
