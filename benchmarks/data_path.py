"""How fast the loaders of the reference loop feed a step, and how many workers a machine needs.

    python benchmarks/data_path.py            # makes the files in a temporary folder, measures, writes the table: 1 min
    python benchmarks/data_path.py --table    # measures nothing, writes what is there

The files are generated in the sizes and formats of the real ones: GTA5 as 1914 x 1052 RGB PNG with palette label PNG,
Cityscapes as 2048 x 1024 RGB PNG. Smooth shapes under fine noise give PNG files of about 2.5 MB, so that decoding costs
what it really costs. The setting is the published one: GTA5 resized to 1280 x 720, Cityscapes to 1024 x 512, crops of
512 x 512, two images of each domain a step, rare-class sampling as in DAFormer.

`images/s` counts source and target images that leave the loader while nothing else runs; with workers the first batch,
which pays for their start, is not counted. Milliseconds by part are medians over files, in one process with one thread,
as in a worker.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import PAGES, SEED, Results, markdown_table, parser_for, write_section
from gta2cs.datasets import Pair, build_pair
from gta2cs.loading import StepData, crop_image, crop_label, draw_window, normalise, step_loader
from gta2cs.reading import ImageFormat, read_ids
from gta2cs.samples import resize_image, resize_label
from udakit import RareClassSampler, count_classes
from udakit.labels import CITYSCAPES_PALETTE, GTA5_IDS

GTA5_SIZE, CITYSCAPES_SIZE = (1052, 1914), (1024, 2048)  # (height, width)
SOURCE_SIZE, TARGET_SIZE, CROP = (720, 1280), (512, 1024), (512, 512)
BATCH = 2  # images of each domain
RARE_PIXELS, TEMPERATURE = 1500, 0.01
NOISE = 1.7  # grey levels, for files of about 2.5 MB
GPU_STEPS = (0.3, 0.1)  # seconds of a training step on a GPU
CORES = 8
Size = tuple[int, int]


# --- files -----------------------------------------------------------------------------------------------------------


def make_files(root: Path, count: int, *, shrink: int = 1) -> dict[str, float]:
    """Write both data sets; `shrink` divides their sizes. Returns the mean megabytes of an image file by domain."""
    generator = np.random.default_rng(SEED)
    gta_size, cityscapes_size = ((h // shrink, w // shrink) for h, w in (GTA5_SIZE, CITYSCAPES_SIZE))
    images = root / "gta" / "images"
    for k in range(count):
        ids = scene(generator, gta_size)
        save(texture(generator, ids), images / f"{k:05d}.png")
        save_palette(ids, root / "gta" / "labels" / f"{k:05d}.png")
    for split in ("train", "val"):
        for k in range(count if split == "train" else 1):
            ids = scene(generator, cityscapes_size)
            name = f"city_{k:06d}_000019"
            save(texture(generator, ids), root / "cityscapes/leftImg8bit" / split / f"city/{name}_leftImg8bit.png")
            save_palette(ids, root / "cityscapes/gtFine" / split / f"city/{name}_gtFine_labelIds.png")
    return {
        "GTA5": megabytes(list(images.glob("*.png"))),
        "Cityscapes": megabytes(list((root / "cityscapes/leftImg8bit/train").glob("*/*.png"))),
    }


def scene(generator: np.random.Generator, size: Size) -> np.ndarray:
    """Raw Cityscapes ids in regions, the common classes more often than the rare ones."""
    ids = np.array(sorted(GTA5_IDS), dtype=np.uint8)
    share = 1 / np.arange(1, len(ids) + 1)
    cells = generator.choice(ids, size=(9, 16), p=share / share.sum())
    return np.asarray(Image.fromarray(cells).resize(size[::-1], Image.Resampling.NEAREST))


def texture(generator: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """RGB: a colour for each id, smooth light, and noise that a PNG cannot compress away."""
    height, width = ids.shape
    coarse = Image.fromarray(generator.integers(0, 80, (12, 20), dtype=np.uint8))
    light = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = NOISE * generator.standard_normal((height, width, 3), dtype=np.float32)
    colours = np.resize(CITYSCAPES_PALETTE, (256, 3)).astype(np.float32) * 0.6
    return np.clip(colours[ids] + light[..., None] + noise, 0, 255).astype(np.uint8)


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_palette(ids: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids, mode="L")
    image.putpalette(np.resize(CITYSCAPES_PALETTE, (256, 3)).tobytes())
    image.save(path)


def megabytes(paths: list[Path]) -> float:
    return statistics.mean(path.stat().st_size for path in paths) / 1e6


# --- time ------------------------------------------------------------------------------------------------------------


def median_ms(calls: list[Callable[[], Any]]) -> float:
    """Median over calls, the first of which is made twice."""
    calls[0]()
    found = []
    for call in calls:
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def parts(pair: Pair, source_size: Size, target_size: Size, crop: Size) -> dict[str, dict[str, float]]:
    """Milliseconds of one image by domain and part."""
    generator, read = torch.Generator().manual_seed(SEED), ImageFormat().read
    found: dict[str, dict[str, float]] = {}
    paths = [image for image, _ in pair.source_train.paths]
    for domain, files, size in (
        ("source", paths, source_size),
        ("target", list(pair.target_train.paths), target_size),
    ):
        raw = [read(path) for path in files]
        resized = [_resized(image, size) for image in raw]
        windows = [draw_window(size, crop, (1.0, 1.0), True, generator) for _ in files]
        crops = [crop_image(image, w, crop) for image, w in zip(resized, windows, strict=True)]
        found[domain] = {
            "decode image": median_ms([partial(read, path) for path in files]),
            "resize image": median_ms([partial(_resized, image, size) for image in raw]),
            "crop image": median_ms([partial(crop_image, *item, crop) for item in zip(resized, windows, strict=True)]),
            "normalise": median_ms([partial(normalise, image[None]) for image in crops]),
        }
    labels = [label for _, label in pair.source_train.paths]
    format = pair.source_train.format
    assert format is not None
    decode = median_ms([partial(read_ids, path) for path in labels])
    mapped = [torch.from_numpy(format.read(path)) for path in labels]
    small = [resize_label(label, source_size) for label in mapped]
    windows = [draw_window(source_size, crop, (1.0, 1.0), True, generator) for _ in labels]
    found["source"] |= {
        "decode label": decode,
        "map label ids": max(median_ms([partial(format.read, path) for path in labels]) - decode, 0.0),
        "resize label": median_ms([partial(resize_label, label, source_size) for label in mapped]),
        "crop label": median_ms([partial(crop_label, *item, crop) for item in zip(small, windows, strict=True)]),
    }
    return found


def _resized(image: Tensor, size: Size) -> Tensor:
    return resize_image(image, size).contiguous()


def images_per_second(data: StepData, workers: int, steps: int) -> float:
    """Images of both domains; with workers from the first batch on."""
    batches = iter(step_loader(data, stop=steps + 1, workers=workers))
    next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return 2 * data.batch_size * steps / (time.perf_counter() - began)


def measure(
    *,
    count: int = 12,
    steps: int = 24,
    workers: tuple[int, ...] = (0, 1, 2),
    shrink: int = 1,
) -> dict[str, Any]:
    """Generate the files, then everything; `shrink` divides all sizes."""
    source_size, target_size, crop = ((h // shrink, w // shrink) for h, w in (SOURCE_SIZE, TARGET_SIZE, CROP))
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="data_path_") as folder:
        sizes = make_files(Path(folder), count, shrink=shrink)
        pair = build_pair("gta2cs", data_root=folder, source_size=source_size, target_size=target_size)
        labels = pair.source_train.labels
        counts = count_classes((labels[i] for i in range(len(labels))), num_classes=len(pair.classes))
        data = StepData(
            pair.source_train,
            pair.target_train,
            batch_size=BATCH,
            crop=crop,
            seed=SEED,
            sampler=RareClassSampler(counts, temperature=TEMPERATURE, min_pixels=RARE_PIXELS // shrink**2),
            rare_class_pixels=RARE_PIXELS // shrink**2,
        )
        try:
            torch.set_num_threads(1)  # a worker has one
            milliseconds = parts(pair, source_size, target_size, crop)
            speed = {str(n): images_per_second(data, n, steps) for n in workers}
        finally:
            torch.set_num_threads(threads)
    return {
        "files": count,
        "megabytes": sizes,
        "steps": steps,
        "batch": BATCH,
        "crop": list(crop),
        "images_per_second": speed,
        "milliseconds": milliseconds,
    }


def workers_needed(images_per_second: float, batch: int, step: float) -> int:
    """Workers of that speed that make a batch of both domains within a training step."""
    return math.ceil(2 * batch / images_per_second / step - 1e-9)


# --- the page --------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """Markdown: throughput, parts, and the arithmetic."""
    if "gta2cs" not in results:
        return "Not measured yet."
    row = results.rows["gta2cs"]
    speed = [
        [workers, f"{found:.1f}", f"{2e3 * row['batch'] / found:.0f}"]
        for workers, found in row["images_per_second"].items()
    ]
    ms = row["milliseconds"]
    names = list(dict.fromkeys(part for domain in ms.values() for part in domain))
    by_part = [
        [part, *(f"{ms[domain][part]:.1f}" if part in ms[domain] else "–" for domain in ("source", "target"))]
        for part in names
    ]
    by_part.append(["all", *(f"{sum(ms[domain].values()):.1f}" for domain in ("source", "target"))])
    one = row["images_per_second"].get("1") or row["images_per_second"]["0"]
    need = [(step, workers_needed(one, row["batch"], step)) for step in GPU_STEPS]
    images = 2 * row["batch"]
    arithmetic = " ".join(
        f"A GPU step of {step:g} s needs {images} / {one:.1f} / {step:g} = {images / one / step:.1f}, so {n} "
        f"worker{'s' if n > 1 else ''}{'' if n < CORES else f', more than {CORES} cores have beside the loop'}."
        for step, n in need
    )
    sizes = ", ".join(f"{name} {size:.1f} MB" for name, size in row["megabytes"].items())
    return (
        f"A step of GTA5 → Cityscapes takes {row['batch']} + {row['batch']} crops of {row['crop'][0]} × "
        f"{row['crop'][1]} pixels with rare-class sampling. The files are generated, have the size and format of the "
        f"real ones ({sizes} for each image), and lie in the page cache.\n\n"
        f"{markdown_table(['workers', 'images/s', 'ms a step'], speed)}\n\n"
        "Milliseconds of one image by part, one thread:\n\n"
        f"{markdown_table(['part', 'source', 'target'], by_part)}\n\n"
        f"How many workers does a machine with {CORES} such cores need, so that the loop does not wait? "
        f"One worker reads {one:.1f} images/s. {arithmetic} "
        "Images that stay decoded in memory (`data.cache`) need no worker."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "data_path.json", page=PAGES / "step.md")
    parser.add_argument("--files", type=int, default=12, help="images of each domain")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    for name in results.waiting(["gta2cs"] if not options.table else (), again=options.again):
        row = measure(count=options.files, steps=options.steps)
        results.add(name, row)
        print({workers: round(found, 1) for workers, found in row["images_per_second"].items()}, "images/s by workers")
    if not options.no_table:
        write_section("data", table(results), options.page)


if __name__ == "__main__":
    main()
