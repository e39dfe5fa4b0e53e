"""The built-in toy pair: street scenes of a clean "game" and of a hazy, textured "camera" world, drawn on the fly.

`render(domain, seed, size)` draws one labelled image in three steps:

1. `lay_out` furnishes a street (metres; x right, y up, z ahead) and paints it, far things first, into a *part map*:
   one integer a pixel that says which polygon is seen there.
2. `shade` turns the part map into colours. It finds the point of the world behind every pixel, so that bricks, paving
   and windows follow the perspective, and adds light and haze.
3. `expose` is the camera: vignette, blur, noise.

A `Style` says what a domain looks like and how its streets are furnished. Every camera image is somewhere between the
two styles: a few are nearly as clean as the game, and most are far from it. Self-training needs such easy images to
start from. The gap is more than a shift of feature statistics: the camera world uses the game's colours and textures on
the *wrong* classes (pale paved roads next to dark smooth sidewalks, mossy buildings, brick-coloured trees), so that
only shape and layout tell the classes apart.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Domain = Literal["game", "camera"]
Colour = np.ndarray  # (3,) red, green, blue, 0..255
Outline = Sequence[tuple[float, float]]  # (x offset, y) in metres

# Cityscapes train ids in Cityscapes order, the classes in between left out.
# fmt: off
CLASSES = ("road", "sidewalk", "building", "fence", "pole", "traffic sign",
           "vegetation", "terrain", "sky", "person", "car")
PALETTE = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153), (153, 153, 153), (220, 220, 0),
                    (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (0, 0, 142)], dtype=np.uint8)
# fmt: on
ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, TERRAIN, SKY, PERSON, CAR = range(len(CLASSES))
OTHER = len(CLASSES)  # bins: drawn and shaded like a class, labelled IGNORE
IGNORE = 255

GROUND, FACADE, FRONT = range(3)  # the plane a part lies in: y = 0; x = `at`; z = `at`
SUPERSAMPLE = 2
FAR = 90.0
SEVERITY = (1.4, 1.4)  # of the beta distribution that places a camera image between the two styles
LAMP_LIGHT = np.array([250.0, 214.0, 140.0], dtype=np.float32)
BLACK = np.full(3, 26.0)


@dataclass(frozen=True)
class Style:
    """How a domain looks (down to `noise`; blended image by image) and how its streets are furnished."""

    colours: np.ndarray  # (K + 1, 3 variants, 3)
    grain: np.ndarray  # (K + 1,) strength of the rough texture
    joints: np.ndarray  # (K + 1,) strength of the brick and paving pattern
    windows: Colour
    lamps: float  # share of lit windows
    sun: float  # contrast between the sunny and the shady side of the street
    clouds: float
    haze: float  # 1 / metres
    haze_colour: Colour
    tint: np.ndarray  # (3,) gain a channel; below 1 is towards night
    vignette: float
    blur: float  # pixels
    noise: float  # 0..255

    focal: tuple[float, float]  # in image widths; every pair is a range to draw from
    camera_height: tuple[float, float]
    horizon: tuple[float, float]  # in image heights
    roll: float  # radians
    road: tuple[float, float]  # half width, metres
    sidewalk: tuple[float, float]
    verge: float  # probability of a strip of grass between sidewalk and houses
    storeys: tuple[float, float]
    houses: float  # probability that a lot has a house; the rest are fenced or hedged gardens
    crossing: float  # probability of a side street
    cars: float  # mean numbers of things
    people: float
    trees: float
    signs: float
    lamp_posts: float


def _colours(**named: Sequence[tuple[int, int, int]]) -> np.ndarray:
    return np.array([named[name.replace(" ", "_")] for name in (*CLASSES, "other")], dtype=np.float32)


def _per_class(**named: float) -> np.ndarray:
    return np.array([named.get(name.replace(" ", "_"), 0.0) for name in (*CLASSES, "other")], dtype=np.float32)


# fmt: off
GAME = Style(
    colours=_colours(
        road=[(84, 86, 98)] * 3,
        sidewalk=[(206, 190, 168), (200, 188, 172), (210, 196, 170)],
        building=[(222, 128, 84), (232, 196, 132), (186, 88, 76)],
        fence=[(150, 104, 66), (236, 232, 222), (150, 104, 66)],
        pole=[(66, 72, 86), (66, 72, 86), (80, 84, 92)],
        traffic_sign=[(226, 36, 44), (30, 96, 220), (250, 200, 30)],
        vegetation=[(58, 150, 52), (84, 172, 58), (40, 124, 60)],
        terrain=[(140, 206, 84)] * 3,
        sky=[(104, 178, 252)] * 3,
        person=[(236, 72, 120), (52, 132, 236), (250, 160, 40)],
        car=[(222, 34, 40), (36, 82, 216), (246, 246, 246)],
        other=[(40, 120, 120), (120, 60, 140), (60, 60, 66)],
    ),
    grain=_per_class(vegetation=0.22, terrain=0.08), joints=_per_class(sidewalk=0.10, fence=0.35),
    windows=np.array([96.0, 156.0, 204.0]), lamps=0.0,
    sun=0.14, clouds=0.0, haze=0.001, haze_colour=np.array([190.0, 220.0, 250.0]),
    tint=np.ones(3), vignette=0.0, blur=0.0, noise=0.0,
    focal=(0.62, 0.70), camera_height=(1.45, 1.7), horizon=(0.44, 0.5), roll=0.0,
    road=(3.8, 5.2), sidewalk=(2.8, 4.2), verge=0.75, storeys=(2, 6), houses=0.58, crossing=0.3,
    cars=4.5, people=5.0, trees=4.0, signs=2.6, lamp_posts=3.0,
)
CAMERA = Style(
    colours=_colours(
        road=[(190, 178, 160), (180, 172, 158), (194, 180, 156)],
        sidewalk=[(98, 98, 104), (104, 100, 100), (92, 94, 102)],
        building=[(104, 126, 78), (136, 142, 112), (92, 106, 100)],
        fence=[(96, 112, 158), (128, 138, 166), (70, 78, 112)],
        pole=[(150, 146, 138), (132, 120, 106), (112, 120, 112)],
        traffic_sign=[(186, 92, 70), (84, 116, 150), (198, 182, 130)],
        vegetation=[(188, 112, 62), (160, 92, 58), (196, 146, 80)],
        terrain=[(160, 156, 76), (148, 146, 70), (134, 132, 64)],
        sky=[(206, 194, 186), (190, 188, 192), (214, 198, 178)],
        person=[(128, 62, 66), (150, 122, 66), (58, 82, 132)],
        car=[(124, 124, 122), (64, 68, 72), (150, 128, 108)],
        other=[(70, 84, 80), (96, 80, 72), (60, 60, 60)],
    ),
    grain=_per_class(road=0.3, sidewalk=0.1, building=0.42, fence=0.2, pole=0.1, vegetation=0.12, terrain=0.35,
                     person=0.15, car=0.12, other=0.2),
    joints=_per_class(road=0.32, building=0.2, fence=0.6), windows=np.array([58.0, 62.0, 64.0]), lamps=0.35,
    sun=0.05, clouds=0.3, haze=0.013, haze_colour=np.array([196.0, 184.0, 172.0]),
    tint=np.array([0.72, 0.66, 0.64]), vignette=0.35, blur=0.4, noise=5.0,
    focal=(0.58, 0.68), camera_height=(1.7, 2.1), horizon=(0.38, 0.46), roll=0.03,
    road=(3.0, 4.2), sidewalk=(3.0, 4.6), verge=0.8, storeys=(2, 4), houses=0.5, crossing=0.4,
    cars=5.0, people=6.0, trees=6.0, signs=3.2, lamp_posts=2.4,
)
# fmt: on
APPEARANCE = [field.name for field in fields(Style)][:13]


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
