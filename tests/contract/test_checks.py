"""The checks check: each one fails on an operation that is broken in its way, and passes on a sound one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract import checks
from contract.registry import CHECKS, Call, Operation, Sample
from udakit._state import FullPrecisionState


def sound(logits: Tensor, labels: Tensor, *, class_weight: Tensor, ignore_index: int = 255) -> Tensor:
    """What is expected of everyone: a cross-entropy in a few lines."""
    if not logits.is_floating_point() or not 3 <= logits.ndim <= 5:
        raise ValueError("Expected `logits` to be float (N, C, *space).")
    if logits.shape[1] < 2:
        raise ValueError("Expected `logits` to have two classes: udakit.binary_logits makes them.")
    if labels.dtype != torch.int64 or labels.shape[1:] != logits.shape[2:]:
        raise ValueError("Expected `labels` to be int64 (N, *space).")
    if not isinstance(class_weight, Tensor) or class_weight.shape != logits.shape[1:2]:
        raise ValueError("Expected `class_weight` to be (C,).")
    if type(ignore_index) is not int or abs(ignore_index) > 2**62:
        raise TypeError("Expected `ignore_index` to be an integer.")
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    valid = labels != ignore_index
    logits = torch.where(valid.unsqueeze(1), logits, 0)
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    return (loss * class_weight.to(loss.dtype)[labels.where(valid, 0)] * valid).sum() / valid.sum().clamp_min(1)


class Sound(FullPrecisionState):
    def __init__(self, *, class_weight: Tensor, ignore_index: int = 255) -> None:
        super().__init__()
        if not isinstance(class_weight, Tensor) or class_weight.ndim != 1:
            raise TypeError("Expected `class_weight` to be a tensor (C,).")
        if type(ignore_index) is not int or abs(ignore_index) > 2**62:
            raise TypeError("Expected `ignore_index` to be an integer.")
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sound(logits, labels, class_weight=self.class_weight, ignore_index=self.ignore_index)


class WeightNotABuffer(Sound):
    def __init__(self, *, class_weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.class_weight, self.ignore_index = class_weight, 255


class Rounded(Sound):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return nn.Module._apply(self, fn, recurse)


class OtherValue(Sound):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(logits, labels) * 1.01


class ForgetfulState(Sound):
    calls: int = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(logits, labels) * self.calls


def example(s: Sample) -> Call:
    return Call((s.logits(), s.labels()), {}, {"class_weight": s.class_values()})


def broken(change: Callable[..., Any], **fields: Any) -> Operation:
    """The sound operation, spoiled: `change(logits, labels, class_weight)` is called in its place."""

    def function(logits: Tensor, labels: Tensor, *, class_weight: Tensor) -> Tensor:
        return change(logits, labels, class_weight)

    return Operation(change.__name__, example, function, Sound, **fields)


def _sound(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return sound(logits, labels, class_weight=weight)


def nan_when_empty(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, weight, ignore_index=255)


def no_graph_when_empty(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) if bool((labels != 255).any()) else torch.zeros(())


def reads_a_value(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) / weight.sum().item()


def selects_by_mask(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return logits.movedim(1, -1)[labels != 255].mean()


def goes_to_the_cpu(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits.cpu(), labels.cpu(), weight.cpu())


def divides_counts(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) * ((labels == 0).sum() / 3)  # of the default dtype


def tensor_from_a_list(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits * torch.tensor([1.0, 2.0, 3.0, 4.0], device=logits.device).reshape(1, 4, 1, 1), labels, weight)


def index_on_the_cpu(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits[torch.arange(2)], labels, weight)


def result_on_the_cpu(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return torch.zeros(()) + 0 * _sound(logits, labels, weight).cpu()


def breaks_the_graph(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return _sound(logits, labels, weight)


def writes_in_place(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    labels[labels == 255] = 0
    return _sound(logits, labels, weight)


def writes_the_same(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    weight.mul_(1)
    return _sound(logits, labels, weight)


def wrong_gradient(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + logits.detach().square().mean()


def detached(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits.detach(), labels, weight)


def half_arithmetic(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    logits = logits.log_softmax(1).exp().log() if logits.dtype == torch.bfloat16 else logits
    return _sound(logits, labels, weight)


def half_result(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight).to(logits.dtype)


def half_under_autocast(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    mixed = torch.einsum("nchw,cd->ndhw", logits, torch.ones(4, 4, dtype=logits.dtype))
    return _sound(mixed + logits, labels, weight)


def overflows(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits.float().exp().clamp_min(1e-30).log(), labels, weight)


def nan_gradient(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + logits.square().sum(1).sqrt().mean()


def three_classes_at_least(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) * (1.0 if logits.shape[1] > 2 else float("nan"))


def reads_the_storage(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    logits = logits.as_strided(logits.shape, logits.contiguous().stride())
    return _sound(logits, labels, weight)


def first_image_counts_double(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + logits[0].mean()


def class_zero_is_special(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + logits[:, 0].mean()


def says_nothing(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    assert logits.ndim == 4
    return _sound(logits, labels, weight)


def broadcasts_silently(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    if logits.ndim == 4 and labels.ndim == 3:
        labels = F.interpolate(labels[:, None].float(), logits.shape[2:])[:, 0].long()
    return _sound(logits, labels, weight)


def names_another(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    if labels.ndim != 3:
        raise ValueError("Expected `gt` to be (N, H, W).")
    return _sound(logits, labels, weight)


def two_dimensional_only(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits.permute(0, 1, 3, 2), labels.permute(0, 2, 1), weight)


def mean_of_the_rows(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + logits.mean(-1).square().mean()


def refuses_without_a_word(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    if logits.ndim != 4:
        raise ValueError("Expected `logits` to be something else.")
    return _sound(logits, labels, weight)


def new_empty_by_numbers(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + logits.new_empty(2, 3).zero_().sum()


def one_channel_passes(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return logits.softmax(1).mean()


def one_channel_unexplained(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        raise ValueError("Expected `logits` to have more classes.")
    return _sound(logits, labels, weight)


def nan_times_zero(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return _sound(logits, labels, weight) + (logits * (labels != 255).unsqueeze(1)).sum()


def nan_gradient_outside(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    extra = torch.where(labels != 255, logits.softmax(1).square().sum(1), 0)
    return _sound(logits, labels, weight) + extra.mean()


class UncheckedIndex(Sound):
    def __init__(self, *, class_weight: Tensor, ignore_index: int = 255) -> None:
        super().__init__(class_weight=class_weight)
        self.ignore_index = ignore_index


class UnnamedIndex(Sound):
    def __init__(self, *, class_weight: Tensor, ignore_index: int = 255) -> None:
        super().__init__(class_weight=class_weight)
        if ignore_index != 255:
            raise ValueError("Expected another index.")


class UnknownOption(Sound):
    def __init__(self, *, class_weight: Tensor, flavour: str = "sweet") -> None:
        super().__init__(class_weight=class_weight)


def _draw(body: Callable[..., Tensor]) -> Operation:
    return Operation(
        body.__name__, lambda s: Call((s.labels(),)), body, kind="draw", grad=(), output="mask",
        exempt={"module": "has none, in this test"},
    )  # fmt: skip


def global_random(labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(labels.shape) < 0.5


def never_another(labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return labels < 2


def draws_and_reseeds(labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    if generator is not None:
        torch.manual_seed(generator.initial_seed())
    return torch.rand(labels.shape) < 0.5


def generator_unchecked(labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(labels.shape, generator=generator).to(labels.device) < 0.5


def sound_draw(labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    if labels.ndim not in (2, 3, 4) or labels.is_floating_point():
        raise ValueError("Expected `labels` to be an integer (N, *space).")
    if generator is not None and generator.device != labels.device:
        raise ValueError("Expected `generator` to be on the input's device.")
    return torch.rand(labels.shape, generator=generator, device=labels.device, dtype=torch.float32) < 0.5


# (check, operation, part of what the check says)
BROKEN = [
    ("module", Operation("other_value", example, sound, OtherValue), "Module against function"),
    ("module", Operation("weight_not_a_buffer", example, sound, WeightNotABuffer), "no buffer"),
    ("module", Operation("without_a_module", example, sound), "has no Module"),
    ("gradcheck", broken(wrong_gradient), "Jacobian mismatch"),
    ("gradcheck", broken(detached), "no output requires grad"),
    ("gradcheck", Operation("nothing_differentiable", example, sound, Sound, grad=()), "name the positions"),
    ("fake_tensors", broken(reads_a_value), "_local_scalar_dense"),
    ("fake_tensors", broken(selects_by_mask), "nonzero"),
    ("fake_tensors", broken(result_on_the_cpu), "output 0 is on cpu"),
    ("defaults", broken(index_on_the_cpu), "with another default, device"),
    ("defaults", broken(divides_counts), "with another default, torch.float64"),
    ("no_device_copy", broken(reads_a_value), "_local_scalar_dense"),
    ("no_device_copy", broken(no_graph_when_empty), "_local_scalar_dense"),
    ("no_device_copy", broken(selects_by_mask), "with a mask"),
    ("no_device_copy", broken(goes_to_the_cpu), "a copy from cuda to cpu"),
    ("no_device_copy", broken(tensor_from_a_list), "a copy from cpu to cuda"),
    ("no_device_copy", broken(index_on_the_cpu), "index on another device"),
    ("compile", broken(breaks_the_graph), "graph_break"),
    ("compile", broken(no_graph_when_empty), "bool((labels != 255).any())"),  # the line, whatever torch says of it
    ("half", broken(half_arithmetic), "against float32"),
    ("half", broken(half_result), "input is float32"),
    ("autocast", broken(half_under_autocast), "under autocast"),
    ("all_ignored", broken(nan_when_empty), "not exactly 0"),
    ("all_ignored", broken(no_graph_when_empty), "no graph"),
    ("all_ignored", Operation("no_labels", lambda s: Call((s.logits(),)), torch.mean), "neither labels nor valid"),
    ("strides", broken(reads_the_storage), "channels_last"),
    ("batch_permutation", broken(first_image_counts_double), "batch permutation"),
    ("class_permutation", broken(class_zero_is_special), "class permutation"),
    ("class_permutation", broken(_sound, output="other"), "every output is 'other'"),
    ("seed", _draw(global_random), "the same seed"),
    ("seed", _draw(never_another), "ten other seeds"),
    ("seed", _draw(draws_and_reseeds), "leaves the global one alone"),
    ("seed", _draw(generator_unchecked), "DID NOT RAISE"),
    ("seed", broken(_sound, kind="draw"), "takes `generator`"),
    ("unmodified", broken(writes_in_place), "was changed"),
    ("unmodified", broken(writes_the_same), "written to in place"),
    ("state_dict", Operation("forgetful", example, sound, ForgetfulState), "after load_state_dict"),
    ("cast", Operation("rounded", example, sound, Rounded), "a cast made `class_weight` torch.float16"),
    ("extreme_values", broken(overflows), "non-finite"),
    ("extreme_values", broken(nan_gradient), "feature scale 0, pattern 0: non-finite entries in tensor 1"),
    ("extreme_values", broken(three_classes_at_least), "one_class"),
    ("space", broken(two_dimensional_only), "dim"),
    ("space", broken(mean_of_the_rows), "1 spatial axes"),
    ("space", broken(_sound, space="two"), "no error"),
    ("space", broken(refuses_without_a_word, space="two"), "does not say that it is for two"),
    ("space", broken(_sound, space="test_space.py::test_that_is_not_there"), "there is no test"),
    ("space", Operation("no_map", lambda s: Call((s.class_values(),)), torch.mean), "space='none'"),
    ("subclass", broken(new_empty_by_numbers), "must be tuple of ints"),
    ("one_channel", broken(one_channel_passes), "no error"),
    ("one_channel", broken(one_channel_unexplained), "does not name the way out"),
    ("nan_outside", broken(nan_times_zero), "nan where nothing counts"),
    ("nan_outside", broken(nan_gradient_outside), "gradient, nan where nothing counts"),
    ("wrong_options", Operation("unchecked", example, sound, UncheckedIndex), "ignore_index=None: no error"),
    ("wrong_options", Operation("unnamed", example, sound, UnnamedIndex), "the message does not name it"),
    ("wrong_options", Operation("unknown", example, sound, UnknownOption), "has no row in wrong_options.py"),
    ("shape_errors", broken(says_nothing), "AssertionError"),
    ("shape_errors", broken(broadcasts_silently), "no error"),
    ("shape_errors", broken(names_another), "`gt` is no argument"),
]  # fmt: skip
ON_FAKE_CUDA = {"result_on_the_cpu", "goes_to_the_cpu", "tensor_from_a_list", "index_on_the_cpu", "generator_unchecked"}


@pytest.mark.parametrize(
    ("check", "op", "message"),
    [
        pytest.param(
            *row, id=f"{row[0]}-{row[1].name}", marks=[checks.needs_fake_cuda] if row[1].name in ON_FAKE_CUDA else []
        )
        for row in BROKEN
    ],
)
def test_check_fails_on(check: str, op: Operation, message: str) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        getattr(checks, check)(op)
    assert message in f"{caught.type.__name__}: {caught.value}"


def test_every_check_has_a_broken_operation() -> None:
    assert {check for check, _, _ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "op", [Operation("sound", example, sound, Sound), _draw(sound_draw)], ids=["loss", "draw"]
)  # fmt: skip
def test_check_passes_on_a_sound_operation(check: str, op: Operation) -> None:
    if check in op.exempt:
        pytest.skip(op.exempt[check])
    getattr(checks, check)(op)
