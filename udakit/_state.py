"""State that keeps its precision and can be gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FullPrecisionState(nn.Module):
    """A Module whose buffers follow devices, not dtypes.

    `.half()` or `.bfloat16()` of a parent leaves them in float32: in bfloat16 an averaging step of 1e-4 never lands,
    and a histogram overflows in float16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


def gather_ranks(x: Tensor) -> Tensor:
    """Stack the ranks' tensors of one shape in rank order: (R, ...); without a process group there is one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return x.unsqueeze(0)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)
