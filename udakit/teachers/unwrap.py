"""Access to nets without their wrappers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from udakit._checks import kind_of
from udakit._state import FullPrecisionState

__all__ = ["unwrap_model"]


class Average(FullPrecisionState):
    """Marker for Modules that average a net. If one is stored inside that net, it does not count as a part of it."""


def unwrap_model(model: nn.Module) -> nn.Module:
    """Remove the wrappers of `torch.compile`, DataParallel and DistributedDataParallel, in any nesting.

    Args:
        model: a net, wrapped or not.

    Returns:
        The net inside. Wrappers of its submodules stay.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> unwrap_model(nn.DataParallel(torch.compile(net))) is net
        True
    """
    model = without_wrappers(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("Expected `model` to be a net in Python, but got a TorchScript module. Pass the original net.")
    return model


def without_wrappers(model: nn.Module) -> nn.Module:
    """The net inside, which may be a TorchScript module."""
    if not isinstance(model, nn.Module):
        hint = " Pass the net itself, not its state_dict or parameters." if not callable(model) else ""
        raise TypeError(f"Expected `model` to be an nn.Module, but got {kind_of(model)}.{hint}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, torch.jit.ScriptModule):
            return model
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def unwrap_all(model: nn.Module) -> nn.Module:
    """Permanently remove the wrappers of a net and its submodules."""
    model = unwrap_model(model)
    for name, child in model._modules.items():
        if child is not None:
            model._modules[name] = unwrap_all(child)
    return model


def named_state(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name without wrappers, tensor, is it a parameter) for parameters and persistent buffers.

    A teacher stored inside the net is left out. The tensors of a TorchScript module can be read like those of others.
    """
    model = without_wrappers(model)
    if isinstance(model, torch.jit.ScriptModule):
        saved = model.state_dict()
        for name, weight in model.named_parameters(remove_duplicate=False):
            yield prefix + name, weight, True
        for name, x in model.named_buffers(remove_duplicate=False):
            if name in saved:
                yield prefix + name, x, False
        return
    for name, parameter in model._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, True
    for name, buffer in model._buffers.items():
        if buffer is not None and name not in model._non_persistent_buffers_set:
            yield prefix + name, buffer, False
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, Average):
            yield from named_state(child, f"{prefix}{name}.")
