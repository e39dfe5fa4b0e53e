"""BatchNorm that uses the statistics of a batch without recording them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
