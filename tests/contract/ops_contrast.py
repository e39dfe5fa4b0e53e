"""Entries of the contrastive losses."""

import udakit
from contract.registry import Call, Operation, Sample


def _pixel_contrast_loss(s: Sample) -> Call:
    return Call((s.features(), s.features()), {"valid": s.valid()}, {"temperature": 0.5, "chunk_size": 40})


OPERATIONS: list[Operation] = [
    Operation(
        "pixel_contrast_loss",
        _pixel_contrast_loss,
        udakit.pixel_contrast_loss,
        udakit.PixelContrastLoss,
        covers=("PixelContrastLoss",),
        grad=(0, 1),
        inductor=True,
    ),
]
