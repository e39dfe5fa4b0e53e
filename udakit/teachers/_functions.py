"""What a function uses from outside, and whether it can leave anything there."""

from __future__ import annotations

import dis
import functools
import inspect
import types
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    type,
    types.ModuleType,
    torch.dtype,
    torch.device,
    type(None),
    RemovableHandle,
)
_CACHED: type = type(functools.lru_cache(len))
SHARED: tuple[type, ...] = (
    types.FunctionType,
    _CACHED,
    weakref.ReferenceType,
    *weakref.ProxyTypes,
)  # what `deepcopy` does not copy
CONTAINERS = (list, tuple, set, frozenset, deque)
_IMPORTED = ("torch", "math", "builtins")  # what a function may use of these leaves nothing outside
_EFFECTS = {"print", "setattr", "open", "exec", "eval", "save", "register_hook"}


def parts(x: Any) -> list[Any]:
    """The objects that an object refers to directly."""
    if isinstance(x, types.FunctionType):
        cells = []
        for cell in x.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # the cell is still empty
                continue
        nets = [g for g in _globals(x) if isinstance(g, (nn.Module, types.MethodType))]
        return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *vars(x).values(), *nets]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values(), *vars(x).values()]
    if isinstance(x, _CACHED):
        return [*vars(x).values()]  # the function is its `__wrapped__`
    if isinstance(x, weakref.ReferenceType):
        return [x()]
    if isinstance(x, Mapping):
        return [*x.values()]
    if isinstance(x, CONTAINERS):
        return [*x]
    return [*getattr(x, "__dict__", {}).values()]


def stores(function: object) -> list[object]:
    """The lists, sets and dicts that a function uses from outside: global ones and those of a closure.

    Those that it uses through another function of its file count, too.
    """
    found: list[object] = []
    stack: list[object] = [function]
    seen: set[int] = set()
    while stack:
        x = stack.pop()
        if isinstance(x, (dict, list, set, deque, types.SimpleNamespace)):
            found.append(x)
        elif isinstance(x, types.FunctionType) and id(x) not in seen:  # what a decorator wraps is in a closure
            seen.add(id(x))
            stack += parts(x)
            stack += [g for g in _globals(x) if not isinstance(g, types.FunctionType) or g.__module__ == x.__module__]
    return found


def _globals(function: types.FunctionType) -> list[object]:
    """The global objects that a function uses. Attributes of the same name do not count."""
    return [function.__globals__.get(name) for name in _global_names(function.__code__)]


@functools.cache
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _global_names(part)]
    used = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return tuple(dict.fromkeys(used + inner))


def is_pure(function: object) -> bool:
    """Whether a function holds nothing that it could modify, and uses no global container."""
    if not isinstance(function, (types.FunctionType, functools.partial)):
        return isinstance(function, ATOMS)
    named: list[object] = []
    if isinstance(function, types.FunctionType):
        named = _globals(function)
    return all(map(is_pure, parts(function))) and not any(isinstance(x, (Mapping, *CONTAINERS)) for x in named)


def only_computes(hook: object) -> bool:
    """Whether a hook returns or changes a value and can leave nothing outside.

    Then it is a part of what the net computes, whoever registered it: the net without it is another function.
    """
    return _leaves_nothing(hook, set()) and any(map(_changes, _codes(hook)))


def _leaves_nothing(x: Any, seen: set[int]) -> bool:
    if id(x) in seen:  # a function that calls itself
        return True
    seen.add(id(x))
    if isinstance(x, (type, types.ModuleType, types.BuiltinFunctionType)):
        home = x.__name__ if isinstance(x, types.ModuleType) else x.__module__ or ""
        return home.split(".")[0].lstrip("_") in _IMPORTED
    if isinstance(x, ATOMS):
        return True
    if isinstance(x, types.FunctionType):
        if (x.__module__ or "").split(".")[0] == "torch":
            return True
        within = all(not _reaches_out(code) for code in _with_nested(x.__code__))
        return within and all(_leaves_nothing(y, seen) for y in (*parts(x), *_globals(x)))
    if isinstance(x, functools.partial):
        return all(_leaves_nothing(y, seen) for y in parts(x))
    if not _codes(x):  # no object that is called like a function
        return False
    return all(isinstance(v, ATOMS) for v in vars(x).values()) and _leaves_nothing(type(x).__call__, seen)


def _reaches_out(code: types.CodeType) -> bool:
    """Whether code assigns to a name outside, or calls what writes or prints."""
    assigned = (
        i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (i.opname == "STORE_DEREF" and i.argval in code.co_freevars)
        for i in dis.get_instructions(code)
    )
    return bool(_EFFECTS & {*code.co_names}) or any(assigned)


def _with_nested(code: types.CodeType) -> list[types.CodeType]:
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return [code, *(x for part in inner for x in _with_nested(part))]


def _codes(hook: Any) -> list[types.CodeType]:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not isinstance(hook, (types.FunctionType, types.MethodType, type, nn.Module)) and hasattr(hook, "__dict__"):
        hook = inspect.getattr_static(type(hook), "__call__", None)
    return [hook.__code__] if isinstance(hook, types.FunctionType) else []


def _changes(code: types.CodeType) -> bool:
    """Whether a function returns something but None, or calls something that works in place."""
    if any(name.endswith("_") and not name.endswith("__") for name in code.co_names):
        return True
    before = None
    for i in dis.get_instructions(code):
        if i.opname == "STORE_SUBSCR" or (i.opname == "RETURN_CONST" and i.argval is not None):
            return True
        if i.opname == "RETURN_VALUE" and not (before and before.opname == "LOAD_CONST" and before.argval is None):
            return True
        before = i
    return False
