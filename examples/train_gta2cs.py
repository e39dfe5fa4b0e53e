"""Train a segmentation net on a labelled source domain and adapt it to an unlabelled target domain.

    python examples/train_gta2cs.py                                    # the built-in toy pair: two CPU cores, minutes
    python examples/train_gta2cs.py --config examples/configs/dacs_gta2cs.yaml --data.data_root /data
    python examples/train_gta2cs.py --config ... --check-data     # what is missing or wrong in the folders?
    torchrun --nproc_per_node 4 examples/train_gta2cs.py --config ...  # several processes: batch_size is per process

A run is a list of stages, each a recipe with its steps; a stage starts from the student of the stage before it. Read
`main` for the run, `train_stage` for the loop, and `gta2cs/recipes/` for the methods: a recipe is a Module whose
forward is the training loss. Everything of step k is a function of (seed, k, global sample index), but for the net's
own dropout of (seed, k, process), so `--resume` continues an interrupted run exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))
from gta2cs import html, report
from gta2cs.checkpoints import load_checkpoint, load_net, save_checkpoint
from gta2cs.datasets import Pair, build_pair, check_data
from gta2cs.evaluation import Score, evaluate, predict, with_bn_statistics
from gta2cs.loading import Batch, StepData, sample_generator, step_loader
from gta2cs.nets import build_net, param_groups
from gta2cs.recipes import RECIPES, Draws, Preparation, Recipe

console = Console(soft_wrap=True)


# --------------------------------------------------------------------------------------------------------------------
# Configuration: every field is a key of the YAML file and an option of the command line (--data.pair toy).


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
    """A run."""

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
    toy = [] if named else [str(Path(__file__).parent / "configs" / "dacs_toy.yaml")]
    config = auto_cli(Config, args=arguments, as_positional=False, default_config_files=toy)
    if config.dry_run:  # the run itself, whether to come or finished, is left alone
        config.out = config.out / "dry_run"
    return config


# --------------------------------------------------------------------------------------------------------------------
# The loop


def train_stage(
    config: Config,
    index: int,
    student: torch.nn.Module,
    previous: Recipe | None,
    pair: Pair,
    sampler: Any,
    accelerator: Accelerator,
) -> tuple[Recipe, dict[str, Any]]:
    """Run one stage; returns its recipe and its history of losses and scores."""
    stage, classes = config.stages[index], pair.classes
    steps = min(stage.steps, 2) if config.dry_run else stage.steps
    seed = config.seed + 1_000_003 * index
    device, rank = accelerator.device, accelerator.process_index
    folder = config.out / f"stage{index + 1}_{stage.recipe}"

    # The recipe holds the student, the teachers and whatever else a method needs.
    def make_net(**changes: Any) -> torch.nn.Module:
        return config.net.build(len(classes.names), **changes)

    recipe = RECIPES[stage.recipe].build(student, len(classes.names), stage.options, make_net, previous)
    recipe = recipe.to(device, memory_format=torch.channels_last).train()
    groups = [
        *param_groups(recipe.student, lr=stage.lr, head_multiplier=config.head_multiplier),
        *recipe.extra_param_groups(stage.lr, config.head_multiplier),
    ]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    base_lrs = [group["lr"] for group in optimizer.param_groups]

    # Resume: nothing but the step is needed to know what data and draws come next.
    start, history = 0, {"name": stage.recipe, "steps": steps, "losses": [], "scores": [], "seconds": 0.0}
    history["step_seconds"] = 0.0  # of the steps alone: no evaluation, no saving
    checkpoint = folder / "last.pt"
    if config.resume and checkpoint.is_file():
        saved = load_checkpoint(checkpoint, device)
        check_same_run(json.loads(saved["config"]), config, index, checkpoint)
        if (world := saved["world_size"]) != accelerator.num_processes:
            raise ValueError(f"Expected the {world} processes of {checkpoint}, but got {accelerator.num_processes}.")
        recipe.load_state_dict(saved["recipe"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        start, history = saved["step"], {**history, **json.loads(saved["history"])}
    else:
        main_process = accelerator.is_main_process
        recipe.prepare(
            Preparation(
                plain_batches(config, pair, device),
                seed=config.seed,
                folder=config.out if main_process else None,
                resume=config.resume,
                console=console if main_process else None,
            )
        )
    if accelerator.is_main_process and start < steps:  # not before: a run that may not be resumed keeps its own
        report.write_text(config.out / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    wrapped, optimizer = accelerator.prepare(recipe, optimizer)

    data = StepData(
        pair.source_train,
        pair.target_train,
        batch_size=config.batch_size,
        crop=config.data.crop,
        seed=seed,
        source_scale=config.data.source_scale,
        target_scale=config.data.target_scale,
        sampler=sampler,
        rare_class_pixels=config.data.rare_class_pixels,
        rank=rank,
    )
    loader = step_loader(data, start=start, stop=steps, workers=config.data.workers)
    samples = range(rank * config.batch_size, (rank + 1) * config.batch_size)
    alarm = ClassAlarm(classes.names)
    began = time.perf_counter() - history["seconds"]
    with report.progress_bar(console, disable=not accelerator.is_main_process) as progress:
        task = progress.add_task(f"{stage.recipe}", total=steps, completed=start, status="")
        for step, batch in enumerate(loader, start):
            step_began = time.perf_counter()
            # Dropout and the like draw from the global generator: it, too, is a function of the step.
            torch.manual_seed(sample_generator(seed, step, rank, "net").initial_seed())
            for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base * lr_factor(step, steps, stage)

            losses = wrapped(
                Batch(*(x.to(device, non_blocking=True) for x in batch)), Draws(seed, step, samples, device)
            )
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(losses.total)
            optimizer.step()
            recipe.after_step()
            history["step_seconds"] += time.perf_counter() - step_began

            done = step + 1
            if done % config.log_every == 0 or done == steps:
                entry = {"step": done, "terms": {k: v.item() for k, v in losses.terms.items()}}
                if not all(v == v and abs(v) != float("inf") for v in entry["terms"].values()):
                    raise FloatingPointError(f"A loss is not finite at step {done}: {entry['terms']}.")
                if losses.selection is not None:
                    entry["kept"] = alarm.shares(losses.selection)
                    for warning in alarm.check():
                        progress.console.print(f"[yellow]step {done}: {warning}[/]")
                if losses.per_class:
                    entry["per_class"] = {
                        k: dict(zip(classes.names, v.tolist(), strict=True)) for k, v in losses.per_class.items()
                    }
                history["losses"].append(entry)
                latest = f"mIoU {history['scores'][-1]['miou']:.1f}" if history["scores"] else ""
                loss = "  ".join(f"{k} {v:.3f}" for k, v in entry["terms"].items())
                progress.update(task, completed=done, status=f"{loss}  {latest}")
            if done == steps or (config.eval_every and done % config.eval_every == 0):
                scores = {name: evaluate_net(config, net, pair, device) for name, net in recipe.nets().items()}
                first = next(iter(scores.values()))
                if accelerator.is_main_process:
                    found = ", ".join(f"{name} {score.miou:.1f}" for name, score in scores.items())
                    progress.console.print(f"{stage.recipe}, step {done} of {steps}: mIoU on target {found}")
                    if kept := (history["losses"] or [{}])[-1].get("kept"):
                        shares = ", ".join(f"{name} {100 * share:.0f}" for name, share in kept.items())
                        progress.console.print(f"  [dim]% of each predicted class that is sure enough: {shares}[/]")
                    progress.update(task, status=f"mIoU {first.miou:.1f}")
                history["scores"].append(
                    {"step": done, "miou": first.miou, "nets": {n: s.to_json() for n, s in scores.items()}}
                )
            if done == steps or (config.save_every and done % config.save_every == 0):
                history["seconds"] = time.perf_counter() - began
                agree = parameters_agree(recipe.student, accelerator)
                if accelerator.is_main_process:
                    saved = {
                        "recipe": recipe.state_dict(),
                        "step": done,
                        "world_size": accelerator.num_processes,
                        "parameters_agree": agree,
                        "history": json.dumps(history),
                        "config": json.dumps(plain(config)),
                    }
                    if config.keep_checkpoints:
                        save_checkpoint(folder / f"step_{done:06d}.pt", saved)
                    if accelerator.scaler is not None:
                        saved["scaler"] = accelerator.scaler.state_dict()
                    save_checkpoint(checkpoint, {**saved, "optimizer": optimizer.state_dict()})
    return recipe, history


def lr_factor(step: int, steps: int, stage: Stage) -> float:
    """Linear warm-up, then polynomial decay to 0."""
    warm = min(1.0, (step + 1) / stage.lr_warmup) if stage.lr_warmup else 1.0
    return warm * (1 - step / steps) ** stage.lr_power


def evaluate_net(config: Config, net: torch.nn.Module, pair: Pair, device: torch.device) -> Score:
    """Score on the labelled part of target that no training step sees."""
    limit = 2 if config.dry_run else None
    return evaluate(net, pair.target_val, pair.classes, device=device, limit=limit, trimap=config.eval_trimap)


class ClassAlarm:
    """Warns once when the teacher all but stops predicting a class that it knew: the usual way a run goes wrong."""

    def __init__(self, names: tuple[str, ...], patience: int = 5, floor: float = 0.05) -> None:
        self.names, self.patience, self.floor = names, patience, floor
        self.predicted: list[list[float]] = []
        self.warned: set[int] = set()

    def shares(self, selection: Any) -> dict[str, float]:
        """Note one step; returns the kept share of each class that was predicted."""
        predicted, kept = selection.predicted.tolist(), selection.kept.tolist()
        self.predicted.append(predicted)
        return {n: k / p for n, p, k in zip(self.names, predicted, kept, strict=True) if p > 0}

    def check(self) -> list[str]:
        """Compare the last steps noted with the first ones."""
        if len(self.predicted) < 2 * self.patience:
            return []
        first = [sum(x) for x in zip(*self.predicted[: self.patience], strict=True)]
        last = [sum(x) for x in zip(*self.predicted[-self.patience :], strict=True)]
        dead = [
            c for c, (a, b) in enumerate(zip(first, last, strict=True)) if b < self.floor * a and c not in self.warned
        ]
        self.warned.update(dead)
        return [
            f"class '{self.names[c]}' is dying: the teacher gives it {last[c]:.0f} pixels, {first[c]:.0f} at the start"
            for c in dead
        ]


# --------------------------------------------------------------------------------------------------------------------
# The run


def main(config: Config) -> dict[str, Score]:
    """Train every stage, then write the report. Returns the table's rows."""
    if not config.stages:
        raise ValueError("Expected `stages` to name at least one recipe, but got an empty list.")
    for stage in config.stages:
        if stage.recipe not in RECIPES:
            raise ValueError(f"Expected `recipe` to be one of {sorted(RECIPES)}, but got {stage.recipe!r}.")
        RECIPES[stage.recipe].parse(stage.options)
    data = config.data
    pair = build_pair(
        data.pair,
        data_root=data.data_root,
        source_root=data.source_root,
        target_root=data.target_root,
        source_list=data.source_list,
        source_size=data.source_size,
        target_size=data.target_size,
        cache=data.cache,
        strict=not config.check_data,
    )
    if data.oracle:
        if pair.target_train_labelled is None:
            raise ValueError(
                f"Expected `data.pair` to label its target training set for `data.oracle`, but {data.pair!r} does not."
            )
        pair = dataclasses.replace(pair, source_train=pair.target_train_labelled())
    if config.check_data:
        found = check_data(pair)
        console.print(found)
        sys.exit(0 if found.ok else 1)

    # Under torchrun without a GPU, accelerate starts independent single processes unless told that the CPU is meant.
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(mixed_precision=config.precision, cpu=on_cpu)
    if accelerator.num_processes != (world := int(os.environ.get("WORLD_SIZE", "1"))):
        raise RuntimeError(
            f"Expected {world} processes to work together, but accelerate found {accelerator.num_processes}."
        )
    torch.manual_seed(config.seed)
    if accelerator.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        for stale in config.out.glob("stage*/*.pt") if not config.resume else ():
            stale.unlink()  # of an earlier run: a later --resume must not find its stages
    student = config.net.build(len(pair.classes.names))
    if config.init is not None:
        load_net(student, config.init)

    rows: dict[str, Score] = {}
    nets: dict[str, torch.nn.Module] = {}
    histories = []
    recipe = None
    sampler = rare_class_sampler(config, pair, accelerator)
    for index, stage in enumerate(config.stages):
        recipe, history = train_stage(config, index, student, recipe, pair, sampler, accelerator)
        histories.append(history)
        student = recipe.student
        before = [s.recipe for s in config.stages[:index]]
        title = stage.recipe if stage.recipe not in before else f"{stage.recipe} (stage {index + 1})"
        single = len(recipe.nets()) == 1
        for name, net in recipe.nets().items():
            row = title if single else f"{title}, {name}"
            rows[row] = Score.from_json(history["scores"][-1]["nets"][name])
            nets[row] = copy.deepcopy(net)  # the next stage goes on from it
        if stage.recipe == "source_only":
            adapted = with_bn_statistics(student, target_batches(config, pair, accelerator.device))
            rows[f"{title} + BatchNorm statistics of target"] = evaluate_net(config, adapted, pair, accelerator.device)

    if accelerator.is_main_process:
        write_report(config, pair, rows, nets, histories, accelerator.device)
    accelerator.end_training()
    return rows


def target_batches(config: Config, pair: Pair, device: torch.device) -> Any:
    """Yield target crops for BatchNorm statistics: 50 batches, the same whatever was trained before."""
    for batch in plain_batches(config, pair, device)(0, 50):
        yield batch.target_images


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


def parameters_agree(net: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether all processes hold the same weights: cheap insurance against a rank that went its own way."""
    total = torch.stack([p.detach().float().sum() for p in net.parameters()]).sum()
    totals = accelerator.gather(total[None])
    return bool((totals == totals[0]).all())


if __name__ == "__main__":
    main(parse())
