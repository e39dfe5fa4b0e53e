"""The folder of a run. Only one process may use it, and nothing of an earlier run is lost without a request."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from gta2cs.files import check_writable, remove_pieces

try:
    import fcntl
except ImportError:  # not on Windows: there nothing is locked
    fcntl = None  # type: ignore[assignment]


class FolderInUse(OSError):
    """Another process uses this folder."""


LOCK = "run.lock"
REPORT = ("history.json", "results.json", "report.md", "report.html", "panels.png", "curves.png")
LEFT = ("stage*/*.pt", "*.pt", *REPORT)


def stage_folder(index: int, recipe: str) -> str:
    """Name of the folder of a stage, in that of its run; stages count from 0 here and from 1 there."""
    return f"stage{index + 1}_{recipe}"


def stage_title(recipes: Sequence[str], index: int) -> str:
    """Name of a stage wherever a reader meets it: its recipe, with a number if the recipe occurs before it."""
    recipe = recipes[index]
    return f"{recipe} (stage {index + 1})" if recipe in recipes[:index] else recipe


def step_file(step: int) -> str:
    """Name of the checkpoint of a step, where `keep_checkpoints` keeps it."""
    return f"step_{step:06d}.pt"


@contextmanager
def own_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Lock a folder for a block. Files of an earlier run stay until `clear_folder`.

    The lock belongs to the process, not to the file. It is released as soon as the process ends, however that happens.

    Raises:
        WriteError: a folder that cannot be written.
        FolderInUse: another process is at work in it.
        FileExistsError: it holds a run, and neither `resume` nor `overwrite` says what should become of it.
    """
    check_writable(folder)
    with _locked(folder) as file:
        try:
            held = left_by_a_run(folder)
            if held and not (resume or overwrite):
                raise FileExistsError(
                    f"Expected `out` to have no run yet, but {folder} holds one, for example {held[0]}. "
                    "Use --resume to continue it or --overwrite to replace it."
                )
            remove_pieces(folder)
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}))
            file.flush()
            yield
        finally:
            with suppress(OSError):  # of a folder that has become read-only; what went wrong there has been said
                (folder / LOCK).unlink(missing_ok=True)  # while it is still held


def left_by_a_run(folder: Path) -> list[Path]:
    """Files of an earlier run that a new one would replace."""
    return sorted(path for pattern in LEFT for path in folder.glob(pattern))


def clear_report(folder: Path) -> None:
    """Remove what says that a run is finished: it has got another stage."""
    for name in REPORT:
        (folder / name).unlink(missing_ok=True)


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run, so that neither a later --resume nor a reader finds them."""
    for path in left_by_a_run(folder):
        path.unlink()


def _locked(folder: Path) -> TextIO:
    """Open the lock's file and lock it."""
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        if fcntl is None:
            _warn(folder, "this system has none")
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FolderInUse(
                f"Expected `out` to be used by one run only, but {_owner(folder)} is at work in {folder}. "
                "Wait for it, end it, or choose another --out."
            ) from None
        except OSError as error:  # a file system without locks
            _warn(folder, (error.strerror or str(error)).lower())
            return file
        try:
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its last owner has just removed it: lock the next one


def _warn(folder: Path, why: str) -> None:
    said = f"Cannot lock {folder} ({why}): see to it yourself that no other run writes there."
    Console(stderr=True, soft_wrap=True).print(f"[yellow]{escape(said)}[/]", highlight=False)


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
