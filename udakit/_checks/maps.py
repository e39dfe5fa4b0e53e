"""Checks of maps of pixels: (N, C, *space) and (N, *space) with one, two or three spatial axes."""

from __future__ import annotations

import torch
from torch import Tensor

from udakit._checks.devices import check_device
from udakit._checks.form import kind_of, shape_of, space_form
from udakit._checks.tensors import check_float, check_tensor


def check_maps(name: str, x: Tensor, first: str = "N, C", *, hint: str = "") -> None:
    """Raise unless `x` is a float map (N, C, *space) with one to three spatial axes; `first` names the other two."""
    check_tensor(name, x, "a float tensor")
    if not x.is_floating_point():
        if not hint:
            hint = " Integers and masks become one by .float()."
            if x.ndim == 3:
                hint = " It looks like a label map: are two arguments swapped?"
            elif x.dtype == torch.uint8:
                hint = " Images of bytes become one by .float() / 255."
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(x)}.{hint}")
    if not 3 <= x.ndim <= 5:
        form = f"{space_form(first, None)} with one to three spatial axes, such as {space_form(first, 2)}"
        raise ValueError(f"Expected `{name}` to be {form}, but got {shape_of(x)}.")


def check_scores(name: str, x: Tensor, kind: str = "logits") -> None:
    """Raise unless `x` is a float map (N, C, *space) of two classes at least: logits, or probabilities by `kind`."""
    check_maps(name, x)
    if x.shape[1] < 2:
        one = "logit" if kind == "logits" else "probability"
        raise ValueError(
            f"Expected `{name}` to be {space_form('N, C', x.ndim - 2)} with C of 2 at least, but got {shape_of(x)}. "
            f"One {one} a pixel becomes two classes by udakit.binary_{kind}."
        )


def check_two_dimensional(name: str, x: Tensor, what: str, first: str = "N, C", *, hint: str = "") -> None:
    """Raise unless a map, checked already, has two spatial axes; `what` is two-dimensional by nature."""
    axes = len(first.split(","))
    if x.ndim != axes + 2:
        raise ValueError(
            f"Expected `{name}` to be {space_form(first, 2)}, since {what} is two-dimensional, but got {shape_of(x)}."
            f"{hint}"
        )


def check_labels_like(
    labels: Tensor, reference: Tensor, *, name: str = "labels", reference_name: str = "logits"
) -> None:
    """Raise unless `labels` is an int64 or uint8 (N, *space) map over the pixels of `reference` (N, C, *space)."""
    _check_label_dtype(labels, name)
    hint = ""
    if "logits" in reference_name:
        hint = f" Bring logits to the size of the labels by F.interpolate({reference_name}, {name}.shape[1:], ...)."
    elif "images" not in reference_name:
        hint = " Bring labels to the size of features by udakit.downscale_labels or udakit.resize_labels."
    else:
        hint = " Labels change size by udakit.resize_labels; for pseudo-labels, upsample the logits before selecting."
    _check_map(labels, reference, name, reference_name, hint)


def check_label_map(
    labels: Tensor, *, name: str = "labels", reference: Tensor | None = None, reference_name: str = "logits"
) -> None:
    """Raise unless `labels` is (N, *space) int64 or uint8; its size is not compared, its number of axes is."""
    _check_label_dtype(labels, name)
    check_spatial(name, labels)
    if reference is not None and labels.ndim != reference.ndim - 1:
        matching = f"{space_form('N', reference.ndim - 2)} matching `{reference_name}` {shape_of(reference)}"
        raise ValueError(f"Expected `{name}` to be {matching}, but got {shape_of(labels)}.{axis_hint(labels)}")


def check_mask(mask: Tensor, *, name: str = "mask") -> None:
    """Raise unless `mask` is bool (N, *space); its size is not compared."""
    _check_bool(mask, name)
    check_spatial(name, mask)


def check_mask_like(
    mask: Tensor,
    reference: Tensor,
    *,
    name: str = "valid",
    reference_name: str = "logits",
    channels: bool | None = True,
) -> None:
    """Raise unless `mask` is a bool (N, *space) map over the pixels of `reference`.

    The reference is (N, C, *space), or (N, *space) with `channels=False`; None takes either.
    """
    _check_bool(mask, name)
    hint = " F.interpolate(mask[:, None].float(), size)[:, 0] > 0.5 resizes."
    _check_map(mask, reference, name, reference_name, hint, channels)


def check_weight_like(
    weight: Tensor,
    reference: Tensor,
    *,
    name: str = "pixel_weight",
    reference_name: str = "logits",
    channels: bool | None = True,
) -> None:
    """Raise unless `weight` is a float (N, *space) map over the pixels of `reference`, as for `check_mask_like`."""
    check_tensor(name, weight, "a float tensor")
    if not weight.is_floating_point():
        hint = f" Integers and masks become one by .float().{_channel_hint(weight)}"
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(weight)}.{hint}")
    hint = " F.interpolate(weight[:, None], size)[:, 0] resizes."
    _check_map(weight, reference, name, reference_name, hint, channels)


def check_confidence(name: str, x: Tensor) -> None:
    """Raise unless `x` is a float map (N, *space), such as a confidence."""
    check_float(name, x)
    check_spatial(name, x)  # logits (N, C, H, W) cannot be told from the confidence (N, D, H, W) of a volume


def check_spatial(name: str, x: Tensor) -> None:
    """Raise unless a map without channels is (N, *space), with one to three spatial axes."""
    if not 2 <= x.ndim <= 4:
        form = f"{space_form('N', None)} with one to three spatial axes, such as {space_form('N', 2)}"
        raise ValueError(f"Expected `{name}` to be {form}, but got {shape_of(x)}.{axis_hint(x)}")


def axis_hint(x: Tensor) -> str:
    """How a map with an axis too many or too few becomes (N, *space)."""
    if x.ndim > 2 and x.shape[1] == 1:
        return _channel_hint(x)
    if x.ndim > 3 and x.is_floating_point():
        return " Logits become a confidence by .softmax(1).amax(1)."
    return " A single one becomes a batch by .unsqueeze(0)." if x.ndim in (1, 2) else ""


def _check_bool(mask: Tensor, name: str) -> None:
    check_tensor(name, mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"Expected `{name}` to be a bool tensor, but got {kind_of(mask)}. "
            f"A comparison makes one, for example weight > 0.5.{_channel_hint(mask)}"
        )


def _check_label_dtype(labels: Tensor, name: str) -> None:
    check_tensor(name, labels, "an int64 or uint8 tensor")
    if labels.dtype not in (torch.int64, torch.uint8):
        hint = f" Class ids become int64 by .long().{_channel_hint(labels)}"
        if labels.is_floating_point() and labels.ndim >= 4 and labels.shape[1] != 1:
            hint = " It looks like logits or images: are two arguments swapped? Logits become labels by .argmax(1)."
        raise TypeError(f"Expected `{name}` to be an int64 or uint8 tensor, but got {kind_of(labels)}.{hint}")


def _channel_hint(x: Tensor) -> str:
    return " The channel axis goes by .squeeze(1)." if x.ndim >= 3 and x.shape[1] == 1 else ""


def _check_map(
    x: Tensor,
    reference: Tensor,
    name: str,
    reference_name: str,
    size_hint: str = "",
    channels: bool | None = True,
) -> None:
    if channels is None:
        channels = reference.ndim != x.ndim
    shape = (reference.shape[0], *reference.shape[2 if channels else 1 :])
    if x.shape != shape:
        matching = f"{space_form('N', len(shape) - 1)} matching `{reference_name}` {shape_of(reference)}"
        hint = _map_hint(x, reference, shape, reference_name, size_hint, channels)
        raise ValueError(f"Expected `{name}` to be {matching}, but got {shape_of(x)}.{hint}")
    check_device(name, x, reference, reference_name)


def _map_hint(
    x: Tensor, reference: Tensor, shape: tuple[int, ...], reference_name: str, size_hint: str, channels: bool
) -> str:
    if channels and x.ndim == reference.ndim - 1 and x.shape == reference.shape[:-1]:
        return f" `{reference_name}` has its channels last: .movedim(-1, 1) brings them to axis 1."
    if channels and x.shape == reference.shape:
        one = " and udakit.binary_logits makes two classes of them" if "logits" in reference_name else ""
        return f" The channel axis of `{reference_name}` comes by .unsqueeze(1){one}."
    if (channels and x.ndim < 5 and x.shape[1:] == reference.shape[1:]) or x.shape == reference.shape[1:]:
        return f" One image's `{reference_name}` becomes a batch by .unsqueeze(0)."
    if x.ndim == len(shape) and x.shape[0] == shape[0]:
        return size_hint
    if x.ndim == len(shape) - 1:
        return " A single one becomes a batch by .unsqueeze(0)."
    return axis_hint(x) if x.ndim > len(shape) else ""
