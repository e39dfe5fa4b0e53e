"""One Cityscapes image to one crop: our reader beside torchvision and Albumentations, images a second on one core.

    python benchmarks/decoding.py            # makes the files in a temporary folder, measures, writes the table: 30 s
    python benchmarks/decoding.py --table    # measures nothing, writes what is there

Generated PNG files of 2048 x 1024 and about 2.5 MB, as in `data_path.py`. Each way decodes the file and cuts the same
512 x 512 window out of it, nothing else: no resizing, no normalisation. Times are processor time in one thread, the
ways take turns, file by file. Every way must return the same pixels.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

import numpy as np
import torch
from torch import Tensor

from benchmarks.data_path import CITYSCAPES_SIZE, CROP, Size, save, scene, texture
from benchmarks.harness import PAGES, SEED, Results, markdown_table, parser_for, write_section
from gta2cs.loading import Window, crop_image, draw_window
from gta2cs.reading import ImageFormat

Way = Callable[[Path, tuple[int, int]], Tensor]  # a file and the window's top left corner


def ours(path: Path, corner: tuple[int, int], *, crop: Size = CROP) -> Tensor:
    """The loop's reader and crop."""
    window = Window(*corner, *crop, crop, (0, 0), False)
    return crop_image(ImageFormat().read(path), window, crop)


def torchvision_way(path: Path, corner: tuple[int, int], *, crop: Size = CROP) -> Tensor:
    """`decode_image` and a crop of `torchvision.transforms.v2`."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional

    return functional.crop(decode_image(str(path), ImageReadMode.RGB), *corner, *crop)


def albumentations_way(path: Path, corner: tuple[int, int], *, crop: Size = CROP) -> Tensor:
    """OpenCV, and Albumentations' `Crop` and `ToTensorV2`, as its documentation shows."""
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(1)
    top, left = corner
    image = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    cut = A.Compose([A.Crop(left, top, left + crop[1], top + crop[0]), ToTensorV2()])
    return cut(image=image)["image"]  # type: ignore[no-any-return]


OPTIONAL = {"Albumentations": "albumentations"}
WAYS: dict[str, Way] = {"udakit's loop": ours, "torchvision": torchvision_way, "Albumentations": albumentations_way}


def measure(*, count: int = 12, rounds: int = 3, shrink: int = 1, ways: dict[str, Way] | None = None) -> dict[str, Any]:
    """Seconds of processor time an image, by way: median over files and rounds."""
    height, width = (side // shrink for side in CITYSCAPES_SIZE)
    crop = CROP[0] // shrink, CROP[1] // shrink
    generator, drawn = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    ways = WAYS if ways is None else ways
    ways = {name: way for name, way in ways.items() if find_spec(OPTIONAL.get(name, "torch")) is not None}
    seconds: dict[str, list[float]] = {}
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="decoding_") as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(count)]
        for path in paths:
            save(texture(generator, scene(generator, (height, width))), path)
        size = statistics.mean(path.stat().st_size for path in paths) / 1e6
        torch.set_num_threads(1)
        try:
            for turn in range(rounds + 1):
                for path in paths:
                    window = draw_window((height, width), crop, (1.0, 1.0), False, drawn)
                    found = {}
                    for name, way in ways.items():
                        call = partial(way, path, (window.top, window.left), crop=crop)  # type: ignore[call-arg]
                        began = time.process_time()
                        found[name] = call()
                        if turn:  # the first round loads code
                            seconds.setdefault(name, []).append(time.process_time() - began)
                    first = next(iter(found.values()))
                    for name, pixels in found.items():
                        if not torch.equal(pixels.to(first.dtype), first):
                            raise AssertionError(f"{name} returned other pixels than {next(iter(found))}.")
        finally:
            torch.set_num_threads(threads)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    spread = {name: [float(q) for q in np.quantile(times, (0.25, 0.75))] for name, times in seconds.items()}
    return {"files": count, "megabytes": size, "seconds": medians, "quartiles": spread}


def table(results: Results) -> str:
    """Markdown: images a second and core."""
    if "decoding" not in results:
        return "Not measured yet."
    row = results.rows["decoding"]
    lines = [
        [
            name,
            f"{1 / seconds:.1f}",
            f"{1e3 * seconds:.1f}",
            " to ".join(f"{1e3 * q:.1f}" for q in row["quartiles"][name]),
        ]
        for name, seconds in row["seconds"].items()
    ]
    missing = [name for name in WAYS if name not in row["seconds"]]
    left_out = f"\n\nNot installed there: {', '.join(missing)}." if missing else ""
    return (
        f"From a PNG file of 1024 × 2048 pixels ({row['megabytes']:.1f} MB) to a crop of 512 × 512: "
        f"processor time of one core, {row['files']} files in turns.\n\n"
        f"{markdown_table(['decode and crop', 'images/s', 'ms an image', 'quartiles'], lines)}{left_out}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, "decoding.json", page=PAGES / "step.md")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    for key in results.waiting(["decoding"] if not options.table else (), again=options.again):
        results.add(key, measure())
        print({name: round(1 / s, 1) for name, s in results.rows[key]["seconds"].items()}, "images/s")
    if not options.no_table:
        write_section("decoding", table(results), options.page)


if __name__ == "__main__":
    main()
