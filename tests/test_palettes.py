"""Colours that are told apart, and what a report says in words."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gta2cs import html, report
from gta2cs.classes import ClassSet, rainbow
from gta2cs.evaluation import Score
from gta2cs.palettes import lab, on_white


def closest(colours: np.ndarray) -> float:
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab(colours), 2))


def test_lab_of_known_colours() -> None:
    known = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]])
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(lab(known), expected, atol=0.02)


@pytest.mark.parametrize(("count", "least"), [(2, 60), (11, 45), (19, 35), (40, 20)])
def test_automatic_colours_are_far_apart(count: int, least: float) -> None:
    colours = rainbow([str(i) for i in range(count)])
    assert colours.shape == (count, 3)
    assert colours.dtype == np.uint8
    assert closest(colours) > least
    assert closest(np.vstack([colours, [[0, 0, 0], [255, 255, 255]]])) > least, "one looks like ignored or like paper"
    longer = rainbow([str(i) for i in range(count + 3)])
    assert np.array_equal(longer[:count], colours)  # a class more changes no colour


@pytest.mark.parametrize(("count", "least"), [(2, 35), (11, 30), (19, 25), (40, 15)])
@pytest.mark.parametrize("name", ["background", "Void", "back ground", "unlabelled"])
def test_a_background_is_dark_grey_and_the_others_show_on_it(name: str, count: int, least: float) -> None:
    colours = rainbow([name, *(str(i) for i in range(count - 1))])
    assert colours[0].tolist() == [64, 64, 64]
    assert lab(colours[1:])[:, 0].min() > lab(colours[:1])[0, 0] + 15
    assert closest(np.vstack([colours[1:], [[64, 64, 64], [255, 255, 255]]])) > least
    assert lab(colours[:1])[0, 0] > 20, "looks like ignored"
    assert np.array_equal(rainbow(["road", name])[1], colours[0])
    assert not np.array_equal(rainbow([f"{name} cell", "road"])[0], colours[0]), "a class of its own"


def test_lines_show_on_white() -> None:
    assert on_white(np.array([10, 20, 200])).tolist() == [10, 20, 200]
    assert lab(on_white(np.array([255, 255, 0]))[None])[0, 0] <= 75


def score(**iou: float) -> Score:
    return Score(iou, {"mIoU": float(np.nanmean(list(iou.values())))})


def test_the_gain_is_said_with_the_classes_that_made_it() -> None:
    rows = {"source_only": score(road=50.0, pole=10.0, car=float("nan")), "dacs": score(road=70.5, pole=8.0, car=3.0)}
    rows["source_only"].means["mIoU"], rows["dacs"].means["mIoU"] = 30.0, 39.2
    text = report.gain_sentence(rows)
    assert text.startswith("**dacs gains 9.2 points of mIoU over source_only** (30.0 → 39.2).")
    assert text.endswith("It gains most in road +20.5. It loses most in pole −2.0.")
    assert report.gain_sentence(dict(list(rows.items())[:1])) == ""
    assert report.gain_sentence(dict(reversed(rows.items()))) == "", "a gain is over source-only"
    (_, before), (_, after) = rows.items()
    again = {"source_only": before, "source_only + x": after, "source_only (stage 2)": after}
    assert report.gain_sentence({**again, "chosen": after}).startswith("**chosen is level with source_only (stage 2)**")
    text = report.gain_sentence({"source_only": after, "dacs": before})
    assert text.startswith("**dacs loses 9.2 points of mIoU against source_only**")
    assert report.gain_sentence({"source_only": before, "chosen": before}) == (
        "**chosen is level with source_only** (mIoU 30.0)."
    )


def test_no_best_in_a_column_of_zeros(tmp_path: Path) -> None:
    page = html.render("| net | a | b |\n|---|---:|---:|\n| x | 0.0 | 1.0 |\n| y | 0.0 | 2.0 |\n", tmp_path)
    assert page.count('class="best"') == 1


def test_curves_have_the_colours_of_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ClassSet(("road", "car"), np.array([[128, 64, 128], [0, 0, 142]], np.uint8))
    kept = [{"step": k, "terms": {"source": 1.0}, "kept": {"road": 0.5, "car": 0.2}} for k in (1, 2)]
    stage = {"name": "dacs", "steps": 2, "losses": kept, "scores": []}
    drawn: dict[str, list[float]] = {}

    def note(figure, path):
        axis = next(a for a in figure.axes if "sure enough" in a.get_title())
        drawn.update({line.get_label(): list(line.get_color()) for line in axis.lines})
        assert [a.get_title() for a in figure.axes] == ["loss", axis.get_title()], "nothing was scored"
        left, right = (a.get_position() for a in figure.axes)
        assert right.x0 - left.x1 < 0.2, "a gap where the other two would be"

    monkeypatch.setattr(report, "_save", note)
    report.save_curves(tmp_path / "curves.png", [stage], classes)
    assert np.allclose(drawn["road"], np.array([128, 64, 128]) / 255)
    assert np.allclose(drawn["car"], np.array([0, 0, 142]) / 255)


def test_curves_show_the_score_of_the_choice_and_single_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point between two steps without the class has no line; it has a marker."""
    kept = [{}, {"car": 0.2}, {}, {"car": 0.3}, {"car": 0.4}, {}]
    losses = [{"step": k, "terms": {"source": 1.0}, "kept": {"road": 0.5, **one}} for k, one in enumerate(kept)]
    scores = {"scores": {"balanced_consistency": 0.5, "mirror_consistency": 0.8}}
    free = [{"step": 5, "nets": {"student": scores}}]
    stage = {"name": "dacs", "steps": 6, "losses": losses, "scores": [], "label_free": free, "source_only": scores}
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.append(figure))
    report.save_curves(tmp_path / "curves.png", [stage])
    report.save_curves(tmp_path / "curves.png", [stage], score="mirror_consistency")
    _, score, shares = figures[0].axes
    assert score.get_title() == "balanced consistency on target, %, no labels"
    assert [list(line.get_ydata()) for line in score.lines] == [[50.0], [50.0, 50.0]]
    assert {line.get_label(): line.get_markevery() for line in shares.lines} == {"road": None, "car": [1]}
    assert list(figures[1].axes[1].lines[0].get_ydata()) == [80.0]


def test_confidence_has_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ClassSet(("road",), np.array([[128, 64, 128]], np.uint8))
    row = {"image": np.zeros((8, 8, 3), np.uint8), "net": np.zeros((8, 8), np.uint8), "confidence": np.ones((8, 8))}
    ticks = []

    def note(figure, path):
        ticks.extend(tick for axis in figure.axes for inset in axis.child_axes for tick in inset.get_xticks())

    monkeypatch.setattr(report, "_save", note)
    report.save_panels(tmp_path / "panels.png", [row, row], classes)
    assert ticks == [0, 0.5, 1]


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (1, 1)])
def test_panels_of_a_strip_are_a_picture_of_usual_size(tmp_path: Path, size: tuple[int, int]) -> None:
    """In the proportions of 2000 x 1 pixels it would have two million rows."""
    classes = ClassSet(("road",), np.array([[128, 64, 128]], np.uint8))
    row = {"image": np.zeros((*size, 3), np.uint8), "net": np.zeros(size, np.uint8), "confidence": np.ones(size)}
    report.save_panels(tmp_path / "panels.png", [row, row], classes)
    with Image.open(tmp_path / "panels.png") as picture:
        assert 100 < min(picture.size) <= max(picture.size) < 3000


def test_long_logs_are_running_means_and_stages_have_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [
        {"step": k, "terms": {"source": 1.0 + k % 2}, "kept": {"road": k % 2, **({"car": 0.3} if k % 9 else {})}}
        for k in range(200)
    ]
    stage = {"name": "dacs", "steps": 200, "losses": losses, "scores": []}
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.append(figure))
    report.save_curves(tmp_path / "curves.png", [stage, stage])
    left, right = figures[0].axes
    assert all(sum(list(line.get_xdata()) == [200, 200] for line in axis.lines) == 1 for axis in (left, right))
    lines = {
        axis: [np.array(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) > 2]
        for axis in figures[0].axes
    }
    mean, raw = lines[left][:2]
    assert np.array_equal(raw, [1.0 + k % 2 for k in range(200)])
    assert np.allclose(mean, [raw[max(0, k - 2) : k + 3].mean() for k in range(200)])
    road, car = lines[right][:2]
    assert np.allclose(road, 100 * (mean - 1)), "in percent, as the other axes"
    assert np.array_equal(np.isnan(car), [k % 9 == 0 for k in range(200)]), "a gap stays a gap"
    assert np.allclose(car[~np.isnan(car)], 30)
