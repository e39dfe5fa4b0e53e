"""The exponential moving average of a student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit._checks import as_device, check_flag, check_integer, check_option, check_range
from udakit._state import FullPrecisionState
from udakit.teachers._matching import check_apart, check_match, shards
from udakit.teachers._sharing import check_not_frozen, grouped, own_when_loaded, take
from udakit.teachers.copying import computed_buffers, copy_sharing, unsaved_buffers
from udakit.teachers.statistics import Blending, Emptied, recording, set_recording
from udakit.teachers.unwrap import Average, named_state, without_wrappers

__all__ = ["EMATeacher"]

Buffers = Literal["copy", "ema", "keep"]
TeacherMode = Literal["batch_statistics", "train", "eval"]
BUFFERS = get_args(Buffers)
TEACHER_MODES = get_args(TeacherMode)

_HALF = (torch.float16, torch.bfloat16)


class EMATeacher(Average):
    r"""A teacher with the exponential moving average of a student's weights.

    $$\theta_T \leftarrow \alpha_t\, \theta_T + (1 - \alpha_t)\, \theta_S, \qquad
    \alpha_t = \min\left(1 - \tfrac{1}{t + 1},\ \alpha\right)$$

    Call `update(student)` after the optimiser's step. Calling the teacher runs the averaged net without gradients.

    **Convention.** `.module` is a copy of the student without compile and DDP wrappers, and nothing in it requires a
    gradient. With `warmup`, step 0 copies the student (up to rounding on a GPU). Parameters are matched by name. A
    missing, unknown or differently shaped one raises an error, so an update can never silently do nothing.

    Nets that cache or merge weights in evaluation mode (timm's LeViT, loralib) do so in `train`. An update switches
    such modules to training mode and back.

    float16 and bfloat16 parameters are averaged in float32 copies and rounded when written, because at alpha = 0.999 a
    step would be smaller than their resolution. Integer buffers are always copied, whatever `buffers` is.
    Non-persistent buffers do not change.

    **BatchNorm modes.** `mode` is what `.train()` does, even if a parent Module calls it. With "batch_statistics",
    BatchNorm uses the statistics of the batch, and everything else (dropout, drop path) stays in evaluation mode; this
    is DAFormer's teacher. "train" is plain training mode (DACS, DiGA). "eval" always stays in evaluation mode.
    `.eval()` always switches to evaluation. A new teacher starts as if `.train()` had been called.

    With `running_share` s > 0, "batch_statistics" uses $s\, \mu_R + (1 - s)\, \mu_B$ and
    $s\, \sigma_R^2 + (1 - s)\, \sigma_B^2$, of the running statistics R and those of the batch B. Statistics of a batch
    fit the look of the target, but follow what its few images show; running statistics do neither. 0 is the batch
    alone, 1 is "eval". Every process uses its own batch, also with SyncBatchNorm. Only calls of the teacher blend:
    `.module`, called directly, uses the running statistics. With `buffers="keep"` these stay as they were copied.

    **Threads.** A pass switches the recording and blending of statistics on and off in the net itself, so only one
    thread at a time may call a teacher.

    **BatchNorm statistics.** With `buffers` "copy" or "ema", the running statistics follow the student, and the
    teacher's own passes do not change them. With "keep" they belong to the teacher: its passes in training mode update
    them, and the student does not. Buffers from which weights are computed (`spectral_norm`, `prune`) always follow the
    student. `torch.optim.swa_utils.update_bn(loader, teacher)` re-estimates the statistics in any `mode`.

    **Source.** Tarvainen and Valpola 2017. DACS, DAFormer and DiGA average only the parameters (`buffers="keep"`).
    `running_share`: Schneider et al., NeurIPS 2020, for a whole target set; You et al., 2021, for each batch.

    Attributes:
        module: the averaged net.
        step: int64 buffer (), the number of updates so far.

    Args:
        model: the student. It is copied (see `copy_net`), and no reference to it is kept.
        decay: alpha in [0, 1].
        warmup: whether alpha rises from 0 as above; turn it off if the student starts from trained weights.
        buffers: whether floating-point buffers are copied from the student ("copy"), averaged like parameters ("ema"),
            or left alone ("keep").
        mode: mode of the teacher after `.train()`: "batch_statistics" | "train" | "eval".
        running_share: s in [0, 1], for "batch_statistics".
        share_frozen: whether parameters that do not require a gradient are shared with the student instead of copied,
            so that a frozen backbone is stored once. Unfreezing one later raises an error at the next update. Moving or
            casting the teacher (`.to`, `.half`) also moves or casts these tensors of the student. Loading other values
            into the teacher, or copying it, gives it its own tensors, so load the student first.
        module: a second net, made like the student, to average into instead of a copy; it takes the student's state.
            Use it for nets that `copy_net` cannot copy: sharded ones (FSDP2), or TorchScript, where `module` is the
            net in Python.
        device: device of the averaged net if it is not that of the student, for example another GPU, or "cpu" to save
            memory. An update then moves the student's tensors there, and a GPU waits for it.

    Raises:
        ValueError: an option is unknown, `running_share` is given with another `mode`, the net cannot be copied (the
            message names the submodule), or `module` does not match; in `update`, the model does not match.

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
        running_share: float = 0.0,
        share_frozen: bool = False,
        module: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_options(decay, warmup, buffers, mode, running_share, share_frozen)
        device = None if device is None else as_device(device)
        self.decay = decay
        self.warmup = warmup
        self.buffers_policy: Buffers = buffers
        self.mode: TeacherMode = mode
        self.running_share = running_share
        inner = without_wrappers(model)
        shared = {id(p) for p in inner.parameters() if share_frozen and not p.requires_grad}
        if shared and device is not None:
            raise ValueError("Expected `share_frozen` to be False with a `device`: sharing needs the same device.")
        # A dict used as a set: torch.compile of torch 2.6 and 2.8 fails on a frozenset in a Module.
        self._shared = {name: None for name, p, _ in named_state(inner) if id(p) in shared}
        if module is None:
            self.module = copy_sharing(inner, shared, device)
        else:
            self.module = take(module, inner, self._shared).to(device)
        self.module.requires_grad_(False)
        own_when_loaded(self.module, self._shared)
        self._apart = device is not None
        self._computed = dict.fromkeys(computed_buffers(self.module))
        self._unsaved = dict.fromkeys(unsaved_buffers(self.module))
        self._switches = any(map(_switches, self.module.modules()))
        # If no layer was made with a cumulative average, one that has it now is being re-estimated by `update_bn`. A
        # layer that was made with it tells us when it is emptied.
        self._cumulative = False
        for norm in self._norms():
            if norm.momentum is None and norm.num_batches_tracked is not None:
                self._cumulative = True
                norm.reset_running_stats = Emptied(norm)  # type: ignore[method-assign]
        self._anew = False
        self._blending = Blending(running_share)
        first = next(self.module.parameters(), torch.empty(0))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=first.device))
        self.masters = FullPrecisionState()
        self._make_masters()
        self.train()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Update the average with the student.

        Args:
            model: the student, wrapped or not.
            step: t, counted from 0; None counts the updates in the buffer `step`, without a GPU wait.

        Raises:
            ValueError: parameters or persistent buffers differ in name, shape, device or sharding from those of the
                averaged net, a shared parameter was unfrozen, or `model` is the averaged net itself.
        """
        for shard in self.module.modules():
            if _is_fsdp(shard):  # a pass without gradients may leave the shards gathered
                shard.reshard()  # type: ignore[operator]
        student = {name: x for name, x, _ in named_state(model) if name not in self._unsaved}
        own = list(named_state(self.module))
        mine = {name: x for name, x, _ in own}
        if self._shared:  # a copy of this teacher has its own tensors
            self._shared = {name: None for name in self._shared if mine[name] is student.get(name, mine[name])}
        if len(student) < len(mine):
            check_not_frozen(model, mine)
        check_match(mine, student, shared=self._shared, apart=self._apart)
        check_apart(mine, student, shared=self._shared)
        if step is not None:
            check_integer("step", step, 0)
            self.step.fill_(step)
        modes = {m: m.training for m in self.module.modules()} if self._switches else {}
        for m in filter(_switches, modes):
            m.train()
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        rounded: list[tuple[Tensor, Tensor]] = []
        policies = list(self._policies(own))
        halves = {_key(name): shards(x) for name, x, policy in policies if policy == "ema" and x.dtype in _HALF}
        if halves != {key: shards(master) for key, master in self.masters._buffers.items()}:
            self._make_masters()  # the net inside was cast or sharded directly
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
        for target, source in grouped(averaged):
            self._lerp(target, source)
        for target, source in grouped(copied + rounded):
            torch._foreach_copy_(target, source)
        for m in filter(_switches, modes):
            m.train(modes[m])
        for m, mode in modes.items():
            if m.training != mode:  # setting an attribute of a Module is slow
                m.training = mode
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
            self._blending.on = self.training and not anew
            with torch.no_grad():
                return self.module(*args, **kwargs)
        finally:
            self._blending.on = False
            set_recording(quiet, True)
            for norm, mode in zip(anew, modes, strict=True):
                norm.train(mode)

    def train(self, mode: bool = True) -> EMATeacher:
        """Switch the teacher to its training `mode` (see the class) or to evaluation."""
        super().train(mode)
        self.module.train(mode and self.mode == "train")
        # `update_bn` resets the layers, calls `train`, runs the net, and calls `train` again, with statistics by then.
        resets = (norm.__dict__.get("reset_running_stats") for norm in self._norms() if self._cumulative)
        self._anew = mode and any(isinstance(reset, Emptied) and reset.still for reset in resets)
        if self.running_share > 0:
            self._blending.register(self._norms())  # again, if a layer was replaced: `convert_sync_batchnorm`
        if mode and self.mode == "batch_statistics" and (self.running_share == 0 or self._anew):
            for norm in self._norms():
                norm.train()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle a teacher, also one that was pickled whole before `running_share` existed."""
        super().__setstate__(  # type: ignore[no-untyped-call]
            {"running_share": 0.0, "_blending": Blending(0.0), **state}
        )

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"decay={self.decay}, warmup={self.warmup}, buffers={self.buffers_policy!r}, mode={self.mode!r}, "
            f"running_share={self.running_share}, share_frozen={bool(self._shared)}"
        )

    def _norms(self) -> list[_BatchNorm]:
        return [m for m in self.module.modules() if isinstance(m, _BatchNorm)]

    def _lerp(self, target: list[Tensor], source: list[Tensor]) -> None:
        """theta_T + (1 - alpha) (theta_S - theta_T): no change where equal, the student (rounded) at alpha 0."""
        if not self.warmup:
            torch._foreach_lerp_(target, source, 1 - self.decay)
            return
        # 1 - alpha = max(1 / (t + 1), 1 - decay) is a tensor on the device; `_foreach_lerp_` would copy it to the host.
        dtype = torch.float64 if target[0].dtype in (torch.float64, torch.complex128) else torch.float32
        weight = (self.step.to(target[0].device, dtype) + 1).reciprocal().clamp_min(1 - self.decay)
        if target[0].device.type == "cpu":  # one pass over memory instead of three; a CPU has no launches to save
            for t, s in zip(target, source, strict=True):
                t.lerp_(s, weight.to(t.dtype))
            return
        difference = torch._foreach_sub(source, target)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(target, difference)

    def _make_masters(self) -> None:
        """Keep a float32 copy of each averaged half-precision tensor, and of no other."""
        masters, self.masters = self.masters, FullPrecisionState()
        for name, x, policy in self._policies(named_state(self.module)):
            master = masters._buffers.get(_key(name))
            if policy == "ema" and x.dtype in _HALF:
                known = master is not None and shards(master) == shards(x)
                self.masters.register_buffer(_key(name), (master if known else x.detach()).float())  # type: ignore[union-attr]
            elif policy == "ema" and master is not None:  # the net became float32: the copy has the full precision
                x.data.copy_(_with_digits(x, master))

    def _policies(self, own: Iterable[tuple[str, Tensor, bool]]) -> Iterator[tuple[str, Tensor, str]]:
        """Yield (name, tensor, what `update` does with it); a tied parameter with several names is yielded once."""
        done: set[int] = set()
        for name, x, is_parameter in own:
            if name in self._shared or id(x) in done:
                continue
            done.add(id(x))
            number = x.is_floating_point() or x.is_complex()
            fixed = not number or name in self._computed
            yield name, x, "copy" if fixed else "ema" if is_parameter else self.buffers_policy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        super()._apply(fn, recurse)
        self._make_masters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load checkpoints of teachers of any precision, with or without float32 copies."""
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


def _check_options(
    decay: float, warmup: bool, buffers: str, mode: str, running_share: float, share_frozen: bool
) -> None:
    check_range("decay", decay, 0.0, 1.0)
    check_option("buffers", buffers, BUFFERS)
    check_option("mode", mode, TEACHER_MODES)
    check_range("running_share", running_share, 0.0, 1.0)
    if running_share > 0 and mode != "batch_statistics":
        raise ValueError(
            f"Expected `running_share` to be 0 with `mode` {mode!r}, but got {running_share}. It is the share "
            'of the running statistics in those that "batch_statistics" uses.'
        )
    check_flag("warmup", warmup)
    check_flag("share_frozen", share_frozen)


def _switches(module: nn.Module) -> bool:
    """Whether a module does more than set a flag when it changes between training and evaluation.

    The modules of `torch.fx` are left out: they only swap their code, which takes long.
    """
    return type(module).train is not nn.Module.train and not isinstance(module, torch.fx.GraphModule)


def _is_fsdp(module: nn.Module) -> bool:
    method = getattr(type(module), "reshard", None)
    return method is not None and method.__module__.startswith("torch.distributed")


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dot


def _with_digits(x: Tensor, master: Tensor) -> Tensor:
    """The float32 copy where `x` is still its rounded value, and `x` where another value was loaded."""
    kept = (master.bfloat16() == x) | (master.half() == x)
    return torch.where(kept, master, x.to(master.dtype))
