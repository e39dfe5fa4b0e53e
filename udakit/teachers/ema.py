"""The moving average of a student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit._checks import check_integer, check_option, check_range, shape_of
from udakit._state import FullPrecisionState
from udakit.teachers.unwrap import named_state, unwrap_all, unwrap_model

__all__ = ["EMATeacher"]

Buffers = Literal["copy", "ema", "keep"]
TeacherMode = Literal["batch_statistics", "train", "eval"]
BUFFERS = get_args(Buffers)
TEACHER_MODES = get_args(TeacherMode)

_ONE_NET = "A teacher averages the net that it was made of: make another one for another net."
_HALF = (torch.float16, torch.bfloat16)


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
        self._shared = {name: None for name, p, _ in named_state(inner) if id(p) in shared}
        # deepcopy finds the tensors ready made, and so copies no gradients.
        copies: dict[int, Any] = {id(b): b.detach().clone() for b in inner.buffers()}
        for p in inner.parameters():
            copies[id(p)] = p if id(p) in shared else nn.Parameter(p.detach().clone(), requires_grad=False)
        self.module = unwrap_all(copy.deepcopy(inner, copies))
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
        student = {name: x for name, x, _ in named_state(model)}
        own = list(named_state(self.module))
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
        for name, x, policy in self._policies(named_state(self.module)):
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
            f"{held}{_key(name)}": f"{prefix}module.{name}" for name, _, _ in self._policies(named_state(self.module))
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
