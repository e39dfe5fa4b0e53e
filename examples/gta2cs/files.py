"""Files written whole or not at all: what stops halfway leaves the old one, and no piece of the new one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gta2cs.interrupts import postponed

_FULL = {errno.ENOSPC, errno.EDQUOT}


class WriteError(OSError):
    """A file that could not be written, with the reason in words."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, of this call alone; what is written there takes the place of `path`.

    Ctrl-C and SIGTERM wait until the file is in place.

    Raises:
        WriteError: naming the file and the space that is left; the temporary file is gone, `path` is as it was.
    """
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with postponed():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            raise WriteError(_why(path, temporary, error)) from None
        finally:
            temporary.unlink(missing_ok=True)


def remove_pieces(folder: Path) -> None:
    """Remove temporary files that killed processes left; only for who holds the folder's lock."""
    for piece in (*folder.glob("*.tmp"), *folder.glob(".*.tmp"), *folder.glob("stage*/*.tmp")):
        piece.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text; folders on the way are made."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def check_writable(folder: Path) -> None:
    """Make a folder and try it, before hours of work are to be written there."""
    probe = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
    except OSError as error:
        raise WriteError(_why(folder, probe, error)) from None
    finally:
        if folder.is_dir():
            probe.unlink(missing_ok=True)


def _why(path: Path, temporary: Path, error: OSError) -> str:
    if isinstance(error, WriteError):  # of a file inside this one
        return str(error)
    reason = (error.strerror or str(error)).lower()
    if error.errno not in _FULL and error.errno != errno.EFBIG:
        return f"Cannot write {path}: {reason}."
    written = temporary.stat().st_size if temporary.exists() else 0
    there = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    kept = "the file that was there before is kept" if path.exists() else "nothing was there before"
    return (
        f"Cannot write {path}: {reason} after {written / 1e6:.1f} MB, {shutil.disk_usage(there).free / 1e6:.1f} MB are "
        f"free on the disk; {kept}."
    )
