"""Blockwise InfoNCE between rows that are not long, for a CPU: one exponential for each pair where two are needed.

With h_i = |z_i|^2 / (2 temperature), exp(S_ij - h_i - h_j) is at most 1 and symmetric, so that it serves the sum of row
i, weighted by exp(h_j), and that of row j. In the backward pass half of each log-sum-exp takes the place of h. Both are
two more columns of the product that gives S. Nothing underflows while h spans no more than `LONGEST`.
All exponents are in units of log 2, for exp2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from udakit._reduce import LOG_2

LONGEST = 28.0  # of h, in units of log 2: float32 has 126 of them, and four such terms meet in one exponent
FEWEST = 128  # rows from which on this pays off


def is_short(z: Tensor, temperature: float) -> bool:
    """Whether rows of z (n, d, count) are many, and none is too long. Nobody waits on a CPU for the value read here."""
    if z.device.type != "cpu" or z.shape[2] < FEWEST or not z.numel():
        return False
    return bool(z.square().sum(1).amax() <= 2 * temperature * LOG_2 * LONGEST)


def log_sums(z: Tensor, valid: Tensor | None, temperature: float, block: int) -> Tensor:
    """Log-sum-exp of each row of S (count,) in units of log 2, without the diagonal and pairs that do not count."""
    scaled = z / (temperature * LOG_2)
    half = (z * scaled).sum(0).div_(2)
    largest = half.amax()
    weight = (half - largest).exp2_()
    if valid is not None:
        weight = weight * valid
    total = torch.zeros_like(half)
    for rows, cols, e in _powers(z, scaled, half, block):
        total[rows] += torch.mv(e, weight[cols])
        if rows != cols:
            total[cols] += torch.mv(e.T, weight[rows])
    return total.log2_().add_(half).add_(largest)


def slopes(z: Tensor, valid: Tensor | None, grad: Tensor, lse: Tensor, temperature: float, block: int) -> Tensor:
    """Gradient (d, count) of the sum of `grad` times the loss; `lse` may be anything where a row is not valid."""
    if valid is not None:
        lse = lse.where(valid, 0)
    half = lse / 2
    up, down = half.exp2(), grad * (-half).exp2()
    if valid is not None:  # `grad` is 0 there already
        up = up * valid
    scaled = z / (temperature * LOG_2)
    result = torch.zeros_like(z, memory_format=torch.contiguous_format)
    scratch = z.new_empty(min(block, z.shape[1]) ** 2)
    for rows, cols, e in _powers(z, scaled, half, block):
        pull = torch.mul(down[rows, None], up[cols], out=scratch[: e.numel()].view(e.shape))
        weight = e.mul_(pull.addcmul_(up[rows, None], down[cols]))
        result[:, rows].addmm_(scaled[:, cols], weight.T)
        if rows != cols:
            result[:, cols].addmm_(scaled[:, rows], weight)
    ours, theirs = scaled.chunk(2, 1)
    first, second = grad.chunk(2)
    result.sub_(torch.cat([theirs, ours], 1).mul_((first + second).repeat(2)))
    return result.mul_(LOG_2)


def _powers(z: Tensor, scaled: Tensor, half: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of 2^(S_ij - half_i - half_j) on and above the diagonal, which is 0: (rows, columns, block)."""
    count = z.shape[1]
    one = torch.ones_like(half)
    left = torch.cat([scaled, torch.stack([-half, one])]).T.contiguous()
    right = torch.cat([z, torch.stack([one, -half])])
    parts = [slice(start, min(start + block, count)) for start in range(0, count, block)]
    memory = z.new_empty(min(block, count) ** 2)
    for k, rows in enumerate(parts):
        for cols in parts[k:]:
            shape = rows.stop - rows.start, cols.stop - cols.start
            e = torch.mm(left[rows], right[:, cols], out=memory[: shape[0] * shape[1]].view(shape))
            e.clamp_max_(0).exp2_()
            if rows == cols:
                e.fill_diagonal_(0)
            yield rows, cols, e
