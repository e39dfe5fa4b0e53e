"""Checks that a student matches the net that a teacher averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from udakit._checks import shape_of

_ONE_NET = "A teacher averages the net that it was made from: make another teacher for another net."

_OBSERVERS = ("fake_quant.", "activation_post_process.")
_OBSERVED = "Observers of quantisation take their shapes in the first pass: call the net once before a teacher is made."


def check_match(
    own: Mapping[str, Tensor], student: Mapping[str, Tensor], *, shared: Collection[str] = (), apart: bool = False
) -> None:
    """Raise unless both nets have the same names, shapes and shards, and (unless `apart`) the same devices."""
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
        observed = any(part in name for name in unlike for part in _OBSERVERS)
        hint = _OBSERVED if observed else _ONE_NET
        raise ValueError(f"Expected `model` to have the shapes of the averaged net: {_first(listed)}. {hint}")
    split = [n for n, x in own.items() if shards(x) != shards(student[n])]
    if split:
        raise ValueError(
            f"Expected `model` to be sharded like the averaged net, but got another layout of {_first(split)}. Shard "
            "both nets in the same way, with fully_shard(net, reshard_after_forward=True)."
        )
    moved = [
        f"{n} on '{x.device}' but got '{student[n].device}'" for n, x in own.items() if x.device != student[n].device
    ]
    if moved and not apart:
        raise ValueError(
            f"Expected `model` to be on the devices of the averaged net: {_first(moved)}. Move one with .to(), or make "
            "the teacher with `device=` to keep it elsewhere."
        )
    thawed = [name for name in shared if student[name].requires_grad]
    if thawed:
        raise ValueError(
            "Expected `model` to keep the parameters frozen that `share_frozen=True` shares, but got parameters that "
            f"require a gradient: {_first(sorted(thawed))}. Make a new teacher after unfreezing."
        )


def check_apart(own: Mapping[str, Tensor], student: Mapping[str, Tensor], *, shared: Collection[str]) -> None:
    """Raise if the net would be averaged into itself: such an update would silently do nothing."""
    common = [name for name, x in own.items() if name not in shared and x is student[name]]
    if common:
        raise ValueError(
            "Expected `model` to be the student, but got the averaged net itself or a net that shares tensors with "
            f"it: {_first(common)}."
        )


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor) on this rank; any other tensor as it is."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


def shards(x: Any) -> Any:
    """How a tensor is sharded; None if it is not."""
    return getattr(x, "placements", None)


def _first(names: Sequence[str], limit: int = 5) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
