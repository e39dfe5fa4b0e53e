"""Entropy minimisation on unlabelled pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_flag, check_mask_like, check_option, check_scores, check_weight_like
from udakit._reduce import (
    BLOCK,
    KINDS,
    Kind,
    Reduction,
    check_reduction,
    exp_,
    guard,
    is_batched,
    is_large,
    learns,
    plain,
    reduce_pixels,
    select,
    softmax_where,
    upcast,
    zero_where_not_,
)


def entropy_loss(
    logits: Float[Tensor, "n c *space"],
    *,
    normalize: bool = True,
    kind: Kind = "logits",
    valid: Bool[Tensor, "n *space"] | None = None,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Shannon entropy of each pixel's class probabilities, as a fraction of its maximum.

    $$\ell_p = -\frac{1}{\log C} \sum_c p_c \log p_c, \qquad p = \operatorname{softmax}(z_p)$$

    **Convention.** The entropy is divided by log C, so a uniform pixel gives 1 for any number of classes.
    `normalize=False` returns nats. "mean" divides by the number of `valid` pixels, "mean_all" by the number of all
    pixels. Nothing is detached: minimise this loss on target images.

    **Source.** Direct entropy minimisation of AdvEnt (Vu et al. 2019), whose code adds 1e-30 inside the logarithm.

    Args:
        logits: class scores before the softmax, or class probabilities with `kind="probabilities"`.
        normalize: divide by log C.
        kind: "logits" | "probabilities".
        valid: True where a pixel counts.
        pixel_weight: weight of each pixel's loss; the divisor does not include it.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, *space) for "none".

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is unknown.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 19, 2, 2, requires_grad=True)
        >>> loss = entropy_loss(logits)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.0
    """
    _check_options(normalize, kind, reduction)
    check_scores("logits", logits, kind)
    if valid is not None:
        check_mask_like(valid, logits)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, logits)
    x, zeroed = upcast(logits), False
    if kind == "logits" and learns(x) and is_large(x):
        loss: Tensor = _Entropy.apply(plain(x), None if valid is None else plain(valid))
        zeroed = True
    elif kind == "logits":
        log_p, _ = softmax_where(valid, x, log=True)
        loss = -(log_p.exp() * log_p).sum(dim=1)
    else:
        x = guard(x, valid)
        loss = -(x * x.clamp_min(torch.finfo(x.dtype).tiny).log()).sum(dim=1)  # p = 0 adds 0, with a finite gradient
    if normalize and logits.shape[1] > 1:
        loss = loss / math.log(logits.shape[1])
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=zeroed)


class _Entropy(torch.autograd.Function):
    """Entropy of the softmax of (N, C, *space) at each pixel, and its gradient, block by block in the cache.

    dH / dx = -p (log p + H). Both are exactly 0 at pixels that are not valid.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None) -> Tensor:
        maps = x.flatten(2)
        mask = None if valid is None else valid.flatten(1).unsqueeze(1)
        n, c, size = maps.shape
        loss = maps.new_empty((n, size))
        kept = torch.empty_like(maps, memory_format=torch.contiguous_format)
        images, pixels = (n, size) if maps.numel() <= BLOCK else (1, max(BLOCK // c, 1))
        buffers = maps.new_empty((2, images * c * min(pixels, size)))
        for i in range(0, n, images):
            for j in range(0, size, pixels):
                at = slice(i, i + images), slice(None), slice(j, j + pixels)
                log_p, p = buffers[:, : maps[at].numel()].view(2, *maps[at].shape)
                torch.log_softmax(maps[at], dim=1, out=log_p)
                exp_(p.copy_(log_p))
                slope, h = kept[at], loss[at[0], at[2]]
                torch.sum(torch.mul(p, log_p, out=slope), dim=1, out=h)
                slope.addcmul_(p, h.unsqueeze(1), value=-1).neg_()  # `h` is -H so far
                if mask is not None:
                    zero_where_not_(mask[at], slope)
        ctx.save_for_backward(x, valid, kept)
        loss.neg_()
        if mask is not None:
            zero_where_not_(mask.squeeze(1), loss)
        return loss.view(n, *x.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, valid, kept = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True: in operations that have a derivative
            log_p = F.log_softmax(x if valid is None else torch.where(valid.unsqueeze(1), x, 0), dim=1)
            p = log_p.exp()
            slope = -p * (log_p - (p * log_p).sum(1, keepdim=True)) * grad.unsqueeze(1)
            return slope if valid is None else select(valid.unsqueeze(1), slope), None
        return (kept * grad.flatten(1).unsqueeze(1)).view(x.shape), None


def _check_options(normalize: bool, kind: str, reduction: str) -> None:
    check_flag("normalize", normalize)
    check_option("kind", kind, KINDS)
    check_reduction(reduction)


class EntropyLoss(nn.Module):
    """Module version of [`entropy_loss`][udakit.losses.entropy_loss].

    Example:
        >>> import torch
        >>> EntropyLoss()(torch.tensor([[1e4], [0.0]]).reshape(1, 2, 1, 1)).abs()
        tensor(0.)
    """

    def __init__(self, *, normalize: bool = True, kind: Kind = "logits", reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(normalize, kind, reduction)
        self.normalize = normalize
        self.kind: Kind = kind
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return entropy_loss(
            logits,
            normalize=self.normalize,
            kind=self.kind,
            valid=valid,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"normalize={self.normalize}, kind={self.kind!r}, reduction={self.reduction!r}"
