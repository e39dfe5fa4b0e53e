"""Trackers (tensorboard, wandb, mlflow) through accelerate, which show the content of the report during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from gta2cs.config import Config, plain
from gta2cs.recipes import Losses
from gta2cs.stage import StageState

PROJECT = "udakit"


def check_tracker(accelerator: Accelerator, config: Config) -> None:
    """Refuse a tracker that is not installed, because accelerate would silently skip it."""
    if config.log_with != "none" and not accelerator.log_with:
        raise ModuleNotFoundError(
            f"Expected the package of `log_with: {config.log_with}` to be installed, but it is not: "
            f"pip install {config.log_with}"
        )


def start_tracking(accelerator: Accelerator, config: Config) -> None:
    """Open the tracker, if any, with the name of the run's folder, and send the configuration."""
    if config.log_with == "none":
        return
    own = {"wandb": {"dir": str(config.out), "name": config.out.name}, "mlflow": {"run_name": config.out.name}}
    try:
        accelerator.init_trackers(PROJECT, config=flat(plain(config)), init_kwargs=own)
    except Exception as error:  # of the tracker's own kind: no account, no network, a place that it does not take
        raise ValueError(f"Cannot open the tracker of `log_with: {config.log_with}`: {error}") from error


class Tracking:
    """Sends losses, kept fractions and scores to the tracker when they are logged."""

    def __call__(self, state: StageState, losses: Losses) -> None:
        """Send what the previous observers added to the history in this step."""
        run, history = state.run, state.history
        values: dict[str, Any] = {}
        if history["losses"] and (entry := history["losses"][-1])["step"] == state.done:
            values |= {f"loss/{name}": value for name, value in entry["terms"].items()}
            values |= {f"kept/{name}": share for name, share in entry.get("kept", {}).items()}
        if history["scores"] and (entry := history["scores"][-1])["step"] == state.done:
            for net, score in entry["nets"].items():
                values |= {f"{mean}/{net}": v for mean, v in score["means"].items() if v is not None}
                values |= {f"IoU/{net}/{name}": v for name, v in score["iou"].items() if v is not None}
        if history.get("label_free") and (entry := history["label_free"][-1])["step"] == state.done:
            for net, found in entry["nets"].items():
                values |= {f"label_free/{net}/{k}": v for k, v in found["scores"].items() if v is not None}
                shares = zip(run.pair.classes.names, found["shares"], strict=True)
                values |= {f"share/{net}/{name}": share for name, share in shares}
        if values:
            before = sum(stage.steps for stage in run.config.stages[: state.index])
            run.accelerator.log(values, step=before + state.done)


def send_pictures(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Send panels and curves of a finished run."""
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({path.stem: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({path.stem: [pixels]}, step=step)
            else:
                tracker.log_artifact(str(path))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to plain values, which every tracker accepts."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
