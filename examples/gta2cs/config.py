"""The configuration of a run: every field is a key of the YAML file and an option of the command line."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gta2cs.datasets import RENDERED
from gta2cs.loading import check_crops
from gta2cs.nets import SegNet, build_net
from gta2cs.options import changed, read_options, read_yaml, with_flags

CONFIGS = Path(__file__).parent.parent / "configs"
TOY = CONFIGS / "dacs_toy.yaml"
POLICY = CONFIGS / "combined_folder.yaml"  # chosen on no pair in particular
UNSET = "not set"
PLACE = re.compile(r"--(stages\.\d+\..+)")


@dataclass
class DataConfig:
    """The data sets, and how images are read and cropped."""

    pair: str = "toy"
    """The two domains: toy, toy_backwards, camvid, carla2camvid, carla2dusk, nuclei, nuclei_backwards, gta2cs,
    synthia2cs, cs2acdc, cs2darkzurich, or folder for your own data."""
    data_root: Path | None = None
    """Folder with the data sets. The default is the environment variable UDAKIT_DATA."""
    source_root: Path | None = None
    """Folder of the source data, if it is not in data_root."""
    target_root: Path | None = None
    """Folder of the target data, if it is not in data_root."""
    source_list: Path | None = None
    """Text file with the names of the source images to use, for published subsets."""
    source_size: str | tuple[int, int] | None = None
    """Size (height, width) of source images after loading, or "native". The default is the published size."""
    target_size: str | tuple[int, int] | None = None
    """Size (height, width) of target images after loading, or "native". The default is the published size."""
    channels: int = 3
    """Number of channels. Grey images can be used with three; any other number must match the files."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel for normalisation, in 0..1. The default is that of ImageNet, for one or three channels."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel for normalisation, in 0..1."""
    source_range: tuple[float, float] | None = None
    """Values (low, high) that mean black and white in source images, for files with more than 8 bits per channel."""
    target_range: tuple[float, float] | None = None
    """Values (low, high) that mean black and white in target images, for files with more than 8 bits per channel."""
    cache: bool | None = None
    """Keep decoded images in memory. By default only small data sets are kept."""
    crop: tuple[int, int] = (128, 192)
    """(height, width) of the training crops."""
    source_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random rescaling of source images before the crop."""
    target_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random rescaling of target images before the crop."""
    match_scale: bool | None = None
    """Before adaptation, estimate without labels how much larger objects are in the target domain. Source images are
    then enlarged by that factor, never shrunk, and scaled by a draw of target_scale instead of source_scale. By default
    only the recipe combined does this."""
    rare_class_temperature: float | None = None
    """Draw source images with rare classes more often; lower favours them more (DAFormer: 0.01). Off by default."""
    rare_class_pixels: int = 50
    """Number of pixels of the drawn class that a crop should show (DAFormer: 1500 of 512 x 512)."""
    rare_class_image_pixels: int = 3000
    """Number of pixels of a class that an image needs to be drawn for it (DAFormer, images of 760 x 1280)."""
    oracle: bool = False
    """Train on labelled target images instead of source images, as an upper bound."""
    workers: int = 0
    """Number of processes that load images; 0 loads them in the main process."""


@dataclass
class NetConfig:
    """The segmentation net."""

    arch: str = "fpn"
    """Architecture: fpn, deeplabv3plus (needs batch_size 2), unet or segformer of segmentation_models_pytorch;
    hf_segformer of transformers; torchvision; or vit, a vision transformer of timm with a light head."""
    encoder: str = "tu-tf_efficientnet_lite0"
    """Encoder: a name of segmentation_models_pytorch, or of timm with the prefix "tu-". For hf_segformer: mit_b0 ...
    mit_b5, a hub id or a folder. For torchvision: the name of a net such as deeplabv3_resnet50. For vit: timm's name,
    such as vit_tiny_patch16_224."""
    weights: str = "imagenet"
    """Initial weights: imagenet (for efficientnet-lite0, 1 and 2 from an installed package, for others from the hub),
    hub, random, or the path of a file or folder with a whole net or an encoder of smp, torchvision, timm or
    transformers."""
    take: Literal["all", "encoder", "some"] = "all"
    """What to load from a path in weights or init: all (below 95 % is an error), only the encoder, or all that fits."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder class, for example decoder_channels; of vit, layer_decay; of every net, scale_attention
    (HRDA)."""

    def build(self, num_classes: int, channels: int = 3, **changes: Any) -> SegNet:
        """Build the net for images with this number of channels; `changes` replace fields of the configuration."""
        settings = {**asdict(self), **changes}
        return build_net(**settings.pop("options"), **settings, num_classes=num_classes, channels=channels)


@dataclass
class Stage:
    """A recipe for a number of steps, which starts from the student of the stage before."""

    recipe: str = "dacs"
    """The method: source_only, combined, dacs, diga_warmup, diga, ehtdi, duda_pre or duda."""
    steps: int = 400
    """Number of optimiser steps."""
    lr: float = 1e-4
    """Learning rate of the encoder."""
    lr_warmup: int = 0
    """Number of steps of linear warm-up."""
    lr_power: float = 1.0
    """The learning rate falls as (1 - progress) ** lr_power."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the recipe; docs/options.md lists them."""


@dataclass
class Config:
    """A run.

    By default there is one compute thread for each free core, and threads sleep while they wait. The environment
    variables OMP_NUM_THREADS and OMP_WAIT_POLICY change this (OMP_NUM_THREADS=1 python examples/train_gta2cs.py).
    """

    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    stages: list[Stage] = field(default_factory=list)
    """The recipes to run, one after the other."""
    batch_size: int = 4
    """Number of images of each domain per process."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9."""
    head_multiplier: float = 1.0
    """Learning rate of the decoder and the head, relative to that of the encoder (DAFormer: 10)."""
    weight_decay: float = 0.01
    """Weight decay of all parameters."""
    seed: int = 0
    """Seed of all random numbers. The same seed gives the same result."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Automatic mixed precision."""
    out: Path = Path("runs/toy")
    """Folder for the results of the run."""
    init: Path | None = None
    """Start of the first stage: a checkpoint of this script (its student is used), or a file or folder as in
    net.weights. The net must be the configured one."""
    eval_every: int = 100
    """Number of steps between evaluations on the target; 0 evaluates only at the end of a stage."""
    eval_trimap: int = 0
    """Also score the pixels within this distance of a true boundary, as "boundary"."""
    select: str = "balanced_consistency"
    """How best.pt is chosen, without target labels, at every evaluation: last, source_or_last, or a score
    (balanced_consistency, mirror_consistency, nuclear_norm, ...; a leading minus reverses its direction)."""
    score_images: int = 24
    """Number of unlabelled target training images for the label-free scores."""
    score_views: list[str] = field(default_factory=lambda: ["mirror"])
    """Views of an image for which predictions should agree: mirror, shift, crop, rotation."""
    save_every: int = 100
    """Number of steps between checkpoints; 0 saves only at the end of a stage."""
    keep_checkpoints: bool = False
    """Keep every checkpoint as a file such as step_000100.pt, without the optimiser state."""
    log_every: int = 10
    """Number of steps between log entries, which are losses and the kept fraction of each class."""
    log_with: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Also send losses, scores and pictures to a tracker."""
    resume: bool = False
    """Continue the run in the folder "out" where it stopped."""
    overwrite: bool = False
    """Replace the run in the folder "out"."""
    dry_run: bool = False
    """Test whether everything runs, with two steps per stage and two images per evaluation, in out/dry_run."""
    check_data: bool = False
    """Only check the data, and report what is missing or wrong."""


def parse(arguments: list[str] | None = None) -> Config:
    """Read the YAML file and the command line.

    Without `--config` the base is the toy configuration, and for another pair the one policy: what was chosen on the
    toy pair does harm elsewhere.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = with_flags(arguments, ("--resume", "--overwrite", "--dry_run", "--check_data"))
    named = any(a.partition("=")[0] == "--config" for a in arguments)  # a file gives everything that is not the default
    base = [] if named else [str(TOY if pair_named(arguments) == "toy" else POLICY)]
    config = read_options(Config, with_places(arguments, base), files=base)
    if config.check_data and not named and not any(a.startswith("--stages") for a in arguments):
        config.stages = []  # nobody asked for them
    elif base == [str(POLICY)]:
        print(f"Without --config: net, crop and stages of {POLICY.name}, the policy for any pair.")
    if config.data.pair in RENDERED and config.data.data_root is not None:
        unread = f"The pair {config.data.pair!r} is rendered: {config.data.data_root} is not read."
        print(f"{unread} For your own data: --data.pair folder.")
    if config.dry_run:  # the run itself, whether it is finished or not, is not touched
        config.out = config.out / "dry_run"
    return config


def pair_named(arguments: list[str]) -> str:
    """The pair on the command line; the last one counts."""
    pair = "toy"
    rest = iter(arguments)
    for argument in rest:
        name, given, value = argument.partition("=")
        if name == "--data.pair":
            pair = value if given else next(rest, pair)
    return pair


def with_places(arguments: list[str], files: list[str]) -> list[str]:
    """Replace arguments such as `--stages.1.lr 1e-5` with the whole list of stages, the only form the parser knows.

    A list replaces the one before it whole. The parser by itself fills each stage from the one at the same place there.
    """
    kept: list[str] = []
    changes: dict[str, Any] = {}
    lists = [stages_of(file) for file in files]
    values = iter(arguments)
    for argument in values:
        name, given, value = argument.partition("=")
        place = PLACE.fullmatch(name)
        if place or name in ("--config", "--stages"):
            value = value if given else next(values, "")
            argument = f"{name}={value}"
        if place:
            changes[place[1]] = read_value(value)
            continue
        if name in ("--config", "--stages"):
            lists.append(stages_of(value) if name == "--config" else read_value(value))
        kept.append(argument)
    stages = next((found for found in reversed(lists) if found), [])  # the last one that has any
    several = sum(map(bool, lists)) > 1 and isinstance(stages, list)
    if not changes and not several:
        return arguments
    whole = [{**asdict(Stage()), **stage} if several and isinstance(stage, dict) else stage for stage in stages]
    return [*kept, f"--stages={json.dumps(changed({'stages': whole}, changes)['stages'])}"]


def stages_of(file: str) -> Any:
    """The stages that a configuration lists; the parser reports what is wrong inside the file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"Expected `config` to be a YAML file, but there is no {file}.")
    try:
        return read_yaml(Path(file).read_text(encoding="utf-8")).get("stages")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return None


def read_value(text: str) -> Any:
    """Read a value of the command line as YAML."""
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration in a form for YAML and JSON."""
    return json.loads(json.dumps(asdict(config), default=str))  # type: ignore[no-any-return]


def check_numbers(config: Config) -> None:
    """Refuse numbers that no run can have."""
    least = {name: (getattr(config, name), 0) for name in ("eval_every", "eval_trimap", "save_every", "log_every")}
    least |= {"batch_size": (config.batch_size, 1), "data.workers": (config.data.workers, 0)}
    least |= {name: (getattr(config, name), 0) for name in ("head_multiplier", "weight_decay")}
    for index, stage in enumerate(config.stages):
        least |= {f"stages.{index}.{name}": (getattr(stage, name), 0) for name in ("lr", "lr_warmup", "lr_power")}
        least |= {f"stages.{index}.steps": (stage.steps, 1)}
    for name, (value, smallest) in least.items():
        if not smallest <= value < float("inf"):
            raise ValueError(f"Expected `{name}` to be at least {smallest}, but got {value}.")
    data = config.data
    check_crops(data.crop, source_scale=data.source_scale, target_scale=data.target_scale)
    if data.rare_class_temperature is not None and not data.rare_class_temperature > 0:
        raise ValueError(
            f"Expected `data.rare_class_temperature` to be above 0, but got {data.rare_class_temperature}."
        )


def check_same_run(saved: dict[str, Any], config: Config, index: int, path: Path) -> None:
    """Refuse to continue a run if the result would match neither the old configuration nor the new one."""
    now, default = plain(config), plain(Config())
    # What was saved before an option existed has its default.
    saved = {**default, **saved, **{part: {**default[part], **saved[part]} for part in ("data", "net")}}
    free = {
        "out",
        "resume",
        "overwrite",
        "eval_every",
        "eval_trimap",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "log_with",
        "check_data",
        "score_views",
    }
    for side in (saved, now):
        side["stages"] = side["stages"][: index + 1]
        side["data"] = {k: v for k, v in side["data"].items() if k not in ("workers", "cache") and "root" not in k}
    changed = [line for k in now if k not in free for line in differences(saved.get(k), now[k], k)]
    if changed:
        choice = (
            " `select` decides during training which net is kept as best.pt. Students of the last step of a stage are "
            "in its last.pt, and `compare_runs.py` ranks all nets of the run by any `--score`."
            if saved["select"] != now["select"]
            else ""
        )
        raise ValueError(
            f"Expected {path} to have the same configuration, but these values differ: {'; '.join(changed)}. Take the "
            f"changes back to go on with this run, or start another one in another `out`.{choice}"
        )


def differences(before: Any, now: Any, place: str) -> list[str]:
    """What differs, each as `stages.1.lr: 0.001 -> 0.0001`, the form in which the command line takes it."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [x for k in keys for x in differences(before.get(k, UNSET), now.get(k, UNSET), f"{place}.{k}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [x for i, (old, new) in pairs for x in differences(old, new, f"{place}.{i}")]
    return [f"{place}: {before} -> {now}"]
