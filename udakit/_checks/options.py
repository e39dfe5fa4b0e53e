"""Checks of options, which are Python values given at construction or in a call."""

from __future__ import annotations

import numbers
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from udakit._checks.form import brief, is_integer, is_sequence, kind_of, shape_of

_SIZES = {
    1: ("(length,)", "one positive integer"),
    2: ("(height, width)", "two positive integers"),
    3: ("(depth, height, width)", "three positive integers"),
}


_PLAIN = (float, int)  # and no bool, which is an int


def check_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {tuple(allowed)}, but got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False: the string "no" is true."""
    if value is True or value is False:
        return
    if not isinstance(value, (bool, np.bool_, torch.SymBool)):
        raise TypeError(f"Expected `{name}` to be True or False, but got {brief(value)}.")


def check_range(
    name: str,
    value: float,
    low: float = float("-inf"),
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
    finite: bool = True,
) -> None:
    """Raise unless the Python number `value` is in [low, high]; `open_low` and `open_high` exclude the ends.

    NaN never passes. An infinite value passes only with `finite=False`.
    """
    if type(value) in _PLAIN and low < value < high:  # the common case, made cheap
        return
    if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
        why = "requires a gradient, which it would not get" if value.requires_grad else f"is on '{value.device}'"
        raise TypeError(
            f"Expected `{name}` to be a number, but got a tensor that {why}. Convert it with float({name})."
        )
    real = isinstance(value, (float, numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    if not real and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"Expected `{name}` to be a number, but got {brief(value)}.")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    endless = finite and high == float("inf") and value == high
    if not (above and below) or endless or (finite and value == float("-inf")):
        if high == float("inf"):
            wanted = "a number" if low == float("-inf") else f"{'above' if open_low else 'at least'} {low:g}"
            wanted = f"finite and {wanted}" if endless else wanted
        else:
            wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        share = f" It is a fraction: {value:g} % is {value / 100:g}." if high == 1 and 10 <= value <= 100 else ""
        raise ValueError(f"Expected `{name}` to be {wanted}, but got {value!r}.{share}")


def check_integer(name: str, value: int, low: int = 1) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if type(value) is int and value >= low:
        return
    if not is_integer(value):
        raise TypeError(f"Expected `{name}` to be an integer, but got {brief(value)}.")
    check_range(name, value, low)


def check_classes(num_classes: int) -> None:
    """Raise unless `num_classes` is an integer of at least 2, the number of classes of logits."""
    check_integer("num_classes", num_classes)
    if num_classes == 1:
        raise ValueError(
            "Expected `num_classes` to be at least 2, but got 1. To turn one logit per pixel into two classes, use "
            "udakit.binary_logits; for one probability, use udakit.binary_probabilities."
        )


def check_ignore_index(ignore_index: int, num_classes: int | None = None) -> None:
    """Raise unless `ignore_index` is an integer; with `num_classes`, warn once if the ignored 255 is also a class.

    With more than 255 classes, the default of 255 would silently keep class 255 from being learned. A 255 that the
    caller names is warned of, too: in Python it is the same object as the default, and another object as the default
    would have to be turned into an integer in each function before torch.compile accepts it.
    """
    if not is_integer(ignore_index):
        none = " To ignore nothing, pass -100 or another id that no pixel has." if ignore_index is None else ""
        raise TypeError(f"Expected `ignore_index` to be an integer, but got {brief(ignore_index)}.{none}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"Expected `ignore_index` to fit an int64, but got {ignore_index}.")
    if num_classes is not None and not torch.compiler.is_compiling() and num_classes > 255 and ignore_index == 255:
        _warn_of_class_255()


def warn_user(message: str) -> None:
    """Warn at the first line of the call that is neither in this library nor in torch, whose Modules call it."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("udakit", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)


@cache
def _warn_of_class_255() -> None:
    warn_user(
        "There are more than 255 classes and `ignore_index` is 255, so pixels of class 255 are ignored. Pass another "
        "one, for example ignore_index=-100, unless class 255 is the one to ignore. (This warning is shown once, also "
        "where 255 is passed by name; warnings.filterwarnings('ignore', 'There are more than 255') turns it off.)"
    )


def check_pair(name: str, value: Any, form: str, *, finite: bool = True) -> None:
    """Raise unless `value` is a sequence of two numbers; `form` describes them in the message."""
    if not is_sequence(value) or len(value) != 2:
        raise ValueError(f"Expected `{name}` to be {form}, but got {brief(value)}.")
    for end in value:
        check_range(name, end, finite=finite)


def check_numbers(name: str, values: Any, count: int, form: str, *, low: float = float("-inf"), **ends: bool) -> None:
    """Raise unless `values` is a sequence of `count` numbers that pass `check_range`; `form` describes them."""
    if not is_sequence(values) or len(values) != count:
        raise ValueError(f"Expected `{name}` to be {form}, but got {brief(values)}.")
    for value in values:
        check_range(name, value, low, **ends)


def check_size(name: str, size: Any, spatial: int = 2, *, labels: Tensor | None = None, hint: str = "") -> None:
    """Raise unless `size` has a positive integer for each spatial axis, as (height, width) of `labels`."""
    form, numbers_of = _SIZES[spatial]
    if not is_sequence(size) or len(size) != spatial or not all(is_integer(side) and side >= 1 for side in size):
        if is_integer(size) and size >= 1:
            hint = f" For equal sides, pass {(size,) * spatial}." if spatial != 2 else ""
            hint = hint or f" For a square, pass ({size}, {size})."
        elif isinstance(size, torch.Size) and not hint:
            hint = f" Take the spatial part of a shape with {'.shape[-2:]' if spatial == 2 else '.shape[2:]'}."
        of = "" if labels is None else f" for `labels` {shape_of(labels)}"
        raise ValueError(f"Expected `{name}` to be {form}, {numbers_of}{of}, but got {brief(size)}.{hint}")


def check_callable(name: str, value: object, form: str) -> None:
    """Raise unless `value` can be called; `form` shows the call."""
    if not callable(value):
        raise TypeError(f"Expected `{name}` to be callable as {form}, but got {kind_of(value)}.")
