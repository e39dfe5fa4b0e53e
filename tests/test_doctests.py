"""The examples in the docstrings run as they stand, and hardly a public name is without one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import udakit

MODULES = sorted(m.name for m in pkgutil.walk_packages(udakit.__path__, "udakit."))
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail: see the output"


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
