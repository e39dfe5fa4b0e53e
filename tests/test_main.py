"""`python -m udakit` says what is installed and where the rest is."""

import subprocess
import sys
from pathlib import Path

import torch

import udakit
from udakit.__main__ import installed, places

ROOT = Path(__file__).resolve().parent.parent


def test_versions_devices_and_places() -> None:
    done = subprocess.run([sys.executable, "-m", "udakit"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{udakit.__version__}, {len(udakit.__all__)} public names" in done.stdout
    assert torch.__version__ in done.stdout
    assert "cpu, " in done.stdout
    assert str(ROOT / "docs") in done.stdout
    assert str(ROOT / "examples") in done.stdout


def test_a_wheel_says_where_the_rest_is(tmp_path: Path) -> None:
    assert "not in the wheel" in places(tmp_path)["examples"]
    assert installed("udakit-no-such-package") == "is missing"
