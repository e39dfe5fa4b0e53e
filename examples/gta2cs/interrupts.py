"""Handle SIGINT (Ctrl-C) and SIGTERM (schedulers, `kill`) with one line and status 130, whenever they come.

A KeyboardInterrupt can get lost: torch's archive writer raises its own error instead, and a finaliser swallows it.
Signals are therefore recorded as well as raised, and code that catches an error checks `asked_to_stop`. Signals are
postponed while files are written. Only the main thread of a process receives signals; elsewhere this does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

STATUS = 130
NOTHING_TORN = "Stopped: every file that was written is whole."
NOTHING_DONE = "Stopped before the first step."
NUMBERS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, "FrameType | None"], Any]

_asked = False  # since the command began
_postponing = False


def leave_at_once(words: str = "") -> None:
    """Let a signal end the process with this line, while modules are loading or when everything is done."""

    def leave(number: int, frame: FrameType | None) -> None:
        _leave("" if _asked else words)

    _handle(_handlers(), leave)


def end_with(status: int) -> NoReturn:
    """End a command that has finished its output."""
    leave_at_once()
    sys.exit(status)


@contextmanager
def heard() -> Iterator[None]:
    """Context in which a signal raises KeyboardInterrupt and is recorded; a second one ends the process at once."""
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
    """Whether a signal has come, even if `error` replaced its KeyboardInterrupt."""
    if not _asked and "DataLoader worker" in str(error):  # it got the group's signal, ours may be a moment behind
        with suppress(KeyboardInterrupt):
            time.sleep(0.5)
    return _asked or isinstance(error, KeyboardInterrupt)


def stop_if_asked() -> None:
    """Raise the KeyboardInterrupt of a signal again, if it was lost."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def said_where(words: Callable[[], str]) -> Iterator[None]:
    """Context that gives a KeyboardInterrupt a message, unless it has one."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not asked_to_stop(error):
            raise
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        raise KeyboardInterrupt(said or words()) from None


@contextmanager
def postponed() -> Iterator[None]:
    """Context that delays a signal until its end; a second signal is delivered at once, in case a disk hangs."""
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
    """Context in which new processes ignore SIGINT, because Ctrl-C is for the process that started them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet_child(number: int = 0) -> None:
    """In a process that loads data: say nothing when the one that fetches a tensor was stopped in between."""
    hook = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            hook(kind, error, trace)

    sys.excepthook = told  # the thread that hands tensors over reports to it; errors of the data set do not


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
