"""Segment images with a net from train_gta2cs.py, or evaluate it again.

    python examples/predict.py --checkpoint runs/toy/stage2_dacs/last.pt --images photos --out predictions
    python examples/predict.py --checkpoint ... --images ... --out ... --window "[512,1024]"  # large
    python examples/predict.py --checkpoint runs/toy/stage2_dacs/last.pt --evaluate         # the table of training

For `photos/a/b.jpg` it writes, at the image's own size, `labels/a/b.png` (class ids 0..C-1, with the palette),
`overlays/a/b.png` (the colours over the image) and `confidence/a/b.png` (largest class probability, 255 is 1), and
`classes.yaml` with the names of the ids. A file that cannot be read is reported, skipped, and listed again at the end;
the exit status is then 1. Existing results are replaced only with `--overwrite`, and images never.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gta2cs.interrupts import NOTHING_TORN, end_with, leave_at_once, stop_if_asked

if __name__ == "__main__":
    leave_at_once(NOTHING_TORN)  # as early as possible

from dataclasses import dataclass, replace
from typing import Literal

from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from gta2cs.datasets import ClassSet
from gta2cs.evaluation import Score, evaluate
from gta2cs.files import WriteError, check_writable, replacing, write_text
from gta2cs.inference import SlidingWindow, Trained, check_window, segment
from gta2cs.options import in_a_line, read_options
from gta2cs.reading import IMAGE_SUFFIXES, ImageFormat, viewable
from gta2cs.report import colorize, progress_bar, rich_table
from gta2cs.samples import Size

console = Console(soft_wrap=True)
KINDS = ("labels", "overlays", "confidence")


@dataclass
class Config:
    """What to predict, and how."""

    checkpoint: Path
    """A checkpoint of train_gta2cs.py, or the folder of a run to use the net that the run chose."""
    images: Path | None = None
    """An image, or a folder of images, including its subfolders."""
    out: Path | None = None
    """Folder for the results."""
    evaluate: bool = False
    """Evaluate the net on the target images of the run's own evaluation."""
    net: str = ""
    """student, teacher, or another prefix in the checkpoint. The default is the student; for --evaluate, every net."""
    arch: str | None = None
    """Architecture of the net, if it differs from the student's."""
    encoder: str | None = None
    """Encoder of the net, if it differs from the student's."""
    window: tuple[int, int] | None = None
    """(height, width) of sliding windows. The default is the whole image at once."""
    stride: tuple[int, int] | None = None
    """(height, width) between two windows. The default is half a window."""
    size: Literal["native", "training"] | tuple[int, int] = "native"
    """Size of the images for the net: native, training, or (height, width). Results have the original size."""
    value_range: tuple[float, float] | None = None
    """Values (low, high) that mean black and white in the images. The default is that of the run."""
    overlay: float = 0.5
    """Opacity of the class colours in the overlays, in 0..1."""
    overwrite: bool = False
    """Replace results of an earlier run."""
    classes: Path | None = None
    """Path of classes.yaml, for a pair "folder" if its folders no longer exist."""
    data_root: Path | None = None
    """For --evaluate: the folder of the data sets, if they have moved."""
    source_root: Path | None = None
    """For --evaluate: the folder of the source set, if it has moved."""
    target_root: Path | None = None
    """For --evaluate: the folder of the target set, if it has moved."""
    limit: int | None = None
    """For --evaluate: the number of images to use. The default is all."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to run the net on."""


def parse(arguments: list[str] | None = None) -> Config:
    """Read the command line."""
    return read_options(Config, arguments, flags=("--evaluate", "--overwrite"))


def main(config: Config) -> int:
    """Evaluate the net, or segment a folder. Returns the exit status."""
    check_window(config.window, config.stride)
    check_values(config)
    trained = Trained.open(config.checkpoint, config.classes)
    if config.checkpoint.is_dir() and not (config.checkpoint / "history.json").is_file():
        console.print(f"The run has not finished. This is the net that it has chosen so far: {trained.title}.")
    if config.evaluate:
        score(config, trained)
        return 0
    if config.images is None or config.out is None:
        lacking = " and ".join(f"`{k}`" for k in ("images", "out") if getattr(config, k) is None)
        raise ValueError(f"Expected `images` and `out`, or `evaluate`, but got no {lacking}.")
    bad = predict(config, trained, config.images, config.out)
    if bad:
        console.print(f"[yellow]Skipped {len(bad)} bad files:[/]")
        for path, why in bad.items():
            console.print(escape(f"  {path}: {why}"))
    return 1 if bad else 0


def check_values(config: Config) -> None:
    """Refuse values that no image can be predicted with, before anything is loaded."""
    if not 0 <= config.overlay <= 1:
        raise ValueError(f"Expected `overlay` to be in [0, 1], but got {config.overlay}.")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"Expected `limit` to be at least 1, but got {config.limit}.")
    if not isinstance(config.size, str) and min(config.size) < 1:
        raise ValueError(f"Expected `size` to be native, training or (height, width), but got {config.size}.")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"Expected `device` to be one of this machine, such as cpu, but got {config.device!r}: {why}"
        ) from None


# --------------------------------------------------------------------------------------------------------------------
# A folder of images


def predict(config: Config, trained: Trained, images: Path, out: Path) -> dict[Path, str]:
    """Segment every image. Returns the images that failed, with the reasons."""
    classes = trained.classes
    jobs, bad = plan(images, out)
    check_writable(out)
    check_out(jobs, out, overwrite=config.overwrite)
    net = load(config, trained, config.net or "student")
    format = trained.image_format
    if config.value_range is not None:
        format = replace(format, value_range=config.value_range)
    size = trained.seen_size if config.size == "training" else None if config.size == "native" else config.size
    if config.size == "native" and trained.seen_size is not None:
        height, width = trained.seen_size
        console.print(f"The run resized its target images to {height} x {width}: --size training does so here.")
    with progress_bar(console) as progress:
        task = progress.add_task("predicting", total=len(jobs), status="")
        for image_path, name in jobs.items():
            stop_if_asked()
            progress.update(task, status=escape(image_path.name))
            try:
                image = format.read(image_path).contiguous()
                labels, confidence = segment_or_explain(config, net, image, size, format)
                save_results(out, name, image, labels, confidence, classes, config.overlay)
            except WriteError:
                raise  # a full disk is not the image's fault, and the next one would not fit either
            except (OSError, ValueError) as error:
                bad[image_path] = str(error)
                progress.console.print(f"[yellow]Skipped {escape(str(image_path))}: {escape(str(error))}[/]")
            progress.advance(task)
    names = {"names": list(classes.names), "palette": classes.palette.tolist()}
    write_text(out / "classes.yaml", yaml.safe_dump(names, sort_keys=False, default_flow_style=None))
    console.print(f"{len(jobs) - len(bad.keys() & jobs.keys())} of {len(jobs)} images labelled: {out}", markup=False)
    return bad


def plan(images: Path, out: Path) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Return the images with the names of their results in `out`, and the images with a name clash."""
    if images.is_file():
        found, root = [images], images.parent
    elif images.is_dir():
        if out.resolve().is_relative_to(images.resolve()):
            raise ValueError(
                f"Expected `out` outside of the image folder {images}, but got {out}: it would be searched."
            )
        found, root = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), images
    else:
        raise FileNotFoundError(f"Expected `images` to be a folder or an image, but there is no {images}.")
    found = [p for p in found if not p.is_dir() and not p.name.startswith(".")]
    bad = {p: "its link leads nowhere, or in a circle" for p in found if p.is_symlink() and not p.exists()}
    if not found:
        raise FileNotFoundError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {images}, but found none.")
    jobs: dict[Path, Path] = {}
    first: dict[Path, Path] = {}
    for path in found:
        if path in bad:
            continue
        name = path.relative_to(root).with_suffix(".png")
        if first.setdefault(name, path) is path:
            jobs[path] = name
        else:
            bad[path] = f"its results would have the name of those of {first[name].name}, which was taken"
    return jobs, bad


def check_out(jobs: dict[Path, Path], out: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, to replace files that must not be replaced."""
    results = [out / kind / name for kind in KINDS for name in jobs.values()]
    taken = {path.resolve() for path in jobs}
    clash = [path for path in results if path.resolve() in taken]
    if clash:
        raise ValueError(f"Expected `out` to keep results and images apart, but {clash[0]} is an image to predict.")
    existing = [path for path in (*results, out / "classes.yaml") if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"Expected `out` to have no results yet, but {len(existing)} files exist, for example {existing[0]}. "
            "Use --overwrite to replace them."
        )


def segment_or_explain(
    config: Config, net: torch.nn.Module, image: Tensor, size: Size | None, format: ImageFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Segment one image. Running out of memory becomes an error of this image; other errors stop the program."""
    try:
        return segment(
            net, image, window=config.window, stride=config.stride, size=size, device=config.device, format=format
        )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            height, width = image.shape[-2:]
            raise OSError(f"{height} x {width} pixels do not fit into memory; use a smaller --window") from error
        raise


def save_results(
    out: Path,
    name: Path,
    image: Tensor,
    labels: np.ndarray,
    confidence: np.ndarray,
    classes: ClassSet,
    share: float,
) -> None:
    """Write the three pictures of one image, each completely or not at all."""
    ids = Image.fromarray(labels).convert("L")
    ids.putpalette(classes.palette.tobytes())  # changes the mode to "P": the ids stay, and viewers show the colours
    mixed = (1 - share) * viewable(image) + share * colorize(labels, classes.palette)
    pictures = (ids, Image.fromarray(mixed.round().astype(np.uint8)), (255 * confidence).round().astype(np.uint8))
    for kind, picture in zip(KINDS, pictures, strict=True):
        save_png(out / kind / name, picture if isinstance(picture, Image.Image) else Image.fromarray(picture))


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a file completely or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


# --------------------------------------------------------------------------------------------------------------------
# The table again


def score(config: Config, trained: Trained) -> dict[str, Score]:
    """Evaluate the nets of the checkpoint as training did, and print its table."""
    pair = trained.pair(data_root=config.data_root, source_root=config.source_root, target_root=config.target_root)
    if pair.target_val is None:
        raise ValueError(
            f"Expected the pair {pair.name!r} to have labelled target images for `evaluate`, but it has none. For a "
            "pair of folders, `val.txt` of target names them."
        )
    stage, names = trained.title, [config.net] if config.net else list(trained.names)
    rows: dict[str, Score] = {}
    for name in names:
        net = load(config, trained, name)
        row = stage if len(names) == 1 and not config.net else f"{stage}, {name}"
        tested = net if config.window is None else SlidingWindow(net, config.window, config.stride)
        with console.status(f"Scoring {row} on {config.limit or len(pair.target_val)} images"):
            found = evaluate(
                tested,
                pair.target_val,
                pair.classes,
                device=config.device,
                limit=config.limit,
                batch_size=8 if config.window is None else 1,
            )
        rows[row] = Score.from_json(found.to_json())  # rounded as in training, so that the last digits agree
    console.print(rich_table(rows, pair.classes))
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Small helpers


def load(config: Config, trained: Trained, name: str) -> torch.nn.Module:
    """Load a net of the checkpoint to its device."""
    changes = {k: v for k, v in {"arch": config.arch, "encoder": config.encoder}.items() if v is not None}
    return trained.net(name, **changes).to(config.device, memory_format=torch.channels_last)


if __name__ == "__main__":
    end_with(in_a_line(lambda: main(parse()), NOTHING_TORN))
