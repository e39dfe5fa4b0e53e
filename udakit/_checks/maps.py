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
            hint = " Convert integers and masks with .float()."
            if x.ndim == 3:
                hint = " It looks like a label map: are two arguments swapped?"
            elif x.dtype == torch.uint8:
                hint = " Convert byte images with .float() / 255."
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(x)}.{hint}")
    if not 3 <= x.ndim <= 5:
        form = f"{space_form(first, None)} with one to three spatial axes, such as {space_form(first, 2)}"
        raise ValueError(f"Expected `{name}` to be {form}, but got {shape_of(x)}.")


def check_scores(name: str, x: Tensor, kind: str = "logits") -> None:
    """Raise unless `x` is a float map (N, C, *space) of at least two classes: logits or probabilities, see `kind`."""
    check_maps(name, x)
    if x.shape[1] < 2:
        one = "logit" if kind == "logits" else "probability"
        raise ValueError(
            f"Expected `{name}` to be {space_form('N, C', x.ndim - 2)} with C of at least 2, but got {shape_of(x)}. "
            f"Use udakit.binary_{kind} to turn one {one} per pixel into two classes."
        )


def check_two_dimensional(name: str, x: Tensor, what: str, first: str = "N, C", *, hint: str = "") -> None:
    """Raise unless a map that has been checked has two spatial axes; `what` is the two-dimensional operation."""
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
        hint = f" Resize logits to the size of the labels with F.interpolate({reference_name}, {name}.shape[1:], ...)."
    elif "images" not in reference_name:
        hint = " Resize labels to the size of features with udakit.downscale_labels or udakit.resize_labels."
    else:
        hint = " Resize labels with udakit.resize_labels; for pseudo-labels, upsample the logits before selecting."
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

    The reference is (N, C, *space), or (N, *space) with `channels=False`; `channels=None` accepts both.
    """
    _check_bool(mask, name)
    hint = " Resize masks with F.interpolate(mask[:, None].float(), size)[:, 0] > 0.5."
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
        hint = f" Convert integers and masks with .float().{_channel_hint(weight)}"
        raise TypeError(f"Expected `{name}` to be a float tensor, but got {kind_of(weight)}.{hint}")
    hint = " Resize weights with F.interpolate(weight[:, None], size)[:, 0]."
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
    """How to turn a map with one axis too many or too few into (N, *space)."""
    if x.ndim > 2 and x.shape[1] == 1:
        return _channel_hint(x)
    if x.ndim > 3 and x.is_floating_point():
        return " Turn logits into a confidence with .softmax(1).amax(1)."
    return " If it is a single item, add the batch axis with .unsqueeze(0)." if x.ndim in (1, 2) else ""


def _check_bool(mask: Tensor, name: str) -> None:
    check_tensor(name, mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"Expected `{name}` to be a bool tensor, but got {kind_of(mask)}. "
            f"A comparison gives one, for example weight > 0.5.{_channel_hint(mask)}"
        )


def _check_label_dtype(labels: Tensor, name: str) -> None:
    check_tensor(name, labels, "an int64 or uint8 tensor")
    if labels.dtype not in (torch.int64, torch.uint8):
        hint = f" Convert class ids to int64 with .long().{_channel_hint(labels)}"
        if labels.is_floating_point() and labels.ndim >= 4 and labels.shape[1] != 1:
            hint = (
                " It looks like logits or images: are two arguments swapped? Turn logits into labels with .argmax(1)."
            )
        raise TypeError(f"Expected `{name}` to be an int64 or uint8 tensor, but got {kind_of(labels)}.{hint}")


def _channel_hint(x: Tensor) -> str:
    return " Remove the channel axis with .squeeze(1)." if x.ndim >= 3 and x.shape[1] == 1 else ""


def _check_map(
    x: Tensor,
    reference: Tensor,
    name: str,
    reference_name: str,
    size_hint: str = "",
    channels: bool | None = True,
) -> None:
    if channels is None:
        # A map with a channel axis of its own, (N, 1, H, W) for images (N, K, H, W), is not a map of a volume.
        channels = reference.ndim != x.ndim or (reference.ndim > 2 and x.shape[1] == 1 != reference.shape[1])
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
        return f" The channels of `{reference_name}` are last: move them to axis 1 with .movedim(-1, 1)."
    if channels and x.shape == reference.shape:
        if x.is_floating_point() and reference.ndim > 3:
            return (
                " If it holds a value for each class, take one per pixel, as .softmax(1).amax(1) does. If "
                f"`{reference_name}` lacks its channel axis, add it with .unsqueeze(1)."
            )
        one = (
            " and turn one logit per pixel into two classes with udakit.binary_logits"
            if "logits" in reference_name
            else ""
        )
        if reference.ndim > 3:
            return (
                " If it is one-hot, take the ids with .argmax(1). If "
                f"`{reference_name}` lacks its channel axis, add it with .unsqueeze(1){one}."
            )
        return f" Add the channel axis of `{reference_name}` with .unsqueeze(1){one}."
    if (channels and x.ndim < 5 and x.shape[1:] == reference.shape[1:]) or x.shape == reference.shape[1:]:
        return f" If `{reference_name}` is of a single image, add the batch axis with .unsqueeze(0)."
    if x.ndim == len(shape) and x.shape[0] == shape[0]:
        return size_hint
    if x.ndim == len(shape) - 1:
        return " If it is a single item, add the batch axis with .unsqueeze(0)."
    return axis_hint(x) if x.ndim > len(shape) else ""
