"""The shapes in the signatures are the shapes that go in and come out."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_annotations_hold() -> None:
    pytest.importorskip("beartype")
    program = Path(__file__).with_name("typecheck.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
