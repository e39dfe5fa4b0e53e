"""What a run can be told: every field is a key of the YAML file and an option of the command line."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gta2cs.nets import SegNet, build_net
from gta2cs.options import changed, read_options

TOY = Path(__file__).parent.parent / "configs" / "dacs_toy.yaml"
PLACE = re.compile(r"--(stages\.\d+\..+)")


@dataclass
class DataConfig:
    """Which images, and how they are cropped."""

    pair: str = "toy"
    """Which two domains: toy, camvid, carla2camvid, carla2dusk, nuclei, nuclei_backwards, gta2cs, synthia2cs, cs2acdc,
    cs2darkzurich, or folder for your own."""
    data_root: Path | None = None
    """Folder of the data sets. The default is the environment variable UDAKIT_DATA."""
    source_root: Path | None = None
    """Folder of the source set, where it is not under data_root."""
    target_root: Path | None = None
    """Folder of the target set, where it is not under data_root."""
    source_list: Path | None = None
    """A text file that names the source images to use, for the published subsets."""
    source_size: str | tuple[int, int] | None = None
    """(height, width) that source images are resized to on loading, or "native". The default is the published one."""
    target_size: str | tuple[int, int] | None = None
    """(height, width) that target images are resized to on loading, or "native". The default is the published one."""
    channels: int = 3
    """Channels of the images. A grey image also serves as three; any other number must be that of the files."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in 0..1, to normalise with. The default is ImageNet's, for one channel or three."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, in 0..1, to normalise with."""
    source_range: tuple[float, float] | None = None
    """The values (low, high) of source images that are black and white, for files of more than 8 bits a channel."""
    target_range: tuple[float, float] | None = None
    """The values (low, high) of target images that are black and white, for files of more than 8 bits a channel."""
    cache: bool | None = None
    """Keep decoded images in memory. The default does so for small sets only."""
    crop: tuple[int, int] = (128, 192)
    """(height, width) of the training crops."""
    source_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random rescaling of source images before the crop."""
    target_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random rescaling of target images before the crop."""
    match_scale: bool | None = None
    """Before adaptation find without labels how much larger things are in target, and scale source images by that and
    by a draw of target_scale, in place of source_scale. The default does so for the recipe combined."""
    rare_class_temperature: float | None = None
    """Draw source images with rare classes more often; lower is more often (DAFormer: 0.01). The default does not."""
    rare_class_pixels: int = 50
    """Pixels of the drawn class that a crop should show (DAFormer: 1500 of 512 x 512)."""
    rare_class_image_pixels: int = 3000
    """Pixels of a class that an image must have to be drawn for it (DAFormer, images of 760 x 1280)."""
    oracle: bool = False
    """Train on labelled target images instead of source: the upper bound."""
    workers: int = 0
    """Processes that load images; 0 loads them in the main process."""


@dataclass
class NetConfig:
    """Which segmentation net."""

    arch: str = "fpn"
    """fpn, deeplabv3plus (batch_size 2 at least), unet or segformer of segmentation_models_pytorch; hf_segformer of
    transformers; torchvision."""
    encoder: str = "tu-tf_efficientnet_lite0"
    """Encoder of the net: a name of segmentation_models_pytorch or, with "tu-" before it, of timm; mit_b0 ... mit_b5, a
    hub id or a folder for hf_segformer; a net such as deeplabv3_resnet50 for torchvision."""
    weights: str = "imagenet"
    """imagenet (from packages without a network where there is one, else from the hub), random, or the path of a file
    or folder with a whole net or an encoder of smp, torchvision, timm or transformers."""
    take: Literal["all", "encoder", "some"] = "all"
    """What to take from a path in weights or init: all (an error below 95 %), the encoder alone, or whatever fits."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder's class, such as decoder_channels."""

    def build(self, num_classes: int, channels: int = 3, **changes: Any) -> SegNet:
        """Build the net, or one like it but for `changes`, for images of so many channels."""
        settings = {**asdict(self), **changes}
        return build_net(**settings.pop("options"), **settings, num_classes=num_classes, channels=channels)


@dataclass
class Stage:
    """One recipe for a number of steps, from the student of the stage before."""

    recipe: str = "dacs"
    """source_only, combined, dacs, diga_warmup, diga, ehtdi, duda_pre or duda."""
    steps: int = 400
    """Optimiser steps."""
    lr: float = 1e-4
    """Learning rate of the encoder."""
    lr_warmup: int = 0
    """Steps of linear warm-up."""
    lr_power: float = 1.0
    """The learning rate falls as (1 - progress) ** lr_power."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the recipe."""


@dataclass
class Config:
    """A run.

    One compute thread is used for each free core, and threads sleep while they wait; the environment variables
    OMP_NUM_THREADS and OMP_WAIT_POLICY override both (OMP_NUM_THREADS=1 python examples/train_gta2cs.py).
    """

    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    stages: list[Stage] = field(default_factory=list)
    """The recipes to run, one after the other."""
    batch_size: int = 4
    """Images of each domain per process."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9."""
    head_multiplier: float = 1.0
    """Learning rate of decoder and head, relative to the encoder's (DAFormer: 10)."""
    weight_decay: float = 0.01
    """Weight decay of all parameters."""
    seed: int = 0
    """Seed of everything random: one seed gives one result."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Automatic mixed precision."""
    out: Path = Path("runs/toy")
    """The folder that a run writes into."""
    init: Path | None = None
    """Where the first stage starts: a checkpoint of this script (its student), or a net of another make as in
    net.weights. The net has to be the configured one."""
    eval_every: int = 100
    """Steps between evaluations on target; 0 evaluates only at the end of a stage."""
    eval_trimap: int = 0
    """Also score the pixels within this distance of a true boundary, as "boundary"."""
    select: str = "confident_consistency"
    """Which net becomes best.pt, chosen without target labels at every evaluation: last, source_or_last, or a score
    (confident_consistency, mirror_consistency, nuclear_norm, ...; a minus before it turns its direction)."""
    score_images: int = 24
    """Unlabelled target training images that the label-free scores look at."""
    score_views: list[str] = field(default_factory=lambda: ["mirror"])
    """Views under which a net should not contradict itself: mirror, shift, crop, rotation."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves only at the end of a stage."""
    keep_checkpoints: bool = False
    """Keep a step_000100.pt, without optimiser state, of everything that is saved."""
    log_every: int = 10
    """Steps between log entries: losses, and the share of each class that is kept."""
    log_with: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Send losses, scores and pictures to a tracker as well."""
    resume: bool = False
    """Go on where the run in the folder "out" stopped."""
    overwrite: bool = False
    """Replace the run that the folder "out" holds."""
    dry_run: bool = False
    """Two steps a stage and two images an evaluation, in out/dry_run: does everything run?"""
    check_data: bool = False
    """Only look at the data, and say what is missing or wrong."""


def parse(arguments: list[str] | None = None) -> Config:
    """Read YAML and command line; without `--config` on top of the toy configuration."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = {"--resume", "--overwrite", "--dry-run", "--check-data"}  # may stand without a value
    arguments = [f"{a.replace('-', '_').replace('__', '--', 1)}=true" if a in flags else a for a in arguments]
    named = any(a.partition("=")[0] == "--config" for a in arguments)  # a file says all that is not the default
    toy = [] if named else [str(TOY)]
    config = read_options(Config, with_places(arguments, toy), files=toy)
    if config.dry_run:  # the run itself, whether to come or finished, is left alone
        config.out = config.out / "dry_run"
    return config


def with_places(arguments: list[str], files: list[str]) -> list[str]:
    """Arguments in which `--stages.1.lr 1e-5` has become the whole list of stages, the only form the parser knows."""
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
    stages = next((found for found in reversed(lists) if found), [])  # the last that says any
    return [*kept, f"--stages={json.dumps(changed({'stages': stages}, changes)['stages'])}"] if changes else arguments


def stages_of(file: str) -> Any:
    """The stages that a configuration lists; what is wrong with the file itself is the parser's to say."""
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("stages")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return None


def read_value(text: str) -> Any:
    """A value of the command line, read as YAML; 1e-5 is a number, too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration as YAML and JSON can hold it."""
    return json.loads(json.dumps(asdict(config), default=str))  # type: ignore[no-any-return]


def check_same_run(saved: dict[str, Any], config: Config, index: int, path: Path) -> None:
    """Refuse to continue a run whose result would be neither the old configuration's nor the new one's."""
    now, default = plain(config), plain(Config())
    saved = {**default, **saved, "data": {**default["data"], **saved["data"]}}  # of before an option existed
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
    }
    free |= {"check_data", "score_images", "score_views"}
    saved["net"] = {"take": "all", **saved["net"]}  # checkpoints of before it existed
    saved.setdefault("select", now["select"])
    for side in (saved, now):
        side["stages"] = side["stages"][: index + 1]
        side["data"] = {k: v for k, v in side["data"].items() if k not in ("workers", "cache") and "root" not in k}
    changed = [k for k in now if k not in free and now[k] != saved.get(k)]
    if changed:
        details = "; ".join(f"{k}: {saved.get(k)} -> {now[k]}" for k in changed)
        raise ValueError(f"Expected {path} to be of the same configuration, but these differ: {details}.")
