"""Predictions averaged over an image and its mirror image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_callable, check_maps, check_option, check_scores, net_logits
from udakit._reduce import upcast

Average = Literal["probabilities", "logits"]
AVERAGES = get_args(Average)


def hflip_average(
    model: Callable[[Tensor], Any], images: Float[Tensor, "n k *space"], *, average: Average = "probabilities"
) -> Float[Tensor, "n c *space2"]:
    r"""Average a net's prediction for an image with the one for its mirror image, turned back.

    $$\bar p(x) = \tfrac12 \left(\operatorname{softmax}(f(x))
    + \operatorname{flip}\operatorname{softmax}(f(\operatorname{flip} x))\right)$$

    **Convention.** Detached; the average is taken in float32. The result is probabilities: hand it on as
    `selector(hflip_average(teacher, images), kind="probabilities")`. With `average="logits"` it is the mean of the
    logits. The net keeps its train or eval mode; in train mode BatchNorm sees both images.

    **Source.** VFM-UDA averages the two softmaxes.

    Args:
        model: any callable from images to logits (N, C, *space), or to what holds them, as the nets of transformers
            (`.logits`) and torchvision ("out") return it.
        images: the batch (N, K, *space), mirrored along its last axis: the width.
        average: "probabilities" | "logits".

    Returns:
        Float32 (float64 for float64 logits) of the size of the net's logits.

    Raises:
        TypeError: `images` that are not float, or a net that returns something else.
        ValueError: `images` that are not (N, K, *space), a net with one logit a pixel, or an unknown `average`.

    Example:
        >>> import torch
        >>> net = torch.nn.Conv2d(3, 5, 3, padding=1)
        >>> images = torch.rand(2, 3, 8, 8)
        >>> p = hflip_average(net, images)
        >>> mirrored = hflip_average(net, images.flip(-1))
        >>> torch.allclose(p, mirrored.flip(-1), atol=1e-6)
        True
    """
    check_option("average", average, AVERAGES)
    check_maps("images", images, "N, K")
    check_callable("model", model, "model(images)")
    with torch.no_grad():
        straight, mirrored = (_logits(model(x)) for x in (images, images.flip(-1)))
        if average == "probabilities":
            straight, mirrored = straight.softmax(1), mirrored.softmax(1)
        return (straight + mirrored.flip(-1)) / 2


def _logits(output: Any) -> Tensor:
    logits = net_logits(output)
    check_scores("model(images)", logits)
    return upcast(logits)
