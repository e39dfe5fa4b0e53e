"""The moving average of a student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit._checks import as_device, check_flag, check_integer, check_option, check_range, kind_of
from udakit._state import FullPrecisionState
from udakit.teachers._matching import check_apart, check_match, local, shards
from udakit.teachers.copying import computed_buffers, copy_sharing
from udakit.teachers.statistics import Emptied, recording, set_recording
from udakit.teachers.unwrap import Average, named_state, unwrap_model

__all__ = ["EMATeacher"]

Buffers = Literal["copy", "ema", "keep"]
TeacherMode = Literal["batch_statistics", "train", "eval"]
BUFFERS = get_args(Buffers)
TEACHER_MODES = get_args(TeacherMode)

_HALF = (torch.float16, torch.bfloat16)


class EMATeacher(Average):
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
    they belong to the teacher: its passes in training mode move them and the student never does. Buffers that weights
    are computed from (`spectral_norm`, `prune`) follow the student whatever `buffers` says.
    `torch.optim.swa_utils.update_bn(loader, teacher)` estimates the statistics anew in any `mode`.

    **Source.** Tarvainen and Valpola 2017. DACS, DAFormer and DiGA average parameters only: `buffers="keep"`.

    Args:
        model: the student; it is copied (`copy_net`), not kept.
        decay: alpha in [0, 1].
        warmup: whether alpha rises from 0 as above; turn it off when the student starts from trained weights.
        buffers: floating-point buffers are copied from the student, averaged like parameters, or left alone.
        mode: what `.train()` puts the teacher in: "batch_statistics" | "train" | "eval".
        share_frozen: whether parameters that do not require a gradient are the student's own tensors instead of copies,
            so that a frozen backbone is stored once. Unfreezing one later is an error at the next update. Moving or
            casting the teacher (`.to`, `.half`) then does the same to these tensors of the student. Loading other
            values into the teacher, or copying it, gives it tensors of its own: load the student first.
        module: a second net, made as the student was, to be averaged into: it takes the student's state and is not
            copied. For nets that `copy_net` refuses, sharded ones (FSDP2) among them.
        device: where the averaged net lives, when not beside the student: another GPU, or "cpu" to save memory. An
            update then moves the student's tensors there, and a GPU waits for it.

    Raises:
        ValueError: an unknown option, a net that cannot be copied (by the name of the submodule), a `module` that does
            not match, and in `update` a model that does not match.

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
        module: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_range("decay", decay, 0.0, 1.0)
        check_option("buffers", buffers, BUFFERS)
        check_option("mode", mode, TEACHER_MODES)
        check_flag("warmup", warmup)
        check_flag("share_frozen", share_frozen)
        device = None if device is None else as_device(device)
        self.decay = decay
        self.warmup = warmup
        self.buffers_policy: Buffers = buffers
        self.mode: TeacherMode = mode
        inner = unwrap_model(model)
        shared = {id(p) for p in inner.parameters() if share_frozen and not p.requires_grad}
        if shared and device is not None:
            raise ValueError("Expected `share_frozen` to be False with a `device`: what is shared is on one device.")
        # A dict for its keys: torch.compile of torch 2.6 and 2.8 fails at a frozenset of a Module.
        self._shared = {name: None for name, p, _ in named_state(inner) if id(p) in shared}
        if module is None:
            self.module = copy_sharing(inner, shared, device)
        else:
            self.module = _take(module, inner, self._shared).to(device)
        self.module.requires_grad_(False)
        _own_when_loaded(self.module, self._shared)
        self._apart = device is not None
        self._computed = dict.fromkeys(computed_buffers(self.module))
        # Where no layer averages cumulatively by itself, one that does is being estimated anew (`update_bn`). One that
        # does by itself tells when it is emptied.
        self._cumulative = False
        for norm in self._norms():
            if norm.momentum is None and norm.num_batches_tracked is not None:
                self._cumulative = True
                norm.reset_running_stats = Emptied(norm)  # type: ignore[method-assign]
        self._anew = False
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
        for shard in self.module.modules():
            if _is_fsdp(shard):  # a pass without gradients may leave it gathered
                shard.reshard()  # type: ignore[operator]
        student = {name: x for name, x, _ in named_state(model)}
        own = list(named_state(self.module))
        mine = {name: x for name, x, _ in own}
        if self._shared:  # a copy of this teacher has tensors of its own
            self._shared = {name: None for name in self._shared if mine[name] is student.get(name, mine[name])}
        check_match(mine, student, shared=self._shared, apart=self._apart)
        check_apart(mine, student, shared=self._shared)
        if step is not None:
            check_integer("step", step, 0)
            self.step.fill_(step)
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        rounded: list[tuple[Tensor, Tensor]] = []
        policies = list(self._policies(own))
        halves = {_key(name): shards(x) for name, x, policy in policies if policy == "ema" and x.dtype in _HALF}
        if halves != {key: shards(master) for key, master in self.masters._buffers.items()}:
            self._make_masters()  # the net inside was cast, or sharded, by itself
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
        norms = recording(self.module)
        estimated = self.training and (self._anew or not self._cumulative)
        anew = [n for n in norms if n.momentum is None] if estimated else []
        modes = [norm.training for norm in anew]
        quiet = [] if anew or self.buffers_policy == "keep" else norms
        try:
            set_recording(quiet, False)  # batch statistics are used in training mode, but not recorded
            for norm in anew:
                norm.train()
            with torch.no_grad():
                return self.module(*args, **kwargs)
        finally:
            set_recording(quiet, True)
            for norm, mode in zip(anew, modes, strict=True):
                norm.train(mode)

    def train(self, mode: bool = True) -> EMATeacher:
        """Put the teacher in its training `mode` (see the class), or in evaluation."""
        super().train(mode)
        self.module.train(mode and self.mode == "train")
        # `update_bn` empties, trains, calls, and trains again: by then there are statistics.
        resets = (norm.__dict__.get("reset_running_stats") for norm in self._norms() if self._cumulative)
        self._anew = mode and any(isinstance(reset, Emptied) and reset.still for reset in resets)
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
                known = master is not None and shards(master) == shards(x)
                self.masters.register_buffer(_key(name), (master if known else x.detach()).float())  # type: ignore[union-attr]
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
            fixed = not number or name in self._computed
            yield name, x, "copy" if fixed else "ema" if is_parameter else self.buffers_policy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_masters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take a checkpoint of a teacher of another precision, too: with or without float32 copies."""
        held = f"{prefix}masters."
        copies = {key: state_dict.pop(key) for key in [*state_dict] if key.startswith(held)}
        assign = args[0].get("assign_to_params_buffers", False)
        for name, x, _ in self._policies(named_state(self.module)):
            key, loaded = f"{held}{_key(name)}", f"{prefix}module.{name}"
            digits = copies.get(key, state_dict.get(loaded))
            if key in copies and not (assign and x.dtype in _HALF):  # an assigned net keeps its precision
                state_dict[loaded] = digits
            if _key(name) in self.masters._buffers and digits is not None:
                state_dict[key] = digits
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _take(module: nn.Module, model: nn.Module, shared: Iterable[str]) -> nn.Module:
    """A net made by the user, with the student's state."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected `module` to be an nn.Module, but got {kind_of(module)}.")
    module = unwrap_model(module)
    student = {name: x for name, x, _ in named_state(model)}
    own = {name: x for name, x, _ in named_state(module)}
    check_match(own, student, apart=True)
    common = [name for name, x in own.items() if x is student[name]]
    if common or module is model:
        raise ValueError(
            f"Expected `module` to be a net of its own, but got one that has {common[0] if common else 'all'} in "
            "common with `model`. Make it as you made `model`, by a second call."
        )
    with torch.no_grad():
        for target, source in _grouped([(x, student[name]) for name, x in own.items()]):
            torch._foreach_copy_(target, source)
    for name in shared:
        _put(module, name, student[name])
    return module


def _own_when_loaded(model: nn.Module, shared: Iterable[str]) -> None:
    """Load no other values into what is the student's: such a parameter becomes the teacher's own."""
    leaves: dict[str, list[str]] = {}
    for name in shared:
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, []).append(leaf)
    for path, names in leaves.items():
        _at(model, path).register_load_state_dict_pre_hook(partial(_make_own, names))  # type: ignore[no-untyped-call]


def _make_own(
    names: list[str], module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *args: object
) -> None:
    for name in names:
        x, loaded = module._parameters[name], state_dict.get(prefix + name)
        if x is not None and loaded is not None and not (loaded.shape == x.shape and torch.equal(loaded.to(x), x)):
            module._parameters[name] = nn.Parameter(x.detach().clone(), requires_grad=False)


def _at(module: nn.Module, path: str) -> nn.Module:
    for step in path.split(".") if path else ():
        module = unwrap_model(module._modules[step])  # type: ignore[arg-type]
    return module


def _put(module: nn.Module, name: str, parameter: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    _at(module, path)._parameters[leaf] = parameter  # type: ignore[assignment]


def _is_fsdp(module: nn.Module) -> bool:
    method = getattr(type(module), "reshard", None)
    return method is not None and method.__module__.startswith("torch.distributed")


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dot


def _with_digits(x: Tensor, master: Tensor) -> Tensor:
    """The float32 copy where `x` is still what it was rounded to, and `x` where something else was loaded into it."""
    kept = (master.bfloat16() == x) | (master.half() == x)
    return torch.where(kept, master, x.to(master.dtype))


def _grouped(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Split (target, source) pairs by device and dtype, the source cast to its target: one fused call a group."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
        targets.append(local(target))
        sources.append(local(source).to(target.device, target.dtype))
    yield from groups.values()
