"""The checks that need a card: one function a check, each over one operation of the registry.

`tests/test_card.py` runs them where there is one, and their logic on the CPU elsewhere. An operation that reads its
input on the host because it is asked to is exempt from "fake_tensors", with the reason; the same reason counts here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from contract.checks import (
    COARSER,
    Example,
    NoHostRead,
    assert_equal,
    assert_finite,
    gradients,
    make,
    run,
    run_with_gradients,
    takes_generator,
)
from contract.devices import captured, moved_leaf, no_waiting
from contract.registry import Operation

DRAWN = {torch.rand, torch.randint, torch.randn, torch.randperm}


class DrawnOnTheCPU(TorchFunctionMode):
    """Draws on the CPU with one generator and moves the numbers, so that one seed means the same on every device."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in DRAWN:
            return func(*args, **kwargs)
        device = kwargs.get("device")
        return func(*args, **{**kwargs, "generator": self.generator, "device": "cpu"}).to(device)


def on(ex: Example, device: str) -> Example:
    """The example on a device."""
    return Example(ex.op, [moved_leaf(x, device) for x in ex.leaves], ex.spec, ex.roles, ex.grad)


def reads(op: Operation) -> str | None:
    """Why the operation reads from the device, if it does."""
    return op.exempt.get("fake_tensors")


def generator_of(op: Operation, device: str) -> str:
    """The device of the operation's generator: the CPU for what draws on the host."""
    return "cpu" if "seed.device" in op.exempt else device


def _drawing(op: Operation) -> AbstractContextManager[Any]:
    """The same draws on every device; what draws on the host does so in any case."""
    return nullcontext() if "seed.device" in op.exempt else DrawnOnTheCPU()


def agrees(op: Operation, device: str, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> None:
    """Value and gradient on a device are those on the CPU, and the result stays there."""
    for dtype in dtypes:
        expected, expected_gradient = run_with_gradients(make(op, dtype=dtype))
        there = on(make(op, dtype=dtype), device)
        with _drawing(op):
            value, gradient = run_with_gradients(there, draws_on=generator_of(op, device))
        if reads(op) is None:
            assert all(x.device.type == torch.device(device).type for x in value), "a result is on another device"
        coarser = COARSER.get(op.name, 1.0)
        assert_equal([x.cpu() for x in value], expected, f"{dtype} on {device}", coarser=coarser)
        assert_equal([x.cpu() for x in gradient], expected_gradient, f"gradient, {dtype} on {device}", coarser=coarser)


def refusing_to_wait(device: str) -> AbstractContextManager[Any]:
    """An error where the host waits for the device; on the CPU, where it would wait for a card."""
    return NoHostRead() if device == "cpu" else no_waiting()


def waits_for_nothing(op: Operation, device: str) -> None:
    """Forward and backward, after one call to warm up, without one wait of the host for the device."""
    if reason := reads(op):
        pytest.skip(f"reads from the device: {reason}")
    ex = on(make(op), device).differentiable()
    gradients(run(ex, seed=None), ex)
    with refusing_to_wait(device):
        out = run(ex, seed=None)
        gradients(out, ex)


def is_captured(op: Operation) -> None:
    """Captured in a CUDA graph with its backward pass, and replayed on other values: as a call on those values.

    What draws has no values to compare with: it replays, and is finite where a call is.
    """
    if reason := reads(op):
        pytest.skip(f"reads from the device: {reason}")
    ex, other = on(make(op), "cuda").differentiable(), on(make(op, seed=1), "cuda")

    def both() -> tuple[list[Tensor], list[Tensor]]:
        out = run(ex, seed=None)
        return [x.detach() for x in out], gradients(out, ex)

    graph, (value, gradient) = captured(both)
    with torch.no_grad():
        for place, x in zip(ex.leaves, other.leaves, strict=True):
            if isinstance(place, Tensor):
                place.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    if takes_generator(op.function):
        assert_finite(value + gradient, "replayed")
        return
    expected, expected_gradient = run_with_gradients(other)
    assert_equal(value, expected, "replayed")
    assert_equal(gradient, expected_gradient, "gradient, replayed")


def under_autocast(op: Operation, device: str) -> None:
    """Under autocast to float16 and bfloat16 finite, and for float32 the same values and gradients as without it."""
    for half in (torch.float16, torch.bfloat16):
        for dtype in (torch.float32, half):
            if dtype == half and "half" in op.exempt:
                continue
            ex = on(make(op, dtype=dtype), device)
            with torch.autocast(torch.device(device).type, dtype=half), _drawing(op):
                value, gradient = run_with_gradients(ex, draws_on=generator_of(op, device))
            assert_finite(value + gradient, f"{dtype} under autocast to {half}")
            if dtype == torch.float32 and "autocast" not in op.exempt:
                with _drawing(op):
                    expected, expected_gradient = run_with_gradients(ex, draws_on=generator_of(op, device))
                assert_equal(value, expected, f"under autocast to {half}")
                assert_equal(gradient, expected_gradient, f"gradient under autocast to {half}")
