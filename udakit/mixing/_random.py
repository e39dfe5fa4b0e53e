"""Random numbers from a single generator, or from one generator for each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from udakit._checks import check_generator, draw_device, drawn_by, is_sequence

Generators = torch.Generator | Sequence[torch.Generator]


def check_generators(generator: Generators | None, n: int, device: torch.device) -> None:
    """Raise unless `generator` is one that draws on `device`, or a sequence of n of them."""
    if not is_sequence(generator):
        check_generator(generator, device)  # type: ignore[arg-type]
        return
    assert isinstance(generator, Sequence)
    if len(generator) != n:
        raise ValueError(
            f"Expected `generator` to be one generator or a list of {n}, one for each image, but got {len(generator)}."
        )
    for one in generator:
        check_generator(one, device)


def device_of_draw(generator: Generators | None, n: int, device: torch.device | str | None) -> torch.device:
    """The device to draw random numbers on: `device`, or else the generator's, or else the CPU."""
    if not is_sequence(generator):
        return draw_device(generator, device)  # type: ignore[arg-type]
    assert isinstance(generator, Sequence)
    first = generator[0] if len(generator) else None
    found = draw_device(first, device)
    check_generators(generator, n, found)
    return found


def uniform(shape: Sequence[int], generator: Generators | None, device: torch.device, *, axis: int = 0) -> Tensor:
    """Float32 numbers in [0, 1). With several generators, each fills its entry of `axis`."""
    if isinstance(generator, torch.Generator) or not generator:
        one = generator if isinstance(generator, torch.Generator) else None
        return torch.rand(tuple(shape), **drawn_by(one), device=device, dtype=torch.float32)
    shape = tuple(1 if i == axis else length for i, length in enumerate(shape))
    drawn = [torch.rand(shape, generator=g, device=device, dtype=torch.float32) for g in generator]
    return torch.cat(drawn, dim=axis)
