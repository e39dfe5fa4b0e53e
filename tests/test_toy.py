"""The built-in toy pair: a pure function of its seed, with every class in both domains."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gta2cs.toy import CAMERA, CLASSES, IGNORE, PALETTE, render

DOMAINS = ("game", "camera")


def scenes(domain, count=40, size=(64, 96)):
    images, labels = zip(*(render(domain, seed, size) for seed in range(count)), strict=True)
    return np.stack(images), np.stack(labels)


def test_palette_has_one_colour_a_class():
    assert PALETTE.shape == (len(CLASSES), 3)
    assert PALETTE.dtype == np.uint8
    assert len(np.unique(PALETTE, axis=0)) == len(CLASSES) == len(set(CLASSES))


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_seed_gives_the_same_scene_whatever_was_drawn_before(domain):
    image, label = render(domain, 7)
    np.random.seed(1)
    render("game", 3)
    again, label_again = render(domain, 7)
    other, _ = render(domain, 8)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    assert (image != other).mean() > 0.3


@pytest.mark.parametrize("domain", DOMAINS)
def test_leaves_the_global_generator_alone(domain):
    before = np.random.get_state()[1].copy()
    render(domain, 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("size", [(32, 32), (64, 160), (128, 192), (160, 96)])
@pytest.mark.parametrize("domain", DOMAINS)
def test_any_size(domain, size):
    image, label = render(domain, 0, size)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8
    assert image.flags.c_contiguous
    assert label.flags.c_contiguous


@pytest.mark.parametrize("domain", DOMAINS)
def test_ids_are_classes_or_ignore_and_every_class_is_common(domain):
    _, labels = scenes(domain)
    assert set(np.unique(labels)) <= {*range(len(CLASSES)), IGNORE}
    assert 0 < (labels == IGNORE).mean() < 0.02
    for index, name in enumerate(CLASSES):
        present = (labels == index).any(axis=(1, 2)).mean()
        assert present > 0.4, f"{name} is in {present:.0%} of the images"
        assert (labels == index).mean() > 0.004, name


def test_the_domains_differ_and_overlap():
    game, camera = scenes("game")[0], scenes("camera")[0]
    contrast = {name: images.astype(float).std(axis=(1, 2, 3)) for name, images in (("game", game), ("camera", camera))}
    assert contrast["game"].mean() > 1.3 * contrast["camera"].mean()
    assert contrast["camera"].max() > 0.9 * contrast["game"].min()  # the easy end of the camera world


def test_road_and_sidewalk_move_towards_each_other():
    def road_over_sidewalk(domain):
        images, labels = scenes(domain)
        grey = images.mean(axis=-1)
        return grey[labels == CLASSES.index("road")].mean() / grey[labels == CLASSES.index("sidewalk")].mean()

    assert road_over_sidewalk("game") < 0.6
    assert road_over_sidewalk("camera") > 1.3 * road_over_sidewalk("game")


def test_the_far_end_of_the_camera_world_swaps_road_and_sidewalk():
    grey = CAMERA.colours.mean(axis=(1, 2))
    assert grey[CLASSES.index("road")] > 1.3 * grey[CLASSES.index("sidewalk")]
    assert CAMERA.joints[CLASSES.index("road")] > CAMERA.joints[CLASSES.index("sidewalk")]


def test_unknown_domain():
    with pytest.raises(ValueError, match="Expected `domain` to be 'game' or 'camera', but got 'film'"):
        render("film", 0)
