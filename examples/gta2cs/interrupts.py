"""SIGINT (Ctrl-C) and SIGTERM (schedulers, `kill`): one line and status 130, wherever they strike.

A KeyboardInterrupt can get lost: torch's archive writer raises an error of its own in its place, a finaliser swallows
it. So a signal is noted as well as raised, and whoever catches an error asks `asked_to_stop`. Files are written with
signals postponed. Only the main thread of a process hears signals; elsewhere nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

STATUS = 130
NOTHING_TORN = "Stopped: every file that was written is whole."
NOTHING_DONE = "Stopped before the first step."
NUMBERS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, "FrameType | None"], Any]

_asked = False  # since the command began
_postponing = False


def leave_at_once(words: str = "") -> None:
    """From here on a signal ends the process with this line: while modules load, and when all is done."""

    def leave(number: int, frame: FrameType | None) -> None:
        _leave("" if _asked else words)

    _handle(_handlers(), leave)


def end_with(status: int) -> NoReturn:
    """End a command that has said all it had to say."""
    leave_at_once()
    sys.exit(status)


@contextmanager
def heard() -> Iterator[None]:
    """For a block: a signal raises KeyboardInterrupt and is noted; a second one ends the process at once."""
    global _asked
    _asked, owner = False, os.getpid()

    def hear(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked or os.getpid() != owner:  # the clean way out takes too long, or this is a child that was just forked
            _leave("Stopped at once." if os.getpid() == owner else "")
        _asked = True
        raise KeyboardInterrupt

    def told(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):  # of a finaliser: it is noted, which is enough
            hook(unraisable)

    before, hook = _handlers(), sys.unraisablehook
    try:
        sys.unraisablehook = told
        _handle(before, hear)
        yield
    finally:
        _restore(before)
        sys.unraisablehook = hook


def asked_to_stop(error: BaseException | None = None) -> bool:
    """Whether a signal has come, even where `error` took the place of its KeyboardInterrupt."""
    if not _asked and "DataLoader worker" in str(error):  # it got the group's signal, ours may be a moment behind
        with suppress(KeyboardInterrupt):
            time.sleep(0.5)
    return _asked or isinstance(error, KeyboardInterrupt)


def stop_if_asked() -> None:
    """Raise the KeyboardInterrupt of a signal once more, if it was lost."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def said_where(words: Callable[[], str]) -> Iterator[None]:
    """Give a KeyboardInterrupt that comes out of a block its words, unless it has some."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not asked_to_stop(error):
            raise
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        raise KeyboardInterrupt(said or words()) from None


@contextmanager
def postponed() -> Iterator[None]:
    """For a block that must not be torn: a signal is delivered after it; a second one at once, should a disk hang."""
    global _postponing
    if _postponing or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def postpone(number: int, frame: FrameType | None) -> None:
        if _postponing and not waiting:
            waiting.append(number)
            return
        waiting.clear()
        _restore(before)
        signal.raise_signal(number)

    before = _handlers()
    _postponing = True
    try:
        _handle(before, postpone)
        yield
    finally:
        _postponing = False
        _restore(before)
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started in a block never hear SIGINT: Ctrl-C is for the one that started them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _handlers() -> dict[int, Any]:
    """Handlers of the signals that may be taken over: not ignored ones (`nohup`), nor those handled outside Python."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in NUMBERS}
    return {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}


def _handle(numbers: Iterable[int], handler: Handler) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave(words: str) -> None:
    if words:
        with suppress(OSError):
            os.write(2, f"{words}\n".encode())
    os._exit(STATUS)
