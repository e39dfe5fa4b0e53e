"""State that keeps its precision, and functions to gather it from all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FullPrecisionState(nn.Module):
    """A Module with buffers that follow the device but not the dtype.

    `.half()` or `.bfloat16()` of a parent leaves them in float32. In bfloat16, an averaging step of 1e-4 would be lost
    to rounding, and in float16 a histogram would overflow; class weights and image statistics would be other numbers
    than those given. What a subclass of a user adds, parameters and submodules, follows the dtype.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = {id(x) for x in self._buffers.values()}

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype or id(x) not in own else x.to(moved.device)

        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(move, recurse=False)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local: dict[str, Any], *args: Any) -> None:
        """Keep the dtypes even with `load_state_dict(assign=True)`, which does not convert tensors."""
        for name, x in self._buffers.items():
            given = state_dict.get(prefix + name)
            if x is not None and isinstance(given, Tensor):
                state_dict[prefix + name] = given.to(x.dtype)
        super()._load_from_state_dict(state_dict, prefix, local, *args)


def gather_ranks(*tensors: Tensor) -> list[Tensor]:
    """Stack the tensors of all ranks in rank order, each (R, ...); without a process group there is one rank.

    All tensors are sent as bytes in one collective, because at these sizes its latency dominates.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [x.unsqueeze(0) for x in tensors]
    packed = torch.cat([x.contiguous().view(torch.uint8).flatten() for x in tensors])
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, packed)
    pieces = torch.split(torch.stack(parts), [x.numel() * x.element_size() for x in tensors], dim=1)
    # A copy, because a view in another dtype needs aligned bytes.
    return [
        p.clone(memory_format=torch.contiguous_format).view(x.dtype).view(-1, *x.shape)
        for p, x in zip(pieces, tensors, strict=True)
    ]


def sum_ranks(counts: Tensor) -> Tensor:
    """Sum integers over the ranks. Unlike that of a gather, the traffic does not grow with the number of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    total = counts.clone()
    dist.all_reduce(total)
    return total
