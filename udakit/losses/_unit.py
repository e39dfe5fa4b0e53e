"""Unit vectors of embeddings of any magnitude."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_vectors(x: Tensor, dim: int) -> Tensor:
    """X / |x|, and 0 with zero gradient for the zero vector.

    Scaled by the largest entry before squaring: in float32 1e-23 squared is 0 and 1e20 squared inf. The result does
    not depend on that scale, so it needs no gradient.
    """
    scale = x.detach().abs().amax(dim, keepdim=True)
    zero = scale == 0
    x = x / torch.where(zero, 1, scale)
    norm = torch.where(zero, 1, x.square().sum(dim, keepdim=True)).sqrt()
    return torch.where(zero, 0, x / norm)
