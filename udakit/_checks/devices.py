"""Checks of devices and of the generators that draw on them."""

from __future__ import annotations

import torch
from torch import Tensor

from udakit._checks.form import kind_of


def check_device(name: str, x: Tensor, reference: Tensor, reference_name: str) -> None:
    """Raise unless both tensors are on one device."""
    if x.device != reference.device:
        raise ValueError(
            f"Expected `{name}` to be on the device of `{reference_name}` '{reference.device}', but got one on "
            f"'{x.device}'. Move it with .to('{reference.device}'); a Module moves its buffers likewise."
        )


def as_device(device: object) -> torch.device:
    """The device that an option names; raise where it names none."""
    try:
        if isinstance(device, (str, int, torch.device)) and not isinstance(device, bool):
            return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Expected `device` to be a device such as 'cpu' or 'cuda:0', but got {device!r}.") from error
    raise TypeError(f"Expected `device` to be a torch.device or its name, but got {kind_of(device)}.")


def draw_device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device:
    """Where random numbers are drawn: on `device`, by default that of the generator, else the CPU."""
    if device is None:
        device = torch.device("cpu") if generator is None else generator.device
    device = as_device(device)
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
