"""Blockwise InfoNCE between rows, as a pair of operators that compilers and fake tensors treat as one node.

The similarity matrix S = z' z / temperature is symmetric, so each block above the diagonal serves its rows and its
columns. The forward pass keeps the log-sum-exp of each row, and the backward pass recomputes the blocks:
dL/dS_ij = g_i (exp(S_ij - lse_i) - [j is i's partner]), and dL/dz = z (dL/dS + its transpose) / temperature.
S and its log-sum-exps are kept in units of log 2, for exp2. Rows that are not long, such as probabilities, take half as
many exponentials on a CPU (`_infonce_short`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from udakit._reduce import LOG_2, first_derivative_only, full_precision, plain, refuse_transforms
from udakit.losses._infonce_short import is_short, log_sums, slopes

BLOCK = {"cpu": 512, "other": 4096}  # pixels per side of a block: 1 MiB fits a CPU cache, 64 MiB keep launches few


def infonce(z: Tensor, valid: Tensor | None, temperature: float, block: int | None) -> Tensor:
    """InfoNCE of each column of z (n, d, 2m); columns i and i + m are partners. Invalid ones give 0: (n, 2m)."""
    block = block or BLOCK.get(z.device.type, BLOCK["other"])
    refuse_transforms(z)
    loss: Tensor = torch.ops.udakit.infonce(plain(z), None if valid is None else plain(valid), temperature, block)[0]
    return loss


def _infonce(z: Tensor, valid: Tensor | None, temperature: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp of each row, and on a CPU whether the rows are short."""
    n, _, count = z.shape
    lse = z.new_full((n, count), float("-inf"))
    loss = z.new_zeros(n, count)
    decision = z.new_empty((), dtype=torch.bool)
    with full_precision(z):
        short = is_short(z, temperature)
        if z.device.type == "cpu":
            decision.fill_(short)
        if short:
            ours, theirs = z.chunk(2, 2)
            loss = ((ours * theirs).sum(1) / (temperature * LOG_2)).repeat(1, 2)
        for k in range(n):
            if short:
                lse[k] = log_sums(z[k], None if valid is None else valid[k], temperature, block)
                continue
            for rows, cols, s, scratch in _blocks(z[k], None if valid is None else valid[k], temperature, block):
                if cols.start == rows.start + count // 2:
                    loss[k, rows] = s.diagonal()
                    loss[k, cols] = s.diagonal()
                _add_log2_sum_exp2(lse[k, rows], s, 1, scratch)
                if rows != cols:
                    _add_log2_sum_exp2(lse[k, cols], s, 0, s)
    loss = (lse - loss) * LOG_2
    if short:  # whose terms and sums are rounded apart
        loss.clamp_min_(0)
    if valid is not None:
        loss = torch.where(valid, loss, 0)
        lse = torch.where(valid, lse, float("inf"))  # exp(S - lse) is 0 there
    return loss, lse, decision


def _infonce_backward(
    grad: Tensor, z: Tensor, valid: Tensor | None, lse: Tensor, decision: Tensor, temperature: float, block: int
) -> Tensor:
    n, _, count = z.shape
    result = torch.zeros_like(z, memory_format=torch.contiguous_format)
    if valid is not None:
        grad = torch.where(valid, grad, 0)
    with full_precision(z):
        scaled, short = z / temperature, z.device.type == "cpu" and bool(decision)
        for k in range(n):
            g = grad[k]
            if short:
                result[k] = slopes(z[k], None if valid is None else valid[k], g, lse[k], temperature, block)
                continue
            for rows, cols, s, weight in _blocks(z[k], None if valid is None else valid[k], temperature, block):
                # Computing a product twice may round differently, which matters at 1e30. No share can exceed 1.
                torch.sub(s, lse[k, rows, None], out=weight).clamp_max_(0).exp2_().mul_(g[rows, None])
                weight += s.sub_(lse[k, cols]).clamp_max_(0).exp2_().mul_(g[cols])
                if cols.start == rows.start + count // 2:
                    weight.diagonal().sub_(g[rows] + g[cols])
                result[k, :, rows].addmm_(scaled[k, :, cols], weight.T)
                if rows != cols:
                    result[k, :, cols].addmm_(scaled[k, :, rows], weight)
    return result


def _blocks(
    z: Tensor, valid: Tensor | None, temperature: float, block: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of S on and above the diagonal, -inf where a pair does not count: (rows, columns, S, scratch of its size).

    Both views are cut the same way, so the partners of a block's rows are on the diagonal of one other block.
    """
    m = z.shape[1] // 2
    block = min(block, max(m, 1))
    parts = [slice(start, min(start + block, v * m + m)) for v in (0, 1) for start in range(v * m, v * m + m, block)]
    left = (z / (temperature * LOG_2)).T.contiguous()
    buffers = z.new_empty(2, block * block)
    bias = None if valid is None else torch.zeros_like(z[0]).masked_fill_(~valid, float("-inf"))
    for a, rows in enumerate(parts):
        for cols in parts[a:]:
            shape = rows.stop - rows.start, cols.stop - cols.start
            s, scratch = (x[: shape[0] * shape[1]].view(shape) for x in buffers)
            torch.mm(left[rows], z[:, cols], out=s)
            if bias is not None:
                s.add_(bias[rows, None]).add_(bias[cols])
            if rows == cols:
                s.fill_diagonal_(float("-inf"))
            yield rows, cols, s, scratch


def _add_log2_sum_exp2(lse: Tensor, s: Tensor, dim: int, scratch: Tensor) -> None:
    """Add 2^s, summed over `dim`, to a running logarithm of such sums."""
    top = s.amax(dim, keepdim=True).clamp_min_(torch.finfo(s.dtype).min)  # -inf - -inf is NaN
    total = torch.sub(s, top, out=scratch).exp2_().sum(dim).log2_().add_(top.squeeze(dim))
    torch.logaddexp2(lse, total, out=lse)


def _fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse = (z.new_empty(z.shape[0], z.shape[2]) for _ in range(2))
    return loss, lse, z.new_empty((), dtype=torch.bool)


def _fake_backward(grad: Tensor, z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, valid, ctx.temperature, ctx.block = inputs
    ctx.save_for_backward(z, valid, *output[1:])


@first_derivative_only("`pixel_contrast_loss`")
def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None]:
    return torch.ops.udakit.infonce_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.block), None, None, None


_op = torch.library.custom_op(
    "udakit::infonce",
    _infonce,
    mutates_args=(),
    schema="(Tensor z, Tensor? valid, float temperature, int block) -> (Tensor, Tensor, Tensor)",
)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup_context)
_op_backward = torch.library.custom_op(
    "udakit::infonce_backward",
    _infonce_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor? valid, Tensor lse, Tensor decision, float temperature, int block)"
    " -> Tensor",
)
_op_backward.register_fake(_fake_backward)
