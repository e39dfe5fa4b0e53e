"""Checkpoints: written whole or not at all, read without pickled code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def save_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a run that dies meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint`; says which file when it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a checkpoint, but there is no file {path}.")
    try:
        value = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be a checkpoint of train_gta2cs.py, but it cannot be read: {error}"
        ) from error
    if not isinstance(value, dict) or "recipe" not in value:
        raise ValueError(f"Expected {path} to be a checkpoint of train_gta2cs.py, but it has no key 'recipe'.")
    return value


def load_net(net: nn.Module, path: Path, name: str = "student") -> None:
    """Read a checkpoint and copy one of its nets (its student, or another by name: "teacher.module") into `net`."""
    copy_net(net, load_checkpoint(path)["recipe"], name, path)


def copy_net(net: nn.Module, recipe: dict[str, Tensor], name: str, path: Path) -> None:
    """Copy the net `name` of a recipe's tensors into `net`; `path` is where they are from, for the message."""
    prefix = f"{name}."
    saved = {k.removeprefix(prefix): v for k, v in recipe.items() if k.startswith(prefix)}
    own = net.state_dict()
    wrong = [k for k in own if k not in saved or saved[k].shape != own[k].shape] + [k for k in saved if k not in own]
    if wrong:
        raise ValueError(
            f"Expected the {name} of {path} to be the configured net, but {len(wrong)} tensors are missing, unknown "
            f"or of another shape, for example {wrong[:3]}."
        )
    net.load_state_dict(saved)
