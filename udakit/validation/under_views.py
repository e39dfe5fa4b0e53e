"""How far a net contradicts itself on a view of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_callable,
    check_maps,
    check_mask_like,
    check_scores,
    is_sequence,
    kind_of,
    net_logits,
    shape_of,
)
from udakit._reduce import interpolate, upcast
from udakit.validation.consistency import Scope, consistency_score
from udakit.validation.views import Inverse, Transform, mirror_view


@torch.no_grad()
def view_consistency(
    model: Callable[[Tensor], Any],
    images: Float[Tensor, "n k *space"],
    transform: Transform,
    inverse: Inverse,
    *,
    background: int | None = None,
    scope: Scope = "image",
    valid: Bool[Tensor, "n *space"] | None = None,
) -> Float[Tensor, "n"] | Float[Tensor, ""]:
    r"""Agreement of a net's predictions for an image and for another view of it.

    $$\operatorname{consistency}\left(f(x),\ \text{inverse}(f(\text{transform}(x)))\right)$$

    where the consistency is [`consistency_score`][udakit.validation.consistency_score].

    **Convention.** The result is detached. Logits of another size are resized linearly to the images before `inverse`.
    The net keeps its train or eval mode, so call `model.eval()` first. Pixels that are not in the view are left out.

    **Source.** CMR (Kutra et al. 2026), which perturbs images with noise. Geometric views and the IoU are ours.

    Args:
        model: any callable that takes images and returns logits (N, C, *space'), or an output that holds them
            (`.logits`, "out").
        images: the batch of images, (N, K, *space).
        transform: function from images to images; `*view` of a `View` gives this argument and the next.
        inverse: function from the logits of the transformed images to logits, or to (logits, valid).
        background: see `consistency_score`, which has all options below.
        scope: "image" | "batch".
        valid: True where a pixel counts.

    Returns:
        The consistency in [0, 1], float32, (N,) for "image" or () for "batch"; NaN if there is nothing to compare.

    Raises:
        TypeError: `images` is not a float tensor, or the net does not return logits.
        ValueError: the shapes do not match, `scope` is unknown, or `background` is not a class.

    Example:
        >>> import torch
        >>> from udakit.validation import shift_view
        >>> net = torch.nn.Conv2d(3, 5, 1)  # looks at single pixels: no shift can surprise it
        >>> view_consistency(net, torch.rand(2, 3, 8, 8), *shift_view((2, 1)))
        tensor([1., 1.])
    """
    straight, back, kept = view_logits(model, images, transform, inverse)
    if valid is not None:
        check_mask_like(valid, straight, reference_name="images")
        kept = valid if kept is None else kept & valid
    return consistency_score(straight, back, background=background, scope=scope, valid=kept)


@torch.no_grad()
def view_logits(
    model: Callable[[Tensor], Any], images: Tensor, transform: Transform, inverse: Inverse
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The two predictions that `view_consistency` compares, and the mask where both exist (None: everywhere)."""
    check_callable("model", model, "model(images)")
    check_callable("transform", transform, "transform(images)")
    check_callable("inverse", inverse, "inverse(logits)")
    check_maps("images", images, "N, K")
    straight = _logits_at(model, images)
    back = inverse(_logits_at(model, transform(images)))
    kept = None
    if not isinstance(back, Tensor):
        if not is_sequence(back) or len(back) != 2:
            raise TypeError(f"Expected `inverse` to return logits or (logits, valid), but got {kind_of(back)}.")
        back, kept = back
        check_mask_like(kept, straight, name="inverse", reference_name="images")
    if back.shape != straight.shape:
        raise ValueError(
            f"Expected `inverse` to return logits of the size of the images, {shape_of(straight)}, "
            f"but got {shape_of(back)}."
        )
    return straight, back, kept


def _logits_at(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    logits = net_logits(model(images))
    check_scores("model(images)", logits)
    if logits.ndim != images.ndim:
        raise ValueError(
            f"Expected `model(images)` to have the number of axes of `images` {shape_of(images)}, but got "
            f"{shape_of(logits)}."
        )
    same = logits.shape[2:] == images.shape[2:]
    return logits if same else interpolate(upcast(logits), images.shape[2:])


def mirror_consistency(
    model: Callable[[Tensor], Any],
    images: Float[Tensor, "n k *space"],
    *,
    background: int | None = None,
    scope: Scope = "image",
    valid: Bool[Tensor, "n *space"] | None = None,
    axis: int = -1,
) -> Float[Tensor, "n"] | Float[Tensor, ""]:
    r"""Agreement of a net's predictions for an image and for its mirror image, as mean IoU of the two label maps.

    $$\operatorname{mIoU}\left(\arg\max f(x),\ \operatorname{flip} \arg\max f(\operatorname{flip} x)\right)$$

    Higher is better. The direction was right on all five pairs of our study.

    **Convention.** This is [`view_consistency`][udakit.validation.view_consistency] with `mirror_view(axis)`. For a
    single number over a data set, add up intersections and unions with
    [`ConsistencyScore`][udakit.validation.ConsistencyScore].

    **Source.** Ours.

    Args:
        model: any callable that takes images and returns logits (N, C, *space'), or an output that holds them
            (`.logits`, "out").
        images: the batch of images, (N, K, *space).
        background: see `consistency_score`.
        scope: "image" | "batch".
        valid: True where a pixel counts.
        axis: spatial axis of `images` to mirror; the labels must stay valid when mirrored along it.

    Returns:
        The consistency in [0, 1], float32, (N,) for "image" or () for "batch"; NaN if there is nothing to compare.

    Raises:
        TypeError: `images` is not a float tensor, or the net does not return logits.
        ValueError: the shapes do not match, or an option is out of range.

    Example:
        >>> import torch
        >>> net = torch.nn.Conv2d(3, 5, 1)
        >>> mirror_consistency(net, torch.rand(2, 3, 8, 8))
        tensor([1., 1.])
    """
    return view_consistency(model, images, *mirror_view(axis), background=background, scope=scope, valid=valid)
