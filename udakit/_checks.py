"""Argument checks: one message form, static facts only (shapes, dtypes, devices, options), never a tensor's values.

"Expected `name` to be ..., but got ....", and a sentence that says what to do where the usual cause is known.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def shape_of(x: Tensor) -> str:
    """A shape as a user writes it: `(2, 19, 64, 64)`."""
    return f"({', '.join(str(s) for s in x.shape)}{',' if x.ndim == 1 else ''})"


def kind_of(x: object) -> str:
    """What was given, in place of the tensor that was expected: `torch.int64 (2, 64, 64)`, `ndarray`, `0.5`."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {shape_of(x)}"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    return repr(x) if x is None or isinstance(x, bool | int | float | str) else type(x).__name__


def check_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {tuple(allowed)}, but got {value!r}.")


def check_range(
    name: str,
    value: float,
    low: float = float("-inf"),
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless the Python number `value` lies in [low, high] (ends open where asked). NaN never passes."""
    if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
        why = "requires a gradient, of which none would reach it" if value.requires_grad else f"is on '{value.device}'"
        raise TypeError(f"Expected `{name}` to be a number, but got a tensor that {why}. float({name}) makes one.")
    if not isinstance(value, (float, numbers.Real, torch.SymInt, torch.SymFloat, Tensor)):
        raise TypeError(f"Expected `{name}` to be a number, but got {_brief(value)}.")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        if high == float("inf"):
            wanted = f"{'above' if open_low else 'at least'} {low:g}"
        else:
            wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        share = f" It is a share: {value:g} % is {value / 100:g}." if high == 1 and 10 <= value <= 100 else ""
        raise ValueError(f"Expected `{name}` to be {wanted}, but got {value!r}.{share}")


def check_integer(name: str, value: int, low: int = 1) -> None:
    """Raise unless `value` is an integer, `low` at least."""
    if not is_integer(value):
        raise TypeError(f"Expected `{name}` to be an integer, but got {_brief(value)}.")
    check_range(name, value, low)


def is_integer(value: object) -> bool:
    """Whether `value` is a Python, NumPy or symbolic integer; True and False are none."""
    return isinstance(value, (int, numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def check_pair(name: str, value: Any, form: str) -> None:
    """Raise unless `value` is a sequence of two numbers; `form` says which."""
    if not is_sequence(value) or len(value) != 2:
        raise ValueError(f"Expected `{name}` to be {form}, but got {_brief(value)}.")
    for end in value:
        check_range(name, end)


def check_size(name: str, size: Any) -> None:
    """Raise unless `size` is (height, width), both positive."""
    if not is_sequence(size) or len(size) != 2 or not all(is_integer(side) and side >= 1 for side in size):
        hint = ""
        if is_integer(size):
            hint = f" A square of that side is ({size}, {size})."
        elif isinstance(size, torch.Size):
            hint = " The last two of a shape are .shape[-2:]."
        raise ValueError(
            f"Expected `{name}` to be (height, width), two positive integers, but got {_brief(size)}.{hint}"
        )


def is_sequence(value: object) -> bool:
    """Whether `value` is a list, a tuple or like one; a string is not."""
    return isinstance(value, (tuple, list)) or (isinstance(value, Sequence) and not isinstance(value, str))


def check_callable(name: str, value: object, form: str) -> None:
    """Raise unless `value` can be called; `form` is how it is going to be."""
    if not callable(value):
        raise TypeError(f"Expected `{name}` to be callable as {form}, but got {kind_of(value)}.")


def check_tensor(name: str, x: object, what: str = "a tensor") -> None:
    """Raise unless `x` is a tensor; `what` is the kind that is wanted."""
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected `{name}` to be {what}, but got {kind_of(x)}.{_unwrap_hint(x)}")


def check_float(name: str, x: Tensor, ndim: int | None = None, form: str = "") -> None:
    """Raise unless `x` is floating point and, where asked, has `ndim` axes (`form` is their names, "(N, C, H, W)")."""
    check_tensor(name, x, "a float tensor")
    if not x.is_floating_point():
        hint = " Integers and masks become one by .float()."
        if ndim == 4 and x.ndim == 3:
            hint = " It looks like a label map: are two arguments swapped?"
        elif x.dtype == torch.uint8 and x.ndim == 4:
            hint = " Images of bytes become one by .float() / 255."
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(x)}.{hint}")
    if ndim is not None and x.ndim != ndim:
        hint = ""
        if form.startswith("(N") and x.ndim == ndim - 1:
            hint = " A single one becomes a batch by .unsqueeze(0)."
            if "D" in form:
                hint += " Tokens (N, L, D) become a map by .mT.unflatten(2, (h, w))."
        elif ndim == 3:
            hint = axis_hint(x)
        raise ValueError(
            f"Expected `{name}` to be {form or f'a tensor with {ndim} axes'}, but got {shape_of(x)}.{hint}"
        )


def check_labels_like(
    labels: Tensor, reference: Tensor, *, name: str = "labels", reference_name: str = "logits"
) -> None:
    """Raise unless `labels` is an int64 or uint8 (N, H, W) map over the pixels of `reference` (N, C, H, W)."""
    check_label_map(labels, name=name, reference=reference, reference_name=reference_name)
    hint = ""
    if "logits" in reference_name:
        hint = ' Bring logits to the size of the labels by F.interpolate(logits, labels.shape[1:], mode="bilinear").'
    elif "images" not in reference_name:
        hint = " Bring labels to the size of features by udakit.downscale_labels or udakit.resize_labels."
    _check_map(labels, reference, name, reference_name, hint)


def check_label_map(
    labels: Tensor, *, name: str = "labels", reference: Tensor | None = None, reference_name: str = "logits"
) -> None:
    """Raise unless `labels` is (N, H, W) int64 or uint8; its size is not compared."""
    check_tensor(name, labels, "an int64 or uint8 tensor")
    if labels.dtype not in (torch.int64, torch.uint8):
        hint = " Class ids become int64 by .long()."
        if labels.is_floating_point() and labels.ndim == 4 and labels.shape[1] != 1:
            hint = " It looks like logits or images: are two arguments swapped? Logits become labels by .argmax(1)."
        raise TypeError(f"Expected `{name}` to be an int64 or uint8 tensor, but got {kind_of(labels)}.{hint}")
    if labels.ndim != 3:
        matching = "" if reference is None else f" matching `{reference_name}` {shape_of(reference)}"
        raise ValueError(f"Expected `{name}` to be (N, H, W){matching}, but got {shape_of(labels)}.{axis_hint(labels)}")


def check_mask(mask: Tensor, *, name: str = "mask") -> None:
    """Raise unless `mask` is bool (N, H, W); its size is not compared."""
    _check_bool(mask, name)
    if mask.ndim != 3:
        raise ValueError(f"Expected `{name}` to be (N, H, W), but got {shape_of(mask)}.{axis_hint(mask)}")


def check_mask_like(mask: Tensor, reference: Tensor, *, name: str = "valid", reference_name: str = "logits") -> None:
    """Raise unless `mask` is a bool (N, H, W) map over the pixels of `reference` (N, C, H, W) or (N, H, W)."""
    _check_bool(mask, name)
    _check_map(
        mask, reference, name, reference_name, " F.interpolate(mask[:, None].float(), size)[:, 0] > 0.5 resizes."
    )


def check_weight_like(
    weight: Tensor, reference: Tensor, *, name: str = "pixel_weight", reference_name: str = "logits"
) -> None:
    """Raise unless `weight` is a float (N, H, W) map over the pixels of `reference`."""
    check_float(name, weight)
    _check_map(weight, reference, name, reference_name, " F.interpolate(weight[:, None], size)[:, 0] resizes.")


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
            if x.ndim == reference.ndim == 4 and x.shape[:2] == reference.shape[:2]:
                hint = " F.interpolate brings one to the size of the other."
        raise ValueError(
            f"Expected `{name}` to have the shape of `{reference_name}` {shape_of(reference)}, "
            f"but got {shape_of(x)}.{hint}"
        )
    check_device(name, x, reference, reference_name)


def check_device(name: str, x: Tensor, reference: Tensor, reference_name: str) -> None:
    """Raise unless both tensors are on one device."""
    if x.device != reference.device:
        raise ValueError(
            f"Expected `{name}` to be on the device of `{reference_name}` '{reference.device}', but got one on "
            f"'{x.device}'. Move it with .to('{reference.device}'); a Module moves its buffers likewise."
        )


def draw_device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device:
    """Where random numbers are drawn: on `device`, by default that of the generator, else the CPU."""
    if device is None:
        device = torch.device("cpu") if generator is None else generator.device
    device = torch.device(device)
    check_generator(generator, device)
    return device


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raise unless `generator` draws on `device` (an index-less "cuda" generator fits any card)."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Expected `generator` to be a torch.Generator or None, but got {kind_of(generator)}. "
            f"torch.Generator('{device}').manual_seed(seed) makes one of a seed."
        )
    own = generator.device
    if own.type != device.type or (own.index is not None and device.index is not None and own.index != device.index):
        raise ValueError(
            f"Expected `generator` to be on the input's device '{device}', but got one on '{own}'. "
            f"Make it with torch.Generator('{device}')."
        )


def net_logits(output: Any) -> Tensor:
    """Return the logits in a net's output: a tensor, an object or a dict that holds them, or a tuple's first tensor."""
    if isinstance(output, Tensor):
        return output
    entries = [getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        entries += [output.get("out"), output.get("logits")]
    elif isinstance(output, Sequence):
        entries += output
    for entry in entries:
        if isinstance(entry, Tensor):
            return entry
    raise TypeError(
        "Expected `model` to return logits (a tensor, an object with `.logits`, a dict with 'out' or 'logits', or a "
        f"tuple of tensors), but got {type(output).__name__}."
    )


def _check_bool(mask: Tensor, name: str) -> None:
    check_tensor(name, mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"Expected `{name}` to be a bool tensor, but got {kind_of(mask)}. "
            "A comparison makes one, for example weight > 0.5."
        )


def _check_map(x: Tensor, reference: Tensor, name: str, reference_name: str, size_hint: str = "") -> None:
    n, h, w = reference.shape[0], reference.shape[-2], reference.shape[-1]
    if x.ndim != 3 or x.shape[0] != n or x.shape[1] != h or x.shape[2] != w:
        hint = axis_hint(x)
        if x.ndim == 3 and x.shape[0] == n:
            hint = size_hint
        raise ValueError(
            f"Expected `{name}` to be (N, H, W) matching `{reference_name}` {shape_of(reference)}, "
            f"but got {shape_of(x)}.{hint}"
        )
    check_device(name, x, reference, reference_name)


def axis_hint(x: Tensor) -> str:
    """How a map with an axis too many or too few becomes (N, H, W)."""
    if x.ndim == 4 and x.shape[1] == 1:
        return " The channel axis goes by .squeeze(1)."
    if x.ndim == 4 and x.is_floating_point():
        return " Logits become a confidence by .softmax(1).amax(1)."
    return " A single one becomes a batch by .unsqueeze(0)." if x.ndim == 2 else ""


def _unwrap_hint(x: object) -> str:
    """How to get at the tensor in what was given instead of one."""
    if isinstance(x, np.ndarray | np.generic):
        return " An array becomes one by torch.as_tensor."
    if hasattr(x, "prototypes"):
        return " Pass its .prototypes."
    if isinstance(x, Mapping) or hasattr(x, "logits"):
        return ' Pass the tensor in it: net(images).logits or net(images)["out"] for the output of a net.'
    if isinstance(x, list | tuple):
        numbers_only = len(x) > 0 and all(isinstance(entry, int | float) for entry in x)
        return " Numbers become one by torch.tensor." if numbers_only else " Pass the tensor in it, for example [0]."
    return ""


def _brief(value: object) -> str:
    """A wrong option: as it is, unless it is large."""
    return repr(value) if is_sequence(value) else kind_of(value)
