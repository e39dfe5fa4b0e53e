"""Export a net of train_gta2cs.py for use elsewhere: ONNX, torch.export, TorchScript, or safetensors with a model card.

    python examples/export.py --checkpoint runs/toy/best.pt --out exported
    python examples/export.py --checkpoint ... --out exported --formats "[onnx]" --size "[512,1024]" --net teacher

The exported net takes images (N, K, H, W) as floats in [0, 1], with K channels as in training (RGB for three). It
normalises them and returns logits (N, C, H, W). N is free; H and W are given by `size`. Every exported file is run on
random images and compared with the net. The largest difference is printed, and a difference above 1e-4 of the largest
logit is an error. ONNX needs `pip install -e ".[export]"`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gta2cs.interrupts import NOTHING_TORN, end_with, leave_at_once

if __name__ == "__main__":
    leave_at_once(NOTHING_TORN)  # as early as possible

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import torch
from rich.console import Console
from torch import Tensor, nn

from gta2cs.choosing import CHOSEN
from gta2cs.files import write_text
from gta2cs.inference import Trained
from gta2cs.loading import MEAN, STD
from gta2cs.options import FAULTS, in_a_line, read_options

Format = Literal["onnx", "torch_export", "torchscript", "safetensors"]
Run = Callable[[Tensor], Tensor]
# What a report says without labels. The verdict follows the last line of its tables.
WITHOUT_LABELS = re.compile(r"^#+ Without labels\n(.*?)(?=^#|\Z)", re.DOTALL | re.MULTILINE)
OF_TABLES = re.compile(r"^(?:\||</details>).*\n", re.MULTILINE)
TOLERANCE = 1e-4  # of the largest logit
console = Console(soft_wrap=True)


@dataclass
class Config:
    """What to export, and how."""

    checkpoint: Path
    """A checkpoint of train_gta2cs.py."""
    out: Path
    """Folder for the results."""
    formats: list[Format] = field(default_factory=lambda: ["onnx", "torch_export", "safetensors"])
    """Any of onnx, torch_export, torchscript, safetensors."""
    net: str = "student"
    """student, teacher, or another prefix in the checkpoint."""
    size: tuple[int, int] | None = None
    """(height, width) of the images; the default is the crop of training."""
    classes: Path | None = None
    """Path of classes.yaml, for a pair "folder" if its folders no longer exist."""


class Deployed(nn.Module):
    """A net with its normalisation, which returns only logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C, H, W) of images (N, K, H, W) in [0, 1]."""
        logits: Tensor = self.net((images - self.mean) / self.std).logits
        return logits


def main(config: Config) -> dict[str, float]:
    """Write every format. Returns the largest difference of each to the net, relative to the largest logit."""
    trained = Trained.open(config.checkpoint, config.classes)
    net = Deployed(trained.net(config.net), *trained.image_format.statistics).eval()
    height, width = config.size or trained.config["data"]["crop"]
    example = torch.rand(2, trained.image_format.channels, height, width, generator=torch.Generator().manual_seed(0))
    config.out.mkdir(parents=True, exist_ok=True)
    differences = {}
    for name in config.formats:
        path, run = WRITERS[name](net, example, config.out)
        differences[name] = difference(net, run, (height, width))
        console.print(f"{path}: differs from the net by {differences[name]:.1e} of its largest logit")
        if not differences[name] <= TOLERANCE:
            raise RuntimeError(f"Expected {path} to agree with the net to {TOLERANCE}, but got {differences[name]}.")
    write_text(config.out / "README.md", model_card(config, trained, net, (height, width)))
    console.print(f"Model card: {config.out / 'README.md'}")
    return differences


@torch.no_grad()
def difference(net: Deployed, run: Run, size: tuple[int, int]) -> float:
    """Largest difference of `run` to the net on three random images, relative to the largest logit."""
    images = torch.rand(
        3, net.mean.shape[1], *size, generator=torch.Generator().manual_seed(1)
    )  # another N than the example
    wanted, got = net(images), run(images)
    if got.shape != wanted.shape:
        raise RuntimeError(f"Expected logits {tuple(wanted.shape)}, but got {tuple(got.shape)}.")
    return float((wanted - got).abs().max() / wanted.abs().max())


# --------------------------------------------------------------------------------------------------------------------
# Formats: each writes a file and returns it with a function that runs what was written


def write_onnx(net: nn.Module, example: Tensor, out: Path) -> tuple[Path, Run]:
    """One file for onnxruntime and others."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX needs the package {error.name}, which is not installed: pip install -e '.[export]'"
        ) from error
    path = out / "model.onnx"
    torch.onnx.export(
        net,
        (example,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return path, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_torch_export(net: nn.Module, example: Tensor, out: Path) -> tuple[Path, Run]:
    """A program that torch runs without our code: `torch.export.load("model.pt2").module()(images)`."""
    path = out / "model.pt2"
    program = torch.export.export(net, (example,), dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}})
    torch.export.save(program, path)
    return path, torch.export.load(path).module()


def write_torchscript(net: nn.Module, example: Tensor, out: Path) -> tuple[Path, Run]:
    """The older format, for libtorch: `torch.jit.load("model.torchscript.pt")(images)`."""
    path = out / "model.torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # known: the trace fixes the size, and torch.export is newer
        torch.jit.trace(net, example).save(str(path))
        loaded = torch.jit.load(str(path))
    return path, loaded


def write_safetensors(net: nn.Module, example: Tensor, out: Path) -> tuple[Path, Run]:
    """Only the tensors, with our names; `net.weights` and `init` of train_gta2cs.py can load them."""
    from safetensors.torch import load_file, save_file

    path = out / "model.safetensors"
    save_file({name: value.contiguous() for name, value in net.net.state_dict().items()}, path)
    again = copy.deepcopy(net)
    for value in again.parameters():
        nn.init.zeros_(value)
    again.net.load_state_dict(load_file(path))
    return path, again


WRITERS: dict[Format, Callable[[nn.Module, Tensor, Path], tuple[Path, Run]]] = {
    "onnx": write_onnx,
    "torch_export": write_torch_export,
    "torchscript": write_torchscript,
    "safetensors": write_safetensors,
}


# --------------------------------------------------------------------------------------------------------------------
# The model card


def model_card(config: Config, trained: Trained, net: nn.Module, size: tuple[int, int]) -> str:
    """Describe the net, its training data and its known quality."""
    run, classes, format = trained.config, trained.classes, trained.image_format
    low, high = format.value_range or (0, 255)
    scale = "" if format.value_range is None else f", where 0 is {low:g} and 1 is {high:g} in the files of target"
    pair = "folders of your own" if run["data"]["pair"] == "folder" else run["data"]["pair"]
    adapted = any(stage["recipe"] != "source_only" for stage in run["stages"])
    kind, (mean, std) = "RGB" if format.channels == 3 else "values", format.statistics
    most = 2 if run.get("dry_run") else math.inf
    stages = [f"{stage['recipe']} ({min(stage['steps'], most)} steps)" for stage in run["stages"]]
    parameters = sum(p.numel() for p in net.parameters())
    lines = [
        f"# {run['net']['arch']} / {run['net']['encoder']}, {'adapted' if adapted else 'trained'} on {pair}",
        "## Use",
        f"Input `images`: float32 (N, {format.channels}, {size[0]}, {size[1]}), {kind} in [0, 1]{scale}; "
        "they are normalised inside. "
        f"Output `logits`: float32 (N, {len(classes.names)}, {size[0]}, {size[1]}); their arg-max is the class.",
        *(
            [
                "`model.safetensors` has the tensors without the normalisation: its net takes images normalised with "
                f"mean {mean} and standard deviation {std}."
            ]
            if "safetensors" in config.formats
            else []
        ),
        "Classes, from 0: " + ", ".join(classes.names) + ".",
        "## Data and method",
        f"Pair of domains: `{run['data']['pair']}`. Method: {', then '.join(stages)}. Seed {run['seed']}, "
        f"batch {run['batch_size']}, crops of {run['data']['crop'][0]} x {run['data']['crop'][1]}. "
        f"The net is the {trained.title if trained.choice else config.net} of `{trained.path}` and has "
        f"{parameters / 1e6:.2f} million parameters.",
        "Data sets and ImageNet weights have licences of their own.",
        "## Quality on labelled images",
        scores_of(trained, config.net),
        "## Quality according to scores without labels",
        verdict_of(trained.path) or "No verdict was recorded in this run.",
        "## Configuration",
        f"```json\n{json.dumps(run, indent=2)}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def scores_of(trained: Trained, name: str) -> str:
    """The latest IoU on labelled target images, if there were any."""
    nets = trained.history["scores"][-1]["nets"] if trained.history["scores"] else {}
    score = nets.get(name) or (next(iter(nets.values())) if len(nets) == 1 else None)
    if trained.choice is not None:
        score = score_of_chosen(trained.path.parent, trained.choice)
    if score is None:
        return "It was not scored on labelled target images."
    means = ", ".join(f"{mean} {value:.1f}" for mean, value in score["means"].items() if value is not None)
    table = "".join(f"| {c} | {'–' if iou is None else f'{iou:.1f}'} |\n" for c, iou in score["iou"].items())
    return (
        f"IoU in percent on labelled target images that no step saw: {means}.\n\n| class | IoU |\n|---|---:|\n{table}"
    )


def score_of_chosen(folder: Path, choice: dict[str, Any]) -> dict[str, Any] | None:
    """What the finished run says of the net of its `best.pt`, which need not be the student of an evaluation."""
    said, rows = folder / "history.json", folder / "results.json"
    if not said.is_file() or json.loads(said.read_text(encoding="utf-8")).get("choice") != choice:
        return None
    return json.loads(rows.read_text(encoding="utf-8")).get(CHOSEN)  # type: ignore[no-any-return]


def verdict_of(checkpoint: Path) -> str:
    """What the report of the run says about its nets without target labels."""
    path = checkpoint.resolve()
    for folder in (path, *path.parents[:2]):
        report = folder / "report.md"
        if report.is_file():
            found = WITHOUT_LABELS.search(report.read_text(encoding="utf-8"))
            return OF_TABLES.split(found[1])[-1].strip() if found else ""
    return ""


def command() -> None:
    """Run from the command line."""
    main(read_options(Config))


if __name__ == "__main__":
    end_with(in_a_line(command, NOTHING_TORN, faults=(*FAULTS, ModuleNotFoundError)))
