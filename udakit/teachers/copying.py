"""An independent copy of a net."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from udakit.teachers._held import Held, attributes, copy_error, place_of
from udakit.teachers.unwrap import named_state, unwrap_all, unwrap_model, without_wrappers

__all__ = ["copy_net"]

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
FROZEN = (
    "`torch.jit.freeze` made its weights constants, so there is nothing to copy or to average. Use the net as it was "
    "before; freeze the copy, or the `module` of a teacher, in the end."
)
_FSDP = ("FullyShardedDataParallel", "FSDPModule")


def copy_net(model: nn.Module) -> nn.Module:
    """Copy a net so that the copy shares nothing with the original.

    **Convention.** Parameters, buffers and everything else that the net holds are copied; gradients are not. The
    wrappers of `torch.compile`, DataParallel and DistributedDataParallel are removed. `requires_grad` and the training
    mode stay.

    A `forward` that was set on the net itself works on the copy. So do hooks that are methods of the net or of objects
    in it, the hooks with which torch computes weights (`weight_norm`, `spectral_norm`, `prune`), hooks that the library
    or a class of the net defines, and hooks on calls that only compute: they return or change a value, and can leave
    nothing outside. All other hooks are not copied, be they on calls or on the `state_dict`: an open `FeatureTap` does
    not see the copy.

    Args:
        model: a net, wrapped or not.

    Returns:
        The copy.

    Raises:
        ValueError: the net cannot be copied; the message names the submodule. It may hold a function that refers to the
            net itself (a closure would still run the original), a tensor with a graph, a lock, or parameters without a
            shape yet. It may have a hook that shares a global list or dict with its code, it may be sharded, or contain
            TorchScript.

    Example:
        >>> net = nn.Conv2d(3, 2, 1)
        >>> twin = copy_net(net)
        >>> bool((twin.weight == net.weight).all()), twin.weight is net.weight
        (True, False)
    """
    return copy_sharing(model, ())


def copy_sharing(model: nn.Module, shared: Collection[int], device: torch.device | str | None = None) -> nn.Module:
    """Copy a net to a device. The copy shares the parameters with ids in `shared`."""
    inner = without_wrappers(model)
    modules = dict(named_modules(inner))
    for name, module in modules.items():
        _check_ready(name, module)
    memo: dict[int, Any] = {}
    for name, p in inner.named_parameters():
        memo[id(p)] = p if id(p) in shared else _copied(name, p, device)
    saved = {id(x) for _, x, _ in named_state(inner)}
    storages = {} if device is not None else _storages((x, memo[id(x)]) for x in inner.parameters())
    for b in inner.buffers():
        if id(b) in saved or _place(b) not in storages:  # otherwise `deepcopy` finds the weight that it is a view of
            memo[id(b)] = b.detach().to(device, copy=True)
    memo["torch"] = storages  # type: ignore[index]
    for module in modules.values():
        for x in computed_weights(module):
            memo.setdefault(id(x), x.detach().to(device, copy=True))
    held = Held(modules, memo)
    hooks = _empty_hooks(modules, held, memo)
    before = dict(memo)  # without what a copy that fails leaves half done
    try:
        for wrapper in reversed(_wrappers(inner)):
            memo[id(wrapper)] = copy.deepcopy(unwrap_model(wrapper), memo)
        twin = copy.deepcopy(inner, memo)
        for target, kept in hooks:  # only now, because they refer to modules of the copy
            target.update({key: copy.deepcopy(hook, memo) for key, hook in kept.items()})
    except Exception as error:
        raise copy_error(*_culprit(modules, before, error)) from error
    _check_own(modules, twin, shared)
    return unwrap_all(twin)


def _check_own(modules: dict[str, nn.Module], twin: nn.Module, shared: Collection[int]) -> None:
    """Raise if a submodule with parameters to be copied is still the original."""
    names = {id(module): name for name, module in modules.items()}
    for _, module in named_modules(twin):
        if id(module) in names and any(id(p) not in shared for p in module.parameters()):
            raise copy_error(
                names[id(module)],
                f"has a `__deepcopy__`, that of {type(module).__name__}, which returns the original. If it is frozen, "
                "EMATeacher(model, share_frozen=True) shares it on purpose.",
            )


def _copied(name: str, p: nn.Parameter, device: torch.device | str | None) -> nn.Parameter:
    """A parameter of its own, of the same class and with what such a class keeps in attributes."""
    data, kind = p.detach().to(device, copy=True), type(p)
    if kind is nn.Parameter or not issubclass(kind, nn.Parameter):  # also a subclass of Tensor that is a parameter
        return nn.Parameter(data, requires_grad=p.requires_grad)
    own: nn.Parameter = Tensor._make_subclass(kind, data, p.requires_grad)
    try:
        vars(own).update(copy.deepcopy(vars(p)))
    except Exception as error:
        place, _, own_name = name.rpartition(".")
        raise copy_error(place, f"has a parameter `{own_name}` that cannot be copied: {error}.") from error
    return own


def _storages(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Any]:
    """The memory of each weight and of its copy, as `deepcopy` looks it up for tensors that are views of a weight.

    Only where the copy lies in its memory as the weight does in its own.
    """
    found: dict[int, Any] = {}
    for x, own in pairs:
        place = _place(x)
        if place is None or _place(own) is None or x.stride() != own.stride():
            continue
        if x.storage_offset() == own.storage_offset() and len(x.untyped_storage()) == len(own.untyped_storage()):
            found.setdefault(place, own.untyped_storage())
    return found


def _place(x: Tensor) -> int | None:
    """What `deepcopy` knows the memory of a tensor by; None for classes and layouts that have none of their own."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.device.type != "meta"
    return x.untyped_storage()._cdata if plain else None


def named_modules(module: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the (dotted name, module) of a net and its submodules, each once and without wrappers."""
    module, seen = without_wrappers(module), set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        yield prefix, module
        if isinstance(module, torch.jit.ScriptModule):
            return
        for name, child in module._modules.items():
            if child is not None:
                yield from named_modules(child, f"{prefix}.{name}".lstrip("."), seen)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module comes from `torch.jit.freeze`, which also takes its training mode away."""
    return isinstance(module, torch.jit.ScriptModule) and not hasattr(module, "training")


def computed_weights(module: nn.Module) -> list[Tensor]:
    """The tensors that torch's own hooks compute before each call and store next to the parameters."""
    names = [
        hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod))
    ]
    return [x for name in names if isinstance(x := vars(module).get(name), Tensor)]


def computed_buffers(model: nn.Module) -> Iterator[str]:
    """Yield the names of buffers from which weights are computed; they are treated like weights."""
    for name, module in named_modules(model):
        start = f"{name}." if name else ""
        if "parametrizations" in name.split("."):
            yield from (start + key for key in module._buffers)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield from (f"{start}{hook.name}_u", f"{start}{hook.name}_v")
            elif isinstance(hook, BasePruningMethod):
                yield f"{start}{hook._tensor_name}_mask"


def unsaved_buffers(model: nn.Module) -> Iterator[str]:
    """Yield the names of buffers that are not persistent; the same net as TorchScript saves them."""
    for name, module in named_modules(model):
        yield from (f"{name}.{key}".lstrip(".") for key in module._non_persistent_buffers_set)


def _empty_hooks(
    modules: dict[str, nn.Module], held: Held, memo: dict[int, Any]
) -> list[tuple[OrderedDict[int, Any], dict[int, Any]]]:
    """Let `deepcopy` find no hooks; return each hook dictionary of the copy with its future hooks."""
    pairs = []
    for name, module in modules.items():
        keys: set[int] = set()
        for kind in (*_CALL_HOOKS, *_STATE_HOOKS):
            if hooks := vars(module).get(kind):
                memo[id(hooks)] = target = OrderedDict[int, Any]()
                on_calls = kind in _CALL_HOOKS
                kept = {key: hook for key, hook in hooks.items() if held.keeps(name, hook, on_calls=on_calls)}
                keys.update(kept)
                pairs.append((target, kept))
        for flags in (vars(module).get(kind) for kind in _HOOK_FLAGS):
            if flags:
                memo[id(flags)] = OrderedDict((key, flag) for key, flag in flags.items() if key in keys)
    return pairs


def _wrappers(module: nn.Module) -> list[nn.Module]:
    """The wrapped submodules, outer ones first."""
    found = []
    for child in unwrap_model(module)._modules.values():
        if child is not None:
            found += ([] if unwrap_model(child) is child else [child]) + _wrappers(child)
    return found


def _check_ready(name: str, module: nn.Module) -> None:
    if any(base.__name__ in _FSDP for base in type(module).__mro__):
        raise copy_error(name, "is sharded (FSDP). Shard the second net in the same way.")
    if is_frozen(module):
        raise ValueError(
            f"Expected `model` to be a net that can be copied, but {place_of(name)} is frozen TorchScript. {FROZEN}"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise copy_error(
            name, "is a TorchScript module, whose layers Python cannot reach. The second net can be plain Python."
        )
    tensors = (*module._parameters.items(), *module._buffers.items())
    lazy = [key for key, x in tensors if isinstance(x, (UninitializedParameter, UninitializedBuffer))]
    if lazy:
        raise copy_error(name, f"is lazy: {', '.join(lazy)} has no shape yet. Call the net once first.")


def _culprit(modules: dict[str, nn.Module], memo: dict[int, Any], error: Exception) -> tuple[str, str]:
    """Find the submodule and the reason for which `deepcopy` failed."""
    others = {id(m): m for m in modules.values()}
    for name, module in modules.items():
        for attribute, value in attributes(module):
            try:
                copy.deepcopy(value, {**memo, **others})
            except Exception as reason:
                return name, f"holds a {type(value).__name__} in `{attribute}`: {reason}."
    for name, module in modules.items():
        if hasattr(type(module), "__deepcopy__"):
            return name, f"is copied by a method of {type(module).__name__}, which fails: {error}."
    return "", f"fails to be copied: {error}."
