"""`import udakit` is silent, quick, and needs nothing but its own dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOREIGN = ("torchvision", "matplotlib", "PIL", "segmentation_models_pytorch", "transformers", "accelerate", "rich")
FOREIGN += ("torchmetrics", "jsonargparse", "timm")
SLOW = ("torchmetrics", "timm", "segmentation_models_pytorch", "transformers", "torchvision")  # together 6 s
EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")


def _python(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_import_is_silent() -> None:
    assert _python("import udakit", "-W", "error") == ""


def test_import_needs_no_dependency_of_the_examples() -> None:
    loaded = _python(f"import sys, udakit; print(*[m for m in {FOREIGN} if m in sys.modules])")
    assert not loaded.strip(), f"import udakit imports {loaded}"


def test_help_and_errors_of_the_examples_do_not_wait_for_slow_imports() -> None:
    code = f"import sys; sys.path[:0] = [{EXAMPLES!r}]; import train_gta2cs, predict, compare_runs; "
    loaded = _python(code + f"print(*[m for m in {SLOW} if m in sys.modules])")
    assert not loaded.strip(), f"the examples import {loaded}"


def test_import_leaves_torch_as_it_was() -> None:
    """No default dtype, seed, thread count or grad mode is set on the way."""
    state = "(torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed())"
    code = f"import torch; torch.manual_seed(3); a = {state}; import udakit; assert a == {state}, (a, {state})"
    _python(code)


@pytest.mark.slow
def test_import_is_quick() -> None:
    """At most 0.35 s over torch: processor time, the least of several runs, since other jobs may share the machine."""
    code = "import time, torch; t = time.process_time(); import udakit; print(time.process_time() - t)"
    seconds = []
    while len(seconds) < 7 and min(seconds, default=1.0) > 0.35:
        seconds.append(float(_python(code)))
    assert min(seconds) <= 0.35, f"import udakit costs {min(seconds):.2f} s over import torch"
