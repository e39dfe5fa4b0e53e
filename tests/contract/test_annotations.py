"""The shapes in the signatures are the shapes that go in and come out."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import udakit

# What hands its arguments on to a net or a function of the user's: nothing else takes *args or **kwargs.
HANDS_ON = {"EMATeacher.forward", "FeatureTap.__call__"}


def _public_callables() -> dict[str, Callable[..., Any]]:
    """Public functions, and constructors and public methods of public classes that udakit defines itself."""
    found: dict[str, Callable[..., Any]] = {}
    for name in udakit.__all__:
        value = getattr(udakit, name)
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value) and not issubclass(value, tuple):
            found |= {
                f"{name}.{method}": function
                for method, function in inspect.getmembers(value, inspect.isfunction)
                if function.__module__.startswith("udakit")
                and (not method.startswith("_") or method in ("__init__", "__call__"))
            }
    return found


CALLABLES = _public_callables()


@pytest.mark.parametrize("name", CALLABLES)
def test_signature_is_explicit(name: str) -> None:
    """An editor can complete and check every argument: named, annotated, and with an annotated result."""
    signature = inspect.signature(CALLABLES[name])
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    assert variadic == (name in HANDS_ON), f"{name}{signature}"
    assert all(p.annotation is not p.empty for p in parameters), f"{name}{signature}"
    assert signature.return_annotation is not signature.empty, f"{name}{signature}"


@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in CALLABLES}))
def test_class_shows_its_options(name: str) -> None:
    """`help(udakit.X)` names the options of a class, not (*args, **kwargs)."""
    kinds = {p.kind for p in inspect.signature(getattr(udakit, name)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _modules() -> list[type[torch.nn.Module]]:
    """Public Modules that are called, without the teacher: what a net returns is the net's."""
    kinds = [getattr(udakit, name) for name in udakit.__all__ if name not in ("EMATeacher", "ClassPrototypes")]
    modules = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, torch.nn.Module)]
    return [kind for kind in modules if kind.forward is not torch.nn.Module.forward]


@pytest.mark.parametrize("kind", _modules())
def test_call_is_typed(kind: type[torch.nn.Module]) -> None:
    """`torch.nn.Module` types a call as Any: what defines `forward` says that a call is the same."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    assert "    if TYPE_CHECKING:\n        __call__ = forward" in inspect.getsource(owner)


def test_what_hands_on_exists() -> None:
    assert set(CALLABLES) >= HANDS_ON


@pytest.mark.slow
def test_annotations_hold() -> None:
    pytest.importorskip("beartype")
    program = Path(__file__).with_name("typecheck.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
