"""Pixel contrast between two views of an image (EHTDI): exact InfoNCE that never holds the matrix of all pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_integer, check_maps, check_mask_like, check_range, check_same_shape
from udakit._reduce import Reduction, check_reduction, reduce_pixels, select, upcast
from udakit.losses._infonce import infonce


def pixel_contrast_loss(
    view_a: Float[Tensor, "n d *space"],
    view_b: Float[Tensor, "n d *space"],
    *,
    temperature: float = 0.05,
    valid: Bool[Tensor, "n *space"] | None = None,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "n 2 *space"]:
    r"""InfoNCE over all pixels of both views of each image: the positive is the same pixel in the other view.

    $$\ell_i = -\log \frac{\exp(z_i \cdot z_{i'} / \tau)}{\sum_{j \ne i} \exp(z_i \cdot z_j / \tau)}$$

    Here i and j run over the 2hw pixels of both views of one image, and i' is pixel i in the other view.

    **Convention.** The dot products use the embeddings as given; nothing is normalised. `valid` applies to both views:
    an invalid pixel is neither an anchor nor a negative. "mean" divides by the number of valid anchors in the batch
    (two for each valid pixel), "mean_all" by the number of all anchors. Both views get gradients; detach one of them to
    train only the other.

    **Source.** EHTDI (Li et al. 2022), which uses class probabilities and 1/tau = 20. There too, pixels of the same
    class are negatives. Its released code divides the sum over the images by the batch size, which gives this mean.

    **Cost.** Each image takes about (2hw)^2 D operations. Besides a few copies of the embeddings, memory is needed for
    two blocks of `chunk_size`^2 numbers: by default 2 MiB in float32, and at most 128 MiB on a GPU. The dense formula
    needs several times 16 (hw)^2 bytes. The backward pass recomputes the blocks from the stored log-sum-exps. The loss
    cannot be differentiated twice, nor in forward mode or by `torch.func.grad`. On a CPU, embeddings of squared length
    up to 38 tau, such as probabilities at tau = 0.05, take half as many exponentials.

    Args:
        view_a: embeddings of one view, with any D and any stride; absolute values up to 1e15 in float32.
        view_b: embeddings of the other view, with the same geometry.
        temperature: tau > 0; the dot products are divided by it.
        valid: True where a pixel counts, at the size of the embeddings.
        chunk_size: number of pixels along each side of a block; None means 512 on the CPU and 4096 on a GPU.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Returns:
        A float32 scalar (float64 for float64 input), or (N, 2, *space) for "none", where axis 1 is the view of the
        anchor.

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> weak, strong = torch.randn(2, 2, 19, 8, 8).softmax(2).requires_grad_()
        >>> pixel_contrast_loss(weak, strong, reduction="none").shape
        torch.Size([2, 2, 8, 8])
        >>> pixel_contrast_loss(weak, strong).backward()
    """
    _check_options(temperature, chunk_size, reduction)
    check_maps("view_a", view_a, "N, D")
    check_maps("view_b", view_b, "N, D")
    check_same_shape(view_b, view_a, name="view_b", reference_name="view_a")
    if valid is not None:
        check_mask_like(valid, view_a, reference_name="view_a")
    z = torch.cat([upcast(view_a).flatten(2), upcast(view_b).flatten(2)], dim=2)
    both = None if valid is None else valid.flatten(1).repeat(1, 2)
    # Invalid pixels must not enter the products, even where they are NaN.
    z = z if both is None else select(both.unsqueeze(1), z)
    loss = infonce(z, both, temperature, chunk_size).view(len(z), 2, *view_a.shape[2:])
    return reduce_pixels(loss, None if both is None else both.view(loss.shape), reduction=reduction)


def _check_options(temperature: float, chunk_size: int | None, reduction: str) -> None:
    check_range("temperature", temperature, 0.0, open_low=True)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size)
    check_reduction(reduction)


class PixelContrastLoss(nn.Module):
    """Module version of [`pixel_contrast_loss`][udakit.losses.pixel_contrast_loss].

    Example:
        >>> import torch
        >>> criterion = PixelContrastLoss(temperature=1.0)
        >>> criterion(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))  # log 7: one positive, six negatives
        tensor(1.9459)
    """

    def __init__(
        self, *, temperature: float = 0.05, chunk_size: int | None = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_options(temperature, chunk_size, reduction)
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.reduction: Reduction = reduction

    def forward(
        self,
        view_a: Float[Tensor, "n d *space"],
        view_b: Float[Tensor, "n d *space"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Apply the function with the configuration given at construction."""
        return pixel_contrast_loss(
            view_a,
            view_b,
            temperature=self.temperature,
            valid=valid,
            chunk_size=self.chunk_size,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"temperature={self.temperature}, chunk_size={self.chunk_size}, reduction={self.reduction!r}"
