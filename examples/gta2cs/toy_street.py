"""Furnish a street of the toy pair and paint it into a part map, as seen by a camera."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from gta2cs.toy_styles import (
    BLACK,
    BUILDING,
    CAR,
    FACADE,
    FAR,
    FENCE,
    FRONT,
    GROUND,
    LAMP_LIGHT,
    OTHER,
    PERSON,
    POLE,
    ROAD,
    SIDEWALK,
    SIGN,
    SKY,
    SUPERSAMPLE,
    TERRAIN,
    VEGETATION,
    Colour,
    Outline,
    Style,
)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above the road, looking along the street; lengths in supersampled pixels."""

    height: int
    width: int
    focal: float
    above_ground: float
    centre: tuple[float, float]
    rotation: np.ndarray

    @classmethod
    def draw(cls, style: Style, size: tuple[int, int], rng: np.random.Generator) -> "Camera":
        """Draw a camera of the style."""
        h, w = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
        angle = rng.uniform(-style.roll, style.roll)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])  # turns y downwards too
        centre = (w * rng.uniform(0.4, 0.6), h * rng.uniform(*style.horizon))
        return cls(h, w, w * rng.uniform(*style.focal), rng.uniform(*style.camera_height), centre, rotation)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (n, 3) to pixel positions (n, 2)."""
        plane = (points[:, :2] - (0.0, self.above_ground)) * (self.focal / points[:, 2:])
        return plane @ self.rotation + self.centre

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Slopes x / z and (y - camera height) / z of the ray through every pixel."""
        u = np.arange(self.width, dtype=np.float32) + 0.5 - self.centre[0]
        v = (np.arange(self.height, dtype=np.float32) + 0.5 - self.centre[1])[:, None]
        (c, s), _ = self.rotation.astype(np.float32) / np.float32(self.focal)
        return c * u + s * v, s * u - c * v


class Canvas:
    """The part map and the table of its parts: class, red, green, blue, plane, at, glow, window period."""

    def __init__(self, camera: Camera, style: Style, rng: np.random.Generator) -> None:
        self.camera, self.style, self.rng = camera, style, rng
        self.image = Image.new("I", (camera.width, camera.height), 0)
        self.pen = ImageDraw.Draw(self.image)
        self.parts = [(SKY, *self.colour(SKY), FRONT, FAR, 0.0, 0.0)]

    def colour(self, cls: int, brightness: float = 1.0) -> Colour:
        """One of the class's colours."""
        return self.style.colours[cls, self.rng.integers(3)] * (brightness * self.rng.uniform(0.92, 1.08))

    def paint(
        self, cls: int, colour: Colour, points: Sequence[tuple[float, float, float]],
        plane: int = FRONT, at: float = 0.0, glow: float = 0.0, window: float = 0.0,
    ) -> None:  # fmt: skip
        """Paint a polygon of world points."""
        self.pen.polygon(self.camera.project(np.asarray(points)).ravel().tolist(), fill=len(self.parts))
        self.parts.append((cls, *colour, plane, at, glow, window))

    def ground(self, cls: int, colour: Colour, x0: float, x1: float, z0: float = 0.5, z1: float = 400.0) -> None:
        """Paint a rectangle of the ground."""
        self.paint(cls, colour, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], GROUND)

    def upright(self, cls: int, colour: Colour, x: float, z: float, outline: Outline, glow: float = 0.0) -> None:
        """Paint an outline that faces the camera."""
        self.paint(cls, colour, [(x + dx, y, z) for dx, y in outline], FRONT, z, glow)


Painter = Callable[[Canvas, float, float, int], None]  # canvas, x, z, side of the street that it faces


def _disc(x: float, y: float, rx: float, ry: float) -> Outline:
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 14, endpoint=False)]


def _box(x0: float, x1: float, y0: float, y1: float) -> Outline:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _taper(wide: float, narrow: float, y0: float, y1: float) -> Outline:
    return [(-wide, y0), (wide, y0), (narrow, y1), (-narrow, y1)]


def lay_out(canvas: Canvas) -> None:
    """Furnish the street and paint it from far to near."""
    style, rng = canvas.style, canvas.rng
    middle = rng.uniform(-1.6, 0.4)  # of the road; the camera drives on the right
    road, verge = rng.uniform(*style.road), rng.uniform(3, 5) if rng.random() < style.verge else 0.0
    kerb = road + rng.uniform(*style.sidewalk)
    side_street = rng.uniform(9, 26) if rng.random() < style.crossing else np.inf

    _paint_skyline(canvas)
    paving, asphalt = canvas.colour(SIDEWALK), canvas.colour(ROAD)
    white = asphalt * 0.35 + 0.65 * np.array([235, 235, 230])
    canvas.ground(TERRAIN, canvas.colour(TERRAIN), -400, 400)
    canvas.ground(SIDEWALK, paving, middle - kerb, middle + kerb)
    if side_street < np.inf:
        canvas.ground(SIDEWALK, paving, -90, 90, side_street - 2, side_street + 8)
        canvas.ground(ROAD, asphalt, -90, 90, side_street, side_street + 6)
    canvas.ground(SIDEWALK, paving * 1.13, middle - road - 0.22, middle + road + 0.22)  # kerb stones
    canvas.ground(ROAD, asphalt, middle - road, middle + road)
    for z in np.arange(1.0 + rng.uniform(0, 5), 60, 6.0):
        canvas.ground(ROAD, white, middle - 0.09, middle + 0.09, z, z + 3)
    if side_street < np.inf:
        for x in np.arange(middle - road + 0.4, middle + road - 0.5, 1.1):
            canvas.ground(ROAD, white, x, x + 0.6, side_street - 4, side_street - 1.5)
    for side in (-1, 1):
        _paint_lots(canvas, side, middle + side * (kerb + verge), side_street)

    things: list[tuple[float, float, Painter]] = []  # (z, x, painter)

    def place(mean: float, near: float, far: float, x0: float, x1: float, painter: Painter) -> None:
        for _ in range(rng.poisson(mean)):
            things.append((rng.uniform(near, far), middle + rng.choice([-1, 1]) * rng.uniform(x0, x1), painter))

    place(style.cars, 5, 26, 0.36 * road, 0.76 * road, _paint_car)
    place(style.people * 0.85, 4, 13, road + 0.5, kerb, _paint_person)
    place(style.people * 0.15, 6, 13, 0, road, _paint_person)
    place(style.trees, 5, 24, kerb - 0.4, kerb - 0.4 + verge, _paint_tree)
    place(style.signs, 4, 13, road + 0.5, road + 1.0, _paint_sign)
    place(style.lamp_posts, 4, 16, road + 0.5, road + 0.7, _paint_lamp_post)
    place(0.5, 5, 15, road + 1.0, road + 1.4, _paint_bin)
    for z, x, painter in sorted(things, key=lambda thing: -thing[0]):
        painter(canvas, x, z, -1 if x > middle else 1)


def _paint_skyline(canvas: Canvas) -> None:
    x = -80.0
    while x < 80:
        width = canvas.rng.uniform(6, 18)
        cls, top = (BUILDING, 13) if canvas.rng.random() < canvas.style.houses else (VEGETATION, 8)
        top = canvas.rng.uniform(4, top)
        outline = [(0, 0), (0, top), (width / 2, top * 1.08), (width, top), (width, 0)]
        canvas.upright(cls, canvas.colour(cls, 0.95), x, FAR, outline)
        x += width


def _paint_lots(canvas: Canvas, side: int, wall: float, side_street: float) -> None:
    """One side of the street: houses, and gardens behind fences and hedges."""
    style, rng = canvas.style, canvas.rng
    edges = [0.5]
    while edges[-1] < 75:
        edges.append(edges[-1] + rng.uniform(6, 13))
    for near, far in reversed(list(pairwise(edges))):
        if near < side_street + 7 and far > side_street - 2:
            continue
        window = 0.0
        if rng.random() < style.houses:
            cls, top, window = BUILDING, 1.2 + 3.1 * rng.uniform(*style.storeys), rng.uniform(2.2, 3.4)
        else:
            for _ in range(rng.integers(1, 3)):
                _paint_tree(canvas, wall + side * rng.uniform(2, 6), rng.uniform(near, far), side)
            cls, top = (FENCE, rng.uniform(2.0, 2.8)) if rng.random() < 0.75 else (VEGETATION, rng.uniform(1.2, 2.0))
        colour = canvas.colour(cls)
        if near > 1:
            front = [(wall + dx, y, near) for dx, y in _box(0, side * 14, 0, top)]
            canvas.paint(cls, colour * 0.92, front, FRONT, near, window=window)
        flank = [(wall, y, z) for z, y in _box(near, far, 0, top)]
        canvas.paint(cls, colour * (1 + side * style.sun), flank, FACADE, wall, window=window)
        if cls == BUILDING:
            cornice = [(wall, y, z) for z, y in _box(near, far, top - 0.4, top)]
            canvas.paint(cls, colour * 0.7, cornice, FACADE, wall)


def _paint_car(canvas: Canvas, x: float, z: float, side: int) -> None:
    rng, paint, glass = canvas.rng, canvas.colour(CAR), canvas.style.windows * 0.55
    w, tall = 0.9 * rng.uniform(0.95, 1.08), rng.choice([1.0, 1.0, 1.25])
    canvas.ground(ROAD, canvas.style.colours[ROAD, 0] * 0.45, x - w - 0.15, x + w + 0.15, z - 0.2, z + 4.5)  # shadow
    flank = x - w if x > 0 else x + w  # the side that can be seen
    body = [(0, 0.3), (0, 0.9), (0.15, 1.0), (0.6, 1.48), (2.4, 1.48), (3.2, 0.95), (4.3, 0.8), (4.3, 0.3)]
    glazing = [(0.45, 1.05), (0.75, 1.4), (2.3, 1.4), (2.85, 1.05)]
    tyres = [_disc(dz, 0.34, 0.36, 0.34) for dz in (0.75, 3.45)]
    for colour, outline in ((paint * 0.8, body), (glass, glazing), (BLACK, tyres[0]), (BLACK, tyres[1])):
        canvas.paint(CAR, colour, [(flank, y * tall, z + dz) for dz, y in outline], at=z + 1)
    roof = [(x + dx, 1.48 * tall, z + dz) for dx, dz in _box(-0.8 * w, 0.8 * w, 0.6, 2.4)]
    canvas.paint(CAR, paint * 1.1, roof, at=z + 1)
    for left in (-w, w - 0.24):
        canvas.upright(CAR, BLACK, x, z, _box(left, left + 0.24, 0, 0.4))
    back = [(-w, 0.3), (w, 0.3), (w, 0.95), (0.8 * w, 1.48), (-0.8 * w, 1.48), (-w, 0.95)]
    for colour, outline in ((paint, back), (glass, _taper(0.8 * w, 0.7 * w, 1.02, 1.4))):
        canvas.paint(CAR, colour, [(x + dx, y * tall, z + max(0.0, y - 1)) for dx, y in outline], at=z)
    lights = np.array([230.0, 40.0, 36.0]) if side < 0 else np.array([255.0, 244.0, 206.0])  # on the left they come
    for left in (-0.85 * w, 0.6 * w):
        canvas.upright(CAR, lights, x, z, _box(left, left + 0.24 * w, 0.68, 0.86), glow=0.8)


def _paint_person(canvas: Canvas, x: float, z: float, side: int) -> None:
    rng, shirt, trousers = canvas.rng, canvas.colour(PERSON), canvas.colour(PERSON, 0.5)
    h, step, b = rng.uniform(1.6, 1.95), rng.uniform(0.05, 0.3), 0.29 * rng.uniform(0.9, 1.15)
    skin = np.array([222.0, 176.0, 146.0]) * rng.uniform(0.45, 1.0)
    for foot in (-step, step):
        leg = [(foot - 0.1, 0), (foot + 0.12, 0), (0.18, 0.5 * h), (-0.18, 0.5 * h)]
        canvas.upright(PERSON, trousers, x, z, leg)
    torso = [(-0.2, 0.46), (0.2, 0.46), (b, 0.8), (0.12, 0.85), (-0.12, 0.85), (-b, 0.8)]
    canvas.upright(PERSON, shirt, x, z, [(dx, y * h) for dx, y in torso])
    for arm in (-1, 1):
        sleeve = [(b, 0.8), (b + 0.1, 0.78), (b + step * 0.5, 0.46), (b - 0.05, 0.48)]
        canvas.upright(PERSON, shirt * 0.86, x, z, [(arm * dx, y * h) for dx, y in sleeve])
    canvas.upright(PERSON, skin, x, z, _disc(0, 0.92 * h, 0.14, 0.16))
    canvas.upright(PERSON, skin * 0.3, x, z, _taper(0.14, 0.1, 0.94 * h, 1.01 * h))


def _paint_tree(canvas: Canvas, x: float, z: float, side: int) -> None:
    rng, leaves = canvas.rng, canvas.colour(VEGETATION)
    trunk, crown = rng.uniform(1.8, 2.8), rng.uniform(1.1, 1.9)
    bark = 0.45 * leaves + np.array([40.0, 26.0, 16.0])
    canvas.upright(VEGETATION, bark, x, z, _taper(0.18, 0.1, 0, trunk + crown))
    for up, (dx, dy) in zip(np.linspace(0, 1, 10), rng.uniform(-1, 1, (10, 2)), strict=True):
        r = crown * rng.uniform(0.38, 0.55)  # the lit leaves are painted last, higher up
        blob = _disc(crown * 0.62 * dx, trunk + crown * (0.35 + 0.35 * dy + 0.75 * up), r, r)
        canvas.upright(VEGETATION, leaves * (0.72 + 0.42 * up), x, z, blob)


def _paint_sign(canvas: Canvas, x: float, z: float, side: int) -> None:
    rng, face, white = canvas.rng, canvas.colour(SIGN), canvas.style.colours[CAR, 2]
    y, r, shape = rng.uniform(2.2, 2.7), rng.uniform(0.52, 0.7), rng.integers(3)
    canvas.upright(POLE, canvas.colour(POLE), x, z, _box(-0.14, 0.14, 0, y))
    for s, colour in ((r, face), (0.62 * r, white if rng.random() < 0.7 else face * 0.8)):
        triangle = [(-1.1 * s, y - 0.62 * s), (1.1 * s, y - 0.62 * s), (0, y + 1.2 * s)]
        outline = (_disc(0, y, s, s), triangle, _box(-0.9 * s, 0.9 * s, y - s, y + s))[shape]
        canvas.upright(SIGN, colour, x, z, outline)


def _paint_lamp_post(canvas: Canvas, x: float, z: float, side: int) -> None:
    top, metal = canvas.rng.uniform(4.6, 6.0), canvas.colour(POLE)
    canvas.upright(POLE, metal, x, z, _taper(0.3, 0.2, 0, top))
    canvas.upright(POLE, metal, x, z, [(0, top), (side * 1.5, top + 0.2), (side * 1.5, top + 0.42), (0, top + 0.22)])
    canvas.upright(POLE, LAMP_LIGHT, x + side * 1.5, z, _taper(0.34, 0.24, top + 0.1, top + 0.42), glow=0.7)


def _paint_bin(canvas: Canvas, x: float, z: float, side: int) -> None:
    canvas.upright(OTHER, canvas.colour(OTHER), x, z, _taper(0.3, 0.36, 0, 1))
    canvas.upright(OTHER, canvas.colour(OTHER, 0.7), x, z, _taper(0.4, 0.36, 0.96, 1.12))
