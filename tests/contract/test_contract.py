"""Every check of `checks.py` over every operation of the registry, as test_<check>[operation]."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import udakit
from contract import checks
from contract.registry import CHECKS, OF_LARGE_MAPS, PARTS, Operation, Sample, all_operations


def _base(op: Operation) -> str:
    """The public name: entries of one name are told apart as "name[variant]"."""
    return op.name.partition("[")[0]


every_operation = pytest.mark.parametrize("op", all_operations(), ids=lambda op: op.name)


def _test(check: str) -> Callable[[Operation], None]:
    @every_operation
    def test(op: Operation) -> None:
        if check in op.exempt:
            pytest.skip(f"exempt: {op.exempt[check]}")
        torch.manual_seed(0)
        getattr(checks, check)(op if check == "module" else checks.as_used(op))

    test.__name__ = f"test_{check}"
    test.__doc__ = getattr(checks, check).__doc__
    return test


for _check in CHECKS:
    globals()[f"test_{_check}"] = _test(_check)


# Size from which a map is large, and below which an image is sorted: the examples are far smaller than both.
THRESHOLDS = {"udakit._reduce.eager.LARGE": 1, "udakit._reduce.eager.SMALL": 1, "udakit.mixing.histogram.EXACT": 0}
THRESHOLDS |= {"udakit.prototypes._distances.SMALL": 0}


@pytest.mark.parametrize("check", OF_LARGE_MAPS)
@pytest.mark.parametrize(
    "op", [op for op in all_operations() if op.kind != "draw" and op.space != "none"], ids=lambda op: op.name
)
def test_large_maps(op: Operation, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done by other means for large maps on the CPU is held to the same, on the maps of the examples."""
    if check in op.exempt:
        pytest.skip(f"exempt: {op.exempt[check]}")
    for name, value in THRESHOLDS.items():
        monkeypatch.setattr(name, value)
    torch.manual_seed(0)
    getattr(checks, check)(checks.as_used(op))


# What has no value without a pixel is NaN, as its docstring says.
NAN_WITHOUT_IMAGES = {"consistency_score[background]", "ConfidenceThreshold"}


@every_operation
def test_no_images(op: Operation) -> None:
    """A batch of no images passes: losses are 0, and nothing is NaN that its docstring does not say."""
    out, gradients = checks.run_with_gradients(checks.make(op, n=0))
    if op.kind == "loss":
        assert all((x == 0).all() for x in out)
    elif op.name not in NAN_WITHOUT_IMAGES:
        assert not any(x.isnan().any() for x in out if x.is_floating_point())
    assert all(x.isfinite().all() for x in gradients)


# What has no value without a pixel is NaN; the nets of these examples, as of users, refuse an image without pixels.
NAN_WITHOUT_PIXELS = {*NAN_WITHOUT_IMAGES, "consistency_score", "view_consistency", "mirror_consistency"}
WITH_A_NET = {"EMATeacher", "FeatureTap"}


@pytest.mark.parametrize("side", ["h", "w"])
@every_operation
def test_no_pixels(op: Operation, side: str) -> None:
    """A map with a side of 0 passes, with losses of 0, or an argument is refused by name."""
    if _base(op) in WITH_A_NET:
        pytest.skip("it is the net that refuses such an image")
    if side == "w" and _base(op).startswith("upsampled_"):
        pytest.skip("the example has one column less than half of the width")
    try:
        out, gradients = checks.run_with_gradients(checks.make(op, **{side: 0}))
    except (TypeError, ValueError) as error:
        if str(error).startswith("Expected `"):
            return
        raise
    if op.kind == "loss":
        assert all((x == 0).all() for x in out)
    elif op.name not in NAN_WITHOUT_PIXELS:
        assert not any(x.isnan().any() for x in out if x.is_floating_point())
    assert all(x.isfinite().all() for x in gradients)


def _of_inputs(ex: checks.Example, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The float outputs with other values of the arguments that take a gradient."""
    for i, x in zip(ex.grad, inputs, strict=True):
        ex = ex.change(i, x)
    return tuple(x for x in checks.run(ex) if x.is_floating_point())


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("way", ["jvp", "dual"])
@every_operation
def test_forward_mode(op: Operation, way: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivative in forward mode is that of `backward`, or an error: torch takes what an operator drops for 0."""
    ex = _learning(op, large, monkeypatch)
    primals, function = tuple(x.detach().clone() for x in ex.inputs()), partial(_of_inputs, ex)
    g = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(x.shape, dtype=x.dtype, generator=g) for x in primals)

    try:
        if way == "jvp":
            slopes = torch.func.jvp(function, primals, tangents)[1]
        else:
            with forward_ad.dual_level():
                out = function(*map(forward_ad.make_dual, primals, tangents))
                slopes = tuple(forward_ad.unpack_dual(x).tangent for x in out)
    except (NotImplementedError, RuntimeError) as error:
        if re.search("(?i)forward.mode|forward AD", str(error)):
            return
        raise
    leaves = tuple(x.clone().requires_grad_() for x in primals)
    for x, slope in zip(function(*leaves), slopes, strict=True):
        if x.requires_grad:
            weight = torch.randn(x.shape, dtype=x.dtype, generator=g)
            gradients = torch.autograd.grad(x, leaves, weight, retain_graph=True, allow_unused=True)
            expected = sum((d * t).sum() for d, t in zip(gradients, tangents, strict=True) if d is not None)
            assert slope is not None, "a tangent was dropped"
            torch.testing.assert_close((slope * weight).sum(), torch.as_tensor(expected, dtype=x.dtype))


def _learning(op: Operation, large: bool, monkeypatch: pytest.MonkeyPatch) -> checks.Example:
    """A small float64 example that takes a gradient, in passes for `large` tensors on request."""
    if large:
        monkeypatch.setattr("udakit._reduce.eager.LARGE", 1)
    ex = checks.make(checks.as_used(op), c=3, d=3, h=4, w=4, dtype=torch.float64)
    if not ex.grad:
        pytest.skip("takes no gradient")
    return ex


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@every_operation
def test_functional_gradient(op: Operation, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.func.vjp` gives what `backward` does, or an error that says so in our words."""
    ex = _learning(op, large, monkeypatch)
    primals, function = tuple(x.detach().clone() for x in ex.inputs()), partial(_of_inputs, ex)

    leaves = tuple(x.clone().requires_grad_() for x in primals)
    out = function(*leaves)
    g = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(x.shape, dtype=x.dtype, generator=g) for x in out)
    try:
        found = torch.func.vjp(function, *primals)[1](weights)
    except NotImplementedError as error:
        if re.search("torch.func.grad, vjp(, vmap)? and jacrev are not", str(error)):
            return
        raise
    total = sum((x * w).sum() for x, w in zip(out, weights, strict=True) if x.requires_grad)
    for one, expected in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@every_operation
def test_second_derivative(op: Operation, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `create_graph=True` gives is the derivative of the gradient, or an error that says so: never a silent 0."""
    ex = _learning(op, large, monkeypatch)
    g = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, dtype=x.dtype, generator=g) for x in ex.inputs()]

    def slopes(step: float, *, twice: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The inputs, moved, and the gradient of a curved function of the outputs and of the inputs themselves."""
        inputs = [(x.detach() + step * v).requires_grad_() for x, v in zip(ex.inputs(), along, strict=True)]
        changed = ex
        for i, x in zip(ex.grad, inputs, strict=True):
            changed = changed.change(i, x)
        out = [x for x in checks.run(changed) if x.requires_grad]
        weights = [torch.arange(1, x.numel() + 1, dtype=torch.float64).cos().view(x.shape) for x in out]
        total = sum((x.double() * (1 + x.double()) * w).sum() for x, w in zip(out, weights, strict=True))
        total = total + sum(x.pow(3).sum() for x in inputs)
        return inputs, list(torch.autograd.grad(total, inputs, create_graph=twice))

    step = 1e-5
    (_, up), (_, down) = slopes(step), slopes(-step)
    expected = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
    inputs, first = slopes(0.0, twice=True)
    product = sum((x * v).sum() for x, v in zip(first, along, strict=True))
    try:
        found = torch.autograd.grad(product, inputs)
    except RuntimeError as error:
        if re.search("The second derivative .* of .* is not implemented", str(error)):
            return
        raise
    scale = max(float(x.abs().max()) for x in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(scale, 1e-3))


@every_operation
def test_numbers_of_any_kind(op: Operation) -> None:
    """An option that takes 1.0 takes 1 and NumPy's numbers, and gives the same."""
    ex = checks.make(op)
    public = getattr(udakit, _base(op), None)
    parameters = inspect.signature(public.__init__ if inspect.isclass(public) else public).parameters.values()
    options = [p.name for p in parameters if str(p.annotation).startswith("float")]
    if not options:
        pytest.skip("has no number among its options")
    for name in options:
        for number in (0.0, 0.5, 1.0):
            expected = _result(ex, name, number)
            whole = (int(number), np.int64(number)) if number != 0.5 else ()
            for other in (np.float32(number), np.float64(number), *whole):
                found = _result(ex, name, other)
                assert (expected is None) == (found is None), f"{name}={other!r}"
                if expected is not None:
                    checks.assert_equal(found, expected, f"{name}={other!r}")


def _result(ex: checks.Example, name: str, value: object) -> list[torch.Tensor] | None:
    """What the operation gives with one option replaced; None where it refuses the value."""
    call = checks._with_option(ex.op, ex.call(), name, value)
    torch.manual_seed(0)
    try:
        return checks.outputs(ex.op.function, call, call.options, 0)
    except (ValueError, TypeError):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in all_operations() if op.inductor], ids=lambda op: op.name)
def test_inductor(op: Operation) -> None:
    """The backend that users get by default, for a handful."""
    checks.compile(checks.as_used(op), backend="inductor")


@every_operation
def test_entry(op: Operation) -> None:
    """The entry itself: known exemptions with a reason, every tensor with a role."""
    known = {*CHECKS, *(f"{check}.{part}" for check, parts in PARTS.items() for part in parts)}
    assert not set(op.exempt) - known, f"unknown checks {set(op.exempt) - known}"
    assert all(len(reason.split()) >= 3 for reason in op.exempt.values()), "an exemption needs a reason"
    ex = checks.make(op)
    for i, (x, role) in enumerate(zip(ex.leaves, ex.roles, strict=True)):
        assert role is not None or not isinstance(x, torch.Tensor), f"tensor {i} has no role: Sample.tag(x, role)"


def test_exemptions(record_property: Callable[[str, object], None]) -> None:
    """What is exempt and why: the run's summary prints it, so that it can be read in one place (see conftest.py)."""
    lines = [f"{op.name}: {check}: {why}" for op in all_operations() for check, why in sorted(op.exempt.items())]
    assert all(line.split(": ", 2)[2].strip() for line in lines)
    record_property("exemptions from the contract", lines)


EXEMPT = [(op, key) for op in all_operations() for key in sorted(op.exempt) if key != "module"]


@pytest.mark.parametrize(
    ("op", "key"),
    [
        pytest.param(op, key, id=f"{op.name}-{key}", marks=[checks.needs_fake_cuda] if key == "seed.device" else [])
        for op, key in EXEMPT
    ],
)
def test_exemption_is_needed(op: Operation, key: str) -> None:
    """Without the exemption the check fails; one that passes must be held to it."""
    strict = replace(op, exempt={k: why for k, why in op.exempt.items() if k != key})
    with pytest.raises((Exception, pytest.fail.Exception)):
        getattr(checks, key.partition(".")[0])(checks.as_used(strict))


FUNCTIONS = sorted({name for op in all_operations() if inspect.isfunction(getattr(udakit, name := _base(op), None))})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_use_every_tensor_argument(name: str) -> None:
    """What no example passes, no check has seen: together, a function's entries pass every tensor that it takes."""
    signature = inspect.signature(getattr(udakit, name))
    wanted = {p.name for p in signature.parameters.values() if "Tensor" in str(p.annotation)}
    for op in all_operations():
        if _base(op) == name:
            call = op.example(Sample())
            given = {**call.tensors, **call.options}
            given |= dict(zip(signature.parameters, call.args, strict=False))
            wanted -= {key for key, value in given.items() if value is not None}
    assert not wanted, f"no entry of {name} passes {sorted(wanted)}"
