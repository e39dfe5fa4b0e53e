"""A learned translator: a small encoder and decoder that give source images the style of a target image.

DiGA trains such a net on both domains before its warm-up, and freezes it. This one is small enough for a CPU: features
at strides 1, 2 and 4 take the channel means and deviations of a target image (AdaIN, Huang and Belongie 2017) and are
decoded with all three scales at hand, so that thin things survive. It learns from images alone:

- reconstruction: an image of either domain in its own style is itself;
- content: a translated image keeps the instance-normalised features of its source in the ImageNet encoder;
- style: it takes on the means and deviations of the target image, of colours and of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from gta2cs.checkpoints import read_tensors, save_checkpoint
from gta2cs.loading import Batch
from gta2cs.nets import SegNet

STRIDES = (2, 8)  # of the ImageNet encoder's stages that the losses look at
CONTENT, STYLE = 2.0, 0.3  # weights beside a reconstruction of 1
SAVE_EVERY = 100
EPS = 1e-3

Batches = Callable[[int, int], Iterable[Batch]]  # steps start ... stop - 1


class Translator(nn.Module):
    """Source images in the style of target images, both in the normalised space: D(AdaIN(E(source), E(target)))."""

    steps: Tensor

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        w = width
        self.encoder = nn.ModuleList([_conv(3, w), _conv(w, 2 * w, stride=2), _conv(2 * w, 4 * w, stride=2)])
        self.blocks = nn.ModuleList([nn.Sequential(_conv(4 * w, 4 * w), _conv(4 * w, 4 * w)) for _ in range(2)])
        self.decoder = nn.ModuleList([_conv(4 * w + 2 * w, 2 * w), _conv(2 * w + w, w)])
        self.to_image = nn.Conv2d(w, 3, 3, padding=1, padding_mode="reflect")
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # trained for, so that a state_dict tells

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Translate `source` (N, 3, H, W); image i of `target` (N, 3, H2, W2) is its style."""
        return self.decode([adain(s, t) for s, t in zip(self.encode(source), self.encode(target), strict=True)])

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features at strides 1, 2 and 4."""
        stages = []
        for layer in self.encoder:
            images = layer(images)
            stages.append(images)
        return stages

    def decode(self, stages: list[Tensor]) -> Tensor:
        """Image of features; nearest upsampling before a convolution leaves no checkerboard."""
        *finer, x = stages
        for block in self.blocks:
            x = x + block(x)
        for layer, skip in zip(self.decoder, reversed(finer), strict=True):
            x = layer(torch.cat([F.interpolate(x, skip.shape[-2:]), skip], dim=1))
        return self.to_image(x)


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Content features with the channel means and deviations of style features."""
    (mean, deviation), (new_mean, new_deviation) = statistics(content), statistics(style)
    return (content - mean) / deviation * new_deviation + new_mean


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of each image, (N, C, 1, 1)."""
    var, mean = torch.var_mean(features.float(), dim=(2, 3), keepdim=True, correction=0)
    return mean, (var + EPS**2).sqrt()


def train_translator(
    translator: Translator,
    batches: Batches,
    net: SegNet,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    path: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> None:
    """Train in place for `steps` steps with Adam and a learning rate that falls linearly to 0, then freeze.

    Args:
        translator: initialised by the caller: a function of the seed.
        batches: `batches(start, stop)` gives the steps' images, as a function of the step.
        net: its ImageNet encoder is the eye of the losses; it is not trained.
        steps: of training.
        lr: at the start.
        seed: that `translator` and `batches` come from, to know the same training by.
        path: a checkpoint, written now and then, to go on from.
        resume: go on from `path` where it is there, and of the same training.
        console: where the progress bar goes; None shows none.
    """
    translator.requires_grad_(True)
    eye = _Eye(net)
    optimizer = torch.optim.Adam(translator.parameters(), lr=lr)
    plan = {"steps": steps, "lr": lr, "seed": seed}
    device = next(translator.parameters()).device
    if resume and path is not None and path.is_file():
        saved = read_tensors(path, device)
        if saved["plan"] == plan:
            translator.load_state_dict(saved["translator"])
            optimizer.load_state_dict(saved["optimizer"])
    start = int(translator.steps)
    loop: Iterable[Batch] = batches(start, steps)
    if console is not None:
        loop = track(loop, "translator", total=steps, completed=start, console=console)
    for step, batch in enumerate(loop, start):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        sum(translator_losses(translator, eye, batch.source_images, batch.target_images).values()).backward()
        optimizer.step()
        translator.steps.add_(1)
        if path is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
            save_checkpoint(
                path, {"translator": translator.state_dict(), "optimizer": optimizer.state_dict(), "plan": plan}
            )
    optimizer.zero_grad(set_to_none=True)
    translator.requires_grad_(False)


def translator_losses(
    translator: Translator, eye: Callable[[Tensor], list[Tensor]], source: Tensor, target: Tensor
) -> dict[str, Tensor]:
    """The three losses of a step, weighted."""
    n = len(source)
    encoded = translator.encode(torch.cat([source, target]))
    # In its own style an image is untouched by AdaIN: one decoding gives both reconstructions and the translation.
    decoded = translator.decode([torch.cat([stage, adain(stage[:n], stage[n:])]) for stage in encoded])
    translated = decoded[2 * n :]
    with torch.no_grad():
        seen_source, seen_target = zip(*(x.split(n) for x in eye(torch.cat([source, target]))), strict=True)
    seen = eye(translated)
    content = [F.mse_loss(_normalised(x), _normalised(y)) for x, y in zip(seen, seen_source, strict=True)]
    style = [_style_distance(x, y) for x, y in zip([translated, *seen], [target, *seen_target], strict=True)]
    return {
        "reconstruction": F.l1_loss(decoded[: 2 * n], torch.cat([source, target])),
        "content": CONTENT * torch.stack(content).mean(),
        "style": STYLE * torch.stack(style).mean(),
    }


class _Eye:
    """The finer stages of a frozen ImageNet encoder. It is not a Module, so it is not in a state_dict."""

    def __init__(self, net: SegNet) -> None:
        self.net = net.requires_grad_(False).eval()

    def __call__(self, images: Tensor) -> list[Tensor]:
        low, high = STRIDES
        return [x for x in self.net.pyramid(images) if low <= round(images.shape[-1] / x.shape[-1]) <= high]


def _style_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of means in units of the target's deviation, plus that of the log deviations; independent of scale."""
    (mean, deviation), (wanted_mean, wanted) = statistics(x), statistics(y)
    floor = 0.1 * wanted.mean(dim=1, keepdim=True)  # a channel that hardly fires would dominate otherwise
    deviation, wanted = deviation + floor, wanted + floor
    return ((mean - wanted_mean) / wanted).abs().mean() + (deviation / wanted).log().abs().mean()


def _normalised(features: Tensor) -> Tensor:
    mean, deviation = statistics(features)
    return (features - mean) / deviation


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="reflect"), nn.LeakyReLU(0.2)
    )
