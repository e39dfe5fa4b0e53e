"""What a run can be told: every field is a key of the YAML file and an option of the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from gta2cs.nets import build_net

TOY = Path(__file__).parent.parent / "configs" / "dacs_toy.yaml"


@dataclass
class DataConfig:
    """Which images, and how they are cropped."""

    pair: str = "toy"  # toy, camvid, carla2camvid, gta2cs, synthia2cs, cs2acdc, cs2darkzurich, folder
    data_root: Path | None = None  # folder of the data sets; without it the environment variable UDAKIT_DATA
    source_root: Path | None = None  # folder of the source set, where it is not under data_root
    target_root: Path | None = None
    source_list: Path | None = None  # a text file of the source images to use, for the published subsets
    source_size: str | tuple[int, int] | None = None  # (height, width) on loading, "native", or the published setting
    target_size: str | tuple[int, int] | None = None
    cache: bool | None = None  # keep decoded images in memory; without it only small sets
    crop: tuple[int, int] = (128, 192)
    source_scale: tuple[float, float] = (1.0, 1.0)  # range of the random rescaling before the crop
    target_scale: tuple[float, float] = (1.0, 1.0)
    rare_class_temperature: float | None = None  # rare-class sampling of source images (DAFormer: 0.01)
    rare_class_pixels: int = 50  # of the drawn class, that a crop should show (DAFormer: 1500 of 512 x 512)
    rare_class_image_pixels: int = 3000  # of a class, in the images that are drawn for it (DAFormer, 760 x 1280)
    oracle: bool = False  # train on labelled target images instead of source: the upper bound
    workers: int = 0


@dataclass
class NetConfig:
    """Which segmentation net."""

    arch: str = "fpn"  # fpn, deeplabv3plus (batch_size 2 at least), unet, segformer (smp decoders), or hf_segformer
    encoder: str = "tu-tf_efficientnet_lite0"
    weights: str = "imagenet"  # imagenet (offline packages, else the hub), a checkpoint's path, or "random"
    options: dict[str, Any] = field(default_factory=dict)  # of the decoder's class, such as decoder_channels

    def build(self, num_classes: int, **changes: Any) -> torch.nn.Module:
        """Build the net, or one like it but for `changes`."""
        settings = {**asdict(self), **changes}
        return build_net(**settings.pop("options"), **settings, num_classes=num_classes)


@dataclass
class Stage:
    """One recipe for a number of steps, from the student of the stage before."""

    recipe: str = "dacs"
    steps: int = 400
    lr: float = 1e-4
    lr_warmup: int = 0  # steps of linear warm-up
    lr_power: float = 1.0  # (1 - progress) ** power
    options: dict[str, Any] = field(default_factory=dict)  # the recipe's own, see its class `Options`


@dataclass
class Config:
    """A run.

    One compute thread is used for each free core, and threads sleep while they wait; the environment variables
    OMP_NUM_THREADS and OMP_WAIT_POLICY override both (OMP_NUM_THREADS=1 python examples/train_gta2cs.py).
    """

    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    stages: list[Stage] = field(default_factory=list)
    batch_size: int = 4  # images of each domain per process
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd with momentum 0.9
    head_multiplier: float = 1.0  # learning rate of what is not the encoder, relative (DAFormer: 10)
    weight_decay: float = 0.01
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    out: Path = Path("runs/toy")
    init: Path | None = None  # a checkpoint whose student is where the first stage starts
    eval_every: int = 100  # steps between evaluations on target; 0: only at the end of a stage
    eval_trimap: int = 0  # also score the pixels within this distance of a true boundary, as "boundary"
    save_every: int = 100
    keep_checkpoints: bool = False  # keep a step_000100.pt, without optimiser state, of everything that is saved
    log_every: int = 10
    resume: bool = False
    dry_run: bool = False  # two steps a stage and two images an evaluation: does everything run?
    check_data: bool = False  # only look at the data


def parse(arguments: list[str] | None = None) -> Config:
    """Read YAML and command line; without `--config` on top of the toy configuration."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = {"--resume", "--dry-run", "--check-data"}  # may stand without a value
    arguments = [f"{a.replace('-', '_').replace('__', '--', 1)}=true" if a in flags else a for a in arguments]
    named = any(a.partition("=")[0] == "--config" for a in arguments)  # a file says all that is not the default
    toy = [] if named else [str(TOY)]
    config = auto_cli(Config, args=arguments, as_positional=False, default_config_files=toy)
    if config.dry_run:  # the run itself, whether to come or finished, is left alone
        config.out = config.out / "dry_run"
    return config


def plain_batches(config: Config, pair: Pair, device: torch.device) -> Callable[[int, int], Iterator[Batch]]:
    """Return a function of (start, stop) that yields steps of crops as they are: not scaled, the same for all ranks."""
    data = StepData(
        pair.source_train, pair.target_train, batch_size=config.batch_size, crop=config.data.crop, seed=config.seed
    )

    def batches(start: int, stop: int) -> Iterator[Batch]:
        for batch in step_loader(data, start=start, stop=min(stop, 2) if config.dry_run else stop):
            yield Batch(*(x.to(device) for x in batch))

    return batches


def rare_class_sampler(config: Config, pair: Pair, accelerator: Accelerator) -> Any:
    """Build the sampler of source images, or None for uniform draws."""
    if config.data.rare_class_temperature is None:
        return None
    from udakit import RareClassSampler, count_classes

    labels = pair.source_train.labels
    silent = not accelerator.is_main_process
    indices = track(range(len(labels)), "counting classes", console=console, transient=True, disable=silent)
    counts = count_classes((labels[i] for i in indices), num_classes=len(pair.classes.names))
    return RareClassSampler(
        counts, temperature=config.data.rare_class_temperature, min_pixels=config.data.rare_class_image_pixels
    )


def write_report(
    config: Config,
    pair: Pair,
    rows: dict[str, Score],
    nets: dict[str, torch.nn.Module],
    histories: list[dict[str, Any]],
    device: torch.device,
) -> None:
    """Write table, curves and panels into the run's folder, and the table to the terminal."""
    count = len(pair.target_val)
    picked = [count * (2 * i + 1) // 8 for i in range(4)]
    panels = []
    for i in picked:
        image, label = pair.target_val[i]
        row = {"image": image.permute(1, 2, 0).numpy(), "truth": label.numpy()}
        for name in dict.fromkeys((next(iter(nets)), list(nets)[-1])):  # where the run began, and what it came to
            probabilities = predict(nets[name].eval(), image, device).cpu()
            row[name] = probabilities.argmax(0).byte().numpy()
        row["confidence"] = probabilities.amax(0).numpy()
        panels.append(row)
    report.save_panels(config.out / "panels.png", panels, pair.classes)
    report.save_curves(config.out / "curves.png", histories)
    report.write_json(config.out / "results.json", {name: score.to_json() for name, score in rows.items()})
    seconds = sum(h["seconds"] for h in histories)
    best = max((s["miou"] for h in histories[-1:] for s in h["scores"]), default=float("nan"))
    report.write_text(
        config.out / "report.md",
        f"# {config.data.pair}: {' → '.join(s.recipe for s in config.stages)}\n\n"
        f"Seed {config.seed}, {sum(h['steps'] for h in histories)} steps, {seconds:.0f} s. IoU in percent on "
        f"{count} target images, one confusion matrix, last checkpoint.\n\n"
        f"{report.markdown_table(rows, pair.classes)}\n"
        f"Best of the last stage's evaluations, for information only (it was chosen on this very set): {best:.1f}.\n\n"
        "![Target images and their truth, what the nets predict, and how sure the last one is](panels.png)\n\n"
        "![Losses, mIoU on target and, with pseudo-labels, the share that was kept](curves.png)\n",
    )
    html.write_html(config.out / "report.md", pair.classes)
    console.print(report.rich_table(rows, pair.classes))
    console.print(f"Report, panels and curves: {config.out / 'report.md'}")


# --------------------------------------------------------------------------------------------------------------------
# Small helpers


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration as YAML and JSON can hold it."""
    return json.loads(json.dumps(asdict(config), default=str))  # type: ignore[no-any-return]


def check_same_run(saved: dict[str, Any], config: Config, index: int, path: Path) -> None:
    """Refuse to continue a run whose result would be neither the old configuration's nor the new one's."""
    now = plain(config)
    free = {"out", "resume", "eval_every", "eval_trimap", "save_every", "keep_checkpoints", "log_every"}
    free |= {"check_data"}
    for side in (saved, now):
        side["stages"] = side["stages"][: index + 1]
        side["data"] = {k: v for k, v in side["data"].items() if k not in ("workers", "cache") and "root" not in k}
    changed = [k for k in now if k not in free and now[k] != saved.get(k)]
    if changed:
        details = "; ".join(f"{k}: {saved.get(k)} -> {now[k]}" for k in changed)
        raise ValueError(f"Expected {path} to be of the same configuration, but these differ: {details}.")
