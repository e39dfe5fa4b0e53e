"""BatchNorm that uses the statistics of a batch without recording them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit.teachers.unwrap import unwrap_model

__all__ = ["keep_statistics"]


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which BatchNorm in training mode uses the statistics of the batch but does not record them.

    Use it for passes over images that should not change the running statistics, for example mixed ones. `EMATeacher`
    does the same in its own passes.

    Args:
        model: a net, wrapped or not.

    Example:
        >>> import torch
        >>> student = nn.BatchNorm2d(3)
        >>> with keep_statistics(student):
        ...     student(torch.rand(2, 3, 4, 4)).sum().backward()
        >>> student.running_mean, int(student.num_batches_tracked)
        (tensor([0., 0., 0.]), 0)
    """
    norms = recording(unwrap_model(model))
    try:
        set_recording(norms, False)
        yield
    finally:
        set_recording(norms, True)


class Blending:
    """Pre-hook of BatchNorm layers in evaluation mode: they normalise with a share of the batch's statistics as well.

    It rescales the input so that the running statistics, applied to it, come to what the blended ones come to. So it
    holds for every kind of layer, whatever the layer does after normalising, and changes no buffer.
    """

    def __init__(self, running_share: float) -> None:
        self.running_share = running_share
        self.on = False

    def register(self, norms: Iterable[_BatchNorm]) -> None:
        """Hook into layers that do not have it yet."""
        for norm in norms:
            if not any(hook is self for hook in norm._forward_pre_hooks.values()):
                norm.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The rescaled input of a layer; the layer itself refuses one of another shape."""
        if not self.on or norm.running_mean is None or norm.running_var is None:
            return None
        x, *rest = (*args, *kwargs.values())  # its name differs between layers
        if x.ndim < 2 or x.shape[1] != norm.running_mean.numel() or x.numel() == 0:
            return None
        own = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        shape = [1, -1, *[1] * (x.ndim - 2)]
        mean, var = norm.running_mean.to(own.dtype).view(shape), norm.running_var.to(own.dtype).view(shape)
        batch_var, batch_mean = torch.var_mean(own, [0, *range(2, x.ndim)], correction=0, keepdim=True)
        center = batch_mean.lerp(mean, self.running_share)
        spread = batch_var.lerp(var, self.running_share)
        scale = ((var + norm.eps) / (spread + norm.eps)).sqrt()
        rescaled = torch.addcmul(mean - center * scale, own, scale).to(x.dtype)
        by_place = (rescaled, *rest)[: len(args)]
        return by_place, dict(zip(kwargs, (rescaled, *rest)[len(args) :], strict=True))


class Emptied:
    """Replacement for `reset_running_stats` of a layer that also tells whether the layer is still empty.

    It looks at the version of the layer's counter, which every batch increases. Reading the counter would make a GPU
    wait.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.version: int | None = None

    def __call__(self) -> None:
        type(self.norm).reset_running_stats(self.norm)
        self.version = self._now()

    @property
    def still(self) -> bool:
        """Whether the layer was reset and has recorded nothing since."""
        return self.version is not None and self.version == self._now()

    def _now(self) -> int | None:
        counter = self.norm.num_batches_tracked
        return None if counter is None or counter.is_inference() else counter._version


def recording(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that record statistics in training mode."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def set_recording(norms: Iterable[_BatchNorm], on: bool) -> None:
    """Turn the recording of statistics on or off in BatchNorm layers."""
    for norm in norms:
        norm.track_running_stats = on
