"""The contract: one function a check, each over one operation of the registry.

A check raises when the operation breaks it and skips (with the reason) when it has nothing to look at.
`test_contract.py` runs them over the registry, `test_checks.py` over operations that are broken on purpose.
"""

from __future__ import annotations

import copy
import inspect
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import udakit
from contract.registry import Call, Operation, Sample
from contract.wrong_options import WRONG

# The one table of tolerances (relative, absolute), by the dtype of the result.
TOLERANCE = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (2e-5, 1e-6),
    torch.bfloat16: (1.6e-2, 8e-3),
    torch.float16: (2e-3, 1e-3),
}
# Operations whose float32 is coarser than that, and by how much; it shows only between devices. Hue is a place of up to
# 3 turns, known to 2.4e-7. A channel changes six times as fast, and is divided by `std`, which is 0.2 here.
COARSER = {"strong_augment": 8.0}
MAPS = ("labels", "valid", "mask", "weight")  # (N, H, W)
SPATIAL = ("logits", "probabilities", "features", "images", *MAPS)
SCORES = ("logits", "probabilities")
BATCHED = (*SPATIAL, "chosen", "batch_values", "batch_class_values", "batch_class_vectors")
CLASS_AXIS = {
    "logits": 1, "probabilities": 1, "chosen": 1, "batch_class_values": 1, "batch_class_vectors": 1,
    "class_vectors": 0, "class_values": 0,
}  # fmt: skip


# --- an example call as a flat list of leaves, so that one check can change every tensor of it --------------------


@dataclass
class Example:
    """A call taken apart: `leaves` of (args, tensors, options), the role of each, and which of them take gradients."""

    op: Operation
    leaves: list[Any]
    spec: Any
    roles: list[str | None]
    grad: tuple[int, ...]

    def map(self, change: Callable[[Any, str | None], Any]) -> Example:
        """Replace every tensor by `change(tensor, role)`."""
        pairs = zip(self.leaves, self.roles, strict=True)
        return replace(self, leaves=[change(x, r) if isinstance(x, Tensor) else x for x, r in pairs])

    def change(self, index: int, x: Any) -> Example:
        return replace(self, leaves=[*self.leaves[:index], x, *self.leaves[index + 1 :]])

    def call(self) -> Call:
        return Call(*tree_unflatten(self.leaves, self.spec))

    def differentiable(self) -> Example:
        """Fresh copies of everything; those of `op.grad` are leaves of a graph."""
        copies = self.map(lambda x, role: x.detach().clone(memory_format=torch.preserve_format))
        for i in self.grad:
            copies.leaves[i].requires_grad_()
        return copies

    def inputs(self) -> list[Tensor]:
        return [self.leaves[i] for i in self.grad]


def make(op: Operation, **sample: Any) -> Example:
    made = Sample(**sample)
    call = op.example(made)
    leaves, spec = tree_flatten((call.args, call.tensors, call.options))
    roles = [made.roles.get(id(x)) if isinstance(x, Tensor) else None for x in leaves]
    grad: list[int] = []
    start = 0
    for position, arg in enumerate(call.args):
        count = len(tree_leaves(arg))
        if position in op.grad:
            grad += [i for i in range(start, start + count) if _is_float(leaves[i])]
        start += count
    return Example(op, leaves, spec, roles, tuple(grad))


def run(
    ex: Example, *, seed: int | None = 0, function: Callable[..., Any] | None = None, draws_on: str = "cpu"
) -> list[Tensor]:
    """Call the operation (or `function` in its place) and return the tensors of the result."""
    call = ex.call()
    function = function or ex.op.function
    options = call.options if function is ex.op.function else {}
    return outputs(function, call, options, seed, draws_on)


def outputs(
    function: Callable[..., Any], call: Call, options: dict[str, Any], seed: int | None, draws_on: str = "cpu"
) -> list[Tensor]:
    extra = {"generator": None if seed is None else torch.Generator(draws_on).manual_seed(seed)}
    extra = extra if takes_generator(function) else {}
    result = function(*call.args, **call.tensors, **{**options, **extra})
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def takes_generator(function: Callable[..., Any]) -> bool:
    target = function.forward if isinstance(function, nn.Module) else function
    return "generator" in inspect.signature(target).parameters


def gradients(out: list[Tensor], ex: Example) -> list[Tensor]:
    """Gradients of a fixed, uneven combination of the float outputs (a plain sum hides what adds up to a constant)."""
    if not ex.grad:
        return []
    reached = [x for x in out if x.requires_grad]
    assert reached, f"{ex.op.name}: no output requires grad; an operation that detaches declares grad=()"
    on: dict[str, Any] = {"dtype": torch.float64, "device": reached[0].device}
    total = torch.zeros((), **on)
    for x in reached:
        weights = torch.arange(1, x.numel() + 1, **on).cos().reshape(x.shape) if x.ndim else 1.0
        total = total + (x.double() * weights).sum()
    found = torch.autograd.grad(total, ex.inputs(), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, ex.inputs(), strict=True)]


def run_with_gradients(ex: Example, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    ex = ex.differentiable()
    out = run(ex, **options)
    return [x.detach() for x in out], gradients(out, ex)


def assert_equal(actual: list[Tensor], expected: list[Tensor], what: str, *, coarser: float = 1.0) -> None:
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors instead of {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rtol, atol = TOLERANCE.get(a.dtype, (0.0, 0.0))
        # The absolute part follows the largest entry: sums in another order differ by an epsilon of their terms.
        scale = float(e.detach().double().abs().nan_to_num(posinf=0).max()) if _is_float(e) and e.numel() else 0.0
        torch.testing.assert_close(
            a,
            e,
            rtol=rtol,
            atol=coarser * atol * max(scale, 1e-3),
            equal_nan=False,
            msg=lambda m, i=i: f"{what}, tensor {i}: {m}",
        )


def assert_finite(values: list[Tensor], what: str) -> None:
    for i, x in enumerate(values):
        if _is_float(x):
            assert bool(x.isfinite().all()), f"{what}: non-finite entries in tensor {i}"


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _module(op: Operation, call: Call) -> nn.Module:
    assert op.module is not None
    return op.module(**(op.module_options(call) if op.module_options else call.options))


def as_used(op: Operation) -> Operation:
    """For an entry named after its Module: the same with the Module in place of the function.

    Such an entry's function is written for the registry (what the Module does, in other words); users call the Module.
    """
    if op.module is None or "module" in op.exempt or getattr(udakit, op.name.partition("[")[0], None) is not op.module:
        return op
    names = make(op).call().options.keys()

    def function(*args: Any, **keywords: Any) -> Any:
        options = {name: keywords.pop(name) for name in names}
        tensors = [x for x in tree_leaves((args, keywords)) if isinstance(x, Tensor)]
        with tensors[0].device:
            made = _module(op, Call(args, keywords, options))
        return made(*args, **keywords)

    function.__signature__ = inspect.signature(op.module.forward)  # type: ignore[attr-defined]
    return replace(op, function=function, build=op.build or (lambda call: _module(op, call)))


def _exempt(op: Operation, part: str) -> bool:
    return part in op.exempt


# --- function and Module -----------------------------------------------------------------------------------------


def module(op: Operation) -> None:
    """The Module, made with the options, gives what the function gives; tensors among the options are buffers."""
    if op.module is None:
        pytest.fail(f"{op.name} has no Module: give one, or exempt the check with a reason")
    ex = make(op)
    call = ex.call()
    made = _module(op, call)
    text = repr(made)
    assert op.module.__name__ in text, f"repr does not name the class: {text}"
    assert not re.search(r"tensor\(| at 0x", text), f"repr is not readable: {text}"
    for name, option in call.options.items():
        if isinstance(option, Tensor):
            assert any(b.shape == option.shape and torch.equal(b, option) for b in made.buffers()), (
                f"the option `{name}` is a tensor, but no buffer of {op.module.__name__} holds it"
            )
    value, gradient = run_with_gradients(ex)
    module_value, module_gradient = run_with_gradients(ex, function=made)
    assert_equal(module_value, value, "Module against function")
    assert_equal(module_gradient, gradient, "gradient of Module against function")


def state_dict(op: Operation) -> None:
    """A used Module's state, saved and loaded into a fresh one, makes the next call the same."""
    if op.module is None:
        pytest.skip("no Module")
    used, fresh = _module(op, make(op).call()), _module(op, make(op).call())
    run(make(op, seed=1), function=used)
    file = io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    following = make(op, seed=2)
    assert_equal(run(following, function=fresh), run(following, function=used), "after load_state_dict")


def cast(op: Operation) -> None:
    """A Module's own buffers keep dtype and values when it is cast, or loads a cast checkpoint with `assign=True`."""
    if op.module is None:
        pytest.skip("no Module")
    used = _module(op, make(op).call())
    run(make(op, seed=1), function=used)
    kept = {name: x.clone() for name, x in _own_buffers(used).items()}
    if not kept:
        pytest.skip("has no buffer")
    saved = {name: x.bfloat16() if x.is_floating_point() else x for name, x in used.state_dict().items()}
    casts: list[Callable[[nn.Module], object]] = [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.type(torch.float16),
        lambda m: nn.Sequential(m).to(torch.bfloat16),
    ]
    for change in casts:
        change(used)
        for name, x in _own_buffers(used).items():
            if name in kept:
                assert x.dtype == kept[name].dtype, f"a cast made `{name}` {x.dtype}, which was {kept[name].dtype}"
                assert torch.equal(x, kept[name]), f"a cast changed the values of `{name}`"
    fresh = _module(op, make(op).call())
    fresh.load_state_dict(saved, assign=True)
    for name, x in _own_buffers(fresh).items():
        assert name not in kept or x.dtype == kept[name].dtype, f"a checkpoint in bfloat16 made `{name}` {x.dtype}"


def _own_buffers(made: nn.Module) -> dict[str, Tensor]:
    """The buffers of a Module and of those in it that torch does not define: its layers, in a net, are cast."""
    return {
        f"{path}.{name}".lstrip("."): x
        for path, m in made.named_modules()
        if not type(m).__module__.startswith("torch.")
        for name, x in m._buffers.items()
        if x is not None
    }


def unmodified(op: Operation) -> None:
    """Arguments keep their values, bit for bit, and were never written to."""
    for ex in (make(op), make(op).differentiable()):
        before = [(x.detach().clone(), x._version) if isinstance(x, Tensor) else None for x in ex.leaves]
        run(ex)
        for i, (x, kept) in enumerate(zip(ex.leaves, before, strict=True)):
            if kept is not None:
                assert torch.equal(x.detach(), kept[0]), f"tensor {i} ({ex.roles[i]}) was changed"
                assert x._version == kept[1], f"tensor {i} ({ex.roles[i]}) was written to in place"


# --- gradients and precision -------------------------------------------------------------------------------------


def gradcheck(op: Operation) -> None:
    """Float64 gradients agree with finite differences."""
    ex = make(op, c=3, d=3, h=4, w=4, dtype=torch.float64).differentiable()
    if not ex.grad:
        assert op.kind != "loss", "a loss takes gradients: name the positions in `grad`"
        pytest.skip("takes no gradient")

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        changed = ex
        for i, x in zip(ex.grad, inputs, strict=True):
            changed = changed.change(i, x)
        return tuple(x for x in run(changed) if x.requires_grad)

    if op.kind == "loss":
        assert all(x.dtype == torch.float64 for x in run(ex)), "a loss of float64 input is float64"
    assert function(*ex.inputs()), "no output requires grad; an operation that detaches declares grad=()"
    assert torch.autograd.gradcheck(function, tuple(ex.inputs()), atol=1e-4, rtol=1e-3)


def half(op: Operation) -> None:
    """Bfloat16 and float16 give what float32 gives on the same (rounded) numbers: the arithmetic is in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        ex = make(op, dtype=dtype)
        if not any(_is_float(x) and x.dtype == dtype for x in ex.leaves):
            pytest.skip("takes no float tensor")
        value, gradient = run_with_gradients(ex)
        up = ex.map(lambda x, role, dtype=dtype: x.float() if x.dtype == dtype else x)
        expected, expected_gradient = run_with_gradients(up)
        assert_finite(value + gradient, f"{dtype}")
        if op.kind == "loss":
            assert all(x.dtype == torch.float32 for x in value), f"a loss of {dtype} input is float32"
        assert_equal(value, _like(expected, value), f"{dtype} against float32")
        assert_equal(gradient, _like(expected_gradient, gradient), f"gradient in {dtype} against float32")


def _like(values: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    return [v.to(o.dtype) if _is_float(v) and _is_float(o) else v for v, o in zip(values, others, strict=True)]


def autocast(op: Operation) -> None:
    """Under autocast the same values as without: reductions and matmuls turn it off for themselves."""
    for dtype in (torch.float32, torch.bfloat16):
        ex = make(op, dtype=dtype)
        expected, expected_gradient = run_with_gradients(ex)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, gradient = run_with_gradients(ex)
        assert_finite(value + gradient, f"{dtype} under autocast")
        assert_equal(value, expected, f"{dtype} under autocast")
        assert_equal(gradient, expected_gradient, f"gradient of {dtype} under autocast")


def extreme_values(op: Operation) -> None:
    """Logits of 1e4, features from 0 over 1e-15 to 1e15, the fewest classes, one image: nothing non-finite."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if _exempt(op, f"extreme_values.{str(dtype).removeprefix('torch.')}"):
            continue
        # Float16 ends at 65504 below and 6e-8 above: its features stay where products with the gradient can be told.
        scales = (0.0, 1e-4, 1e4) if dtype == torch.float16 else (0.0, 1e-15, 1e15)
        scores = any(role in SCORES for role in make(op).roles)  # these have two classes at least: `one_channel`
        for name, sizes in {"": {}, "one_class": {"c": 1 + scores}, "one_image": {"n": 1}}.items():
            if _exempt(op, f"extreme_values.{name}"):
                continue
            plain = make(op, dtype=dtype, **sizes)
            for k, scale in enumerate(scales):
                value, gradient = run_with_gradients(plain.map(lambda x, r, k=k, s=scale: _extreme(x, r, k, s)))
                what = f"{dtype}, {name or 'all classes'}, feature scale {scale:g}, pattern {k}"
                if op.kind == "loss":
                    assert_finite(value + gradient, what)
                else:
                    assert not any(_is_float(x) and bool(x.isnan().any()) for x in value), f"{what}: NaN"
                    assert_finite(gradient, what)


def _extreme(x: Tensor, role: str | None, pattern: int, scale: float) -> Tensor:
    if role == "logits":
        return (torch.zeros_like(x), 1e4 * x.sign(), 1e4 * (x / x.abs().max()))[pattern]
    if role == "probabilities":
        largest = x >= x.amax(1, keepdim=True)
        return (torch.full_like(x, 1 / x.shape[1]), largest.to(x.dtype), x)[pattern]
    if role in ("features", "class_vectors"):
        return x.clamp(-3, 3) * scale
    return x


def all_ignored(op: Operation) -> None:
    """Nothing valid: a loss is exactly 0, has a graph, and sends back exactly 0."""
    if op.kind != "loss":
        pytest.skip("no loss")
    ex = make(op)
    roles = [role for role in ("labels", "valid") if role in ex.roles]
    if not roles:
        pytest.fail(f"{op.name} has neither labels nor valid: exempt it with a reason, or pass them in the example")
    ignore_index = ex.call().options.get("ignore_index", 255)
    for role in roles:
        fill = ignore_index if role == "labels" else False
        empty = ex.map(lambda x, r, role=role, fill=fill: torch.full_like(x, fill) if r == role else x.clone())
        empty = empty.differentiable()
        out = run(empty)
        assert all(x.requires_grad for x in out), f"{role} empty: no graph is attached"
        assert all(bool((x == 0).all()) for x in out), f"{role} empty: the loss is not exactly 0 but {out}"
        assert all(bool((g == 0).all()) for g in gradients(out, empty)), f"{role} empty: the gradient is not 0"


# --- devices and compilation -------------------------------------------------------------------------------------


def _fake(ex: Example, mode: FakeTensorMode, device: str) -> Example:
    """Fake copies on `device`: CUDA too, which needs no card."""

    def convert(x: Tensor) -> Tensor:
        with mode:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return made.requires_grad_(x.requires_grad)

    def convert_leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return convert(x)
        if isinstance(x, nn.Module):
            x = copy.deepcopy(x)
            for part in x.modules():
                for name, p in part._parameters.items():
                    part._parameters[name] = p if p is None else nn.Parameter(convert(p.detach()), p.requires_grad)
                for name, b in part._buffers.items():
                    part._buffers[name] = b if b is None else convert(b)
            return x
        return torch.device(device) if isinstance(x, torch.device) else x

    faked = replace(ex, leaves=[convert_leaf(x) for x in ex.leaves])
    options = faked.call().options
    if isinstance(options.get("device"), str):
        index = faked.leaves.index(options["device"])
        faked = faked.change(index, device)
    return faked


# Without a card, torch 2.5 to 2.9 abort the interpreter in some operators on fake CUDA tensors.
FAKE_DEVICES = ("cpu",) if torch.__version__ < "2.10" and not torch.cuda.is_available() else ("cpu", "cuda")
needs_fake_cuda = pytest.mark.skipif(
    "cuda" not in FAKE_DEVICES, reason="fake CUDA tensors need a card before torch 2.10"
)


def fake_tensors(op: Operation) -> None:
    """Runs on fake CPU and fake CUDA tensors: no data-dependent shape, no value read; results stay on the device."""
    real = run(make(op))
    for device in FAKE_DEVICES:
        mode = FakeTensorMode()
        ex = _fake(make(op).differentiable(), mode, device)
        with mode:
            out = run(ex, seed=None)
            if device == "cpu" and ex.grad and not _exempt(op, "fake_tensors.backward"):
                gradients(out, ex)
        for i, (x, r) in enumerate(zip(out, real, strict=True)):
            assert x.device.type == device, f"output {i} is on {x.device}, its input on {device}"
            assert (x.shape, x.dtype) == (r.shape, r.dtype), f"output {i} is another on fake tensors"


def defaults(op: Operation) -> None:
    """Takes device and dtype from its tensors, whatever torch's defaults are."""
    expected = run_with_gradients(make(op))
    others = [make(op), make(op), make(op)]
    with torch.device("meta"):  # which no tensor of the call is on
        found = {"device": run_with_gradients(others[0])}
    before = torch.get_default_dtype()
    for dtype, ex in zip((torch.float64, torch.bfloat16), others[1:], strict=True):
        torch.set_default_dtype(dtype)
        try:
            found[str(dtype)] = run_with_gradients(ex)
        finally:
            torch.set_default_dtype(before)
    for what, (values, slopes) in found.items():
        assert_equal(values, expected[0], f"with another default, {what}")
        assert_equal(slopes, expected[1], f"gradient with another default, {what}")


SYNCHRONISING = (
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "unique", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "masked_select", "equal", "bincount", "_linalg_check_errors", "_linalg_eigh",
    "_linalg_svd", "multinomial", "histc",
)  # fmt: skip


class NoHostRead(TorchDispatchMode):
    """Raises on an operator that makes a GPU wait for the CPU, or moves data between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in SYNCHRONISING, f"{func.name()} reads a value on the host"
        if name == "repeat_interleave" and func._overloadname == "Tensor":
            assert kwargs.get("output_size") is not None, "repeat_interleave without output_size reads a value"
        if name == "_to_copy" and kwargs.get("device") is not None:
            source, target = args[0].device.type, torch.device(kwargs["device"]).type
            assert source == target, f"a copy from {source} to {target}"
        if name in ("copy_", "copy"):
            assert args[0].device.type == args[1].device.type, "a copy between devices"
        if name in ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"):
            for index in args[1]:
                if index is not None:
                    assert index.dtype not in (torch.bool, torch.uint8), f"{func.name()} with a mask: use torch.where"
                    assert index.device == args[0].device, f"{func.name()} with an index on another device"
        return func(*args, **kwargs)


def no_device_copy(op: Operation) -> None:
    """No operator reads a value on the host or moves data between devices, on the CPU and on fake CUDA tensors."""
    ex = make(op).differentiable()
    with NoHostRead():
        out = run(ex, seed=None)
    gradients(out, ex)
    for device in FAKE_DEVICES[1:]:
        mode = FakeTensorMode()
        ex = _fake(make(op), mode, device)
        with mode, NoHostRead():
            run(ex, seed=None)


def compile(op: Operation, backend: str = "aot_eager") -> None:
    """One graph, the same values and gradients."""
    ex = make(op)
    call = ex.call()

    def fresh() -> Callable[..., Any] | None:
        if op.build is not None:
            return op.build(call)
        return _module(op, call) if op.kind == "state" and op.module is not None else None

    torch.manual_seed(0)
    expected = run_with_gradients(ex, seed=None, function=fresh())
    torch._dynamo.reset()
    function = fresh()
    compiled = torch.compile(function or op.function, fullgraph=True, backend=backend)
    options = {} if function else call.options

    def use(*args: Any, **tensors: Any) -> Any:
        extra = {"generator": None} if takes_generator(function or op.function) else {}
        return compiled(*args, **tensors, **options, **extra)

    torch.manual_seed(0)
    value, gradient = run_with_gradients(ex, seed=None, function=use)
    assert_equal(value, expected[0], f"compiled with {backend}")
    assert_equal(gradient, expected[1], f"gradient compiled with {backend}")


# --- layout and symmetry -----------------------------------------------------------------------------------------


def strides(op: Operation) -> None:
    """Channels-last, every second element of a larger tensor, transposed storage: the same result."""
    ex = make(op)
    expected = run_with_gradients(ex)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
        "every second element": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2] if x.ndim else x,
        "transposed storage": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x,
    }
    for name, layout in layouts.items():
        laid = replace(ex.map(lambda x, role, layout=layout: layout(x.detach().clone())))
        for i in laid.grad:
            laid.leaves[i].requires_grad_()
        out = run(laid)
        assert_equal([x.detach() for x in out], expected[0], name)
        assert_equal(gradients(out, laid), expected[1], f"gradient, {name}")


def batch_permutation(op: Operation) -> None:
    """The images of a batch in another order: per-image results in that order, all else unchanged."""
    order = torch.tensor([2, 0, 1])

    def permute(x: Tensor, role: str | None) -> Tensor:
        return x[order] if role in BATCHED else x

    _permutation(op, make(op, n=3), permute, "batch")


def class_permutation(op: Operation) -> None:
    """Classes under other ids: per-class results in that order, ids renamed, all else unchanged."""
    ex = make(op)
    count = Sample().c
    order = torch.tensor([2, 0, 3, 1])
    assert len(order) == count
    new_id = order.argsort()

    def permute(x: Tensor, role: str | None) -> Tensor:
        if role == "labels":
            renamed = new_id.to(x.dtype)[x.long().clamp(0, count - 1)]
            return torch.where((x >= 0) & (x < count), renamed, x)
        if role not in CLASS_AXIS:
            return x
        axis = CLASS_AXIS[role]
        rest = torch.arange(count, x.shape[axis])  # a further column (the ignored pixels) keeps its place
        return x.index_select(axis, torch.cat([order, rest]))

    if not any(role == "labels" or role in CLASS_AXIS for role in ex.roles):
        pytest.skip("knows no classes")
    _permutation(op, ex, permute, "class")


def _permutation(op: Operation, ex: Example, permute: Callable[[Tensor, str | None], Tensor], axis: str) -> None:
    if op.kind == "draw":
        pytest.skip("a draw belongs to a place in the batch")
    value, gradient = run_with_gradients(ex)
    roles = [op.output] * len(value) if isinstance(op.output, str) else list(op.output)
    assert len(roles) == len(value), f"`output` names {len(roles)} roles, the operation returns {len(value)} tensors"
    compared = [i for i, role in enumerate(roles) if role != "other"]
    assert compared, "every output is 'other': nothing is compared; name the roles or exempt the check"
    permuted, permuted_gradient = run_with_gradients(ex.map(permute))
    assert_equal(
        [permuted[i] for i in compared], [permute(value[i], roles[i]) for i in compared], f"{axis} permutation"
    )
    if all(x.ndim == 0 for x in value):
        expected = [permute(g, ex.roles[i]) for i, g in zip(ex.grad, gradient, strict=True)]
        assert_equal(permuted_gradient, expected, f"gradient under {axis} permutation")


# --- maps of other kinds -----------------------------------------------------------------------------------------

SPACES = {
    1: lambda h, w: (h * w,),
    3: lambda h, w: (h, w // 3, 3) if w % 3 == 0 else (h, w, 1),
}  # of the pixels of (h, w), in their order


def _reshaped(x: Tensor, role: str | None, axes: int) -> Tensor:
    """A map of the same pixels with another number of spatial axes."""
    if role not in SPATIAL or not isinstance(x, Tensor):
        return x
    first = 1 if role in MAPS else 2
    return x.reshape(*x.shape[:first], *SPACES[axes](*x.shape[first:]))


def space(op: Operation) -> None:
    """In one and three dimensions as on the flattened map, or refused by name; what looks at neighbours has a test."""
    ex = make(op)
    if op.space == "none":
        pytest.skip("takes no map, or hands it to a net of the user's")
    if op.space == "two":
        for axes in SPACES:
            message = _refusal(ex.map(lambda x, role, axes=axes: _reshaped(x, role, axes)), None)
            assert message is not None, f"{axes} spatial axes: no error"
            assert "two-dimensional" in message, f"{axes} spatial axes: does not say that it is for two: {message}"
        return
    if op.space != "pixel":
        file, _, name = op.space.partition("::")
        source = (Path(__file__).parents[1] / file).read_text()
        assert re.search(rf"^def {re.escape(name)}\(", source, re.MULTILINE), f"there is no test {op.space}"
        pytest.skip(f"looks at neighbours: {op.space}")
    assert any(role in SPATIAL for role in ex.roles), "it takes no map: space='none'"
    expected, expected_gradient = run_with_gradients(ex)
    for axes in SPACES:
        value, gradient = run_with_gradients(ex.map(lambda x, role, axes=axes: _reshaped(x, role, axes)))
        assert all(a.numel() == e.numel() for a, e in zip(value, expected, strict=True)), f"{axes} spatial axes: sizes"
        assert_equal(
            [a.reshape(e.shape) for a, e in zip(value, expected, strict=True)], expected, f"{axes} spatial axes"
        )
        folded = [g.reshape(e.shape) for g, e in zip(gradient, expected_gradient, strict=True)]
        # Where an output is a map, the uneven weights of `gradients` fall on the same pixels: the order is the same.
        assert_equal(folded, expected_gradient, f"gradient with {axes} spatial axes")


class Strict(Tensor):
    """A subclass as libraries have them: it keeps its class, and its `new_empty` takes a tuple alone (MetaTensor)."""

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:  # type: ignore[override]
        if not isinstance(size, tuple | list):
            raise TypeError(f"new_empty(): argument 'size' must be tuple of ints, not {type(size).__name__}")
        return self.as_subclass(Tensor).new_empty(size, dtype=dtype, device=device, requires_grad=requires_grad)


def subclass(op: Operation) -> None:
    """A strict subclass of Tensor in every place gives the values and gradients of plain tensors."""
    ex = make(op)
    if not any(isinstance(x, Tensor) for x in ex.leaves):
        pytest.skip("takes no tensor")
    expected = run_with_gradients(ex)
    dressed = ex.map(lambda x, role: x.detach().clone().as_subclass(Strict))
    for i in dressed.grad:
        dressed.leaves[i].requires_grad_()
    out = run(dressed)
    found = gradients([x.as_subclass(Tensor) for x in out], dressed)
    assert_equal([x.detach().as_subclass(Tensor) for x in out], expected[0], "of a subclass")
    assert_equal([x.as_subclass(Tensor) for x in found], expected[1], "gradient of a subclass")


def one_channel(op: Operation) -> None:
    """Logits and probabilities of one channel are refused, naming the function that makes two classes of them."""
    ex = make(op)
    scores = [i for i, role in enumerate(ex.roles) if role in SCORES]
    if not scores:
        pytest.skip("takes no logits")
    wrong = ex.map(lambda x, role: x[:, :1] if role in SCORES else x)
    messages = [_refusal(wrong, None)]
    public = getattr(udakit, op.name.partition("[")[0], None)
    for made in [public] if inspect.isclass(public) else []:
        options = _constructor_options(op, made, ex.call())
        if options is not None and "num_classes" in options:  # refused when it is made, not at the first batch
            messages.append(_error_of(lambda made=made, o=options: made(**{**o, "num_classes": 1})))  # type: ignore[misc]
    for message in messages:
        assert message is not None, "one channel: no error"
        assert re.search(r"udakit\.binary_(logits|probabilities)", message), f"does not name the way out: {message}"


def nan_outside(op: Operation) -> None:
    """What is not finite where nothing counts changes nothing: masking equals removing, for NaN and infinities too.

    The left half of every image is ignored, and spoilt in its left quarter, so that what looks at neighbours may.
    """
    ex = make(op, w=24)
    masks = [role for role in ("labels", "valid") if role in ex.roles]
    spoilt = ("logits", "probabilities", "features", "weight")
    if not masks or not any(role in spoilt and _is_float(x) for x, role in zip(ex.leaves, ex.roles, strict=True)):
        pytest.skip("has no pixel that does not count, or no float map")
    ignored = ex.call().options.get("ignore_index", 255)

    def mask(x: Tensor, role: str | None) -> Tensor:
        if role not in masks:
            return x
        x = x.clone()
        x[..., : x.shape[-1] // 2] = ignored if role == "labels" else False
        return x

    def spoil(x: Tensor, role: str | None, value: float) -> Tensor:
        if role not in spoilt or not _is_float(x):
            return x
        x = x.clone()
        x[..., : x.shape[-1] // 4] = value
        return x

    def counted(values: list[Tensor]) -> list[Tensor]:
        return [x[..., x.shape[-1] // 2 :] if x.ndim >= 3 else x for x in values]

    masked = ex.map(mask)
    expected, expected_gradient = run_with_gradients(masked)
    for value in (float("nan"), float("inf"), float("-inf")):
        found, gradient = run_with_gradients(masked.map(lambda x, role, v=value: spoil(x, role, v)))
        assert_equal(counted(found), counted(expected), f"{value} where nothing counts")
        if all(x.ndim == 0 for x in expected):
            assert_equal(gradient, expected_gradient, f"gradient, {value} where nothing counts")


# --- randomness and errors ---------------------------------------------------------------------------------------


def seed(op: Operation) -> None:
    """One seed, one result; None follows torch's global seed; a generator of another device is refused."""
    if not takes_generator(op.function):
        assert op.kind != "draw", "a draw takes `generator`"
        pytest.skip("takes no generator")

    def globally(number: int) -> list[Tensor]:
        torch.manual_seed(number)
        return run(make(op), seed=None)

    for draw in (lambda number: run(make(op), seed=number), globally):
        assert_equal(draw(1), draw(1), "the same seed")
        if not _exempt(op, "seed.another"):
            first = draw(1)
            others = [draw(number) for number in range(2, 12)]
            assert any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)), (
                "ten other seeds, the same result"
            )
    state = torch.random.get_rng_state()
    run(make(op), seed=1)
    assert torch.equal(state, torch.random.get_rng_state()), "a given generator leaves the global one alone"

    if FAKE_DEVICES[1:] and any(isinstance(x, Tensor) for x in make(op).leaves) and not _exempt(op, "seed.device"):
        mode = FakeTensorMode()
        ex = _fake(make(op), mode, "cuda")
        with mode, pytest.raises(ValueError, match="Expected `generator`"):
            run(ex, seed=1)


def shape_errors(op: Operation) -> None:
    """A tensor with an axis too few, a size that fits no other, or a wrong dtype is refused by name."""
    ex = make(op)
    mistakes = list(_mistakes(ex))
    if not mistakes:
        pytest.skip("takes no tensor with a fixed shape")
    for what, wrong in mistakes:
        for function in (None, _module) if op.module is not None and "module" not in op.exempt else (None,):
            message = _refusal(wrong, function)
            through = f"{what}, by the {'function' if function is None else 'Module'}"
            assert message is not None, f"{through}: no error"
            named = re.search(r"Expected (?:every )?`([A-Za-z_]\w*)", message)
            assert named, f"{through}: the message does not begin with an argument's name: {message}"
            known = _argument_names(ex)
            assert named[1] in known, f"{through}: `{named[1]}` is no argument (of {sorted(known)}): {message}"


def _refusal(ex: Example, make_function: Callable[[Operation, Call], nn.Module] | None) -> str | None:
    return _error_of(lambda: run(ex, function=make_function(ex.op, ex.call()) if make_function else None))


def _error_of(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _mistakes(ex: Example) -> Iterator[tuple[str, Example]]:
    """Each an example with one tensor made wrong."""
    op = ex.op
    sizes = [x.shape[-2:] for x, r in zip(ex.leaves, ex.roles, strict=True) if r in SPATIAL]
    has_classes = sum(r in CLASS_AXIS for r in ex.roles) > 1
    for i, (x, role) in enumerate(zip(ex.leaves, ex.roles, strict=True)):
        if not isinstance(x, Tensor) or role in (None, "scalar", "other"):
            continue
        what = f"tensor {i} ({role})"
        if not _exempt(op, "shape_errors.axes"):
            # By itself a map without its last axis is a signal: then it loses all of them.
            alone = role in SPATIAL and sum(r in SPATIAL for r in ex.roles) == 1
            cut = x.flatten(1 if role in MAPS else 2)[..., 0] if alone else x[..., 0]
            yield f"{what} without {'any spatial' if alone else 'its last'} axis", ex.change(i, cut)
        if not _exempt(op, "shape_errors.size"):
            if role in SPATIAL and sizes.count(x.shape[-2:]) > 1:
                yield f"{what} one column short", ex.change(i, x[..., :-1])
                yield f"{what} one row short", ex.change(i, x[..., :-1, :])
            if role == "class_values" and has_classes:
                yield f"{what} one class short", ex.change(i, x[:-1])
            if role == "class_vectors" and "features" in ex.roles:
                yield f"{what} one dimension short", ex.change(i, x[:, :-1])
        if not _exempt(op, "shape_errors.dtype"):
            if role in ("logits", "probabilities", "features", "weight", "class_vectors"):
                yield f"{what} as integers", ex.change(i, x.long())
            elif role in ("labels", "valid", "mask"):
                yield f"{what} as floats", ex.change(i, x.float())


def _argument_names(ex: Example) -> set[str]:
    """Names that the operation's user knows: of its function, its Module's constructor and forward."""
    targets: list[Any] = [ex.op.function]
    if ex.op.module is not None:
        targets += [ex.op.module.__init__, ex.op.module.forward]
    call = ex.call()
    names = {name for target in targets for name in inspect.signature(target).parameters}
    fields = {name for arg in call.args if isinstance(arg, tuple) for name in getattr(arg, "_fields", ())}
    return names | fields | set(call.tensors) | set(call.options)


# Arguments that are no options: nets, and words for messages.
NOT_OPTIONS = {"self", "name", "images", "model", "options", "args", "keywords"}


def wrong_options(op: Operation) -> None:
    """Each option of the function, and of the Module's constructor, refuses each wrong value of the table by name."""
    refused = 0
    ex = make(op)
    base = ex.call()
    public = getattr(udakit, op.name.partition("[")[0], None)
    if inspect.isfunction(public):
        given = Call((), {}, base.options) if op.makes else base
        refused += _refuse_options(op, _option_names(public), given, lambda call: call.run(public))
    for module in _modules(op):
        options = _constructor_options(op, module, base)
        if options is not None:
            made = Call((), {}, options)
            use = lambda call, module=module: module(**call.options)  # noqa: E731
            refused += _refuse_options(op, _option_names(module.__init__), made, use)
    if not refused:
        pytest.skip("has no option")


def _modules(op: Operation) -> list[type[nn.Module]]:
    """The Modules that an entry stands for, whose constructors must refuse what their functions do."""
    public = getattr(udakit, op.name.partition("[")[0], None)
    known = [
        public,
        op.module if "module" not in op.exempt else None,
        *(getattr(udakit, name, None) for name in op.covers),
    ]
    return list(dict.fromkeys(m for m in known if inspect.isclass(m) and issubclass(m, nn.Module)))


def _constructor_options(op: Operation, module: type[nn.Module], call: Call) -> dict[str, Any] | None:
    """Options of the example that the constructor takes; None where it needs more than those."""
    options = op.module_options(call) if op.module_options and module is op.module else call.options
    parameters = inspect.signature(module.__init__).parameters
    accepted = {name: value for name, value in options.items() if name in parameters}
    plain = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    needed = [p.name for p in plain if p.default is p.empty]
    return accepted if set(needed) <= set(accepted) else None


def _option_names(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    found = []
    for p in parameters:
        tensor = "Tensor" in str(p.annotation) and p.name != "class_weight"
        if p.name not in NOT_OPTIONS and not tensor and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            found.append(p.name)
    return found


def _refuse_options(op: Operation, names: list[str], call: Call, use: Callable[[Call], Any]) -> int:
    tried = 0
    for name in names:
        rows = op.wrong.get(name, WRONG.get(name))
        assert rows is not None, f"the option `{name}` has no row in wrong_options.py: what must it refuse?"
        calls = [call]
        if name == "generator" and "device" in call.options:  # which decides where none is given
            calls.append(replace(call, options={k: x for k, x in call.options.items() if k != "device"}))
        for value in rows:
            for given in calls:
                wrong = _with_option(op, given, name, value)
                message = _error_of(lambda wrong=wrong: use(wrong))  # type: ignore[misc]
                assert message is not None, f"{name}={value!r}: no error"
                assert f"`{name}" in message, f"{name}={value!r}: the message does not name it: {message}"
            tried += 1
    return tried


def _with_option(op: Operation, call: Call, name: str, value: Any) -> Call:
    """The call with one option replaced, where it is given by position, too."""
    public = getattr(udakit, op.name.partition("[")[0], None)
    if inspect.isfunction(public) and call.args:
        names = list(inspect.signature(public).parameters)
        if name in names[: len(call.args)]:
            args = list(call.args)
            args[names.index(name)] = value
            return replace(call, args=tuple(args))
    return replace(call, options={**call.options, name: value})
