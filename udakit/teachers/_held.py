"""Find what a net holds besides its weights, and what of it cannot be copied."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from udakit.teachers._functions import ATOMS, CONTAINERS, SHARED, is_pure, only_computes, parts, stores

WAY_OUT = (
    "Make a second net as you made this one. Pass it as EMATeacher(model, module=second), or make it a copy with "
    "second.load_state_dict(model.state_dict())."
)
_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl", "_is_full_backward_hook"}
_OF_TORCH = (
    WeightNorm,
    SpectralNorm,
    BasePruningMethod,
    SpectralNormStateDictHook,
    SpectralNormLoadStateDictPreHook,
)
_QUANTISATION = "torch.ao."  # a `qconfig` has closures over the net: they ask for its device where a quantiser is made


class Held:
    """The objects that the modules of a net hold besides parameters, buffers and submodules."""

    def __init__(self, modules: dict[str, nn.Module], copies: Mapping[int, object]) -> None:
        self.net = {id(m) for m in modules.values()} | {*copies}
        self.packages = {
            "torch",
            *(type(m).__module__.split(".")[0] for m in modules.values() if "." in type(m).__module__),
        }
        self.kinds = {
            (kind.__module__, f"{kind.__qualname__}.") for m in modules.values() for kind in _own_kinds(type(m))
        }
        self.stores = {id(x) for kind in {type(m) for m in modules.values()} for f in _methods(kind) for x in stores(f)}
        self.ids: set[int] = set()
        self.containers: set[int] = set()
        self._functions: list[tuple[str, str, Any]] = []  # what `deepcopy` shares
        for name, module in modules.items():
            for attribute, value in attributes(module):
                self._visit(name, attribute, value)
        for _, attribute, function in self._functions:
            if attribute == "forward":
                self.stores |= {id(x) for x in stores(function)}
        for name, attribute, function in self._functions:
            if self._refers(function):
                raise copy_error(
                    name,
                    f"has a `{attribute}` of its own, a function that refers to the net. On a copy it would still run "
                    "the original. Set it as a method with types.MethodType(function, net), or set it after the copy "
                    "is made.",
                )

    def _visit(self, name: str, attribute: str, value: object) -> None:
        stack = [value]
        while stack:
            x = stack.pop()
            if isinstance(x, ATOMS) or id(x) in self.ids:
                continue
            if isinstance(x, SHARED):
                if (getattr(x, "__module__", None) or "").startswith(_QUANTISATION):
                    continue
                self._functions.append((name, attribute, x))
            elif isinstance(x, Tensor):
                if x.grad_fn is not None and id(x) not in self.net:
                    raise copy_error(
                        name, f"holds a tensor with a graph in `{attribute}`. Detach it or set it to None."
                    )
            elif isinstance(x, types.MethodType):
                self._functions.append((name, attribute, x.__func__))
                stack.append(x.__self__)
            elif not isinstance(x, nn.Module):
                self.ids.add(id(x))
                if isinstance(x, (Mapping, *CONTAINERS)):
                    self.containers.add(id(x))
                stack.extend(parts(x))

    def _refers(self, function: object, *, is_hook: bool = False) -> bool:
        """Whether a function (or a weak reference) leads to the net or its content, or to weights of another net.

        A hook may use another net of the user, or serve an object that knows the net, for example a trainer.
        """
        stack: list[tuple[object, bool]] = [(function, True)]
        seen: set[int] = set()
        while stack:
            x, direct = stack.pop()
            if isinstance(x, ATOMS) or id(x) in seen:
                continue
            seen.add(id(x))
            if id(x) in self.net or (direct and id(x) in self.containers):
                return True
            if isinstance(x, nn.Module):
                foreign = type(x) in weakref.ProxyTypes or next(x.parameters(), None) is not None
            else:
                foreign = isinstance(x, Tensor) and x.requires_grad
                through = isinstance(x, (*SHARED, types.MethodType, functools.partial, Mapping, *CONTAINERS))
                if through or not is_hook:
                    stack.extend((part, direct and through) for part in parts(x))
            if foreign and not is_hook:
                return True
        return False

    def keeps(self, name: str, hook: Any, *, on_calls: bool = True) -> bool:
        """Whether a hook belongs to the net; raise if it does and cannot be copied.

        A hook on calls that does not belong to the net but leads to it, or to what its code reads, is refused as well:
        it may be what the net computes with. A hook on a `state_dict` is not.
        """
        while type(hook).__name__ == "_WrappedHook":
            hook = hook.hook
        if isinstance(hook, _OF_TORCH):
            return True
        function = hook
        own = False
        while isinstance(function, functools.partial):
            own = own or any(self._holds(x) for x in (*function.args, *function.keywords.values()))
            function = function.func
        if isinstance(function, types.MethodType):
            own = own or self._holds(function.__self__)
            function = function.__func__ if own or isinstance(function.__self__, type) else None
        elif not isinstance(function, types.FunctionType):
            return own or self._holds(function) or (on_calls and only_computes(hook))
        if function is None:
            return False
        of_class = self._defined_with(function, "")
        if (on_calls or own or of_class) and self._refers(function, is_hook=not own):
            raise copy_error(
                name,
                f"has a hook, {_title(function)}, a function that refers to the net. On a copy it would still work for "
                "the original. Remove it until the copy is made.",
            )
        pure = is_pure(function if isinstance(hook, types.MethodType) else hook)
        of_package = of_class or (function.__module__ or "").split(".")[0] in self.packages
        kept = own or (pure and of_package) or (on_calls and only_computes(hook))
        if not on_calls:
            return kept or of_class
        if not kept and (
            self._defined_with(function, "__init__.<locals>.") or any(id(x) in self.stores for x in stores(function))
        ):
            raise copy_error(
                name,
                f"has a hook, {_title(function)}, that uses {self._store_of(function)}, as the code of the net does. "
                "Hooks of users are not copied: if the net reads there, a copy would read what the original left. If "
                "the net only writes, which cannot be told safely, remove the hook until the copy is made. Otherwise "
                "keep the list or dict as an attribute of the net, and make the hook a method of the net.",
            )
        return kept

    def _defined_with(self, function: types.FunctionType, where: str) -> bool:
        """Whether a function is defined in a class of the net; `where` narrows it to a method."""
        module, name = function.__module__, function.__qualname__
        return any(module == place and name.startswith(kind + where) for place, kind in self.kinds)

    def _store_of(self, function: types.FunctionType) -> str:
        """Name what a function shares with the code of the net."""
        shared = {id(x) for x in stores(function)} & self.stores
        names = [name for name, x in function.__globals__.items() if id(x) in shared]
        return f"the global `{names[0]}`" if names else "an object of a closure"

    def _holds(self, x: object) -> bool:
        return id(x) in self.net or id(x) in self.ids


def attributes(module: nn.Module) -> list[tuple[str, object]]:
    """The attributes of a Module that do not belong to torch, as `deepcopy` sees them."""
    try:
        state = module.__getstate__()  # type: ignore[no-untyped-call] # nn.RNN leaves its weak references out
    except Exception:
        state = None
    state = state if isinstance(state, dict) else vars(module)
    return [(name, value) for name, value in state.items() if name not in _INTERNAL]


def _own_kinds(kind: type) -> list[type]:
    """A class and its bases, without those of torch."""
    return [base for base in kind.__mro__ if base is not object and base.__module__.split(".")[0] != "torch"]


def _methods(kind: type) -> list[types.FunctionType]:
    """The functions of a class that torch does not define, including those of properties and static methods."""
    members = [f for base in _own_kinds(kind) for f in vars(base).values()]
    members += [f.fget for f in members if isinstance(f, property)]
    members += [f.__func__ for f in members if isinstance(f, (staticmethod, classmethod))]
    return [f for f in members if isinstance(f, types.FunctionType)]


def copy_error(name: str, what: str) -> ValueError:
    return ValueError(f"Expected `model` to be a net that can be copied, but {place_of(name)} {what} {WAY_OUT}")


def place_of(name: str) -> str:
    """A module of a net, in an error message."""
    return f"its submodule '{name}'" if name else "the net itself"


def _title(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
