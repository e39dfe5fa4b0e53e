"""Calls that are refused: they leave the state of a Module as it was, and say which option of a method is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import udakit
from contract.checks import _module, make, run
from contract.registry import Operation, all_operations
from contract.wrong_options import WRONG

LOGITS = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = LOGITS.argmax(1)
MASK = LABELS > 0

# Each Module with state, and the tensors of a legal call of each of its methods.
MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[Tensor, ...]]]] = {
    "AdaptiveThresholdSelector": (lambda: udakit.AdaptiveThresholdSelector(3), {"forward": (LOGITS,)}),
    "ClassQuantileSelector": (lambda: udakit.ClassQuantileSelector(3), {"forward": (LOGITS,)}),
    "DistributionAlignment": (
        lambda: udakit.DistributionAlignment(3),
        {"forward": (LOGITS,), "update_source": (LABELS,)},
    ),
    "ClassPrototypes": (
        lambda: udakit.ClassPrototypes(3, 5),
        {"update": (FEATURES, LABELS), "distances": (FEATURES,), "forward": (FEATURES,), "assign": (FEATURES,)},
    ),
    "ClassDistributions": (lambda: udakit.ClassDistributions(3, 5), {"update": (FEATURES, LABELS)}),
    "InconsistencyLoss": (
        lambda: udakit.InconsistencyLoss(3),
        {"forward": (LOGITS, -LOGITS), "update": (LOGITS, -LOGITS)},
    ),
    "LabelFreeScores": (lambda: udakit.LabelFreeScores(3), {"update": (LOGITS,), "compute": ()}),
    "ConsistencyScore": (lambda: udakit.ConsistencyScore(3), {"forward": (LOGITS, -LOGITS), "compute": ()}),
    "EnsembleAgreement": (
        lambda: udakit.EnsembleAgreement(2),
        {"forward": (torch.stack([LOGITS, -LOGITS]).softmax(2),), "compute": ()},
    ),
    "ConfidenceThreshold": (
        lambda: udakit.ConfidenceThreshold(),
        {"fit": (LOGITS, LABELS), "estimate": (LOGITS,)},
    ),
}
# Arguments of methods that are tensors and not options.
TENSORS = {"features", "valid", "labels", "logits"}
# What selectors share, which `forward` calls with options that it has checked.
SHARED = ("nearness", "scores", "needed", "keep", "train")


def _methods() -> Iterator[tuple[str, str, str]]:
    """(Module, method, option) of every public method with options."""
    for name in udakit.__all__:
        kind = getattr(udakit, name)
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
            continue
        for method, function in inspect.getmembers(kind, inspect.isfunction):
            if method.startswith("_") or not function.__module__.startswith("udakit") or method in SHARED:
                continue
            for parameter in inspect.signature(function).parameters.values():
                if parameter.annotation in ("bool", "Kind"):
                    yield name, method, parameter.name


OPTIONS = [*_methods()]


def test_there_are_methods_with_options() -> None:
    assert {("ClassPrototypes", "update", "sync"), ("LabelFreeScores", "compute", "sync")} <= {*OPTIONS}


@pytest.mark.parametrize(("name", "method", "option"), OPTIONS)
def test_options_of_methods_are_checked(name: str, method: str, option: str) -> None:
    """A `sync="no"` would wait for all ranks. The Module itself refuses the same values: see the contract."""
    if name not in MODULES:  # the stateless selectors have no method but `forward`
        made = _stateless(name)
        arguments: tuple[Tensor, ...] = (LOGITS, FEATURES)
    else:
        make_module, calls = MODULES[name]
        made, arguments = make_module(), calls[method]
    for value in WRONG[option]:
        before = _state(made)
        with pytest.raises((TypeError, ValueError), match=f"`{option}`"):
            getattr(made, method)(*arguments, **{option: value})
        _assert_same(before, made)


def _stateless(name: str) -> nn.Module:
    kind = getattr(udakit, name)
    if name == "ThresholdSelector":
        return kind(0.5)
    return kind(udakit.ClassPrototypes(3, 5)) if name in ("BilateralConsensus", "RectifiedSelector") else kind()


def _state(made: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in made.state_dict().items()}


def _assert_same(before: dict[str, Tensor], made: nn.Module) -> None:
    changed = [name for name, x in made.state_dict().items() if not torch.equal(x, before[name])]
    assert not changed, f"a call that was refused changed {changed}"


def _with_state() -> list[Operation]:
    found = [op for op in all_operations() if op.module is not None and "module" not in op.exempt]
    return [op for op in found if _module(op, make(op).call()).state_dict()]


@pytest.mark.parametrize("op", _with_state(), ids=lambda op: op.name)
def test_a_refused_call_changes_no_state(op: Operation) -> None:
    """Every tensor spoilt in turn, and every argument of the call that is given by keyword."""
    ex, used = make(op, seed=1), _module(op, make(op).call())
    run(make(op), function=used)
    calls: list[Callable[[], Any]] = []
    for i, x in enumerate(ex.leaves):
        if isinstance(x, Tensor) and x.ndim:
            calls += [lambda i=i, bad=bad: run(ex.change(i, bad), function=used) for bad in _spoilt(x)]
    call = ex.call()
    for name in [*inspect.signature(used.forward).parameters][len(call.args) :]:
        for bad in ("no", 3, torch.zeros(2), torch.ones(1, 1, 1, 1, dtype=torch.bool)):
            calls.append(lambda name=name, bad=bad: used(*call.args, **{**call.tensors, name: bad}))
    assert _count_refused(used, calls)


def _spoilt(x: Tensor) -> tuple[Any, ...]:
    return x[:1], x[..., :1].clone(), x.to(torch.complex64), x.unsqueeze(0), "no"


def _count_refused(made: nn.Module, calls: list[Callable[[], Any]]) -> int:
    """Make every call; those that are refused must change nothing."""
    refused = 0
    for call in calls:
        before = _state(made)
        try:
            call()
        except (TypeError, ValueError):
            refused += 1
            _assert_same(before, made)
    return refused


@pytest.mark.parametrize("name", MODULES)
def test_a_refused_call_of_a_method_changes_no_state(name: str) -> None:
    make_module, calls = MODULES[name]
    for method, arguments in calls.items():
        function = getattr(make_module(), method)
        made = function.__self__
        keywords = [p for p in inspect.signature(function).parameters if p in TENSORS][len(arguments) :]
        wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((*arguments[:i], bad, *arguments[i + 1 :]), {}) for i, x in enumerate(arguments) for bad in _spoilt(x)
        ]
        wrong += [(arguments, {k: bad}) for k in keywords for bad in ("no", MASK[..., :1], 3)]
        attempts = [partial(function, *args, **options) for args, options in wrong]
        assert _count_refused(made, attempts) or not arguments
