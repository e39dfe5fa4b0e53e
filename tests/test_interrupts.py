"""Ctrl-C and SIGTERM strike anywhere: no file is torn, the run ends in one line with 130, and goes on where it was."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gta2cs
from gta2cs import checkpoints, choosing, interrupts, observers, stage, summary
from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.files import replacing, write_text
from gta2cs.interrupts import heard, postponed, stop_if_asked
from tiny import ARGUMENTS, small_pair

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals raise KeyboardInterrupt and are not taken over when a test is over."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts._asked = False


def strike(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, *, times: int = 1, call: int = 1
) -> None:
    """Send a signal from inside a function: `times` signals in its `call`-th call."""
    original, calls = getattr(where, name), [0]

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        for _ in range(times if calls[0] == call else 0):
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, struck)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("call", [1, 3])
def test_a_signal_waits_until_the_file_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: int
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"recipe": {"student.x": torch.zeros(3)}, "step": 1})
    strike(monkeypatch, checkpoints._Noting, "write", number, call=call)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"recipe": {"student.x": torch.ones(3)}, "step": 2})
    assert load_checkpoint(path)["step"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_signal_does_not_wait_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"recipe": {"student.x": torch.zeros(3)}, "step": 1})
    strike(monkeypatch, checkpoints._Noting, "write", signal.SIGINT, times=2)
    with heard():
        with pytest.raises((KeyboardInterrupt, RuntimeError)) as ended:  # torch puts an error of its own in its place
            save_checkpoint(path, {"recipe": {"student.x": torch.ones(3)}, "step": 2})
        assert interrupts.asked_to_stop(ended.value)
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_in_a_block_waits_for_the_outer_one_and_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as under nohup
    reached = []

    def outer() -> None:
        with postponed():
            with postponed():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
            reached.append("the end of the inner one")

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert reached
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def test_a_write_that_fails_is_interrupted_none_the_less_and_other_threads_write_too(tmp_path: Path) -> None:
    def full() -> None:
        with replacing(tmp_path / "x"):
            signal.raise_signal(signal.SIGINT)
            raise OSError("full")

    with pytest.raises(KeyboardInterrupt):
        full()
    assert not list(tmp_path.iterdir())
    thread = threading.Thread(target=write_text, args=(tmp_path / "x", "text"))
    thread.start()
    thread.join()
    assert (tmp_path / "x").read_text() == "text"


# ------------------------------------------------------------------------------------------------------- a command


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[[Any], Any]) -> str:
    """What the command says of an interrupted run; its status is 130."""
    monkeypatch.setattr(train_gta2cs, "parse", lambda: None)
    monkeypatch.setattr(train_gta2cs, "main", main)
    assert train_gta2cs.command() == 130
    return capsys.readouterr().err


def test_an_interrupt_that_another_error_took_the_place_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replaced(config: None) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos") from None

    assert ended(monkeypatch, capsys, replaced) == "Stopped before the first step.\n"


class Finalised:
    """Its end is interrupted; Python swallows what a finaliser raises."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_a_finaliser_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallowed(config: None) -> None:
        Finalised()
        stop_if_asked()  # as the loop does before each step
        pytest.fail("nothing stopped")

    assert ended(monkeypatch, capsys, swallowed) == "Stopped before the first step.\n"


def test_a_loader_that_died_of_the_group_s_signal_a_moment_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def died(config: None) -> None:
        threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)).start()
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Terminated.")

    assert ended(monkeypatch, capsys, died) == "Stopped before the first step.\n"


def test_a_worker_whose_tensor_is_not_fetched_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    interrupts.quiet_child()
    sharer = resource_sharer._ResourceSharer()
    address, _ = sharer.register(lambda connection, pid: None, lambda: None)
    for sent in (b"", b"#"):  # gone without a word, and in the middle of one
        with socket.socket(socket.AF_UNIX) as fetching:
            fetching.connect(address)
            fetching.sendall(sent)
    sharer.stop()
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("another error"), None)
    assert "another error" in capsys.readouterr().err


TINY = [
    *ARGUMENTS,
    "--data.crop=[64,64]",
    "--batch_size=1",
    "--log_every=1",
    "--save_every=1",
    "--data.pair=folder",
]
STAGES = [{"recipe": "source_only", "steps": 2}, {"recipe": "dacs", "steps": 2}]
# Where a signal strikes, in which call of it, and what is said. Each run goes on from the one before.
STRUCK: list[tuple[Any, str, int, str]] = [
    (train_gta2cs, "Accelerator", 1, "Stopped before the first step."),
    (train_gta2cs, "open_pair", 1, "Stopped before the first step."),
    (stage.StageState, "build", 1, "Stopped before the first step."),
    (train_gta2cs.TrainingStep, "__call__", 1, "stage 1 of 2 (source_only) after step 0 of 2; no checkpoint was due"),
    (checkpoints._Noting, "write", 1, "stage 1 of 2 (source_only) after step 1 of 2; the last checkpoint is of step 1"),
    (torch.Tensor, "backward", 1, "stage 1 of 2 (source_only) after step 1 of 2; the last checkpoint is of step 1"),
    (observers, "evaluate", 1, "stage 1 of 2 (source_only) after step 2 of 2; the last checkpoint is of step 1"),
    (train_gta2cs, "adapt_batch_norm", 1, "Stopped after stage 1 of 2 (source_only); its last checkpoint"),
    (stage.StageState, "build", 2, "Stopped after stage 1 of 2 (source_only); its last checkpoint"),
    (train_gta2cs, "prepare", 1, "Stopped after stage 1 of 2 (source_only); its last checkpoint"),
    (choosing, "measure", 1, "stage 2 of 2 (dacs) after step 0 of 2; the last checkpoint is of the stage before"),
    (choosing.Choosing, "_offer", 2, "stage 2 of 2 (dacs) after step 2 of 2; the last checkpoint is of step 1"),
    (train_gta2cs, "chosen_net", 1, "Stopped before the report was whole; all 2 stages are done"),
    (summary.report, "write_json", 2, "Stopped before the report was whole; all 2 stages are done"),
    (summary.report, "save_panels", 1, "Stopped before the report was whole; all 2 stages are done"),
]


def test_a_run_that_is_stopped_everywhere_ends_as_one_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"--data.data_root={small_pair(tmp_path / 'data')}", f"--stages={json.dumps(STAGES)}"]

    def command(out: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train", *TINY, *data, f"--out={out}", "--resume"])
        return train_gta2cs.command(), capsys.readouterr().err

    for turn, (where, name, call, words) in enumerate(STRUCK):
        with monkeypatch.context() as patch:
            strike(patch, where, name, SIGNALS[turn % 2], call=call)
            status, said = command(tmp_path / "stopped")
        assert status == 130, (name, said)
        assert words in said, (name, said)
        assert len(said.splitlines()) == 1, (name, said)
        assert not list(tmp_path.rglob("*.tmp"))
    for out in ("stopped", "whole"):
        assert command(tmp_path / out) == (0, "")
    for path in ("stage1_source_only/last.pt", "stage2_dacs/last.pt", "best.pt"):
        stopped, whole = (load_checkpoint(tmp_path / out / path)["recipe"] for out in ("stopped", "whole"))
        assert all(torch.equal(stopped[key], value) for key, value in whole.items())
