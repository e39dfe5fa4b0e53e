"""On a real card: values, gradients, no waiting, CUDA graphs and autocast, over every operation of the registry.

Without a card everything is one skip a check, and the logic of the checks runs over a few operations on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

import udakit
from benchmarks.gpu_step import COUNTED
from benchmarks.step_overhead import ROWS, Clock, Step
from contract import card, checks
from contract.devices import moved
from contract.registry import Call, Operation, all_operations

CARD = torch.cuda.is_available()
needs_card = pytest.mark.skipif(not CARD, reason="needs a GPU")
every_operation = pytest.mark.parametrize(
    "op", all_operations() if CARD else [pytest.param(None, marks=needs_card)], ids=lambda op: op.name if op else "all"
)
# Why no graph can be captured, beside what reads from the device: by the name of the entry.
NOT_CAPTURED: dict[str, str] = {}


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Float32 is float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@every_operation
def test_values_and_gradients_are_those_of_the_cpu(op: Operation) -> None:
    card.agrees(checks.as_used(op), "cuda")


@every_operation
def test_nothing_waits_for_the_card(op: Operation) -> None:
    card.waits_for_nothing(checks.as_used(op), "cuda")


@every_operation
def test_captured_in_a_graph(op: Operation) -> None:
    if op.name in NOT_CAPTURED:
        pytest.skip(f"no graph: {NOT_CAPTURED[op.name]}")
    card.is_captured(checks.as_used(op))


@every_operation
def test_autocast(op: Operation) -> None:
    card.under_autocast(checks.as_used(op), "cuda")


@needs_card
def test_what_has_no_graph(record_property: Callable[[str, object], None]) -> None:
    """The run's summary prints what is exempt (see conftest.py)."""
    reading = {op.name: why for op in all_operations() if (why := card.reads(op))}
    assert set(NOT_CAPTURED) <= {op.name for op in all_operations()}
    record_property(
        "operations without a CUDA graph in the contract",
        [f"{name}: {why}" for name, why in {**reading, **NOT_CAPTURED}.items()],
    )


# --- a step -------------------------------------------------------------------------------------------------------


def step_of(name: str, device: str, size: int = 128) -> Step:
    net = {**ROWS[name].net, "weights": "random"}
    return Step(replace(ROWS[name], size=size, net=net), device=device)


@needs_card
@pytest.mark.parametrize("name", COUNTED)
def test_no_step_waits_for_the_card(name: str) -> None:
    """Forward, backward, optimiser and teacher; the draws, too. Two steps to warm up."""
    step = step_of(name, "cuda")
    for _ in range(2):
        step.take(Clock())
    with card.refusing_to_wait("cuda"):
        step.take(Clock())


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_no_step_would_wait(name: str) -> None:
    """As far as the CPU can tell; its optimiser reads its own counter, which lies on the host in any case.

    A tensor made of numbers of the host is no operator to the mode, and is refused by itself.
    """
    step = step_of(name, "cpu", size=64)
    step.optimizer = mock.Mock()
    refused = mock.Mock(side_effect=AssertionError("a tensor of numbers of the host"))
    with (
        card.refusing_to_wait("cpu"),
        mock.patch.object(torch, "tensor", refused),
        mock.patch.object(torch, "as_tensor", refused),
        mock.patch.object(Tensor, "new_tensor", refused),
    ):
        step.take(Clock())


# --- the checks themselves, on the CPU ----------------------------------------------------------------------------

HERE = ("cross_entropy", "ClassMix", "StrongAugment", "supervised_pixel_contrast_loss", "LabelFreeScores", "EMATeacher")
HERE += ("draw_box_mask", "RareClassSampler", "adapt_batch_norm", "FeatureTap", "crop_detail", "check_labels")
BY_NAME = {op.name: op for op in all_operations()}


@pytest.mark.parametrize("name", HERE)
def test_the_checks_pass_on_the_cpu(name: str) -> None:
    op = checks.as_used(BY_NAME[name])
    card.agrees(op, "cpu")
    card.under_autocast(op, "cpu")
    if card.reads(op) is None:
        card.waits_for_nothing(op, "cpu")


@pytest.mark.parametrize("name", checks.COARSER)
def test_a_coarser_tolerance_is_that_of_float32(name: str) -> None:
    """Float32 is further from float64 than the table allows, and not as far as the exception."""
    op, missed = BY_NAME[name], 0
    for seed in range(40):
        ex = checks.make(op, dtype=torch.float32, seed=seed)
        precise = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in ex.leaves]
        expected = checks.run(checks.Example(op, precise, ex.spec, ex.roles, ex.grad))
        found = checks.run(ex)
        expected = [x.float() for x in expected]
        checks.assert_equal(found, expected, "float32", coarser=checks.COARSER[name])
        try:
            checks.assert_equal(found, expected, "float32")
        except AssertionError:
            missed += 1
    assert missed


def test_one_seed_draws_the_same_on_every_device() -> None:
    """The numbers are those of the CPU, where the operation asks for another device too."""
    expected = udakit.draw_box_mask(2, (8, 8), generator=torch.Generator().manual_seed(3))
    with card.DrawnOnTheCPU(3):
        found = udakit.draw_box_mask(2, (8, 8), generator=torch.Generator().manual_seed(4))
        there = torch.rand(3, device="meta")
    assert torch.equal(found, expected)
    assert there.device.type == "meta"


def broken(function: Callable[..., Tensor]) -> Operation:
    return replace(BY_NAME["entropy_loss"], function=function, module=None)


def test_other_values_and_waiting_are_found() -> None:
    calls: list[int] = []

    def drifts(logits: Tensor, **options: object) -> Tensor:
        calls.append(1)
        return logits.sum() * len(calls)

    def asks(logits: Tensor, **options: object) -> Tensor:
        return logits.sum() * logits.sum().item()

    with pytest.raises(AssertionError, match="on cpu"):
        card.agrees(broken(drifts), "cpu")
    with pytest.raises(AssertionError, match="reads a value on the host"):
        card.waits_for_nothing(broken(asks), "cpu")


def test_a_call_moves_with_all_that_it_holds() -> None:
    net = torch.nn.Linear(2, 2)
    call = Call((net, [torch.ones(1)]), {"valid": torch.ones(2)}, {"device": "cpu", "mode": "mean", "size": (1, 2)})
    there = moved(call, "meta")
    assert there.args[0] is not net
    assert {x.device.type for x in (there.args[0].weight, there.args[1][0], there.tensors["valid"])} == {"meta"}
    assert there.options == {"device": "meta", "mode": "mean", "size": (1, 2)}
    assert net.weight.device.type == "cpu"
