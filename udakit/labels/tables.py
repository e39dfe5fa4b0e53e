"""Id tables, class names and colours of the street data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from jaxtyping import UInt8

CITYSCAPES_CLASSES: Final = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""The 19 class names, in the order of the train ids."""

CITYSCAPES_PALETTE: Final[UInt8[np.ndarray, "19 3"]] = np.array(
    [
        *([128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153], [153, 153, 153]),
        *([250, 170, 30], [220, 220, 0], [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60]),
        *([255, 0, 0], [0, 0, 142], [0, 0, 70], [0, 60, 100], [0, 80, 100], [0, 0, 230], [119, 11, 32]),
    ],
    dtype=np.uint8,
)
"""The standard RGB colour of each train id."""
CITYSCAPES_PALETTE.flags.writeable = False

_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

CITYSCAPES_IDS: Final[Mapping[int, int]] = {label_id: train_id for train_id, label_id in enumerate(_EVALUATED)}
"""Maps Cityscapes `_labelIds` to train ids; all other ids are ignored."""

GTA5_IDS: Final[Mapping[int, int]] = CITYSCAPES_IDS
"""Maps GTA5 ids to train ids. GTA5 labels (palette PNGs) hold Cityscapes ids."""

# fmt: off
SYNTHIA_IDS: Final[Mapping[int, int]] = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15, 20: 16,
    12: 17, 11: 18,
}
# fmt: on
"""Maps SYNTHIA-RAND-CITYSCAPES ids (first channel of the 16-bit PNG) to train ids. Ids 16, 18 and 20 do not occur."""

SYNTHIA_16_CLASSES: Final = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Train ids of the 16-class protocol: without terrain, truck and train."""

SYNTHIA_13_CLASSES: Final = (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Train ids of the 13-class protocol: the 16 without wall, fence and pole."""
