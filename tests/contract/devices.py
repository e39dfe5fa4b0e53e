"""What the checks on a card share with the benchmark of its clock: moving a call there, and refusing to wait for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from contract.registry import Call

T = TypeVar("T")


def moved(call: Call, device: str) -> Call:
    """The same call on a device: tensors, Modules, devices and "cpu" among the options."""
    if device == "cpu":
        return call
    args, tensors, options = tree_map(lambda x: moved_leaf(x, device), (call.args, call.tensors, call.options))
    return replace(call, args=args, tensors=tensors, options=options)


def moved_leaf(x: Any, device: str) -> Any:
    """One value of a call on a device. Modules are copied."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(device)
    if isinstance(x, torch.device):
        return torch.device(device)
    return device if isinstance(x, str) and x == "cpu" else x


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for a card."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of a call, and the results that a replay writes. A call that waits for the card is an error."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        call()
        with no_waiting():  # what waits fails here, and not in the middle of the capture
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
    except BaseException:  # a capture that fails leaves its stream and the state of the default generator behind
        torch.cuda.set_stream(current)
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        default.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise
    return graph, result
