"""Soft cross-entropy in blocks, as an operator that compilers and fake tensors treat as one node."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from udakit._reduce import BLOCK, LOG_2, is_batched, learns, plain, refuse_transforms, upcast, zero_where_not_


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None, *, kl: bool = False
) -> Tensor:
    """`kd_loss` of logits at each pixel, (N, *space). Pixels that are not `valid` have loss 0 and get no gradient."""
    valid, given = None if valid is None else plain(valid), plain(student)
    student, teacher = plain(upcast(student)), plain(upcast(teacher.detach()).to(upcast(student).dtype))
    refuse_transforms(student)
    keep = learns(student)
    if torch.compiler.is_compiling():
        loss: Tensor = torch.ops.udakit.soft_cross_entropy(student, teacher, temperature, keep, valid, kl)[0]
        return loss
    loss = _Eager.apply(student, teacher, temperature, keep, valid, kl, given if keep else None)
    return loss


def _forward(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    keep: bool,
    valid: Tensor | None = None,
    kl: bool = False,
) -> tuple[Tensor, Tensor]:
    """T^2 H(softmax(t / T), softmax(s / T)) per pixel, and softmax(s / T) - softmax(t / T), its gradient / T.

    With `kl`, the entropy of the first is subtracted, which does not change the gradient.
    """
    s, t = student.flatten(2), teacher.flatten(2)
    mask = None if valid is None else valid.flatten(1).unsqueeze(1)
    n, c, size = s.shape
    loss = s.new_empty((n, 1, size))
    kept = torch.empty_like(s, memory_format=torch.contiguous_format) if keep else s.new_empty((0,))
    # A GPU takes the whole batch. The CPU takes pieces of an image, so that intermediate values stay in its cache.
    on_cpu = s.device.type == "cpu"
    images, pixels = (1, max(BLOCK // max(c, 1), 1)) if on_cpu else (max(n, 1), max(size, 1))
    piece = _piece_on_cpu if on_cpu else _piece
    # Allocating memory for every piece would cost more than the sums.
    buffers = s.new_empty((4 if kl else 3, images * c * min(pixels, size)))
    for i in range(0, n, images):
        for j in range(0, size, pixels):
            at = slice(i, i + images), slice(None), slice(j, j + pixels)
            x, y = s[at], t[at]
            gradient = kept[at] if keep else None
            piece(x, y, temperature, kl, list(buffers[:, : x.numel()].view(-1, *x.shape)), loss[at], gradient)
            if keep and mask is not None:
                zero_where_not_(mask[at], kept[at])
    if mask is not None:
        zero_where_not_(mask, loss)
    return loss.view(n, *student.shape[2:]).mul_(-(temperature**2)), kept


def _piece(
    s: Tensor, t: Tensor, temperature: float, kl: bool, buffers: list[Tensor], loss: Tensor, kept: Tensor | None
) -> None:
    """Write the sum of q log p, with `kl` of q (log p - log q), to `loss` (N, 1, P), and p - q to `kept`."""
    x, q, log_p, *rest = buffers
    if kl:
        torch.log_softmax(_divided(t, temperature, x), dim=1, out=rest[0])
        torch.exp(rest[0], out=q)
        rest[0].clamp_min_(torch.finfo(s.dtype).min)  # 0 log 0 is 0
    else:
        torch.softmax(_divided(t, temperature, x), dim=1, out=q)
    torch.log_softmax(_divided(s, temperature, x), dim=1, out=log_p)
    ratio = torch.sub(log_p, rest[0], out=rest[0]) if kl else log_p
    torch.sum(torch.mul(ratio, q, out=x), dim=1, keepdim=True, out=loss)
    if kept is not None:
        torch.sub(log_p.exp_(), q, out=kept)


def _piece_on_cpu(
    s: Tensor, t: Tensor, temperature: float, kl: bool, buffers: list[Tensor], loss: Tensor, kept: Tensor | None
) -> None:
    """The same with the softmax spelled out: `exp2` is three times as fast as `exp`, and each is computed once."""
    log_p, p, q, *rest = buffers
    scale = 1 / (temperature * LOG_2)

    def powers(logits: Tensor, exponents: Tensor, out: Tensor) -> Tensor:
        """Softmax in `out`, times its sum over the classes, which is returned; and its exponents of 2."""
        torch.sub(logits, logits.amax(1, keepdim=True), out=exponents).mul_(scale)
        return torch.exp2(exponents, out=out).sum(1, keepdim=True)

    total_of_q = powers(t, rest[0] if kl else q, q)
    total_of_p = powers(s, log_p, p)
    log_sum = total_of_p.log2()
    if kl:
        log_p.sub_(rest[0].clamp_min_(torch.finfo(s.dtype).min))  # 0 log 0 is 0
        log_sum.sub_(total_of_q.log2())
    torch.sum(log_p.mul_(q), dim=1, keepdim=True, out=loss)
    loss.div_(total_of_q).sub_(log_sum).mul_(LOG_2)
    if kept is not None:
        torch.mul(p, total_of_p.reciprocal_(), out=kept).addcmul_(q, total_of_q.reciprocal_(), value=-1)


def _divided(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Logits / T, in `out` unless there is nothing to do."""
    return logits if temperature == 1 else torch.div(logits, temperature, out=out)


def _fake(student: Tensor, teacher: Tensor, temperature: float, keep: bool, *_: Any) -> tuple[Tensor, Tensor]:
    n, c, *space = student.shape
    return student.new_empty((n, *space)), student.new_empty((n, c, math.prod(space)) if keep else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes a class map of zeros for the second output
    ctx.save_for_backward(output[1])
    ctx.temperature = inputs[2]


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, *tuple[None, ...]]:
    if grad is None:
        return (None,) * 6
    return _gradient(ctx, grad), *(None,) * 5


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    grad = grad * ctx.temperature if ctx.temperature != 1 else grad
    gradient: Tensor = (ctx.saved_tensors[0] * grad.flatten(1).unsqueeze(1)).unflatten(2, grad.shape[1:])
    return gradient


class _Eager(torch.autograd.Function):
    """The same without the operator, whose dispatch takes longer than a small map, and with a second derivative.

    That needs the logits as they were given, which the caller holds as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        keep: bool,
        valid: Tensor | None,
        kl: bool,
        given: Tensor | None,
    ) -> Tensor:
        loss, kept = _forward(student, teacher, temperature, keep, valid, kl)
        ctx.save_for_backward(kept, given, valid)
        ctx.temperature = temperature
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not (torch.is_grad_enabled() or is_batched(grad)):
            return _gradient(ctx, grad), *(None,) * 6
        kept, student, valid = ctx.saved_tensors  # create_graph=True: in operations that have a derivative
        x = upcast(student) if valid is None else torch.where(valid.unsqueeze(1), upcast(student), 0)
        p = torch.softmax(x / ctx.temperature, dim=1)
        q = p.detach() - kept.view(p.shape)
        return (p - q) * (grad * ctx.temperature).unsqueeze(1), *(None,) * 6


_op = torch.library.custom_op(
    "udakit::soft_cross_entropy",
    _forward,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, float temperature, bool keep, Tensor? valid=None, bool kl=False)"
    " -> (Tensor, Tensor)",
)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup_context)
