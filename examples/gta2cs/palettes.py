"""Colours that are easy to tell apart, chosen in CIE Lab, where distances match what the eye sees."""

from __future__ import annotations

import numpy as np

WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
LEVELS = np.linspace(0, 255, 16)
LIGHTER = 20  # in CIE Lab's lightness, 0 to 100: what shows on a background


def lab(colours: np.ndarray) -> np.ndarray:
    """CIE Lab (K, 3) of sRGB colours (K, 3) in 0..255."""
    s = np.asarray(colours, float) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    t = linear @ TO_XYZ.T / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def far_apart(count: int, *, background: np.ndarray | None = None) -> np.ndarray:
    """Colours (count, 3) uint8, each as far as possible from the previous ones, from black (ignored) and from white.

    With a `background` they are also far from it, and clearly lighter: a saturated blue does not show on dark grey.
    """
    grid = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), axis=-1).reshape(-1, 3)
    where = lab(grid)
    distance = np.minimum(*(np.linalg.norm(where - lab(np.full((1, 3), v)), axis=1) for v in (0.0, 255.0)))
    if background is not None:
        behind = lab(background[None])
        distance = np.minimum(distance, np.linalg.norm(where - behind, axis=1))
        distance[where[:, 0] < behind[0, 0] + LIGHTER] = 0
    chosen = []
    for _ in range(count):
        best = int(distance.argmax())
        chosen.append(grid[best])
        distance = np.minimum(distance, np.linalg.norm(where - where[best], axis=1))
    return np.array(chosen).round().astype(np.uint8).reshape(-1, 3)


def on_white(colour: np.ndarray, lightest: float = 75.0) -> np.ndarray:
    """The colour, darkened until a thin line is visible on a white page."""
    colour = np.asarray(colour, float)
    while lab(colour[None])[0, 0] > lightest:
        colour = 0.95 * colour
    return colour.round().astype(np.uint8)
