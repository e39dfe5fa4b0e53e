"""Checks of images (N, K, *space) and their channel statistics, and an optional check of their values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_device, check_maps, check_range, is_sequence, kind_of, shape_of, warn_user
from udakit._reduce import is_run_on_cpu

Channels = Sequence[float] | Tensor
BLOCK = 2**18  # elements processed at once on the CPU, so that intermediate values stay in its cache
_NUMBERS = {1: "one number", 2: "two numbers", 3: "three numbers", 4: "four numbers"}


def check_image_batch(name: str, images: Tensor) -> None:
    """Raise unless `images` is float (N, K, *space), with one to three spatial axes."""
    check_maps(name, images, "N, K")
    if images.ndim == 4 and images.shape[3] == 3 and images.shape[1] >= 8:
        raise ValueError(
            f"Expected `{name}` to be (N, K, H, W), but got {shape_of(images)}. "
            "Move the channels to axis 1 with .permute(0, 3, 1, 2)."
        )
    single = images.ndim == 3 and images.shape[0] in (1, 3) and min(images.shape[1:]) >= 64
    if single and not torch.compiler.is_compiling():
        _warn_of_a_single_image(name, shape_of(images))


@cache
def _warn_of_a_single_image(name: str, shape: str) -> None:
    warn_user(
        f"`{name}` is {shape}, which is treated as a batch of signals (N, K, L). If it is a single image, add the "
        "batch axis with .unsqueeze(0). (This warning is shown once for each shape.)"
    )


def check_rgb(name: str, images: Tensor, what: str) -> None:
    """Raise unless `images` is float (N, 3, H, W), as `what` requires."""
    check_image_batch(name, images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Expected `{name}` to be (N, 3, H, W), but got {shape_of(images)}. "
            f"{what} works on colour images: two-dimensional, with three channels."
        )


def check_statistics(mean: Channels | None, std: Channels | None, images: Tensor | None = None) -> None:
    """Raise unless `mean` and `std` are None or one number for each channel of `images`; `std` must be positive."""
    channels = None if images is None else images.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        wanted = "numbers" if channels is None else _NUMBERS.get(channels, f"{channels} numbers")
        own = ", like `mean`" if name == "std" and images is None and channels is not None else ""
        wanted = f"Expected `{name}` to be {wanted}, one for each channel{own}"
        if isinstance(values, Tensor):
            if values.ndim != 1 or len(values) != (channels or len(values)):
                flat = values.ndim > 1 and values.numel() == (channels or values.shape.numel())
                hint = " Make it one-dimensional with .flatten()." if flat else ""
                raise ValueError(f"{wanted}, but got {shape_of(values)}.{hint or _batch_hint(len(values), images)}")
            if images is not None:
                check_device(name, values, images, "images")
        elif isinstance(values, str) or not hasattr(values, "__len__") or len(values) != (channels or len(values)):
            given = tuple(values) if is_sequence(values) else kind_of(values)
            hint = _batch_hint(len(values), images) if hasattr(values, "__len__") else ""
            raise ValueError(f"{wanted}, but got {given}.{hint}")
        else:
            for value in values:
                check_range(name, value, 0.0 if name == "std" else float("-inf"), open_low=name == "std")
        channels = len(values)


def _batch_hint(count: int, images: Tensor | None) -> str:
    """A hint for a single image, which looks like a batch of signals: (3, H, W) has H channels."""
    if images is not None and images.ndim == 3 and len(images) == count:
        return f" `images` is {shape_of(images)}: if it is a single image, add the batch axis with .unsqueeze(0)."
    return ""


def per_channel(values: Channels, like: Tensor) -> Tensor:
    """K numbers as (1, K, 1, ...) on the device of `like`; Python numbers are filled in there."""
    if not isinstance(values, Tensor):
        values = torch.stack([torch.full((), float(v), dtype=like.dtype, device=like.device) for v in values])
    return values.to(like.dtype).view(1, -1, *(1,) * (like.ndim - 2))


def row_blocks(x: Tensor, block: int = BLOCK) -> Sequence[Tensor]:
    """Stripes along the first spatial axis on the CPU; a GPU and a compiler take the whole image."""
    if not is_run_on_cpu(x) or x.numel() <= block:
        return (x,)
    return torch.split(x, max(block * x.shape[2] // x.numel(), 1), dim=2)


def join(blocks: Sequence[Tensor]) -> Tensor:
    """Join stripes to an image again."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=2)


def restore(result: Tensor, images: Tensor) -> Tensor:
    """Give `result` the dtype and the memory format of `images`."""
    memory_format = torch.contiguous_format
    if not images.is_contiguous() and images.ndim in (4, 5):
        last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        memory_format = last if images.is_contiguous(memory_format=last) else memory_format
    return result.to(images.dtype).contiguous(memory_format=memory_format)


def check_images(
    images: Float[Tensor, "n k *space"],
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    tolerance: float = 0.01,
    name: str = "images",
) -> None:
    r"""Raise if images are not in [0, 1] after denormalising by `mean` and `std`: $0 \le x \sigma + \mu \le 1$.

    `strong_augment` and `color_transfer` clamp images to [0, 1] silently. Images in 0..255, or normalised images
    without their `mean` and `std`, come out white, black or in primary colours. This check finds such images.

    **Convention.** This function reads values, so it waits for the GPU. Call it on the first batch of a loader, not in
    every step.

    Args:
        images: images, (N, K, *space).
        mean: channel means that the images were normalised with; None if they were not shifted.
        std: channel standard deviations that the images were normalised with; None if they were not scaled.
        tolerance: how far a value may be outside [0, 1], for example after bicubic resizing.
        name: name of the images in the message, for example a file name.

    Raises:
        TypeError: `images` is not a float tensor.
        ValueError: a value is outside [0, 1] after denormalising, or is NaN.

    Example:
        >>> import torch
        >>> check_images(torch.rand(2, 3, 4, 4))
        >>> check_images(torch.linspace(0, 255, 48).view(1, 3, 4, 4))
        Traceback (most recent call last):
        ValueError: Expected `images` to be in [0, 1], but got 0..255. Convert byte images with .float() / 255.
    """
    check_range("tolerance", tolerance, 0.0)
    check_image_batch(name, images)
    check_statistics(mean, std, images)
    if images.numel() == 0:
        return
    x = images.detach().double()
    x = x if std is None else x * per_channel(std, x)
    x = x if mean is None else x + per_channel(mean, x)
    # This check reads values by design. It is meant for the first batch of a loader, not for each step.
    low, high = x.amin().item(), x.amax().item()
    if low >= -tolerance and high <= 1 + tolerance:
        return
    given = mean is not None or std is not None
    if low != low or high != high:
        hint = " They contain NaN."
    elif given:
        hint = " Are `mean` and `std` those that the images were normalised with?"
    elif low >= 0 and 2 < high <= 255:
        hint = " Convert byte images with .float() / 255."
    else:
        hint = " If they are normalised, pass the `mean` and `std` that were used."
    wanted = "in [0, 1] after denormalising by `mean` and `std`" if given else "in [0, 1]"
    raise ValueError(f"Expected `{name}` to be {wanted}, but got {low:.4g}..{high:.4g}.{hint}")
