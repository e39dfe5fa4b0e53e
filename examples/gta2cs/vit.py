"""A plain vision transformer of timm (ViT, DINOv2) with a light head and the interface of the other nets."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from gta2cs.nets import SegNet, SegOutput
from udakit import mask_tokens


class ViTSegNet(SegNet):
    """Patch tokens as a feature map, enlarged four times by VFM-UDA's head.

    Position embeddings are interpolated to the size of the images (timm's `dynamic_img_size`). With `token_mask` (N, L)
    patch tokens are replaced by a learned one, before the position embedding is added.
    """

    def __init__(
        self, name: str, num_classes: int, *, pretrained: bool = False, layer_decay: float = 1.0, width: int = 0
    ) -> None:
        encoder = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        if not hasattr(encoder, "patch_embed") or not hasattr(encoder, "num_prefix_tokens"):
            raise ValueError(f"Expected `encoder` to be a vision transformer of timm, but got {name!r}.")
        dim, patch = encoder.embed_dim, encoder.patch_embed.patch_size[0]
        width = width or dim // 2
        decoder = nn.Sequential(
            nn.ConvTranspose2d(dim, width, 2, stride=2),
            LayerNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
        )
        config = timm.get_pretrained_cfg(name)
        stored = {} if config is None else {"mean": config.mean, "std": config.std}
        super().__init__(encoder, decoder, nn.Conv2d(width // 2, num_classes, 1), stride=patch, **stored)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.layer_decay = layer_decay
        self._token_mask: Tensor | None = None
        encoder.patch_embed.register_forward_hook(self._replace)

    def forward(self, images: Tensor, token_mask: Tensor | None = None) -> SegOutput:
        """Logits, features and the patch tokens; `token_mask` (N, L) is True where a token is replaced."""
        self._token_mask = token_mask
        try:
            return super().forward(images)
        finally:
            self._token_mask = None

    def token_count(self, height: int, width: int) -> int:
        """L, the number of patch tokens of an image."""
        return -(-height // self.stride) * -(-width // self.stride)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The patch tokens, back in their grid."""
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]  # type: ignore[operator, misc]
        grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        return [tokens.transpose(1, 2).unflatten(2, grid)]

    def decode(self, stages: list[Tensor]) -> Tensor:
        """The enlarged feature map."""
        return self.decoder(stages[-1])  # type: ignore[no-any-return]

    def _replace(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._token_mask is None:
            return None
        tokens = output.flatten(1, -2)  # timm keeps the grid (N, h, w, D) for interpolated positions
        return mask_tokens(tokens, self._token_mask, self.mask_token).view_as(output)

    def param_groups(self, *, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Encoder groups by layer, from timm: each block has `layer_decay` times the learning rate of the next."""
        groups: list[dict[str, Any]] = []
        for group in param_groups_layer_decay(
            self.encoder, layer_decay=self.layer_decay, weight_decay_exclude_1d=False, no_weight_decay_list=()
        ):
            params = [p for p in group["params"] if p.requires_grad]
            groups.append({"name": "encoder", "params": params, "lr": lr * group["lr_scale"]})
        head = [self.mask_token, *self.decoder.parameters(), *self.head.parameters()]
        return [*groups, {"name": "decoder", "params": head, "lr": lr * head_multiplier}]
