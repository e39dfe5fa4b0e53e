"""Cross-entropy, averaged over the labelled pixels or, as some published code does, over all pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from udakit._checks import (
    check_ignore_index,
    check_labels_like,
    check_per_class,
    check_scores,
    check_weight_like,
    check_weight_option,
)
from udakit._reduce import (
    LOG_2,
    Reduction,
    check_reduction,
    has_nan,
    is_batched,
    is_large,
    learns,
    look_up,
    may_look,
    plain,
    reduce_pixels,
    select,
    softmax_where,
    upcast,
    zero_where_not_,
)
from udakit._state import FullPrecisionState


def cross_entropy(
    logits: Float[Tensor, "n c *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    pixel_weight: Float[Tensor, "n *space"] | None = None,
    class_weight: Float[Tensor, "c"] | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n *space"]:
    r"""Cross-entropy of every labelled pixel, weighted per pixel and per class.

    $$\ell_p = -\,w_p\,w_{y_p} \log \operatorname{softmax}(z_p)_{y_p}$$

    **Convention.** Ignored pixels have loss 0 and get no gradient. "mean" divides by the number of labelled pixels in
    the batch, "mean_all" by the number of all pixels. Weights do not change this divisor: a pixel of weight 0 still
    counts, and the loss is not divided by the sum of the class weights as in `F.cross_entropy(weight=...)`. If all
    pixels are ignored, the loss is 0, not NaN.

    **Source.** DACS, DAFormer and DiGA divide by the number of all pixels, including ignored ones;
    `reduction="mean_all"` gives their value.

    Args:
        logits: class scores before the softmax, in any float dtype.
        labels: class ids 0..C-1 or `ignore_index`, int64 or uint8. Any other id is an error (on CUDA, a device-side
            assertion); `udakit.labels.check_labels` lists such ids.
        pixel_weight: weight of each pixel's loss, for example the confidence weight of a pseudo-label.
        class_weight: weight of each class; detached.
        ignore_index: the label of the pixels to ignore.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 logits), or (N, *space) for "none".

    Raises:
        TypeError: `logits` is not a float tensor, or `labels` is neither int64 nor uint8.
        ValueError: the shapes do not match, an id is not a class, or `reduction` is unknown.

    Example:
        >>> import torch
        >>> logits = torch.randn(2, 19, 4, 4, requires_grad=True)
        >>> labels = torch.full((2, 4, 4), 255)
        >>> loss = cross_entropy(logits, labels)
        >>> loss.backward()
        >>> loss.item(), logits.grad.abs().sum().item()
        (0.0, 0.0)
    """
    check_reduction(reduction)
    check_scores("logits", logits)
    check_ignore_index(ignore_index, logits.shape[1])
    check_labels_like(labels, logits)
    if class_weight is not None:
        check_class_weight(class_weight, logits)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, logits)
    labels = labels.long()
    valid = labels != ignore_index
    loss = labelled_cross_entropy(upcast(logits), labels, ignore_index, class_weight, valid=valid)
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=True)


def check_class_weight(class_weight: Tensor, logits: Tensor) -> None:
    """Raise unless there is one weight for each class of `logits`."""
    check_per_class("class_weight", class_weight, logits.shape[1], reference=logits, reference_name="logits")


def labelled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weight: Tensor | None = None,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """`F.cross_entropy` at each pixel, with our error message for an id that is not a class (on the CPU).

    The loss of an ignored pixel is exactly 0, whatever its logits are. `valid` is `labels != ignore_index`, if the
    caller has computed it already.
    """
    weight = None if class_weight is None else class_weight.detach().to(logits.dtype)
    grows = learns(logits)
    try:
        if grows and is_large(logits, 2):
            loss: Tensor = _CrossEntropy.apply(plain(logits), plain(labels), weight, ignore_index)
            return loss
        if grows and torch.compiler.is_compiling():
            ids = torch.where(labels == ignore_index, -1, labels).int()
            compiled: Tensor = _CompiledCrossEntropy.apply(logits, ids, weight)
            return compiled
        if grows:
            valid = labels != ignore_index if valid is None else valid
            log_p, _ = softmax_where(valid, logits, log=True, only_nan=True)  # `nll_loss` reads no ignored pixel
            return F.nll_loss(log_p, labels, weight, ignore_index=ignore_index, reduction="none")
        return F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction="none")
    except IndexError as error:
        raise unknown_id(logits, ignore_index) from error


class _CompiledCrossEntropy(torch.autograd.Function):
    """-w log softmax at `ids`, 0 at ids below 0, for a compiler: it fuses this gradient into one pass.

    The derivative of `F.cross_entropy` writes a map first, sums it over the classes, and reads it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weight: Tensor | None) -> Tensor:
        top = x.amax(1, keepdim=True)
        log_sum = (x - top).exp().sum(1, keepdim=True).log()
        known = ids.clamp_min(0).long().unsqueeze(1)
        # `weight[ids]` would be looked up again for each class in the backward pass; an embedding is kept.
        own_weight = None if weight is None else F.embedding(known.squeeze(1), weight.unsqueeze(1)).squeeze(-1)
        ctx.save_for_backward(x, top, log_sum, ids, own_weight)
        loss = (log_sum - (x.gather(1, known) - top)).squeeze(1)
        return torch.where(ids < 0, 0, loss if own_weight is None else loss * own_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, top, log_sum, ids, own_weight = ctx.saved_tensors
        ignored = ids.unsqueeze(1) < 0
        # Used twice, it is computed once for each pixel, not once for each class from all that it is made of.
        grad = torch.where(ignored, 0, (grad if own_weight is None else grad * own_weight).unsqueeze(1))
        slope = (x - top - log_sum).exp() - _one_hot(x, ids).to(x.dtype)
        return torch.where(ignored, grad, slope) * grad, None, None


def _one_hot(x: Tensor, ids: Tensor) -> Tensor:
    return _along_classes(x, torch.arange(x.shape[1], dtype=ids.dtype, device=x.device)) == ids.unsqueeze(1)


def _along_classes(x: Tensor, values: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def unknown_id(logits: Tensor, ignore_index: int) -> ValueError:
    """The error for a label that is not a class."""
    return ValueError(
        f"Expected `labels` to hold ids 0..{logits.shape[1] - 1} or `ignore_index` {ignore_index}, but got others. "
        "udakit.check_labels lists them."
    )


class _CrossEntropy(torch.autograd.Function):
    """`F.cross_entropy` with a gradient computed block by block, in the cache, and exactly 0 at ignored pixels.

    The backward pass of `F.cross_entropy` writes a map of zeros first, and gives NaN where ignored logits are NaN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
        log_p = F.log_softmax(x, dim=1)
        ctx.save_for_backward(x, labels, weight, log_p)
        ctx.ignore_index = ignore_index
        return F.nll_loss(log_p, labels, weight, ignore_index=ignore_index, reduction="none")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, labels, weight, log_p = ctx.saved_tensors
        valid = labels != ctx.ignore_index
        ids = labels.where(valid, 0).unsqueeze(1)
        grad = grad if weight is None else grad * look_up(weight, ids.squeeze(1))
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True: in operations that have a derivative
            p = torch.where(valid.unsqueeze(1), x, 0).softmax(1)
            slope = (p - torch.zeros_like(p).scatter(1, ids, 1)) * grad.unsqueeze(1)
            return select(valid.unsqueeze(1), slope), None, None, None
        result = torch.empty_like(log_p, memory_format=torch.contiguous_format)
        grad = select(valid, grad)  # whose products are 0 where nothing is NaN
        hidden = None if may_look(log_p) and not has_nan(log_p) else valid.flatten(1).unsqueeze(1)
        _fill(result.flatten(2), log_p.flatten(2), ids.flatten(2), grad.unsqueeze(1).flatten(2), hidden)
        return result, None, None, None


BLOCK = 2**18  # elements of a class map processed at once: they fit the cache


def _fill(result: Tensor, log_p: Tensor, ids: Tensor, grad: Tensor, valid: Tensor | None) -> None:
    """Result = (softmax - one-hot) * grad, and 0 where not `valid`; all (N, C or 1, pixels)."""
    n, c, size = result.shape
    images, pixels = (n, size) if result.numel() <= BLOCK else (1, max(BLOCK // c, 1))
    for i in range(0, n, images):
        for j in range(0, size, pixels):
            at = slice(i, i + images), slice(None), slice(j, j + pixels)
            g, out = grad[at], result[at]
            torch.mul(log_p[at], 1 / LOG_2, out=out).exp2_().mul_(g)
            out.scatter_add_(1, ids[at], -g)
            if valid is not None:
                zero_where_not_(valid[at], out)


def reduce_labelled(
    loss: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """Weight and reduce a per-pixel loss that is 0 at ignored pixels."""
    labels = labels.long()  # uint8 would wrap an `ignore_index` of -100
    valid = labels != ignore_index
    if class_weight is not None:
        # Class 0 stands for an ignored pixel, and may have an infinite weight: below it is hidden like a pixel's own.
        weight = look_up(class_weight.detach().to(loss.dtype), labels.where(valid, 0))
        pixel_weight = weight if pixel_weight is None else weight * pixel_weight.to(loss.dtype)
    return reduce_pixels(loss, valid, pixel_weight=pixel_weight, reduction=reduction, zeroed=True)


class CrossEntropyLoss(FullPrecisionState):
    """Module version of [`cross_entropy`][udakit.losses.cross_entropy]; `class_weight` is a buffer.

    Attributes:
        class_weight: buffer (C,) of the dtype given, or None.

    Example:
        >>> import torch
        >>> criterion = CrossEntropyLoss(reduction="mean_all")
        >>> criterion(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]]))
        tensor(0.3466)
    """

    class_weight: Tensor | None

    def __init__(
        self, *, class_weight: Tensor | None = None, ignore_index: int = 255, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_ignore_index(ignore_index)
        check_reduction(reduction)
        check_weight_option(class_weight)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        labels: Integer[Tensor, "n *space"],
        *,
        pixel_weight: Float[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return cross_entropy(
            logits,
            labels,
            pixel_weight=pixel_weight,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
