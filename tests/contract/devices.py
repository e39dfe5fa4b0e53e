"""What the checks on a card share with the benchmark of its clock: moving a call there, and refusing to wait for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from contract.registry import Call


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
