"""The built-in toy pair: street scenes of a clean "game" and of a hazy, textured "camera" world, drawn on the fly.

`render(domain, seed, size)` draws one labelled image in three steps:

1. `lay_out` (`toy_street.py`) furnishes a street (metres; x right, y up, z ahead) and paints it, far things first, into
   a *part map*: one integer per pixel that says which polygon is seen there.
2. `shade` turns the part map into colours. It finds the point of the world behind every pixel, so that bricks, paving
   and windows follow the perspective, and adds light and haze.
3. `expose` is the camera: vignette, blur, noise.

A `Style` (`toy_styles.py`) says what a domain looks like and how its streets are furnished. Every camera image is
somewhere between the two styles: a few are nearly as clean as the game, and most are far from it. Self-training needs
such easy images to start from. The gap is more than a shift of feature statistics: the camera world uses the game's
colours and textures on the *wrong* classes (pale paved roads next to dark smooth sidewalks, mossy buildings,
brick-coloured trees), so that only shape and layout tell the classes apart.
"""

import functools
from dataclasses import fields

import numpy as np
from PIL import Image, ImageFilter

from gta2cs.toy_street import Camera, Canvas, lay_out
from gta2cs.toy_styles import (
    APPEARANCE,
    CAMERA,
    CLASSES,
    FACADE,
    FAR,
    GAME,
    GROUND,
    IGNORE,
    LAMP_LIGHT,
    OTHER,
    PALETTE,
    SEVERITY,
    SKY,
    SUPERSAMPLE,
    Domain,
    Style,
)

__all__ = ["CAMERA", "CLASSES", "GAME", "IGNORE", "PALETTE", "Domain", "Style", "expose", "lay_out", "render", "shade"]


def render(domain: Domain, seed: int, size: tuple[int, int] = (128, 192)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one street scene: a pure function of its arguments.

    Args:
        domain: "game" (source) or "camera" (target).
        seed: which scene.
        size: (height, width) in pixels.

    Returns:
        The image (H, W, 3) uint8 and its labels (H, W) uint8 with ids into `CLASSES`, or 255.
    """
    if domain not in ("game", "camera"):
        raise ValueError(f"Expected `domain` to be 'game' or 'camera', but got {domain!r}.")
    rng = np.random.default_rng(np.random.SeedSequence([domain == "camera", seed]))
    style = GAME if domain == "game" else _between(GAME, CAMERA, rng)
    canvas = Canvas(Camera.draw(style, size, rng), style, rng)
    lay_out(canvas)
    colour, label = shade(canvas)
    return expose(colour, style, rng), label


def _between(clean: Style, strange: Style, rng: np.random.Generator) -> Style:
    """`strange`, moved towards the appearance of `clean` by a random amount that varies a little between classes."""
    share = rng.beta(*SEVERITY)
    by_class = np.clip(share + rng.normal(0, 0.12, len(CLASSES) + 1), 0, 1).astype(np.float32)
    values = {field.name: getattr(strange, field.name) for field in fields(Style)}
    for name in APPEARANCE:
        a, b = getattr(clean, name), values[name]
        weight = by_class.reshape(-1, *[1] * (b.ndim - 1)) if np.shape(b)[:1] == by_class.shape else share
        values[name] = a + weight * (b - a)
    return Style(**values)


@functools.cache
def _rough_patch(side: int = 128) -> np.ndarray:
    """A fixed, seamless patch of rough texture in about -1..1."""
    spectrum = np.fft.fft2(np.random.default_rng(0).standard_normal((side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    patch = np.fft.ifft2(spectrum / np.maximum(frequency, 0.02) ** 0.8).real
    return (patch / np.abs(patch).max() * 1.6).clip(-1, 1).astype(np.float32).ravel()


def _rough(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _rough_patch().take(((v.astype(np.int32) & 127) << 7) | (u.astype(np.int32) & 127))


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def shade(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """The colours (H, W, 3) in 0..255, float, and the labels (H, W)."""
    style, part, table = canvas.style, np.asarray(canvas.image).ravel(), np.array(canvas.parts, dtype=np.float32)
    classes = table[:, 0].astype(np.int32)
    plane, at = table[:, 4].astype(np.int8)[part], table[:, 5][part]
    right, up = (slope.ravel() for slope in canvas.camera.rays())

    # The point of the world behind every pixel: `along` the surface and `tall` across it.
    eye, ground, facade = np.float32(canvas.camera.above_ground), plane == GROUND, plane == FACADE
    depth = np.where(facade, at / np.where(np.abs(right) < 1e-3, 1e-3, right), at)
    depth = np.where(ground, eye / np.maximum(-up, 1e-3), depth).clip(0.5, FAR)
    along = np.where(facade, depth, right * depth)
    tall = np.where(ground, depth, eye + up * depth)

    # Rough and jointed surfaces; fine patterns fade before they would alias.
    near = (1.8 - depth * 0.06).clip(0, 1)
    row = np.floor(tall * 1.6)
    joint = (tall * 1.6 - row < 0.16) | (_fraction(along * 0.8 + 0.5 * row) < 0.1)
    light = _rough(along * 14, tall * 14) * (0.35 + 0.65 * near) * style.grain[classes][part]
    light -= style.joints[classes][part] * near * joint
    colour = table[:, 1:4].T.take(part, axis=1) * (1 + light)  # (3, pixels): much faster than channels last
    glow = table[:, 6][part]

    # Window panes, some of them lit.
    wall = np.flatnonzero((table[:, 7] > 0)[part])
    column, storey = along[wall] / table[:, 7][part[wall]], (tall[wall] - 0.9) / 3.1
    pane = (np.abs(_fraction(column) - 0.5) < 0.24) & (np.abs(_fraction(storey) - 0.5) < 0.27) & (storey > 0)
    column, storey, wall = column[pane], storey[pane], wall[pane]
    lit = _fraction(np.floor(column) * 3.7 + np.floor(storey) * 1.7 + at[wall] * 0.5) < style.lamps
    colour[:, wall] = np.where(lit, LAMP_LIGHT[:, None], style.windows[:, None])
    glow[wall] = 0.6 * lit

    # Sky, haze and the light of the hour, which lamps outshine.
    sky = np.flatnonzero((classes == SKY)[part])
    high = up[sky].clip(0)
    drift = canvas.rng.integers(128)
    colour[:, sky] += 60 * style.clouds * _rough(right[sky] / (high + 0.12) * 9 + drift, 9 / (high + 0.12))
    clear = np.exp(-style.haze * depth)
    clear[sky] = 1 - min(1.0, 0.45 + 20 * style.haze) * np.exp(-3 * high)
    clear = np.maximum(clear, 0.8 * glow)
    haze, tint = style.haze_colour[:, None].astype(np.float32), style.tint[:, None].astype(np.float32)
    colour = (haze + (colour - haze) * clear) * (tint + (1 - tint) * glow)

    s, (w, h) = SUPERSAMPLE, canvas.image.size
    label = np.where(classes == OTHER, IGNORE, classes).astype(np.uint8)[part.reshape(h, w)[::s, ::s]]
    colour = sum(colour.reshape(3, h, w)[:, y::s, x::s] for y, x in np.ndindex(s, s)) / s**2
    return np.moveaxis(colour, 0, -1), label


def expose(colour: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """The image of the camera, with vignette, blur and noise, uint8."""
    h, w, _ = colour.shape
    y, x = np.linspace(-1, 1, h, dtype=np.float32)[:, None], np.linspace(-1, 1, w, dtype=np.float32)
    colour = colour * (1 - style.vignette * 0.5 * (x * x + y * y))[..., None]
    image = Image.fromarray(colour.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(style.blur * w / 192))
    noise = style.noise * rng.standard_normal(colour.shape, dtype=np.float32)
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
