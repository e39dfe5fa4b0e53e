"""The examples in the docstrings run as they stand, and hardly a public name is without one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest
import torch

import udakit
from udakit._state import FullPrecisionState

MODULES = sorted(m.name for m in pkgutil.walk_packages(udakit.__path__, "udakit."))
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail: see the output"


SECTIONS = ("Attributes", "Args", "Returns", "Yields", "Raises", "Example")


def _public() -> Iterator[tuple[str, object]]:
    """Public functions and classes, and the public methods and properties of the classes."""
    for name in udakit.__all__:
        x = getattr(udakit, name)
        if inspect.isclass(x) or inspect.isroutine(x):
            yield name, x
        for member, y in vars(x).items() if inspect.isclass(x) else ():
            if not member.startswith("_") and (inspect.isfunction(y) or isinstance(y, property)):
                yield f"{name}.{member}", y


@pytest.mark.parametrize(("name", "x"), list(_public()), ids=lambda x: x if isinstance(x, str) else "")
def test_sections_of_docstrings(name: str, x: object) -> None:
    """Each section has a line of its own, in the usual order, and "Args" has the arguments of the signature."""
    text = inspect.getdoc(x) or ""
    found = re.findall(rf"^( *)({'|'.join(SECTIONS)}):(.*)$", text, re.MULTILINE)
    assert not [line for line in found if line[0] or line[2].strip()], f"{name}: a section is not a line of its own"
    places = [SECTIONS.index(section) for _, section, _ in found]
    assert places == sorted(places), f"{name}: {[section for _, section, _ in found]}"
    if args := re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE):
        named = re.findall(r"^    (\w+):", args[1], re.MULTILINE)
        assert named == [p for p in inspect.signature(x).parameters if p != "self"], name  # type: ignore[arg-type]
    elif inspect.isfunction(x) and "." not in name:
        pytest.fail(f"{name} has no Args")
    if inspect.isclass(x) and issubclass(x, FullPrecisionState):
        assert "\nAttributes:" in text, f"{name} does not name its buffers"


def test_public_names_have_examples() -> None:
    documented, without = 0, []
    for name in udakit.__all__:
        x = getattr(udakit, name)
        if inspect.isclass(x) or inspect.isroutine(x):
            assert inspect.getdoc(x), f"udakit.{name} has no docstring"
            tests = doctest.DocTestFinder(recurse=True).find(x, name)
            if any(t.examples for t in tests):
                documented += 1
            else:
                without.append(name)
    share = documented / (documented + len(without))
    assert share >= 0.9, f"{share:.0%} of the public callables have an example; without: {without}"
