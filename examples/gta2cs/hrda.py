"""HRDA around any net: the whole image at half size, a detail at full size, and attention that weights them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gta2cs.nets import SegNet, SegOutput, param_groups
from udakit import crop_detail, draw_detail_box, fuse_scales, sliding_logits


class HRDANet(nn.Module):
    """One net at two scales, fused by an attention head on the features of the context.

    In training the detail is a crop of half of each side, in one place for the batch, drawn from torch's generator,
    which the loop seeds at each step as for dropout. Otherwise the details of the whole image come from windows of half
    of each side, and the fusion is at the images' size. `features` and `encoded` are those of the context.
    """

    def __init__(self, net: SegNet, num_classes: int) -> None:
        super().__init__()
        self.net = net
        # Of the released head, which is a decoder of its own, the last layers.
        self.attention = nn.Sequential(
            nn.Conv2d(net.feature_dim, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, num_classes, 1)
        )

    @property
    def head_loaded(self) -> bool:
        """Whether its net predicts already."""
        return self.net.head_loaded

    def forward(self, images: Tensor) -> SegOutput:
        """Return the fused logits, and in training also those of the detail, for their part of the loss."""
        height, width = images.shape[-2:]
        half = (height // 2, width // 2)
        context = self.net(F.interpolate(images, half, mode="bilinear", align_corners=False))
        logits = context.head_logits
        attention = F.interpolate(
            self.attention(context.features).sigmoid(), logits.shape[-2:], mode="bilinear", align_corners=False
        )
        if not self.training:
            detail = sliding_logits(lambda x: self.net(x).logits, images, half)
            fused = fuse_scales(logits, detail, attention)
            return SegOutput(fused, context.features, context.encoded, (height, width))
        box = draw_detail_box(
            len(images), (height, width), detail=half, divisor=2 * self._cell(half, logits), device=images.device
        )
        detail = self.net(crop_detail(images, box)).head_logits
        fused = fuse_scales(logits, detail, attention, box)
        return SegOutput(fused, context.features, context.encoded, (height, width), (detail, box))

    @staticmethod
    def _cell(size: tuple[int, int], logits: Tensor) -> int:
        """Pixels of an image that a cell of its logits stands for."""
        return max(1, size[0] // logits.shape[-2])

    @property
    def encoder(self) -> nn.Module:
        """The net's encoder."""
        return self.net.encoder

    @property
    def decoder(self) -> nn.Module:
        """The net's decoder."""
        return self.net.decoder

    @property
    def head(self) -> nn.Module:
        """The net's head."""
        return self.net.head

    @property
    def stride(self) -> int:
        """The net's stride, at full size."""
        return self.net.stride

    @property
    def feature_dim(self) -> int:
        """Channels of `features`."""
        return self.net.feature_dim

    def encode(self, images: Tensor) -> Tensor:
        """Encoder output at the scale of the context, which `encoded` is compared with."""
        half = (images.shape[-2] // 2, images.shape[-1] // 2)
        return self.net.encode(F.interpolate(images, half, mode="bilinear", align_corners=False))

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the encoder at full size."""
        return self.net.pyramid(images)

    def param_groups(self, *, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """The groups of the net; the attention has the learning rate of the decoder."""
        groups = param_groups(self.net, lr=lr, head_multiplier=head_multiplier)
        attention = {"name": "attention", "params": list(self.attention.parameters()), "lr": lr * head_multiplier}
        return [*groups, attention]
