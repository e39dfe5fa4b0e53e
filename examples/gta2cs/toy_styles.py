"""The classes of the toy pair, and the two styles of its domains."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

Domain = Literal["game", "camera"]
Colour = np.ndarray  # (3,) red, green, blue, 0..255
Outline = Sequence[tuple[float, float]]  # (x offset, y) in metres

# Classes in the order of Cityscapes, some of which are left out.
# fmt: off
CLASSES = ("road", "sidewalk", "building", "fence", "pole", "traffic sign",
           "vegetation", "terrain", "sky", "person", "car")
PALETTE = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153), (153, 153, 153), (220, 220, 0),
                    (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (0, 0, 142)], dtype=np.uint8)
# fmt: on
ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, TERRAIN, SKY, PERSON, CAR = range(len(CLASSES))
OTHER = len(CLASSES)  # bins: drawn and shaded like a class, labelled IGNORE
IGNORE = 255

GROUND, FACADE, FRONT = range(3)  # the plane of a part: y = 0; x = `at`; z = `at`
SUPERSAMPLE = 2
FAR = 90.0
SEVERITY = (1.4, 1.4)  # of the beta distribution that places a camera image between the two styles
LAMP_LIGHT = np.array([250.0, 214.0, 140.0], dtype=np.float32)
BLACK = np.full(3, 26.0)


@dataclass(frozen=True)
class Style:
    """How a domain looks (the fields up to `noise`, blended for each image) and how its streets are furnished."""

    colours: np.ndarray  # (K + 1, 3 variants, 3)
    grain: np.ndarray  # (K + 1,) strength of the rough texture
    joints: np.ndarray  # (K + 1,) strength of the brick and paving pattern
    windows: Colour
    lamps: float  # share of lit windows
    sun: float  # contrast between the sunny and the shady side of the street
    clouds: float
    haze: float  # 1 / metres
    haze_colour: Colour
    tint: np.ndarray  # (3,) gain of each channel; below 1 is towards night
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
