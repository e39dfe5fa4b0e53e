"""Checkpoints, written completely or not at all, and read without pickled code."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from gta2cs.files import replacing


def save_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """Write a checkpoint atomically. If the run dies or the disk fills up, the previous one stays."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        noting = _Noting(file)
        try:
            torch.save(value, noting)
        except RuntimeError:
            if noting.error is None:
                raise
            raise noting.error from None  # torch's own words say where in its source the writing stopped
        file.flush()
        os.fsync(file.fileno())


class _Noting:
    """A file that remembers why writing failed, because torch replaces the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is not None:  # torch goes on with the end of the archive
            return len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read tensors and plain values that `torch.save` wrote. Errors name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, but there is no file {path}.")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        # Not torch's text: it recommends to read the file in a way that runs whatever code is in it.
        why = "it holds objects other than tensors and plain values, which could run code, or it is damaged"
    except (EOFError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else "it ends too early"
        why = first if "weights_only" not in first else "it is damaged"
    except OSError as error:
        ends = error.errno == errno.EINVAL  # torch looked for its place behind the end
        why = "it is damaged, or ends too early" if ends else error.strerror or str(error)
    except Exception as error:  # a hostile file can make the reader raise anything
        why = f"it is damaged ({type(error).__name__})"
    raise ValueError(f"Expected {path} to hold tensors saved by torch, but it cannot be read: {why}.")


_PARTS = {
    "recipe": dict,
    "config": str,
    "history": str,
    "choice": str,
    "step": int,
    "world_size": int,
    "optimizer": dict,
}


def load_checkpoint(path: Path, device: torch.device | str = "cpu", needs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint`; `config` and `history` are still JSON.

    Args:
        path: the file.
        device: where its tensors go.
        needs: keys that it must have besides `recipe`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint, or a part is missing.
    """
    value = read_tensors(path, device)
    wrong = f"Expected {path} to be a checkpoint of train_gta2cs.py, but"
    if not isinstance(value, dict):
        raise ValueError(f"{wrong} it holds {type(value).__name__}.")
    for key in ("recipe", *needs):
        if key not in value:
            raise ValueError(f"{wrong} it has no key {key!r}.")
    for key, kind in _PARTS.items():
        if key in value and not isinstance(value[key], kind):
            raise ValueError(f"{wrong} its {key!r} is {type(value[key]).__name__}.")
    if odd := [k for k, v in value["recipe"].items() if not (isinstance(k, str) and isinstance(v, Tensor))]:
        raise ValueError(f"{wrong} its 'recipe' does not name tensors: {odd[:3]!r}.")
    for key in ("config", "history"):
        if key in value:
            checked_json(value[key], key, path)
    return value


# Of `config` and `history`: what is read of a checkpoint, and what it may be.
_SHAPES: dict[str, dict[str, Any]] = {
    "config": {"data": dict, "net": dict, "stages": list},
    "history": {"name": str, "scores": list},
    "data": {"pair": str},
    "net": {"arch": str, "encoder": str},
}


def checked_json(text: str, key: str, path: Path) -> dict[str, Any]:
    """Parse `config` or `history` of a checkpoint."""
    wrong = f"Expected {path} to be a checkpoint of train_gta2cs.py, but its {key!r}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{wrong} is not JSON.") from None
    checks = {key: value}
    if key == "config" and isinstance(value, dict):
        checks |= {name: value.get(name) for name in ("data", "net")}
        stages = value["stages"] if isinstance(value.get("stages"), list) else []
        if not all(isinstance(stage, dict) and isinstance(stage.get("recipe"), str) for stage in stages):
            raise ValueError(f"{wrong} has invalid stages.")
    for name, given in checks.items():
        for part, kind in _SHAPES[name].items():
            if not isinstance(given, Mapping) or not isinstance(given.get(part), kind):
                raise ValueError(f"{wrong} has no {kind.__name__} {part!r}{'' if name == key else f' in {name!r}'}.")
    return value  # type: ignore[no-any-return]


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
