"""Cross-entropy at label size from low-resolution logits, without storing the upsampled logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Integer
from torch import Tensor

from udakit._checks import (
    check_device,
    check_flag,
    check_ignore_index,
    check_integer,
    check_label_map,
    check_scores,
    check_two_dimensional,
    check_weight_like,
    check_weight_option,
    shape_of,
)
from udakit._reduce import (
    Reduction,
    check_reduction,
    divided,
    interpolate,
    is_eager_on_cpu,
    learns,
    look_up,
    plain,
    upcast,
)
from udakit._reduce.eager import LARGE
from udakit._state import FullPrecisionState
from udakit.losses._upsampled import sums_at_once, upsampled_loss, upsampled_sum
from udakit.losses.cross_entropy import check_class_weight, cross_entropy, reduce_labelled

# For signals and volumes: the same value, with the whole map in memory.
ELSEWHERE = " For other numbers of dimensions, use F.interpolate and then udakit.cross_entropy."


def upsampled_cross_entropy(
    logits: Float[Tensor, "n c h w"],
    labels: Integer[Tensor, "n h2 w2"],
    *,
    pixel_weight: Float[Tensor, "n h2 w2"] | None = None,
    class_weight: Float[Tensor, "c"] | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    chunk_rows: int | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n h2 w2"]:
    r"""`cross_entropy` of logits that are bilinearly upsampled to the labels, one band of rows at a time.

    $$\ell_p = -\,w_p\,w_{y_p} \log \operatorname{softmax}\big((U z)_p\big)_{y_p}, \qquad
    U \text{ bilinear, to } (H, W)$$

    **Convention.** Value and gradient equal those of `F.interpolate(logits, labels.shape[1:], mode="bilinear")`
    followed by [`cross_entropy`][udakit.losses.cross_entropy], including its weights, means and ignored pixels.

    **Source.** Nets that predict at a quarter or an eighth of the input's resolution are usually trained in this way.

    **Two-dimensional maps only**: the bands are rows of (N, C, H, W).

    **Cost.** Besides the inputs, their gradient and a few (N, H, W) maps, it holds a few bands of N C `chunk_rows` W
    numbers. The plain way holds several maps of N C H W numbers. The backward pass recomputes the bands from the
    logits, so nothing else is stored; on a CPU, a sum or mean takes its gradient together with its value. The loss
    cannot be differentiated twice, nor in forward mode or by `torch.func.grad`. If the logits already have the size of
    the labels, this is `cross_entropy` in bands.

    Args:
        logits: class scores before the softmax, in any float dtype and of any size.
        labels: class ids 0..C-1 or `ignore_index`, int64 or uint8, at the size of the loss.
        pixel_weight: weight of each pixel's loss, at the size of the labels.
        class_weight: weight of each class; detached.
        ignore_index: the label of the pixels to ignore.
        align_corners: option of the upsampling, as in `F.interpolate`.
        chunk_rows: number of rows in a band, at the size of the labels; None takes as many rows as fit in 2 MiB of
            float32 (64 MiB on a GPU).
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 logits), or (N, H, W) at the size of the labels for "none".

    Raises:
        TypeError: `logits` is not a float tensor, or `labels` is neither int64 nor uint8.
        ValueError: the shapes do not match, an id is not a class, or an option is out of range.

    Example:
        >>> import torch
        >>> logits = torch.randn(2, 19, 8, 16, requires_grad=True)
        >>> labels = torch.randint(19, (2, 32, 64))
        >>> loss = upsampled_cross_entropy(logits, labels)
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 8, 16])
    """
    _check_options(ignore_index, align_corners, chunk_rows, reduction)
    check_scores("logits", logits)
    check_two_dimensional("logits", logits, "`upsampled_cross_entropy`", hint=ELSEWHERE)
    check_ignore_index(ignore_index, logits.shape[1])
    check_label_map(labels, reference=logits)
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(f"Expected `labels` to have the N of `logits` {shape_of(logits)}, but got {shape_of(labels)}.")
    check_device("labels", labels, logits, "logits")
    if class_weight is not None:
        check_class_weight(class_weight, logits)
    if pixel_weight is not None:
        check_weight_like(pixel_weight, labels, reference_name="labels", channels=False)
    few = labels.numel() * logits.shape[1] < 2 * LARGE and chunk_rows is None
    if few and not learns(logits) and is_eager_on_cpu(logits):  # bands would cost more calls than they save memory
        whole = interpolate(plain(upcast(logits)), labels.shape[1:], align_corners=align_corners)
        weights = {"pixel_weight": pixel_weight, "class_weight": class_weight}
        return cross_entropy(whole, plain(labels), **weights, ignore_index=ignore_index, reduction=reduction)
    options: dict[str, Any] = {
        "align_corners": align_corners,
        "chunk_rows": chunk_rows,
        "ignore_index": ignore_index,
    }
    maps = logits, labels, (labels.shape[1], labels.shape[2])
    if sums_at_once(logits, reduction, pixel_weight):
        ids = labels.long()
        valid, weight = ids != ignore_index, pixel_weight
        if class_weight is not None:  # an id that is not a class is an error below
            weight = class_weight.detach().to(upcast(logits[:0]).dtype)
            weight = look_up(weight, ids.where(valid, 0).clamp(0, logits.shape[1] - 1))
            weight = weight if pixel_weight is None else weight * pixel_weight.to(weight.dtype)
        return divided(upsampled_sum(*maps, weight, valid, **options), labels.shape, valid, reduction)
    loss = upsampled_loss(*maps, **options)
    return reduce_labelled(loss, labels, class_weight, pixel_weight, ignore_index, reduction)


def _check_options(ignore_index: int, align_corners: bool, chunk_rows: int | None, reduction: str) -> None:
    check_ignore_index(ignore_index)
    check_flag("align_corners", align_corners)
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows)
    check_reduction(reduction)


class UpsampledCrossEntropyLoss(FullPrecisionState):
    """Module version of [`upsampled_cross_entropy`][udakit.losses.upsampled_cross_entropy]; `class_weight` is a buffer.

    Attributes:
        class_weight: buffer (C,) of the dtype given, or None.

    Example:
        >>> import torch
        >>> criterion = UpsampledCrossEntropyLoss()
        >>> criterion(torch.zeros(1, 2, 1, 1), torch.tensor([[[1, 255, 0]]]))
        tensor(0.6931)
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        chunk_rows: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(ignore_index, align_corners, chunk_rows, reduction)
        check_weight_option(class_weight)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.chunk_rows = chunk_rows
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "n c h w"],
        labels: Integer[Tensor, "n h2 w2"],
        *,
        pixel_weight: Float[Tensor, "n h2 w2"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return upsampled_cross_entropy(
            logits,
            labels,
            pixel_weight=pixel_weight,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            chunk_rows=self.chunk_rows,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"ignore_index={self.ignore_index}, align_corners={self.align_corners}, chunk_rows={self.chunk_rows}, "
            f"reduction={self.reduction!r}"
        )
