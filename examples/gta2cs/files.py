"""Write files completely or not at all. If writing stops halfway, the old file stays and no piece of the new one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gta2cs.interrupts import postponed

_FULL = {errno.ENOSPC, errno.EDQUOT}


class WriteError(OSError):
    """A file could not be written; the message gives the reason."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a unique temporary name next to `path`. What is written there replaces `path` at the end.

    Ctrl-C and SIGTERM wait until the file is in place.

    Raises:
        WriteError: the file could not be written. The message names the file and the free space; the temporary file is
            removed, and `path` is unchanged.
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
            _remove(temporary)


def remove_pieces(folder: Path) -> None:
    """Remove the temporary files of killed processes. Call this only with the lock of the folder."""
    for piece in (*folder.glob("*.tmp"), *folder.glob(".*.tmp"), *folder.glob("stage*/*.tmp")):
        piece.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text, and make missing folders."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def check_writable(folder: Path) -> None:
    """Make a folder and check that it is writable, before hours of work have to be written there."""
    probe = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
    except OSError as error:
        raise WriteError(_why(folder, probe, error)) from None
    finally:
        _remove(probe)


def _remove(temporary: Path) -> None:
    """Remove a piece, if there is one. Where the disk refuses even that, the error before it says why."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


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
