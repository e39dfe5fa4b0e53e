"""Checks of devices and of the generators that draw on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from udakit._checks.form import kind_of


def check_device(name: str, x: Tensor, reference: Tensor, reference_name: str) -> None:
    """Raise unless both tensors are on one device."""
    if x.device != reference.device:
        raise ValueError(
            f"Expected `{name}` to be on the device of `{reference_name}` '{reference.device}', but got one on "
            f"'{x.device}'. Move it with .to('{reference.device}'); .to also moves the buffers of a Module."
        )


def as_device(device: object) -> torch.device:
    """The device that an option names; raise if it does not name one."""
    try:
        if isinstance(device, (str, int, torch.device)) and not isinstance(device, bool):
            return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Expected `device` to be a device such as 'cpu' or 'cuda:0', but got {device!r}.") from error
    raise TypeError(f"Expected `device` to be a torch.device or its name, but got {kind_of(device)}.")


def draw_device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device:
    """The device to draw random numbers on: `device`, or else the generator's, or else the CPU."""
    device = torch.device(getattr(generator, "device", "cpu")) if device is None else as_device(device)
    check_generator(generator, device)
    return device


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raise unless `generator` draws on `device` (a "cuda" generator without an index fits any GPU)."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Expected `generator` to be a torch.Generator or None, but got {kind_of(generator)}. "
            f"Make one with torch.Generator('{device}').manual_seed(seed)."
        )
    own = generator.device
    if own.type != device.type or (own.index is not None and device.index is not None and own.index != device.index):
        raise ValueError(
            f"Expected `generator` to be on the input's device '{device}', but got one on '{own}'. "
            f"Make it with torch.Generator('{device}')."
        )


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """The keyword of torch's draws, or none: compiled with dynamic=True, they fail at `generator=None`."""
    return {} if generator is None else {"generator": generator}
