"""Argument checks: one message form, static facts only (shapes, dtypes, devices, options), never a tensor's values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shape_of(x: Tensor) -> str:
    """A shape as a user writes it: `(2, 19, 64, 64)`."""
    return f"({', '.join(str(s) for s in x.shape)}{',' if x.ndim == 1 else ''})"


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
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"Expected `{name}` to be in {interval}, but got {value!r}.")


def check_float(name: str, x: Tensor, ndim: int | None = None, form: str = "") -> None:
    """Raise unless `x` is floating point and, where asked, has `ndim` axes (`form` is their names, "(N, C, H, W)")."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {_kind(x)}.")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"Expected `{name}` to be {form or f'a tensor with {ndim} axes'}, but got {shape_of(x)}.")


def check_labels_like(
    labels: Tensor, reference: Tensor, *, name: str = "labels", reference_name: str = "logits"
) -> None:
    """Raise unless `labels` is an int64 or uint8 (N, H, W) map over the pixels of `reference` (N, C, H, W)."""
    check_label_map(labels, name=name, reference=reference, reference_name=reference_name)
    _check_map(labels, reference, name, reference_name)


def check_label_map(
    labels: Tensor, *, name: str = "labels", reference: Tensor | None = None, reference_name: str = "logits"
) -> None:
    """Raise unless `labels` is (N, H, W) int64 or uint8; its size is not compared."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"Expected `{name}` to be an int64 or uint8 tensor, but got {_kind(labels)}.")
    if labels.ndim != 3:
        matching = "" if reference is None else f" matching `{reference_name}` {shape_of(reference)}"
        raise ValueError(f"Expected `{name}` to be (N, H, W){matching}, but got {shape_of(labels)}.")


def check_mask_like(mask: Tensor, reference: Tensor, *, name: str = "valid", reference_name: str = "logits") -> None:
    """Raise unless `mask` is a bool (N, H, W) map over the pixels of `reference` (N, C, H, W) or (N, H, W)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"Expected `{name}` to be a bool tensor, but got {_kind(mask)}.")
    _check_map(mask, reference, name, reference_name)


def check_weight_like(
    weight: Tensor, reference: Tensor, *, name: str = "pixel_weight", reference_name: str = "logits"
) -> None:
    """Raise unless `weight` is a float (N, H, W) map over the pixels of `reference`."""
    check_float(name, weight)
    _check_map(weight, reference, name, reference_name)


def check_same_shape(x: Tensor, reference: Tensor, *, name: str, reference_name: str) -> None:
    """Raise unless both tensors have one shape."""
    if x.shape != reference.shape:
        raise ValueError(
            f"Expected `{name}` to have the shape of `{reference_name}` {shape_of(reference)}, but got {shape_of(x)}."
        )


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raise unless `generator` draws on `device` (an index-less "cuda" generator fits any card)."""
    if generator is None:
        return
    own = generator.device
    if own.type != device.type or (own.index is not None and device.index is not None and own.index != device.index):
        raise ValueError(
            f"Expected `generator` to be on the input's device '{device}', but got one on '{own}'. "
            f"Make it with torch.Generator('{device}')."
        )


def _check_map(x: Tensor, reference: Tensor, name: str, reference_name: str) -> None:
    n, h, w = reference.shape[0], reference.shape[-2], reference.shape[-1]
    if x.ndim != 3 or x.shape[0] != n or x.shape[1] != h or x.shape[2] != w:
        raise ValueError(
            f"Expected `{name}` to be (N, H, W) matching `{reference_name}` {shape_of(reference)}, "
            f"but got {shape_of(x)}."
        )


def _kind(x: object) -> str:
    return f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
