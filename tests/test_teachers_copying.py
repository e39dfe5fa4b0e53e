"""A copy of a net shares nothing with it: nets as people bring them, and what is refused by name."""

from __future__ import annotations

import copy
import functools
import queue
import threading
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from udakit import EMATeacher, FeatureTap, copy_net

IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * Net.forward(self, x)


def spoil(net: nn.Module) -> None:
    """Change all weights: what a copy gives must not follow."""
    with torch.no_grad():
        for x in [*net.parameters(), *net.buffers()]:
            x.add_(1) if x.is_floating_point() else None


# --- what is copied ----------------------------------------------------------------------------------------------


def _as_method(net: nn.Module) -> None:
    net.forward = types.MethodType(lambda self, x: 3 * Net.forward(self, x), net)


def _own_method(net: nn.Module) -> None:
    net.forward = net.doubled


def _partial(net: nn.Module) -> None:
    net.forward = functools.partial(Net.doubled, net)


def _accelerate(net: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process, of whatever ran before
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(net)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" in vars(net)


def _accelerate_hooks(net: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(net.body, hooks.ModelHook())
    assert "forward" in vars(net.body)


def _own_hook(net: nn.Module) -> None:
    """The net hangs a method of its own on a layer."""
    net.add_one = types.MethodType(lambda self, module, args, output: output + self.head.bias.sum(), net)
    net.body.register_forward_hook(net.add_one)


class Store:
    def __init__(self) -> None:
        self.last: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last[:] = [output.detach()]


def _own_store(net: nn.Module) -> None:
    """The net returns what its hook kept: a copy must not give the original's activations."""
    net.store = Store()
    net.head.register_forward_hook(net.store)
    net.forward = types.MethodType(lambda self, x: (Net.forward(self, x), self.store.last[0])[1], net)


def _with_kwargs(net: nn.Module) -> None:
    net.twice = types.MethodType(lambda self, module, args, kwargs, output: 2 * output + self.head.bias.sum(), net)
    net.register_forward_hook(net.twice, with_kwargs=True)


def _weight_norm(net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.body)
    net(IMAGES)


def _pruned_twice(net: nn.Module) -> None:
    prune.l1_unstructured(net.body, "weight", amount=0.3)
    prune.random_unstructured(net.body, "weight", amount=0.3)
    net(IMAGES)


def _spectral_norm(net: nn.Module) -> None:
    nn.utils.spectral_norm(net.body)
    net(IMAGES)


def _compiled_part(net: nn.Module) -> None:
    net.body = torch.compile(net.body, backend="eager")


def _checkpointing(net: nn.Module) -> None:
    net.run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def _activation(net: nn.Module) -> None:
    scale = torch.tensor(2.0)
    net.activation = lambda x: scale * x  # a constant


def _view(net: nn.Module) -> None:
    """A layer keeps a view of its weight, which follows the optimiser."""
    net.kept = [net.body.weight.detach()[:, :, 0, 0]]
    net.forward = types.MethodType(lambda self, x: x.movedim(1, -1) @ self.kept[0].T, net)


def _unsaved_view(net: nn.Module) -> None:
    net.register_buffer("kept", net.body.weight.data, persistent=False)
    net.forward = types.MethodType(lambda self, x: nn.functional.conv2d(x, self.kept), net)


COPIED: dict[str, Callable[[nn.Module], None]] = {
    "plain": lambda net: None,
    "method set on the net": _as_method,
    "method of its own": _own_method,
    "partial": _partial,
    "accelerate prepare": _accelerate,
    "accelerate hooks": _accelerate_hooks,
    "hook of its own": _own_hook,
    "hook of its own with kwargs": _with_kwargs,
    "store of its own": _own_store,
    "weight_norm": _weight_norm,
    "weight_norm parametrized": lambda net: parametrizations.weight_norm(net.body),
    "spectral_norm": _spectral_norm,
    "spectral_norm parametrized": lambda net: parametrizations.spectral_norm(net.body),
    "orthogonal parametrized": lambda net: parametrizations.orthogonal(net.body),
    "prune": lambda net: prune.l1_unstructured(net.body, "weight", amount=0.5),
    "prune twice": _pruned_twice,
    "compiled part": _compiled_part,
    "compiled in place": lambda net: net.compile(backend="eager"),
    "checkpointing function": _checkpointing,
    "activation": _activation,
    "view of a weight": _view,
    "buffer that is a view of a weight": _unsaved_view,
}


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_copy_gives_what_the_net_gave_and_shares_nothing(name: str) -> None:
    net = Net()
    COPIED[name](net)
    net.eval()
    before = net(IMAGES).detach()
    twin = copy_net(net)
    torch.testing.assert_close(twin(IMAGES), before)
    spoil(net)
    assert not torch.allclose(net(IMAGES).float(), before.float()), "the case proves nothing"
    torch.testing.assert_close(twin(IMAGES), before)
    net_now = net(IMAGES).detach()
    spoil(twin)
    torch.testing.assert_close(net(IMAGES).detach(), net_now)  # nor the other way round
    own = {id(x) for x in [*net.parameters(), *net.buffers(), *net.modules()]}
    assert not own & {id(x) for x in [*twin.parameters(), *twin.buffers(), *twin.modules()]}


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_teacher_follows_such_a_net(name: str) -> None:
    net = Net()
    COPIED[name](net)
    teacher = EMATeacher(net, decay=0.5, warmup=True, mode="eval")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    teacher.update(net)  # step 0 copies
    net.eval()
    torch.testing.assert_close(teacher(IMAGES), net(IMAGES).detach())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_recurrent_nets_and_graph_modules() -> None:
    rnn = nn.LSTM(3, 4)
    x = torch.rand(5, 2, 3)
    torch.testing.assert_close(copy_net(rnn)(x)[0], rnn(x)[0])
    traced = torch.fx.symbolic_trace(Net())
    twin = copy_net(traced)
    before = twin(IMAGES)
    spoil(traced)
    assert torch.equal(twin(IMAGES), before)


def test_a_tree_of_modules_stays_tied() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net.append(net[0])
    twin = copy_net(net)
    assert twin[0].weight is twin[1].weight
    assert twin[2] is twin[0]
    assert twin[0].weight is not net[0].weight


def test_flags_stay_and_gradients_go() -> None:
    net = Net().eval()
    net.body.requires_grad_(False)
    net(IMAGES).sum().backward()
    twin = copy_net(nn.DataParallel(net))
    assert type(twin) is Net
    assert not twin.training
    assert [p.requires_grad for p in twin.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in twin.parameters())


class Scaled(nn.Parameter):
    """A parameter of a class of its own, with an attribute that its constructor asks for."""

    def __new__(cls, data: Tensor, scales: dict[str, float]) -> Scaled:
        x = super().__new__(cls, data)
        x.scales = scales
        return x


@pytest.mark.parametrize("make", [copy_net, lambda net: EMATeacher(net).module])
def test_a_parameter_keeps_its_class_and_its_attributes(make: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Linear(3, 2)
    net.bias = Scaled(torch.ones(2), {"all": 0.5})
    bias = make(net).bias
    assert type(bias) is Scaled
    assert bias.scales == {"all": 0.5}
    assert bias.scales is not net.bias.scales
    assert torch.equal(bias, net.bias)
    assert bias.data_ptr() != net.bias.data_ptr()
    assert bias.requires_grad == (make is copy_net)

    net.bias.scales["lock"] = threading.Lock()
    with pytest.raises(ValueError, match="the net itself has a parameter `bias` that cannot be copied: cannot pickle"):
        make(net)


SEEN: list[Tensor] = []


def test_hooks_of_users_stay_behind() -> None:
    net, seen = Net(), []

    class Trainer:
        def __init__(self, net: nn.Module) -> None:
            self.net = net

        def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append("trainer")

    def watch(trainer: Trainer) -> Callable[..., None]:
        return lambda module, args, output: seen.append(str(type(trainer)))

    net.body.register_forward_hook(lambda module, args, output: seen.append("hook"))
    net.body.register_forward_pre_hook(functools.partial(lambda store, module, args: store.append("pre"), seen))
    net.head.register_forward_hook(Trainer(net).look)
    net.head.register_forward_hook(lambda module, args, output: SEEN.append(output))
    net.head.register_forward_hook(watch(Trainer(net)))
    net.head.register_full_backward_hook(lambda module, gradient, output: seen.append("backward"))
    with FeatureTap(net, "body") as tap:
        twin = copy_net(net)
        twin(IMAGES).sum().backward()
        assert not seen
        assert not SEEN
        with pytest.raises(RuntimeError, match="did not"):
            tap.pop()
        net(IMAGES)
        assert tap.pop().shape == (2, 4, 4, 4)
    reference = weakref.ref(tap)
    del tap
    assert reference() is None  # no copy holds the tap
    assert len(seen) == 4
    assert len(SEEN) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in twin.modules())


class Renaming(nn.Module):
    """A net with hooks of its own on its `state_dict`, of every kind, and on a call."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 2, 1)
        self.loads: list[str] = []
        self.register_state_dict_post_hook(Renaming.stamp)
        self.register_load_state_dict_pre_hook(Renaming.unstamp)
        self._register_load_state_dict_pre_hook(self.note)
        self.register_load_state_dict_post_hook(lambda module, keys: module.loads.append("loaded"))
        self.head.register_forward_hook(lambda module, args, output: output.relu())
        self.head.register_forward_pre_hook(Renaming.double)

    @staticmethod
    def stamp(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[prefix + "stamp"] = torch.ones(())

    @staticmethod
    def unstamp(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state.pop(prefix + "stamp")

    def note(self, *args: Any) -> None:
        self.loads.append("own")

    @classmethod
    def double(cls, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (2 * args[0],)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_hooks_of_users_on_a_state_dict_stay_behind_and_those_of_the_net_come_along() -> None:
    net, seen = Renaming(), []
    net.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append("saves"))
    net.register_state_dict_post_hook(lambda module, *args: seen.append(str(type(net))))
    net.register_load_state_dict_pre_hook(lambda module, *args: seen.append("loads"))
    net.register_load_state_dict_post_hook(functools.partial(lambda store, module, keys: store.append("done"), seen))
    net._register_load_state_dict_pre_hook(lambda *args: seen.append("old"))
    for twin in (copy_net(net), EMATeacher(net).module):
        state = twin.state_dict()
        assert "stamp" in state
        twin.load_state_dict(state)
        assert twin.loads == ["own", "loaded"]
    assert not seen
    assert not net.loads
    net.load_state_dict(net.state_dict())
    assert len(seen) == 5


class _Itself(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Itself:
        return self


def test_a_module_that_is_its_own_copy_is_named_unless_it_is_shared_on_purpose() -> None:
    net = nn.Sequential(nn.Linear(2, 2), _Itself(2, 2).requires_grad_(False))
    for make in (copy_net, EMATeacher):
        with pytest.raises(ValueError, match=r"submodule '1' has a `__deepcopy__`, that of _Itself, which returns the"):
            make(net)
        with pytest.raises(ValueError, match=r"the net itself has a `__deepcopy__`"):
            make(net[1])
    teacher = EMATeacher(net, share_frozen=True)
    assert teacher.module[1] is net[1]
    teacher.update(net)


class _Scale:
    """A hook that is an object and holds a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _times(output, self.factor)


def _times(x: Tensor, factor: float) -> Tensor:
    return torch.mul(x, factor)


def _clamped(low: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clamp(low, 0.1)


def _halved(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(0.5)


_CALLS = 0


def _counts(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    global _CALLS
    _CALLS += 1
    return output


def _counter() -> Callable[..., Tensor]:
    calls = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output

    return count


def _factorial(n: int) -> int:
    return 1 if n < 2 else n * _factorial(n - 1)


def _looks(module: nn.Module, args: Any, output: Tensor) -> None:
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "hook",
    [
        lambda m, i, o: o.clamp(-0.1, 0.1),
        functools.partial(_clamped, -0.1),
        _Scale(3.0),
        _halved,
        lambda m, i, o: _factorial(3) * o,
    ],
    ids=["lambda", "partial", "object", "in place", "recursion"],
)
@pytest.mark.parametrize("make", [copy_net, lambda net: EMATeacher(net).module], ids=["copy", "teacher"])
def test_a_hook_that_only_computes_is_a_part_of_the_net_whoever_registered_it(
    hook: Callable[..., Any], make: Callable[[nn.Module], nn.Module]
) -> None:
    net = Net().eval()
    plain = net(IMAGES)
    looking = [_looks, lambda m, i, o: print("seen"), lambda m, i, o: SEEN.append(o), _counts, _counter()]  # they stay
    for each in (hook, *looking):
        if isinstance(each, types.FunctionType):
            each.__module__ = "script"  # not in the package of the net
        net.body.register_forward_hook(each)
    twin = make(net).eval()
    assert not torch.equal(net(IMAGES), plain)
    assert torch.equal(twin(IMAGES), net(IMAGES))
    assert len(twin.body._forward_hooks) == 1


def test_hooks_that_the_class_of_a_net_defines_come_along() -> None:
    net = Renaming()
    assert torch.equal(copy_net(net)(IMAGES), net(IMAGES))


def test_a_hook_made_with_the_net_that_cannot_be_copied_is_refused() -> None:
    class Scaled(nn.Conv2d):
        def __init__(self, scale: list[float]) -> None:
            super().__init__(3, 2, 1)
            self.register_forward_hook(lambda module, args, output: output * scale[0])

    with pytest.raises(ValueError, match=r"the net itself has a hook, .*<lambda>, that uses an object of a closure"):
        copy_net(Scaled([2.0]))

    class Stamped(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 2, 1)
            self.register_state_dict_post_hook(lambda module, state, *args: state.update(bias=self.bias))

    with pytest.raises(ValueError, match=r"the net itself has a hook, .*<lambda>, a function that refers to the net"):
        copy_net(Stamped())


def test_a_global_of_an_attributes_name_is_no_store_of_the_net() -> None:
    """A notebook that keeps `features = {}` beside a net with an attribute `features`."""
    space: dict[str, Any] = {"nn": nn}
    exec(
        "features = {}\n"
        "def leave(module, args, output):\n"
        "    features['x'] = output\n"
        "class Notebook(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.features = nn.Conv2d(3, 2, 1)\n"
        "    def forward(self, x):\n"
        "        return self.features(x)\n",
        space,
    )
    net = space["Notebook"]()
    net.features.register_forward_hook(space["leave"])
    copy_net(net)(IMAGES)
    assert not space["features"]


def test_a_hook_on_a_store_that_the_net_only_writes_to_is_refused_until_it_is_removed() -> None:
    """Whether code reads cannot be told safely. Without the hook, the net is copied, and writes as its class does."""
    space: dict[str, Any] = {"nn": nn}
    exec(
        "seen = {}\n"
        "def leave(module, args, output):\n"
        "    seen['hook'] = output\n"
        "class Writes(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Conv2d(3, 2, 1)\n"
        "    def forward(self, x):\n"
        "        seen['net'] = self.body(x)\n"
        "        return 2 * self.body(x)\n",
        space,
    )
    net, seen = space["Writes"](), space["seen"]
    handle = net.body.register_forward_hook(space["leave"])
    for make in (copy_net, EMATeacher):
        with pytest.raises(ValueError, match=r"'body' has a hook, leave, that uses the global `seen`.*remove the hook"):
            make(net)
    handle.remove()
    teacher = EMATeacher(net, decay=0.0, warmup=False).eval()
    net.body.register_forward_hook(space["leave"])
    spoil(net)
    teacher.update(net)
    torch.testing.assert_close(teacher(IMAGES), net(IMAGES))
    mine = seen["hook"]
    teacher(IMAGES)
    assert seen["hook"] is mine  # the teacher has no hook
    assert not seen["net"].requires_grad  # but it has the code


def test_hooks_of_the_nets_library_come_along() -> None:
    """transformers hangs hooks on at the first pass, and knows that it did."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=3, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, decoder_hidden_size=12, num_attention_heads=[1] * 4
    )
    net = transformers.SegformerForSemanticSegmentation(config).eval()
    images = torch.rand(1, 3, 64, 64)
    before = net(images, output_hidden_states=True).hidden_states
    after = copy_net(net)(images, output_hidden_states=True).hidden_states
    assert len(before) == len(after) > 0
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y)


def test_a_stored_hook_handle_is_the_copys() -> None:
    net = Net()
    net.own = types.MethodType(lambda self, module, args, output: output + 1, net)
    net.handle = net.body.register_forward_hook(net.own)
    twin = copy_net(net)
    twin.handle.remove()
    assert not twin.body._forward_hooks
    assert net.body._forward_hooks


# --- what is refused, by name ------------------------------------------------------------------------------------


def _closure(net: nn.Module) -> None:
    old = net.body.forward
    net.body.forward = lambda x: 2 * old(x)


def _autocast(net: nn.Module) -> None:
    net.forward = torch.autocast("cpu", dtype=torch.bfloat16)(net.forward)


def _compiled_forward(net: nn.Module) -> None:
    net.forward = torch.compile(net.forward, backend="eager")


def _default(net: nn.Module) -> None:
    net.body.forward = lambda x, layer=net.head: x


def _foreign(net: nn.Module) -> None:
    other = nn.Conv2d(3, 4, 1)
    net.extra = lambda x: other(x)


def _closure_hook(net: nn.Module) -> None:
    net.store = []
    store = net.store
    net.body.register_forward_hook(lambda module, args, output: store.append(output))


STORE: dict[str, Tensor] = {}
SPACE = types.SimpleNamespace()
COUNTS: Counter[str] = Counter()


class _Left(nn.Module):
    """The code of the net reads what a hook leaves in a global store."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layer.register_forward_hook(_leave)


class _InForward(_Left):
    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return STORE["output"]


class _InAHelper(_Left):
    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return _read()


class _InAProperty(_Left):
    @property
    def output(self) -> Tensor:
        return STORE["output"]

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.output


class _InAStaticMethod(_Left):
    @staticmethod
    def output() -> Tensor:
        return STORE["output"]

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.output()


class _InANamespace(_Left):
    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return SPACE.output


class _InACounter(_Left):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * COUNTS["calls"]


def _in_a_forward_of_its_own(net: nn.Module) -> None:
    net.neck = _Left()
    net.neck.forward = types.MethodType(_InForward.forward, net.neck)


def _read() -> Tensor:
    return STORE["output"]


def _leave(module: nn.Module, args: Any, output: Tensor) -> None:
    STORE["output"] = SPACE.output = output
    COUNTS["calls"] += 1


def _hook_on_self(net: nn.Module) -> None:
    net.body.register_forward_hook(lambda module, args, output: setattr(net, "last", output))


def _graph(net: nn.Module) -> None:
    net.head.last = {"features": [net.body(IMAGES)]}


def _weak(net: nn.Module) -> None:
    net.head.parent = weakref.ref(net)


def _proxy(net: nn.Module) -> None:
    object.__setattr__(net.head, "parent", weakref.proxy(net))


REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "closure": (_closure, r"submodule 'body' has a `forward` of its own, a function that refers to the net"),
    "autocast": (_autocast, r"the net itself has a `forward` of its own"),
    "compiled forward": (_compiled_forward, r"the net itself has a `forward` of its own"),
    "default": (_default, r"submodule 'body' has a `forward` of its own"),
    "function over another net": (_foreign, r"the net itself has a `extra` of its own"),
    "closure hook over a store": (_closure_hook, r"submodule 'body' has a hook, _closure_hook.*refers to the net"),
    **{
        f"hook that leaves what the code reads, {kind.__name__}": (
            lambda net, kind=kind: setattr(net, "neck", kind()),
            r"'neck.layer' has a hook, _leave, that uses the global `(STORE|SPACE|COUNTS)`",
        )
        for kind in (_InForward, _InAHelper, _InAProperty, _InAStaticMethod, _InANamespace, _InACounter)
    },
    "hook that leaves what a forward of its own reads": (
        _in_a_forward_of_its_own,
        r"'neck.layer' has a hook, _leave, that uses the global `(STORE|SPACE|COUNTS)`",
    ),
    "closure hook over the net": (_hook_on_self, r"submodule 'body' has a hook, _hook_on_self"),
    "tensor with a graph": (_graph, r"submodule 'head' holds a tensor with a graph in `last`"),
    "weak reference": (_weak, r"submodule 'head' has a `parent` of its own"),
    "weak proxy": (_proxy, r"submodule 'head' has a `parent` of its own"),
    "cached method": (
        lambda net: setattr(net.body, "rows", functools.lru_cache(net.body.extra_repr)),
        r"submodule 'body' has a `rows` of its own",
    ),
    "queue": (lambda net: setattr(net.body, "jobs", queue.Queue()), r"'body' holds a Queue in `jobs`: cannot pickle"),
    "lock": (lambda net: setattr(net.body, "lock", threading.Lock()), r"'body' holds a lock in `lock`: cannot pickle"),
    "lazy": (lambda net: setattr(net, "neck", nn.LazyLinear(3)), r"submodule 'neck' is lazy: weight, bias has no"),
    "generator": (
        lambda net: setattr(net, "rows", iter([])) or setattr(net, "g", (x for x in [])),
        r"holds a generator",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", [copy_net, EMATeacher])
def test_what_cannot_be_copied_is_refused_by_name(name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    net = Net()
    spoiler, message = REFUSED[name]
    spoiler(net)
    with pytest.raises(ValueError, match=message):
        make(net)
    if name != "lazy":
        with pytest.raises(ValueError, match=r"EMATeacher\(model, module=second\)"):
            make(net)


@pytest.mark.parametrize("name", [k for k in REFUSED if k not in ("lazy", "compiled forward")])
def test_the_way_out_leads_out(name: str) -> None:
    """A second net, made by the user as the first."""
    net, second = Net(), Net()
    for one in (net, second):
        REFUSED[name][0](one)
    spoil(net)
    teacher = EMATeacher(net, decay=0.5, warmup=False, module=second)
    assert teacher.module is second
    assert not any(p.requires_grad for p in second.parameters())
    assert torch.equal(second.body.weight, net.body.weight)
    before = second.body.weight.clone()
    spoil(net)
    teacher.update(net)
    torch.testing.assert_close(second.body.weight, before + 0.5)
    assert net.body.weight.requires_grad


def _scripted(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(net)


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def test_a_torchscript_net_is_refused_by_name_and_followed_by_a_net_in_python() -> None:
    for whole in (False, True):
        net = _scripted(_small()) if whole else nn.Sequential(_scripted(_small()), nn.Conv2d(2, 2, 1))
        where = "the net itself" if whole else "its submodule '0'"
        for make in (copy_net, EMATeacher):
            with pytest.raises(ValueError, match=f"{where} is a TorchScript module.*module=second"):
                make(net)
        second = _small() if whole else nn.Sequential(_small(), nn.Conv2d(2, 2, 1))
        teacher = EMATeacher(net, decay=0.5, warmup=False, module=second)
        torch.testing.assert_close(teacher.eval()(IMAGES), net.eval()(IMAGES))
        before = {name: p.clone() for name, p in second.named_parameters()}
        spoil(net)
        teacher.update(net)
        for name, p in net.named_parameters():
            torch.testing.assert_close(second.get_parameter(name), (before[name] + p) / 2)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(second.get_buffer(name), buffer)
        where = "it" if whole else "its submodule '0'"
        with pytest.raises(TypeError, match=f"`module` to be a net in Python, but {where} is a TorchScript"):
            EMATeacher(second, module=net)
    with pytest.raises(TypeError, match="to be a net in Python, but got a TorchScript module"):
        FeatureTap(net, "0")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_frozen_torchscript_net_hears_of_freezing() -> None:
    """`torch.jit.freeze` makes constants of the weights: there is nothing to average."""
    for whole in (True, False):
        frozen = torch.jit.freeze(_scripted(_small().eval()))
        net, second = (frozen, _small()) if whole else (nn.Sequential(frozen), nn.Sequential(_small()))
        where = "the net itself" if whole else "its submodule '0'"
        says = f"{where} is frozen TorchScript. `torch.jit.freeze` made its weights constants.*as it was before"
        for make in (copy_net, EMATeacher, lambda net, second=second: EMATeacher(net, module=second)):
            with pytest.raises(ValueError, match=says):
                make(net)
        with pytest.raises(ValueError, match=says):
            EMATeacher(second).update(net)
    # Constants without weights are no matter: an activation may be frozen.
    net = nn.Sequential(nn.Conv2d(3, 2, 1), torch.jit.freeze(_scripted(nn.ReLU().eval())))
    EMATeacher(net, module=nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())).update(net)


def test_a_torchscript_net_saves_every_buffer() -> None:
    def made() -> nn.Module:
        net = _small()
        net[0].register_buffer("position", torch.ones(2), persistent=False)
        return net

    net, second = _scripted(made()), made()
    teacher = EMATeacher(net, decay=0.0, warmup=False, module=second)
    spoil(net)
    teacher.update(net)
    torch.testing.assert_close(teacher.eval()(IMAGES), net.eval()(IMAGES))


@pytest.mark.parametrize("by", ["modules", "fx"])
def test_a_net_with_quantisers_is_averaged(by: str) -> None:
    """Quantisation-aware training, whose `qconfig` holds closures over the net."""
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def prepared() -> nn.Module:
        if by == "fx":
            mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
            return prepare_qat_fx(_small().train(), mapping, (IMAGES,))
        net = nn.Sequential(quantization.QuantStub(), *_small(), quantization.DeQuantStub()).train()
        net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(net)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        net = prepared()
        early = EMATeacher(net)
        net(IMAGES)
    with pytest.raises(ValueError, match="Observers of quantisation take their shapes in the first pass"):
        early.update(net)
    teacher = EMATeacher(net, decay=0.5, warmup=False)
    torch.testing.assert_close(teacher.eval()(IMAGES), net.eval()(IMAGES))
    shared = {x.data_ptr() for x in net.state_dict().values()} & {
        x.data_ptr() for x in teacher.module.state_dict().values()
    }
    assert not shared
    before = {name: p.clone() for name, p in teacher.module.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    teacher.update(net)
    for name, p in teacher.module.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5)


def test_a_module_must_be_another_net_of_the_same_kind() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"`module` to be a separate net, but got one that shares body\.weight"):
        EMATeacher(net, module=net)
    half = Net()
    half.head = net.head
    with pytest.raises(ValueError, match=r"one that shares head\.weight"):
        EMATeacher(net, module=half)
    with pytest.raises(ValueError, match="0 of 2 match"):
        EMATeacher(net, module=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"`module` to be an nn\.Module, but got dict"):
        EMATeacher(net, module={})  # type: ignore[arg-type]


def test_a_module_can_share_what_is_frozen() -> None:
    net, second = Net(), Net()
    net.body.requires_grad_(False)
    teacher = EMATeacher(net, module=second, share_frozen=True)
    assert second.body.weight is net.body.weight
    assert second.head.weight is not net.head.weight
    teacher.update(net)


def test_a_copied_teacher_is_one_of_its_own() -> None:
    """With `share_frozen`, too: its frozen part follows the student that it is shown."""
    net = Net()
    net.body.requires_grad_(False)
    teacher = EMATeacher(net, decay=0.5, warmup=False, share_frozen=True)
    twin = copy.deepcopy(teacher)
    other = copy_net(net)
    spoil(other)
    before = net.body.weight.clone()
    twin.update(other)
    torch.testing.assert_close(twin.module.body.weight, before + 0.5)
    assert torch.equal(net.body.weight, before)
    pair = copy.deepcopy({"student": net, "teacher": teacher})
    assert pair["teacher"].module.body.weight is pair["student"].body.weight  # copied together they go on sharing
