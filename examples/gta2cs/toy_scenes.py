"""Sets of toy scenes, which are drawn on first use and then kept in memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from gta2cs.samples import Labelled, Remembered, Size, Unlabelled


class Scenes:
    """Draws toy scenes and remembers the last one, because its label is usually needed right after its image."""

    def __init__(self, domain: str, first: int, size: Size) -> None:
        self.domain, self.first, self.size = domain, first, size
        self.last: tuple[int, np.ndarray, np.ndarray] | None = None

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image and label of a scene."""
        from gta2cs.toy import render

        if self.last is None or self.last[0] != index:
            self.last = (index, *render(self.domain, self.first + index, self.size))  # type: ignore[arg-type]
        return self.last[1], self.last[2]


def labelled_scenes(domain: str, first: int, count: int, size: Size) -> Labelled:
    """Return `count` scenes of a domain, from number `first` on, with labels."""
    scenes = Scenes(domain, first, size)
    images = Remembered(count, partial(_image, scenes), cache=True)
    return Labelled(_names(domain, first, count), images, Remembered(count, partial(_label, scenes), cache=True))


def unlabelled_scenes(domain: str, first: int, count: int, size: Size) -> Unlabelled:
    """Return the same scenes without labels. They are drawn again: nothing is shared with a set that has labels."""
    images = Remembered(count, partial(_image, Scenes(domain, first, size)), cache=True)
    return Unlabelled(_names(domain, first, count), images)


def _names(domain: str, first: int, count: int) -> list[str]:
    return [f"{domain}_{first + i:06d}" for i in range(count)]


def _image(scenes: Scenes, index: int) -> Tensor:
    return torch.from_numpy(scenes.draw(index)[0]).permute(2, 0, 1).contiguous()


def _label(scenes: Scenes, index: int) -> Tensor:
    return torch.from_numpy(scenes.draw(index)[1])
