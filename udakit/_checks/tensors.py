"""Checks of tensors by themselves and in pairs: kind, dtype, shape."""

from __future__ import annotations

import torch
from torch import Tensor

from udakit._checks.devices import check_device
from udakit._checks.form import kind_of, shape_of, unwrap_hint


def check_tensor(name: str, x: object, what: str = "a tensor") -> None:
    """Raise unless `x` is a tensor; `what` is the kind that is wanted."""
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected `{name}` to be {what}, but got {kind_of(x)}.{unwrap_hint(x)}")


def check_float(name: str, x: Tensor, ndim: int | None = None, form: str = "") -> None:
    """Raise unless `x` is floating point and, where asked, has `ndim` axes (`form` is their names, "(C, D)").

    Maps of pixels are `check_maps`.
    """
    check_tensor(name, x, "a float tensor")
    if not x.is_floating_point():
        hint = " Integers and masks become one by .float()."
        if ndim == 4 and x.ndim == 3:
            hint = " It looks like a label map: are two arguments swapped?"
        elif x.dtype == torch.uint8 and x.ndim == 4:
            hint = " Images of bytes become one by .float() / 255."
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(x)}.{hint}")
    if ndim is not None and x.ndim != ndim:
        hint = " A single one becomes a batch by .unsqueeze(0)." if form.startswith("(N") and x.ndim == ndim - 1 else ""
        raise ValueError(
            f"Expected `{name}` to be {form or f'a tensor with {ndim} axes'}, but got {shape_of(x)}.{hint}"
        )


def check_per_class(name: str, x: Tensor, classes: int, *, reference: Tensor, reference_name: str) -> None:
    """Raise unless `x` is (C,), one entry for each of the `classes` of `reference`."""
    check_tensor(name, x)
    if x.ndim != 1 or x.shape[0] != classes:
        raise ValueError(
            f"Expected `{name}` to be (C,) matching `{reference_name}` {shape_of(reference)}, but got {shape_of(x)}."
        )
    check_device(name, x, reference, reference_name)


def check_weight_option(class_weight: Tensor | None) -> None:
    """Raise unless the `class_weight` of a Module is None or a tensor (C,)."""
    if class_weight is not None:
        check_tensor("class_weight", class_weight, "a tensor (C,)")
        if class_weight.ndim != 1:
            raise ValueError(f"Expected `class_weight` to be (C,), but got {shape_of(class_weight)}.")


def check_same_shape(x: Tensor, reference: Tensor, *, name: str, reference_name: str, hint: str | None = None) -> None:
    """Raise unless both tensors have one shape, on one device."""
    if x.shape != reference.shape:
        if hint is None:
            hint = ""
            if x.ndim == reference.ndim >= 3 and x.shape[:2] == reference.shape[:2]:
                hint = " F.interpolate brings one to the size of the other."
            elif 3 in (x.ndim, reference.ndim) and 4 in (x.ndim, reference.ndim):
                hint = " Tokens (N, L, D) become a map by .mT.unflatten(2, (h, w))."
        raise ValueError(
            f"Expected `{name}` to have the shape of `{reference_name}` {shape_of(reference)}, "
            f"but got {shape_of(x)}.{hint}"
        )
    check_device(name, x, reference, reference_name)
