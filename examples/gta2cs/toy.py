"""The built-in toy pair: street scenes of a clean "game" and of a hazy, textured "camera" world, drawn on the fly.

`render(domain, seed, size)` draws one labelled image in three steps:

1. `lay_out` furnishes a street (metres; x right, y up, z ahead) and paints it, far things first, into a *part map*: one integer a pixel
   that says which polygon is seen there.
2. `shade` turns the part map into colours. It finds the point of the world behind every pixel, so that bricks, paving and windows
   follow the perspective, and adds light and haze.
3. `expose` is the camera: tint, vignette, blur, noise.

A `Style` says what a domain looks like and how its streets are furnished. Every camera image lies somewhere between the two styles: some are
nearly as clean as the game, most are far from it. That is what self-training needs, an easy end to start from. The gap is more than a shift of
feature statistics: the camera world wears the game's colours and textures on the *wrong* classes (pale paved roads beside dark smooth
sidewalks, mossy buildings, brick-coloured trees), so that only the layout tells them apart.
"""

import functools
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Domain = Literal["game", "camera"]

# Cityscapes train ids in Cityscapes order, the classes in between left out.
CLASSES = (
    "road",
    "sidewalk",
    "building",
    "fence",
    "pole",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "car",
)
PALETTE = np.array(
    [
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (190, 153, 153),
        (153, 153, 153),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
    ]
    + [(70, 130, 180), (220, 20, 60), (0, 0, 142)],
    dtype=np.uint8,
)
IGNORE = 255
ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, TERRAIN, SKY, PERSON, CAR = range(len(CLASSES))
OTHER = len(CLASSES)  # bins and boxes: drawn and shaded like a class, labelled IGNORE

GROUND, FACADE, FRONT = range(3)  # the plane a part lies in: y = 0; x = `at`; z = `at`
SUPERSAMPLE = 2
FAR = 90.0
SEVERITY = (1.6, 1.0)  # of the beta distribution that places a camera image between the two styles
LAMP_LIGHT = np.array([250.0, 214.0, 140.0], dtype=np.float32)


@dataclass(frozen=True)
class Style:
    """How a domain looks (the first block is blended image by image) and how its streets are furnished (the second block)."""

    colours: np.ndarray  # (K + 1, 3 variants, 3) 0..255
    grain: np.ndarray  # (K + 1,) strength of the rough texture
    joints: np.ndarray  # (K + 1,) strength of the brick and paving pattern
    windows: np.ndarray  # (3,) colour of window panes
    lamps: float  # share of lit windows
    sun: float  # contrast between the sunny and the shady side of the street
    clouds: float
    haze: float  # 1 / metres
    haze_colour: np.ndarray
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


def _colours(**named: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array([named[name.replace(" ", "_")] for name in (*CLASSES, "other")], dtype=np.float32)


def _per_class(**named: float) -> np.ndarray:
    return np.array([named.get(name.replace(" ", "_"), 0.0) for name in (*CLASSES, "other")], dtype=np.float32)


GAME = Style(
    colours=_colours(
        road=[(84, 86, 98)] * 3,
        sidewalk=[(206, 190, 168), (200, 188, 172), (210, 196, 170)],
        building=[(222, 128, 84), (232, 196, 132), (186, 88, 76)],
        fence=[(150, 104, 66), (236, 232, 222), (150, 104, 66)],
        pole=[(66, 72, 86), (66, 72, 86), (80, 84, 92)],
        traffic_sign=[(226, 36, 44), (30, 96, 220), (250, 200, 30)],
        vegetation=[(58, 150, 52), (84, 172, 58), (40, 124, 60)],
        terrain=[(130, 200, 84)] * 3,
        sky=[(104, 178, 252)] * 3,
        person=[(236, 72, 120), (52, 132, 236), (250, 160, 40)],
        car=[(222, 34, 40), (36, 82, 216), (246, 246, 246)],
        other=[(40, 120, 120), (120, 60, 140), (60, 60, 66)],
    ),
    grain=_per_class(vegetation=0.22, terrain=0.08),
    joints=_per_class(sidewalk=0.10, fence=0.35),
    windows=np.array([96.0, 156.0, 204.0]),
    lamps=0.0, sun=0.14, clouds=0.0, haze=0.001, haze_colour=np.array([190.0, 220.0, 250.0]),
    tint=np.array([1.0, 1.0, 1.0]), vignette=0.0, blur=0.0, noise=0.0,
    focal=(0.62, 0.70), camera_height=(1.45, 1.7), horizon=(0.44, 0.5), roll=0.0,
    road=(3.8, 5.2), sidewalk=(2.6, 4.0), verge=0.55, storeys=(2, 6), houses=0.62, crossing=0.3,
    cars=5.0, people=7.0, trees=4.0, signs=3.0, lamp_posts=4.0,
)  # fmt: skip
CAMERA = Style(
    colours=_colours(
        road=[(196, 184, 166), (184, 176, 164), (200, 186, 160)],
        sidewalk=[(92, 92, 100), (100, 96, 96), (86, 90, 100)],
        building=[(104, 126, 78), (136, 142, 112), (92, 106, 100)],
        fence=[(92, 116, 84), (110, 112, 116), (84, 78, 72)],
        pole=[(150, 146, 138), (132, 120, 106), (112, 120, 112)],
        traffic_sign=[(186, 92, 70), (84, 116, 150), (198, 182, 130)],
        vegetation=[(188, 112, 62), (160, 92, 58), (196, 146, 80)],
        terrain=[(180, 152, 104), (166, 142, 100), (150, 134, 92)],
        sky=[(206, 194, 186), (190, 188, 192), (214, 198, 178)],
        person=[(74, 66, 62), (104, 88, 72), (58, 70, 82)],
        car=[(124, 124, 122), (64, 68, 72), (150, 128, 108)],
        other=[(70, 84, 80), (96, 80, 72), (60, 60, 60)],
    ),
    grain=_per_class(road=0.30, sidewalk=0.10, building=0.42, fence=0.2, pole=0.1, vegetation=0.12, terrain=0.35, person=0.15, car=0.12, other=0.2),
    joints=_per_class(road=0.32, building=0.2, fence=0.5, vegetation=0.0),
    windows=np.array([58.0, 62.0, 64.0]),
    lamps=0.35, sun=0.05, clouds=0.3, haze=0.022, haze_colour=np.array([196.0, 184.0, 172.0]),
    tint=np.array([0.72, 0.66, 0.64]), vignette=0.35, blur=0.5, noise=9.0,
    focal=(0.54, 0.66), camera_height=(1.7, 2.1), horizon=(0.38, 0.46), roll=0.03,
    road=(3.0, 4.2), sidewalk=(3.0, 4.6), verge=0.65, storeys=(2, 4), houses=0.5, crossing=0.4,
    cars=6.0, people=8.0, trees=6.0, signs=3.4, lamp_posts=3.0,
)  # fmt: skip
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
    camera = Camera.draw(style, size, rng)
    canvas = Canvas(camera, style, rng)
    lay_out(canvas, style, rng)
    colour, label = shade(canvas, style, rng)
    return expose(colour, style, rng), label


def _between(clean: Style, strange: Style, rng: np.random.Generator) -> Style:
    """`strange` with its appearance drawn back towards `clean` by a random amount, a little different for every class."""
    share = rng.beta(*SEVERITY)
    by_class = np.clip(share + rng.normal(0, 0.12, len(CLASSES) + 1), 0, 1).astype(np.float32)
    blended = {}
    for name in APPEARANCE:
        a, b = getattr(clean, name), getattr(strange, name)
        weight = by_class.reshape(-1, *[1] * (np.ndim(b) - 1)) if np.shape(b)[:1] == by_class.shape else share
        blended[name] = (a + weight * (b - a)).astype(np.float32) if np.ndim(b) else a + weight * (b - a)
    return Style(**{field.name: blended.get(field.name, getattr(strange, field.name)) for field in fields(Style)})


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
        h, w = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
        angle = rng.uniform(-style.roll, style.roll)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])  # and y turned downwards
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
    """The part map and the table of its parts."""

    def __init__(self, camera: Camera, style: Style, rng: np.random.Generator) -> None:
        self.camera, self.style, self.rng = camera, style, rng
        self.image = Image.new("I", (camera.width, camera.height), 0)
        self.pen = ImageDraw.Draw(self.image)
        self.parts: list[tuple[float, ...]] = []  # class, r, g, b, plane, at, glow, window period
        self.add(SKY, self.colour(SKY), FRONT, FAR)

    def colour(self, cls: int, brightness: float = 1.0) -> np.ndarray:
        """A colour that the style has for the class."""
        return self.style.colours[cls, self.rng.integers(3)] * (brightness * self.rng.uniform(0.92, 1.08))

    def add(self, cls: int, colour: np.ndarray, plane: int, at: float, glow: float = 0.0, window: float = 0.0) -> int:
        self.parts.append((cls, *colour, plane, at, glow, window))
        return len(self.parts) - 1

    def fill(self, points: list[tuple[float, float, float]], part: int) -> None:
        """Paint a polygon of world points."""
        self.pen.polygon(self.camera.project(np.asarray(points)).ravel().tolist(), fill=part)

    def ground(self, x0: float, x1: float, z0: float, z1: float, cls: int, colour: np.ndarray) -> None:
        part = self.add(cls, colour, GROUND, 0.0)
        self.fill([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], part)

    def flat(
        self, x: float, z: float, outline: list[tuple[float, float]], cls: int, colour: np.ndarray, glow: float = 0.0
    ) -> None:
        """Paint an outline of (x, y) offsets that faces the camera."""
        self.fill([(x + dx, y, z) for dx, y in outline], self.add(cls, colour, FRONT, z, glow))

    def disc(
        self, x: float, y: float, z: float, rx: float, ry: float, cls: int, colour: np.ndarray, glow: float = 0.0
    ) -> None:
        self.flat(x, z, [(rx * c, y + ry * s) for c, s in _CIRCLE], cls, colour, glow)


_CIRCLE = [(float(np.cos(a)), float(np.sin(a))) for a in np.linspace(0, 2 * np.pi, 14, endpoint=False)]


def lay_out(canvas: Canvas, style: Style, rng: np.random.Generator) -> None:
    """Furnish the street and paint it from far to near."""
    middle = rng.uniform(-1.6, 0.4)  # of the road; the camera drives on the right
    road, walk = rng.uniform(*style.road), rng.uniform(*style.sidewalk)
    verge = rng.uniform(1.5, 3.5) if rng.random() < style.verge else 0.0
    kerb, edge = road + walk, road + walk + verge
    side_street = rng.uniform(9, 26) if rng.random() < style.crossing else None

    _paint_skyline(canvas, style, rng)
    grass, paving, asphalt = canvas.colour(TERRAIN), canvas.colour(SIDEWALK), canvas.colour(ROAD)
    canvas.ground(-400, 400, 0.5, 400, TERRAIN, grass)
    canvas.ground(middle - kerb, middle + kerb, 0.5, 400, SIDEWALK, paving)
    if side_street:
        canvas.ground(-90, 90, side_street - 2, side_street + 8, SIDEWALK, paving)
        canvas.ground(-90, 90, side_street, side_street + 6, ROAD, asphalt)
    for side in (-1, 1):
        canvas.ground(middle + side * road, middle + side * (road + 0.22), 0.5, 400, SIDEWALK, paving * 1.13)
    canvas.ground(middle - road, middle + road, 0.5, 400, ROAD, asphalt)
    _paint_markings(canvas, middle, road, side_street, asphalt, rng)
    for side in (-1, 1):
        _paint_lots(canvas, style, side, middle + side * edge, side_street, rng)

    things = []
    for _ in range(rng.poisson(style.cars)):
        lane = rng.choice([-0.74, -0.36, 0.4, 0.76])
        things.append((rng.uniform(5, 42), middle + lane * road, _paint_car))
    for _ in range(rng.poisson(style.people)):
        across = (
            rng.uniform(-road, road) if rng.random() < 0.15 else rng.choice([-1, 1]) * rng.uniform(road + 0.4, kerb)
        )
        things.append((rng.uniform(4, 24), middle + across, _paint_person))
    for _ in range(rng.poisson(style.trees)):
        things.append((rng.uniform(6, 45), middle + rng.choice([-1, 1]) * (kerb - 0.4 + 0.5 * verge), _paint_tree))
    for _ in range(rng.poisson(style.signs)):
        things.append((rng.uniform(4.5, 20), middle + rng.choice([-1, 1]) * (road + 0.7), _paint_sign))
    for number in range(rng.poisson(style.lamp_posts)):
        things.append((rng.uniform(5, 9) + 7 * number, middle + rng.choice([-1, 1]) * (road + 0.5), _paint_lamp_post))
    if rng.random() < 0.4:
        things.append((rng.uniform(5, 15), middle + rng.choice([-1, 1]) * (road + 1.2), _paint_bin))
    for z, x, paint in sorted(things, key=lambda thing: -thing[0]):
        paint(canvas, float(x), float(z), -1 if x > middle else 1, rng)


def _paint_skyline(canvas: Canvas, style: Style, rng: np.random.Generator) -> None:
    x = -80.0
    while x < 80:
        width = rng.uniform(6, 18)
        cls = BUILDING if rng.random() < style.houses else VEGETATION
        top = rng.uniform(4, 13) if cls == BUILDING else rng.uniform(4, 8)
        part = canvas.add(cls, canvas.colour(cls, 0.95), FRONT, FAR)
        canvas.fill(
            [(x, 0, FAR), (x, top, FAR), (x + width / 2, top * 1.08, FAR), (x + width, top, FAR), (x + width, 0, FAR)],
            part,
        )
        x += width


def _paint_markings(
    canvas: Canvas, middle: float, road: float, side_street: float | None, asphalt: np.ndarray, rng: np.random.Generator
) -> None:
    white = asphalt * 0.35 + 0.65 * np.array([235, 235, 230])
    for z in np.arange(1.0 + rng.uniform(0, 5), 60, 6.0):
        canvas.ground(middle - 0.09, middle + 0.09, z, z + 3, ROAD, white)
    if side_street:
        for x in np.arange(middle - road + 0.4, middle + road - 0.5, 1.1):
            canvas.ground(x, x + 0.6, side_street - 4, side_street - 1.5, ROAD, white)


def _paint_lots(
    canvas: Canvas, style: Style, side: int, wall: float, side_street: float | None, rng: np.random.Generator
) -> None:
    """One side of the street: houses, and gardens behind fences and hedges."""
    edges = [0.5]
    while edges[-1] < 75:
        edges.append(edges[-1] + rng.uniform(6, 13))
    light = 1 + side * style.sun
    for near, far in reversed(list(zip(edges[:-1], edges[1:], strict=True))):
        if side_street and near < side_street + 7 and far > side_street - 2:
            continue
        if rng.random() < style.houses:
            cls, top, colour, window = (
                BUILDING,
                1.2 + 3.1 * rng.uniform(*style.storeys),
                canvas.colour(BUILDING),
                rng.uniform(2.2, 3.4),
            )
        else:
            for _ in range(rng.integers(1, 3)):
                _paint_tree(canvas, wall + side * rng.uniform(2, 6), rng.uniform(near, far), side, rng)
            cls, top = (FENCE, rng.uniform(1.2, 1.9)) if rng.random() < 0.6 else (VEGETATION, rng.uniform(1.2, 2.4))
            colour, window = canvas.colour(cls), 0.0
        facade = canvas.add(cls, colour * light, FACADE, wall, 0.0, window)
        front = canvas.add(cls, colour * 0.92, FRONT, near, 0.0, window)
        if near > 1:
            canvas.fill(
                [(wall, 0, near), (wall, top, near), (wall + side * 14, top, near), (wall + side * 14, 0, near)], front
            )
        canvas.fill([(wall, 0, near), (wall, top, near), (wall, top, far), (wall, 0, far)], facade)
        if cls == BUILDING:  # a cornice
            canvas.fill(
                [(wall, top - 0.4, near), (wall, top, near), (wall, top, far), (wall, top - 0.4, far)],
                canvas.add(cls, colour * 0.7, FACADE, wall),
            )


def _paint_car(canvas: Canvas, x: float, z: float, side: int, rng: np.random.Generator) -> None:
    w, tall = 0.9 * rng.uniform(0.95, 1.08), rng.choice([1.0, 1.0, 1.25])
    paint, glass = canvas.colour(CAR), canvas.style.windows * 0.55
    canvas.ground(x - w - 0.15, x + w + 0.15, z - 0.2, z + 4.5, ROAD, canvas.style.colours[ROAD, 0] * 0.45)
    flank = x - w if x > 0 else x + w  # the side that can be seen
    body = [(0, 0.3), (0, 0.9), (0.15, 1.0), (3.2, 0.95), (4.3, 0.8), (4.3, 0.3)]
    cabin = [(0.15, 1.0), (0.6, 1.48), (2.4, 1.48), (3.2, 0.95)]
    side_colour = canvas.add(CAR, paint * 0.8, FRONT, z + 2)
    canvas.fill([(flank, y * tall, z + dz) for dz, y in body], side_colour)
    canvas.fill([(flank, y * tall, z + dz) for dz, y in cabin], side_colour)
    canvas.fill(
        [(flank, y * tall, z + dz) for dz, y in [(0.45, 1.05), (0.75, 1.4), (2.3, 1.4), (2.85, 1.05)]],
        canvas.add(CAR, glass, FRONT, z + 2),
    )
    tyre = canvas.add(CAR, np.full(3, 26.0), FRONT, z + 1)
    for wheel in (0.75, 3.45):
        canvas.fill([(flank, 0.34 + 0.34 * s, z + wheel + 0.36 * c) for c, s in _CIRCLE], tyre)
    roof = canvas.add(CAR, paint * 1.1, FRONT, z + 1)
    canvas.fill(
        [
            (x - 0.8 * w, 1.48 * tall, z + 0.6),
            (x + 0.8 * w, 1.48 * tall, z + 0.6),
            (x + 0.8 * w, 1.48 * tall, z + 2.4),
            (x - 0.8 * w, 1.48 * tall, z + 2.4),
        ],
        roof,
    )
    for dx in (-w, w - 0.24):
        canvas.flat(x + dx, z, [(0, 0), (0.24, 0), (0.24, 0.4), (0, 0.4)], CAR, np.full(3, 26.0))
    rear = canvas.add(CAR, paint, FRONT, z)
    canvas.fill(
        [
            (x - w, 0.3, z),
            (x + w, 0.3, z),
            (x + w, 0.95 * tall, z),
            (x + 0.8 * w, 1.48 * tall, z + 0.6),
            (x - 0.8 * w, 1.48 * tall, z + 0.6),
            (x - w, 0.95 * tall, z),
        ],
        rear,
    )
    pane = canvas.add(CAR, glass, FRONT, z)
    canvas.fill(
        [
            (x - 0.8 * w, 1.02 * tall, z + 0.1),
            (x + 0.8 * w, 1.02 * tall, z + 0.1),
            (x + 0.7 * w, 1.4 * tall, z + 0.5),
            (x - 0.7 * w, 1.4 * tall, z + 0.5),
        ],
        pane,
    )
    lights = (
        np.array([230.0, 40.0, 36.0]) if side < 0 else np.array([255.0, 244.0, 206.0])
    )  # oncoming cars are on the left
    for dx in (-0.85 * w, 0.6 * w):
        canvas.flat(x + dx, z, [(0, 0.68), (0.24 * w, 0.68), (0.24 * w, 0.86), (0, 0.86)], CAR, lights, glow=0.8)


def _paint_person(canvas: Canvas, x: float, z: float, side: int, rng: np.random.Generator) -> None:
    h, step, b = rng.uniform(1.55, 1.9), rng.uniform(0.05, 0.3), 0.27 * rng.uniform(0.9, 1.15)
    shirt, trousers = canvas.colour(PERSON), canvas.colour(PERSON, 0.5)
    skin = np.array([222.0, 176.0, 146.0]) * rng.uniform(0.45, 1.0)
    for foot in (-step, step):
        canvas.flat(x, z, [(foot - 0.09, 0), (foot + 0.11, 0), (0.17, 0.5 * h), (-0.17, 0.5 * h)], PERSON, trousers)
    canvas.flat(
        x,
        z,
        [(-0.2, 0.46 * h), (0.2, 0.46 * h), (b, 0.8 * h), (0.12, 0.85 * h), (-0.12, 0.85 * h), (-b, 0.8 * h)],
        PERSON,
        shirt,
    )
    for hand in (-1, 1):
        canvas.flat(
            x,
            z,
            [
                (hand * b, 0.8 * h),
                (hand * (b + 0.1), 0.78 * h),
                (hand * (b + step * 0.5), 0.46 * h),
                (hand * (b - 0.05), 0.48 * h),
            ],
            PERSON,
            shirt * 0.86,
        )
    canvas.disc(x, 0.92 * h, z, 0.14, 0.16, PERSON, skin)
    canvas.flat(x, z, [(-0.14, 0.94 * h), (0.14, 0.94 * h), (0.1, 1.01 * h), (-0.1, 1.01 * h)], PERSON, skin * 0.3)


def _paint_tree(canvas: Canvas, x: float, z: float, side: int, rng: np.random.Generator) -> None:
    trunk, crown, leaves = rng.uniform(1.8, 2.8), rng.uniform(1.1, 1.9), canvas.colour(VEGETATION)
    bark = 0.45 * leaves + np.array([40.0, 26.0, 16.0])
    canvas.flat(x, z, [(-0.16, 0), (0.16, 0), (0.1, trunk + crown), (-0.1, trunk + crown)], VEGETATION, bark)
    shades = [canvas.add(VEGETATION, leaves * b, FRONT, z) for b in (0.72, 0.88, 1.0, 1.14)]
    for number, (dx, dy) in enumerate(rng.uniform(-1, 1, (11, 2))):
        up = number / 10  # the lit blobs are painted last, higher up
        cx, cy, r = (
            x + crown * 0.62 * dx,
            trunk + crown * (0.35 + 0.35 * dy + 0.75 * up),
            crown * rng.uniform(0.38, 0.55),
        )
        canvas.fill([(cx + r * c, cy + r * s, z) for c, s in _CIRCLE], shades[int(3.99 * up)])


def _paint_sign(canvas: Canvas, x: float, z: float, side: int, rng: np.random.Generator) -> None:
    y, r = rng.uniform(2.2, 2.7), rng.uniform(0.42, 0.6)
    canvas.flat(x, z, [(-0.06, 0), (0.06, 0), (0.06, y), (-0.06, y)], POLE, canvas.colour(POLE))
    face, white = canvas.colour(SIGN), canvas.style.colours[CAR, 2]
    shape = rng.integers(3)
    for scale, colour in ((1.0, face), (0.62, white if rng.random() < 0.7 else face * 0.8)):
        s = r * scale
        if shape == 0:
            canvas.disc(x, y, z, s, s, SIGN, colour)
        elif shape == 1:
            canvas.flat(x, z, [(-s * 1.1, y - 0.62 * s), (s * 1.1, y - 0.62 * s), (0, y + 1.2 * s)], SIGN, colour)
        else:
            canvas.flat(x, z, [(-s * 0.9, y - s), (s * 0.9, y - s), (s * 0.9, y + s), (-s * 0.9, y + s)], SIGN, colour)


def _paint_lamp_post(canvas: Canvas, x: float, z: float, side: int, rng: np.random.Generator) -> None:
    top, metal = rng.uniform(4.6, 6.0), canvas.colour(POLE)
    canvas.flat(x, z, [(-0.15, 0), (0.15, 0), (0.1, top), (-0.1, top)], POLE, metal)
    canvas.flat(x, z, [(0, top), (side * 1.5, top + 0.2), (side * 1.5, top + 0.38), (0, top + 0.2)], POLE, metal)
    canvas.flat(
        x + side * 1.5,
        z,
        [(-0.3, top + 0.12), (0.3, top + 0.12), (0.22, top + 0.38), (-0.22, top + 0.38)],
        POLE,
        LAMP_LIGHT,
        glow=0.7,
    )


def _paint_bin(canvas: Canvas, x: float, z: float, side: int, rng: np.random.Generator) -> None:
    canvas.flat(x, z, [(-0.3, 0), (0.3, 0), (0.36, 1.0), (-0.36, 1.0)], OTHER, canvas.colour(OTHER))
    canvas.flat(x, z, [(-0.4, 0.96), (0.4, 0.96), (0.36, 1.12), (-0.36, 1.12)], OTHER, canvas.colour(OTHER, 0.7))


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


def shade(canvas: Canvas, style: Style, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The colours (H, W, 3) in 0..255, float, and the labels (H, W)."""
    part = np.asarray(canvas.image).ravel()
    table = np.array(canvas.parts, dtype=np.float32)
    classes = table[:, 0].astype(np.int32)
    plane, at = table[:, 4].astype(np.int8)[part], table[:, 5][part]
    right, up = (slope.ravel() for slope in canvas.camera.rays())

    # The point of the world behind every pixel: `along` the surface and `tall` across it.
    eye, ground, facade = np.float32(canvas.camera.above_ground), plane == GROUND, plane == FACADE
    depth = np.where(
        ground, eye / np.maximum(-up, 1e-3), np.where(facade, at / np.where(np.abs(right) < 1e-3, 1e-3, right), at)
    ).clip(0.5, FAR)
    along = np.where(facade, depth, right * depth)
    tall = np.where(ground, depth, eye + up * depth)

    # Rough and jointed surfaces; fine patterns fade before they would alias.
    near = (1.8 - depth * 0.06).clip(0, 1)
    row = np.floor(tall * 1.6)
    joint = (tall * 1.6 - row < 0.16) | (_fraction(along * 0.8 + 0.5 * row) < 0.1)
    light = _rough(along * 14, tall * 14) * (0.35 + 0.65 * near) * style.grain[classes][part]
    light -= style.joints[classes][part] * near * joint
    colour = table[:, 1:4].T.take(part, axis=1) * (
        1 + light
    )  # (3, pixels): channels first is several times faster here
    glow = table[:, 6][part]

    # Window panes, some of them lit.
    wall = np.flatnonzero((table[:, 7] > 0)[part])
    column, storey = along[wall] / table[:, 7][part[wall]], (tall[wall] - 0.9) / 3.1
    pane = (np.abs(_fraction(column) - 0.5) < 0.24) & (np.abs(_fraction(storey) - 0.5) < 0.27) & (storey > 0)
    column, storey, wall = column[pane], storey[pane], wall[pane]
    lit = _fraction(np.floor(column) * 3.7 + np.floor(storey) * 1.7 + at[wall] * 0.5) < style.lamps
    colour[:, wall] = np.where(lit, LAMP_LIGHT[:, None], style.windows[:, None])
    glow[wall] = 0.6 * lit

    # Sky and haze.
    sky = np.flatnonzero((classes == SKY)[part])
    high = up[sky].clip(0)
    drift = rng.integers(128)
    colour[:, sky] += 60 * style.clouds * _rough(right[sky] / (high + 0.12) * 9 + drift, 9 / (high + 0.12))
    clear = np.exp(-style.haze * depth)
    clear[sky] = 1 - min(1.0, 0.45 + 20 * style.haze) * np.exp(-3 * high)
    clear = np.maximum(clear, 0.8 * glow)
    haze, tint = style.haze_colour[:, None].astype(np.float32), style.tint[:, None].astype(np.float32)
    colour = (haze + (colour - haze) * clear) * (tint + (1 - tint) * glow)

    h, w = canvas.camera.height // SUPERSAMPLE, canvas.camera.width // SUPERSAMPLE
    corner = part.reshape(h, SUPERSAMPLE, w, SUPERSAMPLE)[:, 0, :, 0]
    label = np.where(classes == OTHER, IGNORE, classes).astype(np.uint8)[corner]
    colour = sum(
        colour.reshape(3, *canvas.image.size[::-1])[:, y::SUPERSAMPLE, x::SUPERSAMPLE]
        for y, x in np.ndindex(SUPERSAMPLE, SUPERSAMPLE)
    )
    return np.moveaxis(colour, 0, -1) / SUPERSAMPLE**2, label


def expose(colour: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """What the camera makes of the light: vignette, blur, noise; uint8."""
    h, w, _ = colour.shape
    y, x = np.linspace(-1, 1, h, dtype=np.float32)[:, None], np.linspace(-1, 1, w, dtype=np.float32)
    colour = colour * (1 - style.vignette * 0.5 * (x * x + y * y))[..., None]
    image = Image.fromarray(colour.clip(0, 255).astype(np.uint8))
    if style.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(style.blur * w / 192))
    if style.noise == 0:
        return np.array(image)
    return (
        (np.asarray(image) + style.noise * rng.standard_normal(colour.shape, dtype=np.float32))
        .clip(0, 255)
        .astype(np.uint8)
    )
