"""How a message writes what was given: shapes, kinds of things, wrong options."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}


def shape_of(x: Tensor) -> str:
    """A shape as a user writes it: `(2, 19, 64, 64)`."""
    return f"({', '.join(str(s) for s in x.shape)}{',' if x.ndim == 1 else ''})"


def kind_of(x: object) -> str:
    """What was given instead of the expected tensor: `torch.int64 (2, 64, 64)`, `ndarray`, `0.5`."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {shape_of(x)}"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    return repr(x) if x is None or isinstance(x, (bool, int, float, str)) else type(x).__name__


def brief(value: object) -> str:
    """A wrong option as it was given, unless it is large."""
    return repr(value) if is_sequence(value) else kind_of(value)


def space_form(first: str, spatial: int | None) -> str:
    """The form of a map: `space_form("N, C", 2)` is "(N, C, H, W)"; None, or a wrong number, leaves it open."""
    return f"({first}, {'*space' if spatial is None else _AXES.get(spatial, '*space')})"


def is_integer(value: object) -> bool:
    """Whether `value` is a Python, NumPy or symbolic integer; True and False are not."""
    return isinstance(value, (int, numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def is_sequence(value: object) -> bool:
    """Whether `value` is a list, a tuple or another sequence; a string is not."""
    return isinstance(value, (tuple, list)) or (isinstance(value, Sequence) and not isinstance(value, str))


def unwrap_hint(x: object) -> str:
    """How to get the tensor out of what was given."""
    if isinstance(x, (np.ndarray, np.generic)):
        return " Convert arrays with torch.as_tensor."
    if hasattr(x, "prototypes"):
        return " Pass its .prototypes."
    if isinstance(x, Mapping) or hasattr(x, "logits"):
        return ' Pass the tensor in it: net(images).logits or net(images)["out"] for the output of a net.'
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return f" Pass one of its fields ({', '.join(x._fields)}), or check the order of the arguments."
    if isinstance(x, (list, tuple)):
        numbers_only = len(x) > 0 and all(isinstance(entry, (int, float)) for entry in x)
        return " Convert numbers with torch.tensor." if numbers_only else " Pass the tensor in it, for example [0]."
    return ""
