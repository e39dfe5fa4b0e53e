"""Predictions that are averaged over an image and its mirror image."""

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
    r"""Average a net's prediction for an image with the flipped-back prediction for its mirror image.

    $$\bar p(x) = \tfrac12 \left(\operatorname{softmax}(f(x))
    + \operatorname{flip}\operatorname{softmax}(f(\operatorname{flip} x))\right)$$

    **Convention.** The result is detached and computed in at least float32. By default it is a map of probabilities;
    use it as `selector(hflip_average(teacher, images), kind="probabilities")`. With `average="logits"` it is the mean
    of the logits. The net keeps its train or eval mode. In train mode, BatchNorm is updated with both images.

    **Source.** VFM-UDA, which averages the two softmaxes.

    Args:
        model: any callable that takes images and returns logits (N, C, *space), or an output that holds them, such as
            those of nets of transformers (`.logits`) and torchvision ("out").
        images: the batch (N, K, *space). It is mirrored along the last axis, the width.
        average: "probabilities" | "logits", what to average.

    Returns:
        The average, float32 (float64 for float64 logits), at the size of the net's logits.

    Raises:
        TypeError: `images` is not a float tensor, or the net does not return logits.
        ValueError: `images` is not (N, K, *space), the net returns one logit per pixel, or `average` is unknown.

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
            return straight.softmax(1).add_(mirrored.softmax(1).flip(-1)).mul_(0.5)
        return (straight + mirrored.flip(-1)).mul_(0.5)


def _logits(output: Any) -> Tensor:
    logits = net_logits(output)
    check_scores("model(images)", logits)
    return upcast(logits)
