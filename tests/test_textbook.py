"""Each textbook version agrees with its operation, in value and in gradient: equal work is what the benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.workloads import CLASSES, ELSEWHERE, SIZES, Workload, build_case, workloads
from contract.registry import Sample, all_operations
from textbook import NO_TEXTBOOK, TEXTBOOK

ROWS = {w.name: w for w in workloads()}
# Draws are compared by their statistics below, approximations with the tolerance that they document.
DRAWS = ("draw_classes", "ClassMix", "CrossDomainMix", "draw_box_mask", "draw_block_mask")
APPROXIMATE = ("ClassQuantileSelector", "ConfidenceThreshold", "histogram_transfer", "color_transfer", "strong_augment")
SAMPLES = {
    "supervised_pixel_contrast_loss": {"h": 12, "w": 12},  # few pixels: all are drawn
    "fourier_transfer": {"h": 204, "w": 210},  # a square of more than one frequency
}
STATEFUL = ("ClassPrototypes.update", "EMATeacher.update")
COMPARED = sorted(TEXTBOOK.keys() - {*DRAWS, *APPROXIMATE, *STATEFUL})


def sample(workload: Workload, **sizes: int) -> Sample:
    """Small, in float64; every class has several pixels."""
    options: dict[str, int] = {"n": 2, "c": 5, "d": 6, "h": 16, "w": 16, **SAMPLES.get(workload.name, {}), **sizes}
    return Sample(3, dtype=torch.float64, **options)


def results(name: str, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
    workload = ROWS[name]
    case = build_case(workload, "tiny", torch.float64, backward=backward, sample=sample(workload))
    assert "textbook" in case.contestants, case.skipped
    return case.contestants["udakit"](), case.contestants["textbook"]()


def test_every_row_has_a_textbook_or_a_reason() -> None:
    assert set(ROWS) == TEXTBOOK.keys() | NO_TEXTBOOK.keys()
    assert not TEXTBOOK.keys() & NO_TEXTBOOK.keys()
    assert all(len(why.split()) > 5 for why in NO_TEXTBOOK.values())


def test_every_operation_of_the_registry_has_a_row() -> None:
    names = {op.name.partition("[")[0] for op in all_operations()}
    assert names - set(ROWS) == set(ELSEWHERE)
    assert list(SIZES)[1:] == ["small", "medium", "large"]
    assert CLASSES == 19


@pytest.mark.parametrize("backward", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("name", COMPARED)
def test_agrees(name: str, backward: bool) -> None:
    if backward and not ROWS[name].grad:
        pytest.skip("no gradient")
    ours, theirs = results(name, backward)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


def test_a_wrong_textbook_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TEXTBOOK["entropy_loss"]
    monkeypatch.setitem(TEXTBOOK, "entropy_loss", lambda *args, **options: 1.001 * right(*args, **options))
    with pytest.raises(AssertionError):
        test_agrees("entropy_loss", False)


def test_agrees_class_quantile() -> None:
    """A bin is kept whole: a pixel beside the threshold may differ."""
    ours, theirs = results("ClassQuantileSelector", False)
    assert (ours[0] == theirs[0]).float().mean() > 0.99
    assert (ours[3] - theirs[3]).abs().max() < 0.03


def test_agrees_confidence_threshold() -> None:
    """A bin is as wide as it is; the shares above its edges are close."""
    ours, theirs = results("ConfidenceThreshold", False)
    assert float(ours[0]) == pytest.approx(float(theirs[0]))
    assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=0.01)
    assert float(ours[2]) == pytest.approx(float(theirs[2]), abs=0.01)


def test_agrees_histogram() -> None:
    """Values are told apart to a bin of the range."""
    (ours,), (theirs,) = results("histogram_transfer", False)
    assert (ours - theirs).abs().mean() < 2e-2 * theirs.std()


def test_agrees_color() -> None:
    """Its constants have more digits than kornia's."""
    (ours,), (theirs,) = results("color_transfer", False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_agrees_strong_augment() -> None:
    """Away from the border, where kornia mirrors and udakit averages over what lies in the image."""
    workload = ROWS["strong_augment"]
    case = build_case(workload, "tiny", torch.float64, sample=sample(workload, n=8, h=24, w=24))
    (ours,), (theirs,) = case.contestants["udakit"](), case.contestants["textbook"]()
    inside = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=1e-4, atol=1e-4)


def test_agrees_prototypes() -> None:
    workload = ROWS["ClassPrototypes.update"]
    call = workload.example(sample(workload))
    call.options["momentum"] = 0.3
    torch.testing.assert_close(
        workload.use(call)(*call.args).double(),
        TEXTBOOK["ClassPrototypes.update"](*call.args, **call.options).double(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_agrees_teacher() -> None:
    workload = ROWS["EMATeacher.update"]
    student = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    call = workload.example(sample(workload))
    teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    teacher.load_state_dict(student.state_dict())
    mine = workload.use(type(call)((teacher, student), {}, {"decay": 0.7}))
    with torch.no_grad():
        for x in student.parameters():
            x.add_(1)
    mine(teacher, student)
    TEXTBOOK["EMATeacher.update"](teacher, student, decay=0.7)
    averaged = mine.__closure__[0].cell_contents.module  # type: ignore[attr-defined]
    for a, b in zip(averaged.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_alike(name: str) -> None:
    """The share of True over many draws is that of the operation."""
    workload = ROWS[name]
    case = build_case(workload, "tiny", sample=Sample(1, n=8, c=6, d=4, h=32, w=32))

    def share(step: Callable[[], Any]) -> float:
        return float(torch.stack([step()[-1].float().mean() for _ in range(60)]).mean())

    assert share(case.contestants["udakit"]) == pytest.approx(share(case.contestants["textbook"]), abs=0.04)


@pytest.mark.parametrize("name", ["pixel_contrast_loss", "supervised_pixel_contrast_loss", "boundary_band"])
def test_peer_agrees(name: str) -> None:
    pytest.importorskip("pytorch_metric_learning")
    case = build_case(ROWS[name], "tiny", sample=Sample(3, n=1, c=5, d=6, h=12, w=12))
    (peer,) = [k for k in case.contestants if k not in ("udakit", "textbook")]
    (ours,), (theirs,) = case.contestants["udakit"](), case.contestants[peer]()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
