"""The count of GPU work: known calls have known counts, and no operation does more than the JSON says."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_cost, gpu_step, harness, kernels, workloads
from contract.checks import NoHostRead, needs_fake_cuda

pytestmark = needs_fake_cuda
ROWS = {w.name: w for w in gpu_cost.rows()}
COUNTED = gpu_cost.Counts(gpu_cost.parse([]).results)
POINTS = 4 * 8 * 16 * 16 * 4  # bytes of `x`


def counted(call: object, *shapes: tuple[int, ...], grad: bool = False, compiled: bool = False) -> kernels.Cost:
    with kernels.fake_card():
        made = [torch.empty(shape, device="cuda", requires_grad=grad) for shape in shapes or [(4, 8, 16, 16)]]
        inputs = made if grad else []
        return kernels.count(lambda: call(*made), held=made, inputs=inputs, compiled=compiled)  # type: ignore[operator]


# --- the meter ------------------------------------------------------------------------------------


def test_a_pointwise_kernel_reads_and_writes_once() -> None:
    cost = counted(lambda x: x + 1)
    assert (cost.launches, cost.bytes, cost.peak) == (1, 2 * POINTS, POINTS)


def test_an_operand_counts_once_and_in_place_reads_and_writes() -> None:
    assert counted(lambda x: x * x).bytes == 2 * POINTS
    cost = counted(lambda x, y: x.clone().add_(y), (4, 8), (4, 8))
    assert (cost.launches, cost.bytes) == (2, (2 + 3) * 4 * 8 * 4)


def test_views_and_allocations_are_free() -> None:
    cost = counted(lambda x: (x.flatten(2).mT[:, 1:].expand_as(x.flatten(2).mT[:, 1:]), torch.empty_like(x)))
    assert (cost.launches, cost.bytes, cost.peak) == (0, 0, POINTS)


def test_an_expanded_operand_is_read_as_it_lies() -> None:
    cost = counted(lambda x: x.expand(16, 8).clone(), (1, 8))
    assert cost.bytes == 8 * 4 + 16 * 8 * 4


def test_composites_are_opened() -> None:
    assert counted(lambda x: x.logsumexp(1)).names == [
        *("amax", "abs", "eq", "masked_fill_", "sub", "exp_", "sum", "log_", "add_"),
    ]
    assert counted(lambda x: x.masked_fill(x > 0, 1.0)).names == ["gt", "clone", "masked_fill_"]
    assert counted(lambda x: F.pad(x, (1, 1))).names == ["new_full", "copy_"]
    assert counted(lambda x: x.var(1)).launches == 1


def test_custom_operators_are_opened() -> None:
    def call(*maps: Tensor) -> Tensor:
        return torch.ops.udakit.soft_cross_entropy(*maps, 1.0, False)[0]

    cost = counted(call, *[(2, 5, 8, 8)] * 2)
    assert cost.launches >= 4
    assert any("softmax" in name for name in cost.names)


def test_an_operator_without_a_rule_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="No rule says how many kernels"):
        counted(lambda x: torch.linalg.inv_ex(x), (4, 4))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backward_walk_is_that_of_autograd(reduction: str) -> None:
    """On the CPU both can run: the same gradients, through broadcasting, a custom function and a tensor used twice."""
    x, scale = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    leaves = [x.requires_grad_(), scale.requires_grad_()]
    out = F.softmax(x * scale, 1) * x
    out = out.mean() if reduction == "mean" else out
    incoming = torch.rand_like(out)
    expected = torch.autograd.grad(out, leaves, incoming, retain_graph=True)
    found = kernels.backward([out], [incoming], leaves)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_backward_walk_knows_idle_leaves() -> None:
    """A leaf that the graph does not reach has no gradient, whatever memory its node had."""
    leaves = [torch.randn(3, requires_grad=True) for _ in range(200)]
    out = (leaves[7] * leaves[150]).sum()
    found = kernels.backward([out], [torch.ones_like(out)], leaves)
    assert [i for i, grad in enumerate(found) if grad is not None] == [7, 150]


def test_backward_adds_what_arrives_twice() -> None:
    cost = counted(lambda x: (x.exp() + x.sin()).sum(), grad=True)
    assert cost.names == ["exp", "sin", "add", "sum", "mul", "cos", "mul", "add"] or "add" in cost.names[4:]


# --- fusion ---------------------------------------------------------------------------------------


def test_a_chain_is_one_kernel_and_moves_its_ends() -> None:
    cost = counted(lambda x: ((x + 1) * 2).relu().exp(), compiled=True)
    assert (cost.launches, cost.bytes) == (1, 2 * POINTS)


def test_a_softmax_is_one_kernel() -> None:
    cost = counted(lambda x: x.softmax(1), compiled=True)
    assert (cost.launches, cost.bytes) == (1, 2 * POINTS)


def test_nothing_fuses_across_a_product() -> None:
    cost = counted(lambda x: ((x + 1) @ (x + 1)).relu(), (64, 64), compiled=True)
    assert cost.launches >= 3


def test_a_sum_of_everything_takes_two_steps_when_it_is_large() -> None:
    assert counted(lambda x: (x + 1).sum(), (64, 64), compiled=True).launches == 1
    assert counted(lambda x: (x + 1).sum(), (512, 512), compiled=True).launches == 2


def test_groups_wait_for_each_other_without_a_circle() -> None:
    """The last product joins neither side of the matrix product that it needs."""

    def call(x: Tensor) -> Tensor:
        y = x + 1
        return y * (y @ y)

    cost = counted(call, (64, 64), compiled=True)
    assert cost.launches == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_cost.DEFAULTS)
def test_a_call_with_default_options_compiles(name: str) -> None:
    """One graph, which the contract asks of the options of its examples only; what draws is compared by its shapes."""
    workload = ROWS[name + gpu_cost.MARK]
    plain, compiled = (
        workloads.build_case(workload, "tiny", compiled=how, rivals=False, backend="aot_eager").contestants["udakit"]
        for how in (False, True)
    )
    draws = name in ("ClassMix", "StrongAugment")
    for found, expected in zip(compiled(), plain(), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if not draws:
            torch.testing.assert_close(found, expected)


# --- a step ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dacs_step_could_be_captured_in_a_graph() -> None:
    """Nothing reads a value on the host or copies between devices, and no value decides a shape.

    Fake tensors have no values, and refuse whoever asks; the mode refuses what a card would wait for.
    """
    parts = gpu_step.count_step("dacs", modes=(NoHostRead(),))
    found = {part: len(parts.kernels(part)) for part in dict.fromkeys(parts.of)}
    assert {"mixing", "augmentation", "selection", "cross-entropy", "EMA"} <= set(found)
    assert sum(n for part, n in found.items() if part != gpu_step.NETS) <= gpu_step.WANTED["dacs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_step.COUNTED)
def test_no_step_does_more_than_before(name: str) -> None:
    """Kernels and bytes outside the nets, against the JSON: `python benchmarks/gpu_step.py` after a wanted change."""
    before = json.loads((harness.RESULTS / "gpu_step.json").read_text())[name]["parts"]
    parts = gpu_step.count_step(name)
    ours = [k for part in set(parts.of) - {gpu_step.NETS} for k in parts.kernels(part)]
    kernels, moved = (sum(c[key] for p, c in before.items() if p != gpu_step.NETS) for key in ("kernels", "bytes"))
    assert len(ours) <= gpu_cost.GROWTH * kernels, f"{len(ours)} kernels, were {kernels}"
    assert sum(k.bytes for k in ours) <= gpu_cost.GROWTH * moved


# --- the page -------------------------------------------------------------------------------------


def test_the_roofline_takes_the_longest() -> None:
    card = gpu_cost.Card.parse("some card, 1000 GB/s, 10 TFLOP/s, 5 us")
    assert card.seconds("1 100 0") == pytest.approx(5e-6)
    assert card.seconds(gpu_cost.together([(1, 10**9, 0), (1, 100, 0)])) == pytest.approx(1e-3 + 5e-6)
    assert card.seconds("2 2 40000000000") == pytest.approx(4e-3)
    with pytest.raises(Exception, match="Expected a card"):
        gpu_cost.Card.parse("A100")


def test_the_table_says_what_was_counted() -> None:
    text = gpu_cost.summarize(COUNTED, gpu_cost.Card.parse(gpu_cost.CARD))
    for name in gpu_cost.DEFAULTS:
        assert f"| `{name}` |" in text


KEYS = [(w.name, mode) for w in ROWS.values() for mode in gpu_cost.MODES[: 1 + bool(w.grad)]]


def test_the_json_holds_no_row_that_is_gone() -> None:
    assert not set(COUNTED.rows) - {gpu_cost.row_key(*key) for key in KEYS}
    assert {gpu_cost.row_key(name + gpu_cost.MARK, "forward") for name in gpu_cost.DEFAULTS} <= set(COUNTED.rows)


@pytest.mark.parametrize(("name", "mode"), KEYS)
def test_no_operation_does_more_than_before(name: str, mode: str) -> None:
    """Kernels and bytes of an eager call, against the JSON: `gpu_cost.py --ops NAME --again` after a wanted change."""
    row = COUNTED.rows.get(gpu_cost.row_key(name, mode))
    if row is None:
        pytest.skip("not in the JSON: it waits for the device, or python benchmarks/gpu_cost.py has not counted it yet")
    if "udakit, eager" not in row["contestants"]:
        pytest.skip(str(row["skipped"]["udakit, eager"]))
    if COUNTED.torch.split(".")[:2] != torch.__version__.split(".")[:2]:
        pytest.skip(f"counted with torch {COUNTED.torch}: another one launches other kernels")
    cost, _ = gpu_cost.cost_of(ROWS[name], mode)
    before = row["contestants"]["udakit, eager"]
    assert cost.launches <= gpu_cost.GROWTH * before["kernels"], f"{cost.launches} kernels, were {before['kernels']}"
    assert cost.bytes <= gpu_cost.GROWTH * before["bytes"], f"{cost.bytes} bytes, were {before['bytes']}"
