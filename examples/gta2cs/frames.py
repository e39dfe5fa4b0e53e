"""Segmentation nets of several libraries with one interface: encoder, decoder and head."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gta2cs.loading import MEAN, STD
from gta2cs.outputs import SegOutput, enlarge
from udakit import copy_net


class SegNet(nn.Module):
    """The common interface of all nets: `encoder`, `decoder` and a `head` that maps features to logits.

    Images are normalised with the mean and standard deviation of ImageNet, as everywhere in udakit. The net converts
    them to the normalisation of its weights (`mean`, `std`: 0.5 for efficientnet-lite). Images normalised with
    `data.mean` and `data.std` have the spread of ImageNet's, and are converted alike. Images with sides that are not a
    multiple of the encoder's stride are padded at the right and bottom by repetition, and the outputs are cropped.
    """

    image_scale: Tensor
    image_shift: Tensor
    foreign: ClassVar[Mapping[str, str]] = {"head.": "segmentation_head.0."}  # the names of its parts in smp
    head_loaded: bool = False  # whether it predicts already: its weights were loaded, those of the head included

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
        """Return logits, features and the last feature map of the encoder from one pass."""
        height, width = images.shape[-2:]
        stages = self.stages(self._prepare(images))
        features = self.decode(stages)
        logits = self.head(features)
        padded = (_round_up(height, self.stride), _round_up(width, self.stride))
        if padded == (height, width):
            return SegOutput(logits, features, stages[-1], padded)
        logits = enlarge(logits, padded)[..., :height, :width]  # a crop has no smaller equivalent
        return SegOutput(logits, _cut(features, padded, height, width), _cut(stages[-1], padded, height, width))

    @property
    def feature_dim(self) -> int:
        """D of `features`, the input channels of the head."""
        return next(m.in_channels for m in self.head.modules() if isinstance(m, nn.Conv2d))

    def first_convolution(self) -> tuple[str, nn.Conv2d]:
        """The first convolution, which gets the image, with its name."""
        return next((name, m) for name, m in self.named_modules() if isinstance(m, nn.Conv2d))

    def encode(self, images: Tensor) -> Tensor:
        """Run only the encoder and return its last feature map."""
        padded = (_round_up(images.shape[-2], self.stride), _round_up(images.shape[-1], self.stride))
        return _cut(self.stages(self._prepare(images))[-1], padded, images.shape[-2], images.shape[-1])

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Run only the encoder and return all its feature maps of the padded images, finest first."""
        return self.stages(self._prepare(images))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the encoder, finest first."""
        return list(self.encoder(images))

    def decode(self, stages: list[Tensor]) -> Tensor:
        """Fuse the feature maps to the features that the head sees."""
        return self.decoder(stages)  # type: ignore[no-any-return]

    def foreign_name(self, name: str) -> str:
        """The name of a tensor in the original library of the net."""
        for own, other in self.foreign.items():
            if name.startswith(own):
                return other + name.removeprefix(own)
        return name

    def convert(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename the tensors of a file to the names of the library's net."""
        return state

    def _prepare(self, images: Tensor) -> Tensor:
        images = images * self.image_scale + self.image_shift
        height, width = images.shape[-2:]
        pad = (0, _round_up(width, self.stride) - width, 0, _round_up(height, self.stride) - height)
        return F.pad(images, pad, mode="replicate") if any(pad) else images


class HFSegNet(SegNet):
    """transformers' SegFormer with the common interface."""

    foreign: ClassVar[Mapping[str, str]] = {
        "encoder.": "segformer.",
        "decoder.": "decode_head.",
        "head.": "decode_head.classifier.",
    }

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let transformers rename saved tensors: since version 5, the names in files and in nets differ."""
        from transformers import SegformerForSemanticSegmentation
        from transformers.utils import logging

        heads = [match for name in state if (match := re.match(r"(.*?\.)??(segformer|decode_head)\.", name))]
        prefix = (heads[0][1] or "") if heads else ""  # from training code that wraps a net
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
        failed = {str(key) for key in info["missing_keys"]} | {key_of(entry) for entry in info["mismatched_keys"]}
        found = {name: value for name, value in model.state_dict().items() if name not in failed}
        return {**found, **{name: state[name] for name in info["unexpected_keys"] if name in state}}

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the four stages."""
        return list(self.encoder(images, output_hidden_states=True, return_dict=True).hidden_states)


class TorchvisionSegNet(SegNet):
    """torchvision's FCN or DeepLabV3: the encoder is its backbone, and the head its last convolution."""

    def stages(self, images: Tensor) -> list[Tensor]:
        """The only feature map of the backbone."""
        return [self.encoder(images)["out"]]

    def decode(self, stages: list[Tensor]) -> Tensor:
        """Apply torchvision's classifier except for its last convolution."""
        return self.decoder(stages[-1])  # type: ignore[no-any-return]

    def foreign_name(self, name: str) -> str:
        """Name of a tensor in torchvision."""
        part, _, rest = name.partition(".")
        places = {"encoder": "backbone", "decoder": "classifier", "head": f"classifier.{len(self.decoder)}"}  # type: ignore[arg-type]
        return f"{places[part]}.{rest}"


class ReferenceEncoder(nn.Module):
    """A frozen copy of a net's encoder for the feature distance. Make it before training, with ImageNet weights."""

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


def key_of(entry: object) -> str:
    """Return the name of a tensor in an entry of transformers' loading report."""
    return str(entry[0]) if isinstance(entry, tuple | list) else str(entry)


def _round_up(length: int, stride: int) -> int:
    return -(-length // stride) * stride


def _cut(x: Tensor, padded: tuple[int, int], height: int, width: int) -> Tensor:
    """Crop a feature map of the padded image to the image."""
    rows = -(-height * x.shape[-2] // padded[0])
    columns = -(-width * x.shape[-1] // padded[1])
    return x[..., :rows, :columns]
