"""Checks of single tensors and of pairs of tensors: kind, dtype, shape."""

from __future__ import annotations

import torch
from torch import Tensor

from udakit._checks.devices import check_device
from udakit._checks.form import kind_of, shape_of, unwrap_hint


def check_tensor(name: str, x: object, what: str = "a tensor") -> None:
    """Raise unless `x` is a tensor; `what` is the expected kind."""
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected `{name}` to be {what}, but got {kind_of(x)}.{unwrap_hint(x)}")


def check_float(name: str, x: Tensor, ndim: int | None = None, form: str = "") -> None:
    """Raise unless `x` is floating point and, if given, has `ndim` axes (`form` names them, as in "(C, D)").

    For maps of pixels, use `check_maps`.
    """
    check_tensor(name, x, "a float tensor")
    if not x.is_floating_point():
        hint = " Convert integers and masks with .float()."
        if ndim == 4 and x.ndim == 3:
            hint = " It looks like a label map: are two arguments swapped?"
        elif x.dtype == torch.uint8 and x.ndim == 4:
            hint = " Convert byte images with .float() / 255."
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(x)}.{hint}")
    if ndim is not None and x.ndim != ndim:
        single = form.startswith("(N") and x.ndim == ndim - 1
        hint = " If it is a single item, add the batch axis with .unsqueeze(0)." if single else ""
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
    """Raise unless both tensors have the same shape and device."""
    if x.shape != reference.shape:
        if hint is None:
            hint = ""
            if x.ndim == reference.ndim >= 3 and x.shape[:2] == reference.shape[:2]:
                hint = " Resize one to the size of the other with F.interpolate."
            elif 3 in (x.ndim, reference.ndim) and 4 in (x.ndim, reference.ndim):
                hint = " Turn tokens (N, L, D) into a map with .mT.unflatten(2, (h, w))."
        raise ValueError(
            f"Expected `{name}` to have the shape of `{reference_name}` {shape_of(reference)}, "
            f"but got {shape_of(x)}.{hint}"
        )
    check_device(name, x, reference, reference_name)
