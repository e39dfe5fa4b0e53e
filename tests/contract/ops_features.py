"""Entries of udakit.features."""

from torch import Tensor, nn

import udakit
from contract.registry import Call, Operation

# Nothing drawn, nothing to learn: the tap is looked at, not the net, which takes longer to make than to tap.
NET = nn.Sequential(nn.AvgPool2d(2), nn.Softplus(), nn.Upsample(scale_factor=2))


def _tap(images: Tensor) -> tuple[Tensor, Tensor]:
    return udakit.FeatureTap(NET, "1")(images)


OPERATIONS = [
    Operation(
        "FeatureTap",
        lambda s: Call((s.images(),)),
        _tap,
        kind="map",
        space="none",
        output=("features", "features"),
        exempt={
            "module": "it wraps a net: there is no function of tensors to compare with",
            "compile": "a hook comes and goes at each call; compile the net, and tap the compiled one",
            "shape_errors": "the net looks at its inputs, not the tap",
        },
    ),
]
