"""The EMA teacher against the recursion written out, and against the ways in which such teachers silently fail."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from contract.checks import NoHostRead, needs_fake_cuda
from udakit import EMATeacher, FeatureTap, draw_box_mask, keep_statistics, unwrap_model


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


@torch.no_grad()
def move(net: nn.Module, seed: int) -> None:
    """Stand in for an optimiser's step and a pass in training mode."""
    generator = torch.Generator().manual_seed(seed)
    for x in net.state_dict().values():
        x.add_(torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else 1)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in net.state_dict().items()}


def textbook_ema(states: list[dict[str, Tensor]], start: dict, decay: float, warmup: bool, buffers: str) -> dict:
    """Step by step in float64; the names with "running" and "num" are the buffers."""
    average = {name: x.double() if x.is_floating_point() else x for name, x in start.items()}
    for t, student in enumerate(states):
        alpha = min(1 - 1 / (t + 1), decay) if warmup else decay
        for name, x in student.items():
            if not x.is_floating_point():
                average[name] = x
            elif "running" not in name or buffers == "ema":
                average[name] = alpha * average[name] + (1 - alpha) * x.double()
            elif buffers == "copy":
                average[name] = x.double()
    return average


@given(
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]),
    warmup=st.booleans(),
    buffers=st.sampled_from(["copy", "ema", "keep"]),
    steps=st.integers(1, 6),
    given_step=st.booleans(),
)
def test_update_is_the_recursion(decay: float, warmup: bool, buffers: str, steps: int, given_step: bool) -> None:
    net = make_net()
    teacher = EMATeacher(net, decay, warmup, buffers)
    start, states = state(net), []
    for t in range(steps):
        move(net, t)
        states.append(state(net))
        teacher.update(net, t if given_step else None)
    expected = textbook_ema(states, start, decay, warmup, buffers)
    for name, x in teacher.module.state_dict().items():
        torch.testing.assert_close(x.double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=name)
    assert int(teacher.step) == steps


def test_step_zero_copies_and_a_constant_stays() -> None:
    net = make_net()
    teacher = EMATeacher(net, warmup=True)
    move(net, 1)
    teacher.update(net)
    for name, x in net.state_dict().items():
        assert torch.equal(teacher.module.state_dict()[name], x), name
    for _ in range(50):
        teacher.update(net)
    for name, x in net.state_dict().items():
        assert torch.equal(teacher.module.state_dict()[name], x), name


def test_the_student_is_not_touched() -> None:
    net = make_net().train()
    net(torch.rand(2, 3, 4, 4)).sum().backward()
    before = state(net)
    teacher = EMATeacher(net)
    move(teacher.module, 3)
    teacher.update(net)
    teacher(torch.rand(2, 3, 4, 4))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(p.requires_grad and p.grad is not None for p in net.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    own = {x.data_ptr() for x in teacher.module.state_dict().values()}
    assert not own & {x.data_ptr() for x in net.state_dict().values()}


# --- wrappers and names: an update that silently does nothing ----------------------------------------------------

WRAPPERS = {
    "none": lambda m: m,
    "compile": torch.compile,
    "parallel": nn.DataParallel,
    "parallel of compile": lambda m: nn.DataParallel(torch.compile(m)),
    "compile of parallel": lambda m: torch.compile(nn.DataParallel(m)),
}


@pytest.mark.parametrize("at_update", WRAPPERS)
@pytest.mark.parametrize("at_start", WRAPPERS)
def test_wrappers_are_seen_through(at_start: str, at_update: str) -> None:
    net = make_net()
    teacher = EMATeacher(WRAPPERS[at_start](net), decay=0.5, warmup=False)
    assert type(teacher.module) is nn.Sequential
    assert list(teacher.module.state_dict()) == list(net.state_dict())
    before = teacher.module[0].weight.clone()
    move(net, 1)
    teacher.update(WRAPPERS[at_update](net))
    torch.testing.assert_close(teacher.module[0].weight, (before + net[0].weight) / 2)
    assert unwrap_model(WRAPPERS[at_update](net)) is net


def test_a_compiled_part_is_seen_through() -> None:
    net, plain = make_net(), make_net()
    net[0] = torch.compile(net[0])
    teacher = EMATeacher(net)
    assert list(teacher.module.state_dict()) == list(plain.state_dict())
    teacher.update(plain)
    teacher.update(net)


def test_a_net_of_other_names_is_refused() -> None:
    teacher = EMATeacher(make_net())
    with pytest.raises(ValueError, match=r"0 of 9 match: missing 0\.weight, .*, and 4 more, unknown weight, bias\."):
        teacher.update(nn.Linear(2, 2))
    longer = make_net().append(nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match=r"9 of 9 match: missing none, unknown 4\.weight, 4\.bias\."):
        teacher.update(longer)


def test_a_net_of_other_shapes_is_refused_before_anything_moves() -> None:
    teacher = EMATeacher(make_net(), decay=0.5, warmup=False)
    before = state(teacher)
    other = make_net(1)
    other[3] = nn.Conv2d(4, 5, 1)
    with pytest.raises(
        ValueError, match=r"shapes of the averaged net: 3\.weight \(2, 4, 1, 1\) but got \(5, 4, 1, 1\)"
    ):
        teacher.update(other)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_a_net_on_another_device_is_refused() -> None:
    teacher = EMATeacher(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="devices of the averaged net: weight on 'cpu' but got 'meta'"):
        teacher.update(nn.Linear(2, 2, device="meta"))


def test_tied_parameters_move_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    teacher = EMATeacher(net, decay=0.5, warmup=False)
    before = teacher.module[0].weight.clone()
    move(net[0], 1)
    teacher.update(net)
    assert teacher.module[0].weight is teacher.module[1].weight
    torch.testing.assert_close(teacher.module[0].weight, (before + net[0].weight) / 2)


def _smp() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").FPN("resnet18", encoder_weights=None, classes=3)


def _torchvision() -> nn.Module:
    nets = pytest.importorskip("torchvision").models.segmentation
    return nets.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


def _transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=3, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, decoder_hidden_size=12, num_attention_heads=[1] * 4
    )
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("make", [_smp, _torchvision, _transformers])
def test_real_nets(make: Callable[[], nn.Module]) -> None:
    """Also after a pass of the student: some libraries hang hooks on."""
    net = make()
    images = torch.rand(2, 3, 64, 64)
    FeatureTap(net, "")(images)
    teacher = EMATeacher(net, decay=0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    teacher.update(net)
    expected, _ = FeatureTap(net.eval(), "")(images)
    torch.testing.assert_close(FeatureTap(teacher.eval(), "module", index=0)(images)[0], expected.detach())


def test_a_teacher_may_live_in_the_net_that_it_averages() -> None:
    net, plain = make_net(), make_net()
    net.teacher = EMATeacher(net, decay=0.5, warmup=False)
    reference = EMATeacher(plain, decay=0.5, warmup=False)
    for one in (net, plain):
        for k in (0, 1, 3):
            move(one[k], k)
    net.teacher.update(net)
    reference.update(plain)
    for name, x in reference.module.state_dict().items():
        assert torch.equal(net.teacher.module.state_dict()[name], x), name
    twin = copy.deepcopy(net)
    twin.teacher.update(twin)
    EMATeacher(net).update(plain)  # another one of the same net


def _pruned(module: nn.Module) -> nn.Module:
    return nn.utils.prune.random_unstructured(module, "weight", amount=0.5)


# --- buffers, BatchNorm and mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_passes_of_the_teacher_leave_followed_statistics_alone(buffers: str) -> None:
    teacher = EMATeacher(make_net(), buffers=buffers)
    norm = teacher.module[1]
    before = state(norm)
    images = torch.rand(4, 3, 5, 5) + 3
    out = teacher(images)
    assert torch.equal(norm.running_mean, before["running_mean"]) == (buffers != "keep")
    assert int(norm.num_batches_tracked) == (1 if buffers == "keep" else 0)
    assert norm.track_running_stats  # as it was: the averaged net can be taken out and trained
    reference = make_net().train()
    reference[2].eval()
    torch.testing.assert_close(out, reference(images))  # the statistics of the batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("space", [(), (5,), (4, 6), (2, 3, 4)])
def test_statistics_of_a_batch_are_blended_with_the_running_ones(space: tuple[int, ...], dtype: torch.dtype) -> None:
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(space)]
    norm = kind(3).double()
    for x in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert x is not None
        x.uniform_(0.5, 2)
    images = (torch.randn(4, 3, *space, dtype=torch.float64) * 3 + 5).to(dtype).double()
    dims = [d for d in range(images.ndim) if d != 1]
    shape = [1, 3, *[1] * len(space)]
    for share in (0.0, 0.3, 1.0):
        teacher = EMATeacher(norm.to(dtype), running_share=share, mode="batch_statistics")
        before = state(teacher)
        out = teacher(images.to(dtype))
        mean = share * norm.running_mean.double() + (1 - share) * images.mean(dims)
        var = share * norm.running_var.double() + (1 - share) * images.var(dims, correction=0)
        expected = (images - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
        expected = expected * norm.weight.double().view(shape) + norm.bias.double().view(shape)
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out.double(), expected, **tolerance)
        assert out.dtype == dtype
        assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
        torch.testing.assert_close(teacher.eval()(images.to(dtype)), norm.eval()(images.to(dtype)))
        torch.testing.assert_close(teacher.train().module.eval()(images.to(dtype)), norm(images.to(dtype)))
        norm.train()


def test_blended_statistics_in_nets_that_were_copied_compiled_and_emptied() -> None:
    BatchNormAct2d = pytest.importorskip("timm.layers").BatchNormAct2d

    net = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    net(torch.rand(2, 3, 4, 4))
    images = torch.rand(2, 3, 4, 4) * 5 + 1
    teacher = EMATeacher(net, running_share=0.5)
    out = teacher(images)
    ends = [EMATeacher(net, mode=mode)(images) for mode in ("batch_statistics", "eval")]
    assert all((out - end).abs().max() > 0.01 for end in ends)
    torch.testing.assert_close(copy.deepcopy(teacher)(images), out)
    torch.testing.assert_close(torch.compile(teacher, fullgraph=True, backend="aot_eager")(images), out)
    torch.testing.assert_close(EMATeacher(teacher.module, mode="eval")(images), ends[1])  # a copy does not blend
    reference = copy.deepcopy(net)
    torch.optim.swa_utils.update_bn([images], reference)
    torch.optim.swa_utils.update_bn([images], teacher)
    for name, x in reference.named_buffers():
        torch.testing.assert_close(teacher.module.get_buffer(name), x, msg=name)
    with pytest.raises(ValueError, match=r"`running_share` to be 0 with `mode` 'eval', but got 0\.5"):
        EMATeacher(net, mode="eval", running_share=0.5)
    with pytest.raises(ValueError, match=r"`running_share` to be in \[0, 1\], but got 2"):
        EMATeacher(net, running_share=2)


def test_a_blending_layer_treats_its_input_as_it_does_alone() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return self.norm(input=images)  # type: ignore[no-any-return]

    net = ByName()
    net(torch.rand(2, 3, 4, 4))
    images = torch.rand(2, 3, 4, 4) * 5 + 1
    teacher = EMATeacher(net, running_share=0.3)
    out = teacher(images)
    torch.testing.assert_close(out, EMATeacher(net.norm, running_share=0.3)(images))
    for wrong in (images[:, :1], images[:, :2], images[0], images[0, 0]):  # by the layer, not by the rescaling
        with pytest.raises((RuntimeError, ValueError)) as alone:
            EMATeacher(net, mode="eval")(wrong)
        with pytest.raises(alone.type, match=re.escape(str(alone.value))):
            teacher(wrong)
    torch.testing.assert_close(teacher(images), out)
    assert teacher(images[:1, :, :1, :1]).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert teacher(images[:0]).shape == (0, 3, 4, 4)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(teacher).train()
    assert isinstance(converted.module.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(images), out)


def test_an_error_in_the_net_leaves_it_as_it_was() -> None:
    teacher = EMATeacher(make_net())
    with pytest.raises(RuntimeError):
        teacher(torch.rand(1, 7, 2, 2))
    assert teacher.module[1].track_running_stats


@pytest.mark.parametrize(
    ("mode", "training"),
    [("batch_statistics", (False, True, False)), ("train", (True, True, True)), ("eval", (False, False, False))],
)
def test_a_parents_train_does_no_more_than_the_mode_says(mode: str, training: tuple[bool, ...]) -> None:
    teacher = EMATeacher(make_net().eval(), mode=mode)
    parent = nn.ModuleList([teacher])

    def modes() -> tuple[bool, ...]:
        return tuple(m.training for m in (teacher.module, teacher.module[1], teacher.module[2]))

    assert modes() == training
    parent.eval()
    assert modes() == (False, False, False)
    parent.train()
    assert modes() == training
    assert teacher.training


def test_evaluation_uses_the_students_statistics() -> None:
    """A teacher whose statistics stay at their start gives nonsense in evaluation."""
    net = make_net()
    teacher = EMATeacher(net)
    for _ in range(60):
        net(torch.rand(8, 3, 4, 4) * 5 + 10)
        teacher.update(net)
    images = torch.rand(2, 3, 4, 4) * 5 + 10
    torch.testing.assert_close(teacher.eval()(images), net.eval()(images))


class Caching(nn.Linear):
    """In evaluation it keeps twice its weight, as timm's LeViT keeps its attention biases."""

    cache: Tensor | None = None

    def train(self, mode: bool = True) -> nn.Module:
        self.cache = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.cache is None:
            self.cache = 2 * self.weight
        return x @ (2 * self.weight if self.cache is None else self.cache).T


class Merging(nn.Linear):
    """In evaluation the weight holds the low-rank change, as in loralib."""

    merged = False

    def __init__(self, *args: int) -> None:
        super().__init__(*args, bias=False)
        self.change = nn.Parameter(torch.randn_like(self.weight))

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.merged:
            self.weight.data += -self.change if mode else self.change
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.merged else self.weight + self.change).T


@pytest.mark.parametrize("mode", ["batch_statistics", "train", "eval"])
@pytest.mark.parametrize("kind", [Caching, Merging])
def test_what_evaluation_computes_from_weights_follows_them(kind: type[nn.Module], mode: Any) -> None:
    student = nn.Sequential(kind(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    teacher = EMATeacher(student, decay=0.5, warmup=False, mode=mode)
    teacher.module[2].train()  # a mode that the user set stays
    x = torch.rand(4, 3)
    expected = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(2):
        teacher.module[0](x)
        modes = [m.training for m in teacher.modules()]
        with torch.no_grad():
            for name, p in student.named_parameters():
                p.add_(torch.randn_like(p))
                expected[name] = (expected[name] + p) / 2
        teacher.update(student)
        assert [m.training for m in teacher.modules()] == modes
    weight = expected["0.weight"] * 2 if kind is Caching else expected["0.weight"] + expected["0.change"]
    torch.testing.assert_close(teacher.module[0](x), x @ weight.T)


def test_non_persistent_buffers_are_left_alone() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("cache", torch.zeros(3), persistent=False)
    teacher = EMATeacher(net)
    net.cache = torch.ones(7)  # a cache may have any size
    teacher.update(net)
    assert torch.equal(teacher.module.cache, torch.zeros(3))


@pytest.mark.parametrize("mode", ["batch_statistics", "train", "eval"])
@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_update_bn_estimates_the_teachers_statistics(mode: str, buffers: str) -> None:
    net, loader = make_net(), [torch.rand(8, 3, 4, 4) * 5 + 10 for _ in range(3)]
    teacher, reference = EMATeacher(net, mode=mode, buffers=buffers), make_net()
    torch.optim.swa_utils.update_bn(loader, teacher)
    torch.optim.swa_utils.update_bn(loader, reference)
    for name, x in reference[1].named_buffers():
        torch.testing.assert_close(teacher.module[1].get_buffer(name), x, msg=name)
    assert int(teacher.module[1].num_batches_tracked) == 3
    assert teacher.module[1].momentum == 0.1
    assert teacher.module[1].training == (mode != "eval")
    before = state(teacher.module)
    teacher(loader[0] + 1)
    if buffers != "keep":  # the next pass is an ordinary one again
        assert all(torch.equal(x, before[name]) for name, x in teacher.module.state_dict().items())


def test_statistics_of_a_block_are_not_recorded() -> None:
    net = make_net()
    before = state(net)
    images = torch.rand(4, 3, 5, 5) + 3
    net[2].eval()
    with keep_statistics(nn.DataParallel(net)):
        inside = net(images)
        with pytest.raises(RuntimeError):
            net(images[:, :1])
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    torch.testing.assert_close(net(images), inside)  # the statistics of the batch, in the block as well
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, _pruned])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_weights_are_computed_from_follows_the_student(norm: Callable[..., nn.Module], buffers: str) -> None:
    """A singular vector that stays behind, or a mask of halves, would silently give other weights."""
    net = norm(nn.Linear(6, 6)).train()
    teacher = EMATeacher(net, decay=0.5, warmup=False, buffers=buffers, mode="eval")
    with torch.no_grad():
        for x in net.buffers():
            x.copy_(x.flip(0))
    teacher.update(net)
    for name, x in net.named_buffers():
        assert torch.equal(teacher.module.get_buffer(name), x), name
    assert [*net.buffers()]


# --- half precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_land_in_half_precision(dtype: torch.dtype) -> None:
    net = nn.Linear(8, 8).to(dtype)
    teacher = EMATeacher(net, warmup=False)
    start = net.weight.detach().float()
    with torch.no_grad():
        net.weight.add_(1)
    for _ in range(300):
        teacher.update(net)
    share = (teacher.module.weight.float() - start) / (net.weight.float() - start)
    assert share.mean().item() == pytest.approx(1 - 0.999**300, rel=0.02)  # computed in `dtype` it would be 0
    assert teacher.module.weight.dtype == dtype
    resumed = EMATeacher(net, warmup=False)
    resumed.load_state_dict(teacher.state_dict())
    for t in (teacher, resumed):
        t.update(net)
    assert all(torch.equal(x, resumed.state_dict()[name]) for name, x in teacher.state_dict().items())


def test_changing_the_dtype_keeps_the_digits() -> None:
    net = make_net()
    teacher = EMATeacher(net, decay=0.9, warmup=False)
    move(net, 1)
    teacher.update(net)
    before = state(teacher.module)
    teacher.bfloat16()
    net.bfloat16()
    teacher.update(net)
    assert all(x.dtype == torch.float32 for x in teacher.masters.buffers())
    assert teacher.module[0].weight.dtype == torch.bfloat16
    teacher.float()
    assert not list(teacher.masters.buffers())
    expected = 0.9 * before["0.weight"].bfloat16().float() + 0.1 * net[0].weight.float()
    torch.testing.assert_close(teacher.module[0].weight, expected)  # not rounded to bfloat16


def test_weights_loaded_into_a_half_precision_net_stay() -> None:
    net = nn.Linear(2, 2).bfloat16()
    teacher = EMATeacher(net, decay=0.5, warmup=False)
    teacher.update(net)
    teacher.module.load_state_dict({name: torch.full_like(x, 7.0) for name, x in net.state_dict().items()})
    teacher.update(net)
    torch.testing.assert_close(teacher.module.weight.float(), 3.5 + net.weight.float() / 2, rtol=0.01, atol=0)
    teacher.module.load_state_dict({name: torch.full_like(x, 7.0) for name, x in net.state_dict().items()})
    teacher.float()
    assert (teacher.module.weight == 7).all()


def test_a_net_cast_by_itself_is_averaged_in_float32() -> None:
    net = nn.Linear(2, 2)
    teacher = EMATeacher(net, decay=0.9, warmup=False)
    net.bfloat16()
    teacher.module.bfloat16()
    teacher.update(net)
    assert [x.dtype for x in teacher.masters.buffers()] == [torch.float32] * 2
    teacher.module.float()
    teacher.update(net)
    assert not list(teacher.masters.buffers())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_checkpoints_cross_precisions_with_their_digits(source: torch.dtype, target: torch.dtype) -> None:
    def make(dtype: torch.dtype) -> tuple[nn.Module, EMATeacher]:
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype)
        return net, EMATeacher(net, decay=0.9, warmup=False)

    net, teacher = make(source)
    with torch.no_grad():
        net[0].weight.add_(1)
    teacher.update(net)
    _, other = make(target)
    other.load_state_dict(teacher.state_dict())
    digits = teacher if source == torch.float32 else teacher.float()
    assert torch.equal(other.float().module[0].weight, digits.module[0].weight)


def test_a_float32_student_of_a_half_teacher() -> None:
    teacher, net = EMATeacher(make_net().bfloat16()), make_net(3)
    teacher.update(net)
    assert torch.equal(teacher.module[0].weight, net[0].weight.bfloat16())


# --- frozen parts ------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_is_stored_once() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    teacher = EMATeacher(net, share_frozen=True)
    assert teacher.module[0].weight is net[0].weight
    assert teacher.module[3].weight is not net[3].weight
    assert net[3].weight.requires_grad
    before = net[0].weight.clone()
    teacher.update(net)
    assert torch.equal(net[0].weight, before)
    assert EMATeacher(net).module[0].weight is not net[0].weight
    net[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"got parameters that require a gradient: 0\.bias, 0\.weight\."):
        teacher.update(net)


def test_loading_leaves_the_students_frozen_tensors_alone() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    teacher = EMATeacher(net, decay=0.5, warmup=False, share_frozen=True)
    teacher.load_state_dict(state(teacher))
    assert teacher.module[0].weight is net[0].weight  # the same values: they go on sharing
    before = net[0].weight.clone()
    teacher.load_state_dict({name: x + 1 for name, x in state(teacher).items()})
    assert torch.equal(net[0].weight, before)
    torch.testing.assert_close(teacher.module[0].weight, before + 1)
    teacher.update(net)
    torch.testing.assert_close(teacher.module[0].weight, before + 0.5)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_the_averaged_net_leaves_the_student_alone(assign: bool) -> None:
    net = make_net()
    net[0].requires_grad_(False)
    teacher = EMATeacher(net, share_frozen=True)
    before = net[0].weight.clone()
    teacher.module.load_state_dict({name: x + 1 for name, x in state(teacher.module).items()}, assign=assign)
    assert torch.equal(net[0].weight, before)
    torch.testing.assert_close(teacher.module[0].weight, before + 1)


def test_no_net_is_averaged_into_itself() -> None:
    teacher = EMATeacher(make_net())
    with pytest.raises(ValueError, match=r"`model` to be the student, but got the averaged net itself"):
        teacher.update(teacher.module)


# --- state, copies, devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_a_resumed_run_is_the_uninterrupted_one(buffers: str) -> None:
    """Also the step: a warm-up that begins again would make the teacher the student."""
    net = make_net()
    teacher = EMATeacher(net, buffers=buffers)
    for t in range(5):
        move(net, t)
        teacher.update(net)
        if t == 2:
            file = io.BytesIO()
            torch.save([teacher.state_dict(), net.state_dict()], file)
    file.seek(0)
    saved, saved_net = torch.load(file, weights_only=True)
    net2 = make_net(9)
    resumed = EMATeacher(net2, buffers=buffers)
    resumed.load_state_dict(saved)
    net2.load_state_dict(saved_net)
    for t in (3, 4):
        move(net2, t)
        resumed.update(net2)
    assert int(resumed.step) == 5
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


def test_a_copy_of_a_teacher_is_independent() -> None:
    net = make_net()
    teacher = EMATeacher(net)
    twin = copy.deepcopy(teacher)
    before = state(teacher)
    move(net, 1)
    twin.update(net)
    twin(torch.rand(2, 3, 4, 4))
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assigned_checkpoints_keep_their_precision(dtype: torch.dtype) -> None:
    """`assign=True` takes tensors as they come: the averages stay in float32 for all that."""
    net = make_net().to(dtype)
    teacher, source = EMATeacher(net, decay=0.9, warmup=False), EMATeacher(make_net(3).bfloat16())
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in source.state_dict().items()}
    teacher.load_state_dict(half, assign=True)
    assert all(x.dtype == torch.float32 for x in teacher.masters.buffers())
    start = teacher.module[0].weight.float()
    with torch.no_grad():
        net[0].weight.copy_(start + 1)
    for _ in range(10):
        teacher.update(net)
    assert [*teacher.masters.buffers()]
    torch.testing.assert_close(
        teacher.float().module[0].weight - start, torch.full_like(start, 1 - 0.9**10), atol=0.02, rtol=0
    )
    assert not any(p.requires_grad for p in teacher.parameters())


def test_an_assigned_checkpoint_of_a_half_precision_teacher() -> None:
    """With its float32 copies: the net stays in half precision, and the digits come along."""
    source, teacher = EMATeacher(make_net(3).bfloat16()), EMATeacher(make_net().bfloat16())
    for master in source.masters.buffers():
        master.add_(1e-4)
    saved = {name: x.clone() for name, x in source.state_dict().items()}
    teacher.load_state_dict(saved, assign=True)
    assert {x.dtype for x in teacher.module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(x, saved[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize(("device", "error"), [("gpu", ValueError), (3.5, TypeError), (True, TypeError)])
def test_a_device_that_is_none(device: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Expected `device` to be a .*device"):
        EMATeacher(make_net(), device=device)
    with pytest.raises(error, match=r"Expected `device` to be a .*device"):
        draw_box_mask(2, (4, 4), device=device)


@needs_fake_cuda
def test_the_average_may_live_on_another_device() -> None:
    with FakeTensorMode():
        net = make_net()
        with torch.device("cuda"):
            on_gpu = make_net()
        for student, device in ((on_gpu, "cpu"), (net, "cuda")):
            teacher = EMATeacher(student, buffers="ema", device=device)
            teacher.update(student)
            assert {x.device.type for x in teacher.state_dict().values()} == {device}
            assert {x.device.type for x in student.state_dict().values()} == {"cuda" if device == "cpu" else "cpu"}
    net = make_net()
    net[0].requires_grad_(False)
    with pytest.raises(ValueError, match="`share_frozen` to be False with a `device`"):
        EMATeacher(net, share_frozen=True, device="cpu")
    teacher, plain = EMATeacher(net, decay=0.5, device="cpu"), EMATeacher(net, decay=0.5)
    move(net, 1)
    teacher.update(net)
    plain.update(net)
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in teacher.state_dict().items())


@needs_fake_cuda
@pytest.mark.parametrize("step", [None, 3])
@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_an_update_on_a_gpu_waits_for_nothing(buffers: str, step: int | None) -> None:
    with FakeTensorMode():
        with torch.device("cuda"):
            net = make_net()
        teacher = EMATeacher(net, buffers=buffers)
        with NoHostRead():
            teacher.update(net, step)
        assert teacher.step.device.type == "cuda"


def test_update_compiles_in_one_graph() -> None:
    net = make_net()
    teacher, plain = EMATeacher(net), EMATeacher(net)
    compiled = torch.compile(teacher.update, fullgraph=True, backend="aot_eager")
    for t in range(3):
        move(net, t)
        compiled(net)
        plain.update(net)
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], x, msg=name)


def test_the_teacher_compiles_in_one_graph() -> None:
    teacher = EMATeacher(make_net())
    images = torch.rand(2, 3, 4, 4)
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    before = teacher.module[1].running_mean.clone()
    torch.testing.assert_close(compiled(images), teacher(images))
    assert torch.equal(teacher.module[1].running_mean, before)


def test_options_are_checked() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`decay` to be in \[0, 1\], but got 1\.5"):
        EMATeacher(net, decay=1.5)
    with pytest.raises(ValueError, match=r"`buffers` to be one of \('copy', 'ema', 'keep'\), but got 'average'"):
        EMATeacher(net, buffers="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`mode` to be one of .*, but got True"):
        EMATeacher(net, mode=True)  # type: ignore[arg-type]
    assert "decay=0.5" in repr(EMATeacher(net, decay=0.5))


@pytest.mark.parametrize("mode", ["batch_statistics", "train", "eval"])
@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_update_bn_of_norms_that_average_cumulatively(mode: str, buffers: str) -> None:
    """`momentum=None` in the net itself: what is emptied is filled again, and an ordinary pass leaves it alone."""
    net, reference = make_net(), make_net()
    loader = [torch.rand(8, 3, 4, 4) * 5 + 10 for _ in range(3)]
    for model in (net, reference):
        model[1].momentum = None
    teacher = EMATeacher(net, mode=mode, buffers=buffers)
    torch.optim.swa_utils.update_bn(loader, reference)
    for one in (teacher, copy.deepcopy(teacher), EMATeacher(teacher.module, mode=mode, buffers=buffers)):
        one.train()
        torch.optim.swa_utils.update_bn(loader, one)
        for name, x in reference[1].named_buffers():
            torch.testing.assert_close(one.module[1].get_buffer(name), x, msg=name)
        assert one.module[1].momentum is None
        before = state(one.module)
        one(loader[0] + 1)
        if buffers != "keep":
            assert all(torch.equal(x, before[name]) for name, x in one.module.state_dict().items())
    torch.optim.swa_utils.update_bn(loader, teacher.module)  # nor does one past the teacher make it record
    teacher.train()
    before = state(teacher.module)
    teacher(loader[0] + 1)
    if buffers != "keep":
        assert all(torch.equal(x, before[name]) for name, x in teacher.module.state_dict().items())
    assert not net[1].__dict__.get("reset_running_stats"), "the student stays as it was"


def test_a_teacher_that_an_earlier_version_pickled_whole_is_read() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    teacher = EMATeacher(student)
    images = torch.rand(2, 3, 8, 8)
    expected = teacher(images)
    del teacher.running_share, teacher._blending  # as it was before they existed
    again = pickle.loads(pickle.dumps(teacher))
    assert again.running_share == 0
    assert torch.equal(again.train()(images), expected)
    again.update(student)
    half = pickle.loads(pickle.dumps(EMATeacher(student, running_share=0.5)))
    assert half.running_share == half._blending.running_share == 0.5
    assert not torch.allclose(half(images), expected)
