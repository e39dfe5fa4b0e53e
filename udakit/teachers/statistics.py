"""BatchNorm that works with the statistics of a batch and does not record them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit.teachers.unwrap import unwrap_model

__all__ = ["keep_statistics"]


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block, BatchNorm in training mode uses the batch's own statistics as ever, and does not record them.

    For passes over images whose statistics the net should not remember, mixed ones for example. `EMATeacher` does the
    same in its own passes.

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
    """The `reset_running_stats` of a layer, which tells whether the layer is empty still.

    By the version of its counter, which every batch raises: reading the counter would make a GPU wait.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.version: int | None = None

    def __call__(self) -> None:
        type(self.norm).reset_running_stats(self.norm)
        self.version = self._now()

    @property
    def still(self) -> bool:
        """Whether it was emptied, and has recorded nothing since."""
        return self.version is not None and self.version == self._now()

    def _now(self) -> int | None:
        counter = self.norm.num_batches_tracked
        return None if counter is None or counter.is_inference() else counter._version


def recording(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers that record statistics when they are trained."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def set_recording(norms: Iterable[_BatchNorm], on: bool) -> None:
    """Let BatchNorm layers record statistics or not."""
    for norm in norms:
        norm.track_running_stats = on
