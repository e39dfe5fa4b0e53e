"""Nothing is lost: one process a folder, no run replaced unasked, a full disk leaves the last file. Real processes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gta2cs
from gta2cs import files
from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.files import WriteError, check_writable, replacing, write_text
from gta2cs.run_folder import FolderInUse, clear_folder, own_folder
from tiny import ARGUMENTS

EXAMPLES = Path(files.__file__).parent.parent
SCRIPT = EXAMPLES / "train_gta2cs.py"
TINY = [*ARGUMENTS, "--data.crop=[64,64]", "--batch_size=1", "--log_every=1", "--eval_every=0"]
HOLD = "import sys; from pathlib import Path; from gta2cs.run_folder import own_folder\n"
HOLD += "with own_folder(Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])}


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that has a folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_of_one_process_and_free_when_that_is_killed(tmp_path: Path) -> None:
    other = hold(tmp_path)
    with pytest.raises(FolderInUse, match=rf"process {other.pid} on .* is at work in {tmp_path}"), own_folder(tmp_path):
        pass
    other.kill()
    other.communicate()
    with own_folder(tmp_path):  # no stale lock stands in the way
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_its_block_and_not_with_its_file(tmp_path: Path) -> None:
    other = hold(tmp_path)
    (tmp_path / "run.lock").unlink()  # by hand: the next run makes its own
    with own_folder(tmp_path), pytest.raises(FolderInUse), own_folder(tmp_path):
        pass
    other.communicate("")
    with own_folder(tmp_path):
        pass


def test_a_refused_run_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "best.pt").touch()
    with pytest.raises(FileExistsError, match="to have no run yet"), own_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    with own_folder(tmp_path):
        said = capsys.readouterr().err
    assert said == f"Cannot lock {tmp_path} (no locks available): see to it yourself that no other run writes there.\n"
    monkeypatch.setattr("gta2cs.run_folder.fcntl", None)
    with own_folder(tmp_path):
        assert "(this system has none)" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["stage1_dacs/last.pt", "results.json", "report.md", "translator.pt"])
def test_a_run_is_replaced_only_when_asked(tmp_path: Path, left: str) -> None:
    write_text(tmp_path / left, "an hour of work")
    (tmp_path / "stage1_dacs").mkdir(exist_ok=True)
    (tmp_path / "stage1_dacs" / ".12-ab.tmp").write_text("a piece of a process that was killed")
    refused = pytest.raises(FileExistsError, match=rf"holds one, .*{left}\. Use --resume .* --overwrite")
    with refused, own_folder(tmp_path):
        pass
    with own_folder(tmp_path, resume=True):
        assert (tmp_path / left).read_text() == "an hour of work"
        assert not list(tmp_path.rglob("*.tmp"))
    with own_folder(tmp_path, overwrite=True):
        assert (tmp_path / left).exists()  # until the new run is sure to begin
        clear_folder(tmp_path)
        assert not (tmp_path / left).exists()


def test_a_folder_that_cannot_be_written_is_noticed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=rf"Cannot write {tmp_path}/file/run: not a directory"):
        own_folder(tmp_path / "file" / "run").__enter__()
    if os.getuid():
        tmp_path.chmod(0o555)
        with pytest.raises(WriteError, match="permission denied"):
            own_folder(tmp_path / "run").__enter__()


FULL = """
import resource, sys, torch
from pathlib import Path
from gta2cs.checkpoints import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save_checkpoint(Path(sys.argv[1]), {"recipe": {"student.x": torch.zeros(200_000)}, "step": 2})
except OSError as error:
    print(error)
"""


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_and_no_piece(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"recipe": {"student.x": torch.ones(3)}, "step": 1})
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, env=environment())
    assert done.stdout.startswith(f"Cannot write {path}: file too large after 0."), done.stdout + done.stderr
    assert "are free on the disk; the file that was there before is kept." in done.stdout
    assert "enforce fail" not in done.stdout + done.stderr
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr("gta2cs.files.secrets.token_hex", lambda count: "x")
    for write in (
        lambda path: write_text(path, "text"),
        lambda path: save_checkpoint(path, {"recipe": {"student.x": torch.zeros(100_000)}}),
    ):
        (tmp_path / f".{os.getpid()}-x.tmp").symlink_to("/dev/full")
        with pytest.raises(WriteError, match=r"Cannot write .*new: no space left on device after .* MB are free"):
            write(tmp_path / "new")
        assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------- whole runs


def hear_interrupts() -> None:
    """In the child: SIGINT as at a terminal, since a suite that runs in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(out: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    stages = json.dumps([{"recipe": "source_only", "steps": 10_000}])
    command = [sys.executable, str(SCRIPT), *TINY, f"--stages={stages}", f"--out={out}", *arguments]
    options.setdefault("preexec_fn", hear_interrupts)
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment(), **options)  # type: ignore[call-overload, no-any-return]


def refused(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, in this process, of a folder that it may not have."""
    stages = json.dumps([{"recipe": "source_only", "steps": 10_000}])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, f"--stages={stages}", f"--out={out}"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert train_gta2cs.command() == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return capsys.readouterr().err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert path.is_file(), process.communicate(timeout=30)


@pytest.mark.slow
def test_a_second_run_an_interrupt_and_a_forgotten_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "stage1_source_only" / "last.pt"
    first = start(tmp_path, "--save_every=1", "--data.workers=1")
    wait_for(checkpoint, first)
    said = refused(tmp_path, monkeypatch, capsys)
    assert f"process {first.pid} on " in said
    assert len(said.splitlines()) == 1, said

    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 130, said
    assert "Stopped in stage 1 of 1 (source_only) after step " in said
    assert said.rstrip().endswith("--resume goes on from there.")
    assert len(said.splitlines()) == 1, said

    step = load_checkpoint(checkpoint)["step"]
    said = refused(tmp_path, monkeypatch, capsys)
    assert "Use --resume to continue it or --overwrite to replace it." in said
    assert load_checkpoint(checkpoint)["step"] == step


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_a_line(tmp_path: Path) -> None:
    import resource

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    run = start(tmp_path, "--save_every=1", preexec_fn=few_bytes)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 2
    assert f"Cannot write {tmp_path / 'stage1_source_only' / 'last.pt'}: file too large after " in said
    assert "Stopped in stage 1 of 1 (source_only) after step 1 of 10000" in said
    assert len(said.splitlines()) == 1, said
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cut_checkpoint_is_called_damaged_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"recipe": {"student.weight": torch.zeros(50_000)}, "config": "{}"})
    whole = path.read_bytes()
    for kept in [0, 1, 10, *range(1000, len(whole), 9000), len(whole) - 1]:
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"Expected {re.escape(str(path))} to hold tensors") as found:
            load_checkpoint(path)
        assert re.search(r"ends too early|damaged|not saved properly", str(found.value)), (kept, str(found.value))


def test_a_disk_that_became_read_only_is_one_clear_error(tmp_path, monkeypatch):
    """Not even the piece can be removed there; that must not hide why the file could not be written."""

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("write_bytes", "write_text", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(WriteError, match=rf"Cannot write {tmp_path}/a\.txt: read-only file system"):
        write_text(tmp_path / "a.txt", "x")
    with pytest.raises(WriteError, match=rf"Cannot write {tmp_path}: read-only file system"):
        check_writable(tmp_path)


def test_a_folder_that_becomes_read_only_does_not_hide_what_went_wrong_in_it(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    def work():
        with own_folder(tmp_path / "run"):
            monkeypatch.setattr(Path, "unlink", refuse)
            raise WriteError("Cannot write last.pt: permission denied.")

    with pytest.raises(WriteError, match=r"Cannot write last\.pt"):
        work()
