"""Use a trained net on images of any size: read a checkpoint, and segment whole images or sliding windows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gta2cs.checkpoints import copy_net, load_checkpoint
from gta2cs.datasets import (
    CITYSCAPES_19,
    PUBLISHED_SIZES,
    RENDERED,
    SMALL,
    SYNTHETIC,
    ClassSet,
    Pair,
    build_pair,
    load_classes,
)
from gta2cs.evaluation import class_probabilities
from gta2cs.loading import normalise
from gta2cs.nets import MIT, SegNet, build_net
from gta2cs.reading import ImageFormat
from gta2cs.recipes.duda import LARGE_PAIR, DudaPre
from gta2cs.samples import Size, rainbow, resize_image
from udakit import sliding_bands, sliding_logits

# Of DUDA's pre-adaptation, in the order of its table.
LARGE = {name: f"base.{prefix}" for name, prefix in sorted(LARGE_PAIR.items())}
# A table's row -> where a checkpoint keeps the net.
NETS = {"student": "student", "teacher": "teacher.module", **LARGE}


def prefixes_of(recipe: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each net that a checkpoint holds -> prefix of its tensors; of `combined`, those of what goes on."""
    found = {name: prefix for name, prefix in NETS.items() if any(key.startswith(f"{prefix}.") for key in recipe)}
    candidates = [*dict.fromkeys(key.split(".")[1] for key in recipe if key.startswith("candidates."))]
    if candidates and "teacher" not in found:
        # All are there only while they take turns, and after a trial; `progress` ends with the one that was kept.
        kept = max(0, int(recipe["progress"].flatten()[-1])) if len(candidates) > 1 else 0
        found["teacher"] = f"candidates.{candidates[kept]}.teacher.module"
    return found


@dataclass(frozen=True)
class Trained:
    """An opened checkpoint of train_gta2cs.py. Its configuration has everything that is needed to use its nets."""

    path: Path
    config: dict[str, Any]
    history: dict[str, Any]
    prefixes: dict[str, str]  # name of each net that it holds -> where `recipe` has its tensors
    classes_file: Path | None = None
    recipe: dict[str, Tensor] = field(default_factory=dict, repr=False)  # the tensors, read once for all nets
    choice: dict[str, Any] | None = None  # of `best.pt`: which net it holds as its student

    @classmethod
    def open(cls, path: Path, classes_file: Path | None = None) -> Trained:
        """Read a checkpoint. For the folder of a run, read the chosen net."""
        if path.is_dir():
            folder, path = path, path / "best.pt"
            if not path.is_file() and (left := sorted(str(file) for file in folder.glob("stage*/last.pt"))):
                raise FileNotFoundError(
                    f"Expected {folder} to be a run that has chosen a net, but it was stopped before. Continue it with "
                    f"--resume, or name one of its checkpoints: {', '.join(left)}."
                )
        saved = load_checkpoint(path, needs=("config", "history"))
        recipe = saved["recipe"]
        held = prefixes_of(recipe)
        choice = json.loads(saved.get("choice", "null"))
        return cls(path, json.loads(saved["config"]), json.loads(saved["history"]), held, classes_file, recipe, choice)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nets that it holds."""
        return tuple(self.prefixes)

    @property
    def title(self) -> str:
        """Name of the net of `best.pt`, otherwise of the stage."""
        from gta2cs.choosing import Choice  # and with it everything that trains

        return self.history["name"] if self.choice is None else Choice(**self.choice).title

    @cached_property
    def classes(self) -> ClassSet:
        """Names and colours from `classes_file`, from the pair, or from the last evaluation."""
        with _as_it_says(self.path):
            return self._classes()

    def _classes(self) -> ClassSet:
        pair, data = self.config["data"]["pair"], self.config["data"]
        if self.classes_file is not None:
            return load_classes(self.classes_file).known
        if pair in RENDERED:
            from gta2cs.toy import CLASSES, PALETTE

            return ClassSet(tuple(CLASSES), np.asarray(PALETTE, np.uint8))
        known = {"cs2acdc": CITYSCAPES_19, "cs2darkzurich": CITYSCAPES_19, **SMALL, **SYNTHETIC}.get(pair)
        if known is not None:
            return known
        roots = [data.get("source_root"), data.get("target_root"), data.get("data_root")]
        roots += [Path(data["data_root"]) / part for part in ("source", "target")] if data.get("data_root") else []
        for root in roots:
            if root is not None and (found := Path(root) / "classes.yaml").is_file():
                return load_classes(found).known
        if stored := self.history.get("classes"):
            return ClassSet(tuple(stored["names"]), np.array(stored["palette"]).clip(0, 255).astype(np.uint8))
        if not self.history["scores"]:  # checkpoints of before they held the names
            raise ValueError(
                f"Expected `classes` to name the classes.yaml of the pair {pair!r}: {self.path} was written before the "
                "first evaluation, which would have told their names."
            )
        names = next(iter(self.history["scores"][-1]["nets"].values()))["iou"]
        return ClassSet(tuple(names), rainbow(list(names)))

    @property
    def seen_size(self) -> Size | None:
        """Size (height, width) of the run's target images after loading; None if they were not resized."""
        given = self.config["data"].get("target_size")
        if isinstance(given, list):
            return (given[0], given[1])
        _, published = PUBLISHED_SIZES.get(self.config["data"]["pair"], (None, None))
        return None if given == "native" else published

    @property
    def image_format(self) -> ImageFormat:
        """How the run read its target images."""
        data = self.config["data"]
        given = data.get("target_range")  # checkpoints of before it existed have none
        with _as_it_says(self.path):
            mean, std = (tuple(data[key]) if data.get(key) else None for key in ("mean", "std"))
            return ImageFormat(data.get("channels", 3), (given[0], given[1]) if given else None, mean, std)

    def net(self, name: str = "student", **changes: str) -> SegNet:
        """Build one of its nets in eval mode, by one of its `names` or any prefix of the recipe's tensors.

        DUDA's large nets are built by the options of the run. `changes` (`arch`, `encoder`) are for other nets that are
        not built like the student.
        """
        prefix = self.prefixes.get(name, name)
        if not any(key.startswith(f"{prefix}.") for key in self.recipe):
            raise ValueError(
                f"Expected {self.path} to hold the net {name!r}, but it holds {', '.join(self.names) or 'none'}. "
                "The nets of a stage are in its own checkpoint (stage1_source_only/last.pt and so on)."
            )
        options = {**self.config["net"], **(self._large if name in LARGE else {}), **changes}
        if options["arch"] != "hf_segformer" or options["encoder"] in MIT:
            options["weights"] = "random"  # all tensors come from the checkpoint, none from a package or the hub
        decoder = options.pop("options", {})  # checkpoints of before it existed have none
        with _as_it_says(self.path):
            channels = self.image_format.channels
            try:
                net = build_net(**decoder, **options, num_classes=len(self.classes.names), channels=channels)
            except ValueError as error:
                raise ValueError(f"Cannot use the net of {self.path}: {error}") from error
        copy_net(net, self.recipe, prefix, self.path)
        return net.eval()  # type: ignore[return-value]

    @property
    def _large(self) -> dict[str, Any]:
        """How DUDA's large nets differ from the student."""
        given = [s["options"] for s in self.config["stages"] if s["recipe"] == self.history["name"]]
        with _as_it_says(self.path):
            return DudaPre.parse(given[0]).large  # type: ignore[no-any-return]

    def pair(self, **roots: Path | None) -> Pair:
        """Open the pair that it was trained on; `roots` are the new paths of moved folders."""
        data = self.config["data"]
        options = {k: data[k] for k in ("data_root", "source_root", "target_root", "source_size", "target_size")}
        options |= {k: v for k, v in roots.items() if v is not None}
        options |= {k: data[k] for k in ("channels", "mean", "std", "source_range", "target_range") if k in data}
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return build_pair(data["pair"], cache=data["cache"], **options)


@contextmanager
def _as_it_says(path: Path) -> Iterator[None]:
    """What a foreign checkpoint says of itself can be anything: say which file it is that makes no sense."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError) as error:
        raise ValueError(
            f"Expected {path} to be a checkpoint of train_gta2cs.py, but its description of the run is invalid "
            f"({type(error).__name__}: {error})."
        ) from error


class Logits(NamedTuple):
    """What an evaluation reads of a net's output."""

    logits: Tensor


class SlidingWindow(nn.Module):
    """A net that processes one window at a time and averages the logits of the windows."""

    def __init__(self, net: nn.Module, window: Size, stride: Size | None = None) -> None:
        super().__init__()
        self.net, self.window, self.stride = net, window, check_window(window, stride)

    def forward(self, images: Tensor) -> Logits:
        """Averaged logits (N, C, H, W)."""
        return Logits(sliding_logits(self.net, images, self.window, self.stride))


def check_window(window: Size | None, stride: Size | None) -> Size | None:
    """Check both and fill in the stride: half a window."""
    if window is None:
        if stride is not None:
            raise ValueError(f"Expected `window` with `stride`, but got stride {stride} and no window.")
        return None
    if min(window) < 1:
        raise ValueError(f"Expected `window` to be two positive numbers (height, width), but got {window}.")
    if stride is None:
        return (max(1, window[0] // 2), max(1, window[1] // 2))
    if not all(1 <= s <= w for s, w in zip(stride, window, strict=True)):
        raise ValueError(f"Expected `stride` to be in [1, window] {window} along both axes, but got {stride}.")
    return stride


@torch.no_grad()
def probability_bands(
    net: nn.Module, images: Tensor, *, window: Size | None = None, stride: Size | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Class probabilities of normalised images (N, 3, H, W) from top to bottom: (first row, (N, C, rows, W)).

    Without a window there is one band, the whole image. With a window, the logits of a pixel are averaged over the
    windows that cover it, and only one row of windows is in memory at a time.
    """
    stride = check_window(window, stride)
    if window is None:
        yield 0, class_probabilities(net, images)
        return
    images = images.contiguous(memory_format=torch.channels_last)
    for top, logits in sliding_bands(net, images, window, stride):
        yield top, logits.softmax(1)


def segment(
    net: nn.Module,
    image: Tensor,
    *,
    window: Size | None = None,
    stride: Size | None = None,
    size: Size | None = None,
    device: torch.device | str = "cpu",
    format: ImageFormat | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Label map (H, W) uint8 and confidence (H, W) float32 of one image (K, H, W) as it was read, at its own size.

    Args:
        net: net in eval mode, on `device`.
        image: image of any size.
        window: (height, width) of the windows; None for the whole image at once.
        stride: stride of the windows; by default half a window.
        size: (height, width) for the net; its probabilities are resized to the size of the image (bilinear).
        device: device of the net.
        format: how images are normalised; by default with the values of ImageNet.
    """
    height, width = image.shape[-2:]
    seen = normalise(resize_image(image, size)[None].to(device), format)
    if tuple(seen.shape[-2:]) == (height, width):
        labels, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float32)
        for top, p in probability_bands(net, seen, window=window, stride=stride):
            best = p[0].max(0)
            labels[top : top + p.shape[2]] = best.indices.byte().cpu().numpy()
            confidence[top : top + p.shape[2]] = best.values.cpu().numpy()
        return labels, confidence
    p = torch.cat([band for _, band in probability_bands(net, seen, window=window, stride=stride)], dim=2)
    best_p = torch.full((height, width), -1.0, device=p.device)
    best_c = torch.zeros(height, width, dtype=torch.uint8, device=p.device)
    for c in range(p.shape[1]):  # class by class: all classes at full size are never in memory together
        full = F.interpolate(p[:, c : c + 1], (height, width), mode="bilinear", align_corners=False)[0, 0]
        best_c = torch.where(full > best_p, c, best_c)
        best_p = torch.maximum(full, best_p)
    return best_c.byte().cpu().numpy(), best_p.cpu().numpy()
