"""Fusion of the predictions of several teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_device,
    check_float,
    check_numbers,
    check_option,
    check_scores,
    check_size,
    is_sequence,
    kind_of,
    net_logits,
    shape_of,
)
from udakit._reduce import BLOCK, KINDS, Kind, exp_, interpolate, is_large, plain, top_class, upcast

__all__ = ["fuse_teachers", "teacher_agreement"]

Fusion = Literal["mean", "max_confidence", "agreement"]
FUSIONS = get_args(Fusion)


def fuse_teachers(
    logits: Sequence[Float[Tensor, "n c *space"]],
    *,
    weights: Sequence[float] | Float[Tensor, "k"] | None = None,
    size: Sequence[int] | None = None,
    mode: Fusion = "mean",
    kind: Kind = "logits",
) -> Float[Tensor, "n c *space2"]:
    r"""Fuse the predictions of several teachers into one probability map.

    $$\bar p = \frac{\sum_k a_k\, \operatorname{softmax}(z_k)}{\sum_k a_k}$$

    **Convention.** The probabilities of each pixel sum to 1, and the teachers are detached. "mean" is the formula
    above. "max_confidence" takes the probabilities of the teacher with the largest a_k max_c p_k at each pixel; ties go
    to the first teacher. "agreement" is the mean where all teachers have the same arg-max (even those with weight 0),
    and uniform, 1 / C, elsewhere, so that a confidence threshold rejects these pixels. To leave them out of a loss,
    pass `teacher_agreement` as its `valid`.

    **Source.** Ours, for DUDA's fine-tuning with several teachers. The paper's rule was not available to us.

    Args:
        logits: for each teacher one tensor (N, C, *space), or the output of a net that holds it; with
            `kind="probabilities"`, probabilities. All must be on the same device.
        weights: a_k >= 0, finite and not all 0, as K numbers or a tensor (K,); equal by default. The values of a tensor
            are not checked, because a GPU would wait: with infinite or negative ones, or zeros alone, the result can be
            NaN or not sum to 1.
        size: spatial size of the result, (H, W) for images; required if the sizes differ. Logits are interpolated
            linearly, before the softmax.
        mode: "mean" | "max_confidence" | "agreement".
        kind: "logits" | "probabilities", for all teachers.

    Returns:
        The fused probabilities, float32 (float64 for float64 input).

    Raises:
        TypeError: the output of a teacher is not a float tensor.
        ValueError: there is no teacher, the shapes do not match, there is only one class, the weights do not match, or
            an option is unknown.

    Example:
        >>> large, small = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4, 4)
        >>> fused = fuse_teachers([large, small], weights=[2.0, 1.0], size=(8, 8))
        >>> fused.shape, bool((fused.sum(1) - 1).abs().max() < 1e-6)
        (torch.Size([2, 5, 8, 8]), True)
    """
    check_option("mode", mode, FUSIONS)
    check_option("kind", kind, KINDS)
    maps = _teacher_maps(logits, size, kind)
    share = _teacher_weights(weights, maps)
    if mode == "mean" and kind == "logits" and is_large(maps[0]):
        return _mean_in_pieces(maps, share)
    maps = [_probabilities(x, kind) for x in maps]
    if mode == "max_confidence":
        fused, best = maps[0], share[0] * maps[0].amax(1, keepdim=True)
        for a, p in zip(share[1:], maps[1:], strict=True):
            confidence = a * p.amax(1, keepdim=True)
            fused = torch.where(confidence > best, p, fused)
            best = torch.maximum(confidence, best)
        return fused
    fused = sum((a * p for a, p in zip(share[1:], maps[1:], strict=True)), share[0] * maps[0])
    if mode == "agreement":
        fused = torch.where(_agree(maps)[:, None], fused, 1 / fused.shape[1])
    return fused


def teacher_agreement(
    logits: Sequence[Float[Tensor, "n c *space"]], *, size: Sequence[int] | None = None
) -> Bool[Tensor, "n *space2"]:
    """Return a mask that is True where all teachers have the same arg-max, for use as `valid` in a loss.

    Args:
        logits: for each teacher one tensor (N, C, *space) of logits or probabilities, or the output of a net that holds
            it.
        size: spatial size of the result, (H, W) for images; required if the sizes differ. The maps are interpolated
            linearly.

    Returns:
        The mask, bool (N, *space).

    Raises:
        TypeError: the output of a teacher is not a float tensor.
        ValueError: there is no teacher, or the shapes do not match.

    Example:
        >>> a, b = torch.tensor([[[[0.0, 1.0]], [[2.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])
        >>> teacher_agreement([a, b])
        tensor([[[ True, False]]])
    """
    return _agree(_teacher_maps(logits, size, None))


def _agree(maps: list[Tensor]) -> Tensor:
    first = top_class(maps[0])
    agree = torch.ones_like(first, dtype=torch.bool)
    for p in maps[1:]:
        agree = agree & (top_class(p) == first)
    return agree


def _teacher_maps(logits: Sequence[Tensor], size: Sequence[int] | None, kind: str | None) -> list[Tensor]:
    """The maps at the same size, detached; `kind=None` if only the arg-max matters."""
    if kind is not None:
        check_option("kind", kind, KINDS)
    if not is_sequence(logits) or not len(logits):
        given = "an empty one" if is_sequence(logits) else kind_of(logits)
        raise ValueError(
            "Expected `logits` to be a non-empty sequence of (N, C, *space) tensors, one for each teacher, but got "
            f"{given}. Pass [teacher_a(images), teacher_b(images)]."
        )
    outputs = [net_logits(x) if isinstance(x, Mapping) or hasattr(x, "logits") else x for x in logits]
    for k, x in enumerate(outputs):
        check_scores(f"logits[{k}]", x, kind or "logits")
    first = outputs[0]
    if size is not None:
        check_size("size", size, first.ndim - 2)
    maps = []
    for k, x in enumerate(outputs):
        alike = x.shape[:2] == first.shape[:2] and x.ndim == first.ndim
        if not alike or (size is None and x.shape != first.shape):
            hint = " Pass `size=` to interpolate." if alike else ""
            raise ValueError(
                f"Expected `logits[{k}]` to match `logits[0]` {shape_of(first)}, but got {shape_of(x)}.{hint}"
            )
        check_device(f"logits[{k}]", x, first, "logits[0]")
        x = plain(x.detach())
        if size is not None and tuple(x.shape[2:]) != tuple(size):
            x = interpolate(upcast(x), size, name=f"logits[{k}]")
        maps.append(x)
    return maps


def _probabilities(x: Tensor, kind: str) -> Tensor:
    return F.softmax(upcast(x), dim=1) if kind == "logits" else upcast(x)


def _mean_in_pieces(maps: list[Tensor], share: Sequence[float] | Tensor) -> Tensor:
    """The weighted mean of the softmax in pieces that stay in the cache of a CPU.

    Each is written out, so that its division is part of the sum, and with `exp_`, which is faster than a softmax.
    """
    n, c, *space = maps[0].shape
    size = math.prod(space)
    dtype = reduce(torch.promote_types, (x.dtype for x in maps), torch.float32)
    fused = maps[0].new_empty((n, c, size), dtype=dtype)
    pixels = min(max(BLOCK // c, 1), size)
    buffer, flat = fused.new_empty(c * pixels), [x.flatten(2) for x in maps]
    for i in range(n):
        for j in range(0, size, pixels):
            out = fused[i, :, j : j + pixels]
            for k, x in enumerate(flat):
                p = buffer[: out.numel()].view(out.shape).copy_(x[i, :, j : j + pixels])
                exp_(p.sub_(p.amax(0)))
                scale = share[k] / p.sum(0)
                if k:
                    out.addcmul_(p, scale)
                else:
                    torch.mul(p, scale, out=out)
    return fused.view(n, c, *space)


def _teacher_weights(weights: Sequence[float] | Tensor | None, maps: list[Tensor]) -> Sequence[float] | Tensor:
    if isinstance(weights, Tensor):
        check_float("weights", weights)
        weights = plain(weights)
        if weights.ndim != 1 or weights.shape[0] != len(maps):
            raise ValueError(f"Expected `weights` to be (K,) with K = {len(maps)}, but got {shape_of(weights)}.")
        weights = weights.detach().to(torch.promote_types(maps[0].dtype, torch.float32))
        return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    if weights is not None and not is_sequence(weights):
        raise TypeError(
            f"Expected `weights` to be {len(maps)} numbers, one for each teacher, but got {kind_of(weights)}."
        )
    numbers = [1.0] * len(maps) if weights is None else list(weights)
    form = f"{len(maps)} numbers >= 0, not all 0, one for each teacher"
    check_numbers("weights", numbers, len(maps), form, low=0.0, finite=True)
    if not sum(numbers) > 0:
        raise ValueError(f"Expected `weights` to be {form}, but got {numbers}.")
    return [a / sum(numbers) for a in numbers]
