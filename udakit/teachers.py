"""Teachers: the moving average of a student, and several teachers made one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit._checks import (
    check_device,
    check_float,
    check_integer,
    check_option,
    check_range,
    check_size,
    is_sequence,
    kind_of,
    shape_of,
)
from udakit._reduce import KINDS, Kind, top_class, upcast
from udakit._state import FullPrecisionState

__all__ = ["EMATeacher", "fuse_teachers", "teacher_agreement", "unwrap_model"]

Buffers = Literal["copy", "ema", "keep"]
TeacherMode = Literal["batch_statistics", "train", "eval"]
Fusion = Literal["mean", "max_confidence", "agreement"]
BUFFERS = get_args(Buffers)
TEACHER_MODES = get_args(TeacherMode)
FUSIONS = get_args(Fusion)

_ONE_NET = "A teacher averages the net that it was made of: make another one for another net."
_HALF = (torch.float16, torch.bfloat16)
_Named = list[tuple[str, Tensor]]


def unwrap_model(model: nn.Module) -> nn.Module:
    """Take off the wrappers of `torch.compile`, DataParallel and DistributedDataParallel, in any nesting.

    Args:
        model: a net, wrapped or not.

    Returns:
        The net inside; wrappers of its submodules stay.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap_model(nn.DataParallel(torch.compile(net))) is net
        True
    """
    if not isinstance(model, nn.Module):
        hint = " Pass the net itself, not its state_dict or parameters." if not callable(model) else ""
        raise TypeError(f"Expected `model` to be an nn.Module, but got {kind_of(model)}.{hint}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _unwrap_all(model: nn.Module) -> nn.Module:
    model = unwrap_model(model)
    for name, child in model._modules.items():
        if child is not None:
            model._modules[name] = _unwrap_all(child)
    return model


def _named_state(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name without wrappers, tensor, whether it is a parameter) of parameters and persistent buffers."""
    model = unwrap_model(model)
    for name, parameter in model._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, True
    for name, buffer in model._buffers.items():
        if buffer is not None and name not in model._non_persistent_buffers_set:
            yield prefix + name, buffer, False
    for name, child in model._modules.items():
        if child is not None:
            yield from _named_state(child, f"{prefix}{name}.")


class EMATeacher(nn.Module):
    r"""A teacher whose weights are the exponential moving average of a student's.

    $$\theta_T \leftarrow \alpha_t\, \theta_T + (1 - \alpha_t)\, \theta_S, \qquad
    \alpha_t = \min\left(1 - \tfrac{1}{t + 1},\ \alpha\right)$$

    Call `update(student)` after the optimiser's step. Calling the teacher runs the averaged net without gradients.

    **Convention.** `.module` is a copy of the student without its compile and DDP wrappers; nothing in it requires a
    gradient. With `warmup` step 0 copies the student (on a GPU up to rounding). Parameters are matched by name: a
    missing, unknown or differently shaped one is an error, so that an update can never silently do nothing. float16 and
    bfloat16 parameters are averaged in float32 copies (at alpha = 0.999 a step is smaller than their resolution and
    would never land) and rounded on writing. Integer buffers are copied whatever `buffers` says; non-persistent buffers
    are left alone.

    **BatchNorm.** `mode` says what `.train()` does, also a `.train()` that arrives from a parent Module: with
    "batch_statistics" the normalisation uses the batch's own statistics and all else (dropout, drop path) stays in
    evaluation, which is DAFormer's teacher; "train" is plain training mode (DACS, DiGA); "eval" keeps the teacher in
    evaluation for good. `.eval()` always evaluates. A new teacher starts as if `.train()` had been called.
    Running statistics follow the student ("copy", "ema") and the teacher's own passes never touch them; with "keep"
    they belong to the teacher: its passes in training mode move them and the student never does.

    **Source.** Tarvainen and Valpola 2017. DACS, DAFormer and DiGA average parameters only: `buffers="keep"`.

    Args:
        model: the student; it is copied, not kept.
        decay: alpha in [0, 1].
        warmup: whether alpha rises from 0 as above; turn it off when the student starts from trained weights.
        buffers: floating-point buffers are copied from the student, averaged like parameters, or left alone.
        mode: what `.train()` puts the teacher in: "batch_statistics" | "train" | "eval".
        share_frozen: whether parameters that do not require a gradient are the student's own tensors instead of copies,
            so that a frozen backbone is stored once. Unfreezing one later is an error at the next update. Moving or
            casting the teacher (`.to`, `.half`) then does the same to these tensors of the student.

    Raises:
        ValueError: an unknown option, and in `update` a model that does not match.

    Example:
        >>> student = nn.Conv2d(3, 2, 1)
        >>> teacher = EMATeacher(student, decay=0.99)
        >>> optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> student(torch.rand(1, 3, 4, 4)).mean().backward()
        >>> optimiser.step()
        >>> teacher.update(student)
        >>> bool((teacher.module.weight == student.weight).all()), teacher(torch.rand(1, 3, 4, 4)).requires_grad
        (True, False)
    """

    step: Tensor
    module: nn.Module

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        warmup: bool = True,
        buffers: Buffers = "copy",
        *,
        mode: TeacherMode = "batch_statistics",
        share_frozen: bool = False,
    ) -> None:
        super().__init__()
        check_range("decay", decay, 0.0, 1.0)
        check_option("buffers", buffers, BUFFERS)
        check_option("mode", mode, TEACHER_MODES)
        self.decay = decay
        self.warmup = warmup
        self.buffers_policy: Buffers = buffers
        self.mode: TeacherMode = mode
        inner = unwrap_model(model)
        shared = {id(p) for p in inner.parameters() if share_frozen and not p.requires_grad}
        # A dict for its keys: torch.compile of torch 2.6 and 2.8 fails at a frozenset of a Module.
        self._shared = {name: None for name, p, _ in _named_state(inner) if id(p) in shared}
        # deepcopy finds the tensors ready made, and so copies no gradients.
        copies: dict[int, Any] = {id(b): b.detach().clone() for b in inner.buffers()}
        for p in inner.parameters():
            copies[id(p)] = p if id(p) in shared else nn.Parameter(p.detach().clone(), requires_grad=False)
        self.module = _unwrap_all(copy.deepcopy(inner, copies))
        first = next(self.module.parameters(), torch.empty(0))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=first.device))
        self.masters = FullPrecisionState()
        self._make_masters()
        self.train()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Average the student in.

        Args:
            model: the student, wrapped or not.
            step: t, from 0; None counts the updates in the buffer `step`, which no GPU has to wait for.

        Raises:
            ValueError: parameters or persistent buffers that differ in name or shape from the averaged net's.
        """
        student = {name: x for name, x, _ in _named_state(model)}
        own = list(_named_state(self.module))
        self._check_match({name: x for name, x, _ in own}, student)
        if step is not None:
            check_integer("step", step, 0)
            self.step.fill_(step)
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        rounded: list[tuple[Tensor, Tensor]] = []
        policies = list(self._policies(own))
        halves = {_key(name) for name, x, policy in policies if policy == "ema" and x.dtype in _HALF}
        if halves != {*self.masters._buffers}:
            self._make_masters()  # the net inside was cast by itself
        for name, x, policy in policies:
            if policy == "copy":
                copied.append((x, student[name]))
            elif policy == "ema" and x.dtype in _HALF:
                master = self.masters.get_buffer(_key(name))
                master.copy_(_with_digits(x, master))
                averaged.append((master, student[name]))
                rounded.append((x, master))
            elif policy == "ema":
                averaged.append((x, student[name]))
        for target, source in _grouped(averaged):
            self._lerp(target, source)
        for target, source in _grouped(copied + rounded):
            torch._foreach_copy_(target, source)
        self.step.add_(1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged net without gradients."""
        recording = [] if self.buffers_policy == "keep" else [n for n in self._norms() if n.track_running_stats]
        try:
            for norm in recording:  # batch statistics are used in training mode, but not recorded
                norm.track_running_stats = False
            with torch.no_grad():
                return self.module(*args, **kwargs)
        finally:
            for norm in recording:
                norm.track_running_stats = True

    def train(self, mode: bool = True) -> EMATeacher:
        """Put the teacher in its training `mode` (see the class), or in evaluation."""
        super().train(mode)
        self.module.train(mode and self.mode == "train")
        if mode and self.mode == "batch_statistics":
            for norm in self._norms():
                norm.train()
        return self

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"decay={self.decay}, warmup={self.warmup}, buffers={self.buffers_policy!r}, mode={self.mode!r}, "
            f"share_frozen={bool(self._shared)}"
        )

    def _norms(self) -> list[_BatchNorm]:
        return [m for m in self.module.modules() if isinstance(m, _BatchNorm)]

    def _lerp(self, target: list[Tensor], source: list[Tensor]) -> None:
        """theta_T + (1 - alpha) (theta_S - theta_T): unmoved where both agree, the student (rounded) at alpha 0."""
        if not self.warmup:
            torch._foreach_lerp_(target, source, 1 - self.decay)
            return
        # 1 - alpha = max(1 / (t + 1), 1 - decay) is a number of the device: `_foreach_lerp_` would read it back.
        dtype = torch.float64 if target[0].dtype in (torch.float64, torch.complex128) else torch.float32
        weight = (self.step.to(target[0].device, dtype) + 1).reciprocal().clamp_min(1 - self.decay)
        if target[0].device.type == "cpu":  # one pass over memory instead of three; no launches to save
            for t, s in zip(target, source, strict=True):
                t.lerp_(s, weight.to(t.dtype))
            return
        difference = torch._foreach_sub(source, target)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(target, difference)

    def _make_masters(self) -> None:
        """Keep a float32 copy of each half-precision tensor that is averaged, and of nothing else."""
        masters, self.masters = self.masters, FullPrecisionState()
        for name, x, policy in self._policies(_named_state(self.module)):
            master = masters._buffers.get(_key(name))
            if policy == "ema" and x.dtype in _HALF:
                self.masters.register_buffer(_key(name), (x.detach() if master is None else master).float())
            elif policy == "ema" and master is not None:  # the net became float32: its digits are in the copy
                x.data.copy_(_with_digits(x, master))

    def _policies(self, own: Iterable[tuple[str, Tensor, bool]]) -> Iterator[tuple[str, Tensor, str]]:
        """Yield (name, tensor, what `update` does with it); a tied parameter has several names and comes once."""
        done: set[int] = set()
        for name, x, is_parameter in own:
            if name in self._shared or id(x) in done:
                continue
            done.add(id(x))
            number = x.is_floating_point() or x.is_complex()
            yield name, x, "copy" if not number else "ema" if is_parameter else self.buffers_policy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_masters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take a checkpoint of a teacher of another precision, too: with or without float32 copies."""
        held = f"{prefix}masters."
        copies = {key: state_dict.pop(key) for key in [*state_dict] if key.startswith(held)}
        names = {
            f"{held}{_key(name)}": f"{prefix}module.{name}" for name, _, _ in self._policies(_named_state(self.module))
        }
        state_dict.update({name: copies[key] for key, name in names.items() if key in copies})
        for key, name in names.items():
            if key.removeprefix(held) in self.masters._buffers and name in state_dict:
                state_dict[key] = state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_match(self, own: dict[str, Tensor], student: dict[str, Tensor]) -> None:
        missing = [name for name in own if name not in student]
        unknown = [name for name in student if name not in own]
        if missing or unknown:
            raise ValueError(
                "Expected `model` to have the parameters and buffers of the averaged net, but got a "
                f"net of which {len(own) - len(missing)} of {len(own)} match: "
                f"missing {_first(missing)}, unknown {_first(unknown)}. {_ONE_NET}"
            )
        unlike = [n for n, x in own.items() if x.shape != student[n].shape]
        if unlike:
            listed = [f"{n} {shape_of(own[n])} but got {shape_of(student[n])}" for n in unlike]
            raise ValueError(f"Expected `model` to have the shapes of the averaged net: {_first(listed)}. {_ONE_NET}")
        apart = [
            f"{n} on '{x.device}' but got '{student[n].device}'"
            for n, x in own.items()
            if x.device != student[n].device
        ]
        if apart:
            raise ValueError(
                f"Expected `model` to be on the devices of the averaged net: {_first(apart)}. Move one with .to()."
            )
        thawed = [name for name in self._shared if student[name].requires_grad]
        if thawed:
            raise ValueError(
                "Expected `model` to keep frozen what `share_frozen=True` shares, but got parameters that require a "
                f"gradient: {_first(sorted(thawed))}. Make the teacher anew after unfreezing."
            )


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dot


def _with_digits(x: Tensor, master: Tensor) -> Tensor:
    """The float32 copy where `x` is still what it was rounded to, and `x` where something else was loaded into it."""
    kept = (master.bfloat16() == x) | (master.half() == x)
    return torch.where(kept, master, x.to(master.dtype))


def _first(names: Sequence[str], limit: int = 5) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def _grouped(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Split (target, source) pairs by device and dtype, the source cast to its target: one fused call a group."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
        targets.append(target)
        sources.append(source.to(target.dtype))
    yield from groups.values()


def fuse_teachers(
    logits: Sequence[Float[Tensor, "n c h w"]],
    *,
    weights: Sequence[float] | Float[Tensor, "k"] | None = None,
    size: tuple[int, int] | None = None,
    mode: Fusion = "mean",
    kind: Kind = "logits",
) -> Float[Tensor, "n c h2 w2"]:
    r"""Fuse the predictions of several teachers into one probability map.

    $$\bar p = \frac{\sum_k a_k\, \operatorname{softmax}(z_k)}{\sum_k a_k}$$

    **Convention.** Every pixel's result sums to 1 over the classes; the teachers are detached. "mean" is the formula.
    "max_confidence" takes at each pixel the probabilities of the one teacher whose a_k max_c p_k is largest, the first
    of equals. "agreement" is the mean where all teachers (a weight does not silence one) have the same arg-max, and
    uniform, 1 / C, elsewhere, so that a confidence threshold rejects the pixel; to leave such pixels out of a loss
    altogether pass `teacher_agreement` as its `valid`.

    **Source.** Ours, for DUDA's fine-tuning with multiple teachers, whose rule is not public to us.

    Args:
        logits: one (N, C, H, W) a teacher, or probabilities by `kind`. All on one device.
        weights: a_k >= 0, numbers or a tensor (K,); equal by default.
        size: (H, W) that all take, bilinear (logits are interpolated before the softmax); needed when sizes differ.
        mode: "mean" | "max_confidence" | "agreement".
        kind: "logits" | "probabilities", of all teachers.

    Returns:
        Probabilities, float32 (float64 for float64 input).

    Raises:
        TypeError: teachers that are not float tensors.
        ValueError: no teacher, unlike shapes, weights that do not match, or an unknown option.

    Example:
        >>> large, small = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4, 4)
        >>> fused = fuse_teachers([large, small], weights=[2.0, 1.0], size=(8, 8))
        >>> fused.shape, bool((fused.sum(1) - 1).abs().max() < 1e-6)
        (torch.Size([2, 5, 8, 8]), True)
    """
    check_option("mode", mode, FUSIONS)
    maps = _teacher_maps(logits, size, kind)
    share = _teacher_weights(weights, maps)
    if mode == "max_confidence":
        fused, best = maps[0], share[0] * maps[0].amax(1, keepdim=True)
        for a, p in zip(share[1:], maps[1:], strict=True):
            confidence = a * p.amax(1, keepdim=True)
            fused = torch.where(confidence > best, p, fused)
            best = torch.maximum(confidence, best)
        return fused
    fused = sum((a * p for a, p in zip(share[1:], maps[1:], strict=True)), share[0] * maps[0])
    if mode == "agreement":
        fused = torch.where(_agree(maps)[:, None], fused, 1 / fused.shape[1])
    return fused


def teacher_agreement(
    logits: Sequence[Float[Tensor, "n c h w"]], *, size: tuple[int, int] | None = None
) -> Bool[Tensor, "n h2 w2"]:
    """Tell where all teachers have the same arg-max: a `valid` mask for a loss.

    Args:
        logits: one (N, C, H, W) a teacher; probabilities do as well.
        size: (H, W) that all take, bilinear; needed when sizes differ.

    Returns:
        True where the teachers agree.

    Raises:
        TypeError: teachers that are not float tensors.
        ValueError: no teacher, or unlike shapes.

    Example:
        >>> a, b = torch.tensor([[[[0.0, 1.0]], [[2.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])
        >>> teacher_agreement([a, b])
        tensor([[[ True, False]]])
    """
    return _agree(_teacher_maps(logits, size, "probabilities"))


def _agree(maps: list[Tensor]) -> Tensor:
    first = top_class(maps[0])
    agree = torch.ones_like(first, dtype=torch.bool)
    for p in maps[1:]:
        agree = agree & (top_class(p) == first)
    return agree


def _teacher_maps(logits: Sequence[Tensor], size: tuple[int, int] | None, kind: str) -> list[Tensor]:
    check_option("kind", kind, KINDS)
    if not is_sequence(logits) or not len(logits):
        given = "an empty one" if is_sequence(logits) else kind_of(logits)
        raise ValueError(
            f"Expected `logits` to be a non-empty sequence of (N, C, H, W) tensors, one a teacher, but got {given}. "
            "Pass [teacher_a(images), teacher_b(images)]."
        )
    if size is not None:
        check_size("size", size)
    maps = []
    for k, x in enumerate(logits):
        check_float(f"logits[{k}]", x, 4, "(N, C, H, W)")
        alike = x.shape[:2] == logits[0].shape[:2]
        if not alike or (size is None and x.shape != logits[0].shape):
            hint = " Pass `size=` to interpolate." if alike else ""
            raise ValueError(
                f"Expected `logits[{k}]` to match `logits[0]` {shape_of(logits[0])}, but got {shape_of(x)}.{hint}"
            )
        check_device(f"logits[{k}]", x, logits[0], "logits[0]")
        x = upcast(x.detach())
        if size is not None and tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        maps.append(F.softmax(x, dim=1) if kind == "logits" else x)
    return maps


def _teacher_weights(weights: Sequence[float] | Tensor | None, maps: list[Tensor]) -> Sequence[float] | Tensor:
    if isinstance(weights, Tensor):
        check_float("weights", weights)
        if weights.ndim != 1 or weights.shape[0] != len(maps):
            raise ValueError(f"Expected `weights` to be (K,) with K = {len(maps)}, but got {shape_of(weights)}.")
        weights = weights.detach().to(maps[0].dtype)
        return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    if weights is not None and not is_sequence(weights):
        raise TypeError(
            f"Expected `weights` to be {len(maps)} numbers, one for each teacher, but got {kind_of(weights)}."
        )
    numbers = [1.0] * len(maps) if weights is None else list(weights)
    if len(numbers) != len(maps) or not min(numbers) >= 0 or not sum(numbers) > 0:
        raise ValueError(
            f"Expected `weights` to be {len(maps)} numbers >= 0, not all 0, one for each teacher, but got {numbers}."
        )
    return [a / sum(numbers) for a in numbers]
