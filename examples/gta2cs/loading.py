"""Batches as a function of (seed, step, sample), independent of workers and ranks, without loader state to resume.

Sample s of step k draws its index, scale, crop and flip from a generator seeded with (seed, k, s, stream). Rank r of n
with batch b takes the samples r b ... r b + b - 1 of each step, so n ranks see what one process sees with batch n b.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gta2cs.interrupts import kept_from_children, quiet_child
from gta2cs.reading import IGNORE, ImageFormat
from gta2cs.reading import MEAN as MEAN
from gta2cs.reading import STD as STD
from gta2cs.samples import Labelled, Size, Unlabelled, nearest_index


class Batch(NamedTuple):
    """One step's data of one rank. Images are normalised float32 (N, K, h, w), labels int64 (N, h, w)."""

    source_images: Tensor
    source_labels: Tensor
    source_ids: Tensor  # (N,) positions in the source set
    target_images: Tensor | None
    target_ids: Tensor | None
    samples: Tensor  # (N,) sample index within the global batch of this step


class Draws(Protocol):
    """The interface of a rare-class sampler: a draw returns (image index, class that the crop should show or None)."""

    def draw(self, generator: torch.Generator) -> tuple[int, int | None]:
        """Draw with `generator` alone."""
        ...


class Window(NamedTuple):
    """Where a crop comes from: a region of the image (pixels), its size after scaling, its place in the crop."""

    top: int
    left: int
    height: int
    width: int
    scaled: Size
    offset: Size
    flip: bool


def normalise(images: Tensor, format: ImageFormat | None = None) -> Tensor:
    """Values of 0..255 (N, K, H, W) -> float32 with the format's mean and standard deviation; by default ImageNet's."""
    mean, std = (
        torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (format or ImageFormat()).statistics
    )
    return (images.float() - 255 * mean) / (255 * std)


def sample_generator(seed: int, step: int, sample: int, stream: str) -> torch.Generator:
    """A new CPU generator that depends only on these four numbers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sample}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def check_crops(crop: Size, **scales: tuple[float, float]) -> None:
    """Refuse crops of no size, and scales that cannot be drawn."""
    if min(crop) < 1 or len(crop) != 2:
        raise ValueError(f"Expected `crop` to be two positive numbers (height, width), but got {crop}.")
    for name, (low, high) in scales.items():
        if not 0 < low <= high < math.inf:
            raise ValueError(f"Expected `{name}` to be (low, high) with 0 < low <= high, but got {(low, high)}.")


class StepData(Dataset[Batch]):
    """The training data as a map from step to [`Batch`][].

    Args:
        source: labelled set.
        target: unlabelled set, or None for training on source only.
        batch_size: number of samples of each domain on this rank.
        crop: (height, width) of the crops.
        seed: of all draws.
        source_scale: range of the random scale (log-uniform); (1, 1) leaves the pixels alone.
        target_scale: the same for the target.
        flip: mirror half of the samples.
        sampler: chooses the source image instead of a uniform draw, see `Draws`.
        rare_class_pixels: pixels of the drawn class that a crop should show.
        recrops: how often to try for that; the last crop counts in any case.
        rank: of this process.
    """

    def __init__(
        self,
        source: Labelled,
        target: Unlabelled | None = None,
        *,
        batch_size: int,
        crop: Size,
        seed: int = 0,
        source_scale: tuple[float, float] = (1.0, 1.0),
        target_scale: tuple[float, float] = (1.0, 1.0),
        flip: bool = True,
        sampler: Draws | None = None,
        rare_class_pixels: int = 1,
        recrops: int = 10,
        rank: int = 0,
    ) -> None:
        if target is not None and not isinstance(target, Unlabelled):
            raise TypeError(f"Expected `target` to be Unlabelled, but got {type(target).__name__}.")
        for name, data in {"source": source, "target": target}.items():
            if data is not None and len(data) == 0:
                raise ValueError(f"Expected `{name}` to hold at least one image, but it is empty.")
        check_crops(crop, source_scale=source_scale, target_scale=target_scale)
        self.source, self.target = source, target
        self.batch_size, self.crop, self.seed, self.rank = batch_size, crop, seed, rank
        self.source_scale, self.target_scale, self.flip = source_scale, target_scale, flip
        self.sampler, self.rare_class_pixels, self.recrops = sampler, rare_class_pixels, recrops

    def __getitem__(self, step: int) -> Batch:
        samples = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        source = [self._source_sample(step, s) for s in samples]
        images, labels, ids = zip(*source, strict=True)
        target_images = target_ids = None
        if self.target is not None:
            views, positions = zip(*(self._target_sample(step, s) for s in samples), strict=True)
            target_images = normalise(torch.stack(views), self.target.image_format)
            target_ids = torch.tensor(positions)
        return Batch(
            normalise(torch.stack(images), self.source.image_format),
            torch.stack(labels).long(),
            torch.tensor(ids),
            target_images,
            target_ids,
            torch.tensor(samples),
        )

    def _source_sample(self, step: int, sample: int) -> tuple[Tensor, Tensor, int]:
        generator = sample_generator(self.seed, step, sample, "source")
        if self.sampler is None:
            index, wanted = _uniform(len(self.source), generator), None
        else:
            index, wanted = self.sampler.draw(generator)
            index, wanted = int(index), None if wanted is None else int(wanted)
        image, label = self.source[index]
        for _ in range(1 if wanted is None else self.recrops):
            window = draw_window(_size(image), self.crop, self.source_scale, self.flip, generator)
            cropped = crop_label(label, window, self.crop)
            if wanted is None or int((cropped == wanted).sum()) >= self.rare_class_pixels:
                break
        return crop_image(image, window, self.crop), cropped, index

    def _target_sample(self, step: int, sample: int) -> tuple[Tensor, int]:
        generator = sample_generator(self.seed, step, sample, "target")
        index = _uniform(len(self.target), generator)  # type: ignore[arg-type]
        image = self.target[index]  # type: ignore[index]
        window = draw_window(_size(image), self.crop, self.target_scale, self.flip, generator)
        return crop_image(image, window, self.crop), index


def step_loader(
    data: StepData, *, start: int = 0, stop: int, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Batches of the steps start ... stop - 1. To resume, start at the step; there is no other state."""
    return QuietLoader(
        data,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(data.seed),  # otherwise the loader draws from the global one
    )


class QuietLoader(DataLoader[Any]):
    """A loader of single items whose workers end with the main process on Ctrl-C, without printing a trace."""

    def __init__(self, data: Dataset[Any], **options: Any) -> None:
        super().__init__(data, batch_size=None, worker_init_fn=quiet_child, **options)

    def __iter__(self) -> Any:
        """Start the workers."""
        with kept_from_children():
            return super().__iter__()


def evaluation_batches(
    data: Labelled | Unlabelled, *, batch_size: int = 8, workers: int = 0, indices: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor | None, list[int]]]:
    """Whole images in order: (normalised images, labels int64 or None, positions), of one size in a batch."""
    chosen = range(len(data)) if indices is None else indices
    loader = QuietLoader(data, sampler=chosen, num_workers=workers, generator=torch.Generator())
    held: list[tuple[Tensor, Tensor | None, int]] = []
    for index, item in zip(chosen, loader, strict=True):
        image, label = item if isinstance(data, Labelled) else (item, None)
        if held and (len(held) == batch_size or not _same_size(held[0], image, label)):
            yield _stack(held, data.image_format)
            held = []
        held.append((image, label, index))
    if held:
        yield _stack(held, data.image_format)


def draw_window(size: Size, crop: Size, scale: tuple[float, float], flip: bool, generator: torch.Generator) -> Window:
    """Draw scale, position and flip of a crop; as many numbers are drawn whatever the arguments."""
    u = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    factor = math.exp(math.log(scale[0]) + u[0] * (math.log(scale[1]) - math.log(scale[0])))
    rows = _fit(size[0], crop[0], factor, u[1])
    columns = _fit(size[1], crop[1], factor, u[2])
    return Window(
        rows[0], columns[0], rows[1], columns[1], (rows[2], columns[2]), (rows[3], columns[3]), flip and u[3] < 0.5
    )


def crop_image(image: Tensor, window: Window, crop: Size) -> Tensor:
    """Cut, scale (bilinear, antialiased), pad by reflection, mirror; the type stays."""
    region = image[:, window.top : window.top + window.height, window.left : window.left + window.width]
    if region.shape[-2:] != window.scaled:
        region = F.interpolate(region[None], window.scaled, mode="bilinear", antialias=True)[0]
    if window.scaled != crop:
        for axis in (0, 1):
            region = region.index_select(axis + 1, _reflect(window.scaled[axis], crop[axis], window.offset[axis]))
    return region.flip(-1) if window.flip else region


def crop_label(label: Tensor, window: Window, crop: Size) -> Tensor:
    """Apply the same to labels by index (nearest, never through float), with 255 outside of the image."""
    rows = window.top + nearest_index(window.height, window.scaled[0])
    columns = window.left + nearest_index(window.width, window.scaled[1])
    region = label[rows[:, None], columns[None, :]]
    if window.scaled != crop:
        before = window.offset
        after = [crop[axis] - window.scaled[axis] - before[axis] for axis in (0, 1)]
        region = F.pad(region, (before[1], after[1], before[0], after[0]), value=IGNORE)
    return region.flip(-1) if window.flip else region


def _fit(length: int, crop: int, factor: float, u: float) -> tuple[int, int, int, int]:
    """One axis: (start, extent in the image, extent after scaling, offset in the crop)."""
    extent = max(1, round(crop / factor))
    if extent <= length:
        return min(int(u * (length - extent + 1)), length - extent), extent, crop, 0
    scaled = min(crop, max(1, round(length * factor)))
    return 0, length, scaled, min(int(u * (crop - scaled + 1)), crop - scaled)


def _reflect(length: int, crop: int, offset: int) -> Tensor:
    """Indices that continue an axis by reflection, as often as needed."""
    period = max(1, 2 * (length - 1))
    index = (torch.arange(crop) - offset) % period
    return torch.minimum(index, period - index).clamp_max(length - 1)


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _uniform(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _same_size(first: tuple[Tensor, Tensor | None, int], image: Tensor, label: Tensor | None) -> bool:
    return first[0].shape == image.shape and (label is None or first[1] is None or first[1].shape == label.shape)


def _stack(
    held: list[tuple[Tensor, Tensor | None, int]], format: ImageFormat
) -> tuple[Tensor, Tensor | None, list[int]]:
    images, labels, indices = zip(*held, strict=True)
    stacked = None if labels[0] is None else torch.stack(labels).long()
    return normalise(torch.stack(images), format), stacked, list(indices)
