"""Use nets with one logit per pixel as nets of two classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_maps, shape_of, space_form

__all__ = ["binary_logits", "binary_probabilities"]


def binary_logits(logits: Float[Tensor, "n 1 *space"]) -> Float[Tensor, "n 2 *space"]:
    r"""Turn one logit per pixel into the logits of two classes, background and foreground.

    $$z \mapsto (0, z), \qquad \operatorname{softmax}(0, z)_1 = \operatorname{sigmoid}(z)$$

    **Convention.** Class 1 is the foreground that the net was trained to find. The value and gradient of
    `cross_entropy` of the result are those of `F.binary_cross_entropy_with_logits`, and every other part of the library
    accepts the result like the logits of any two classes. A single logit is refused everywhere, because the softmax of
    a single class is always 1.

    Args:
        logits: output of a net with one channel, before the sigmoid, (N, 1, *space).

    Returns:
        The logits of two classes, (N, 2, *space), in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not a float tensor.
        ValueError: `logits` does not have one channel.

    Example:
        >>> import torch
        >>> from udakit import cross_entropy
        >>> logits = torch.randn(2, 1, 4, 4, requires_grad=True)
        >>> labels = torch.randint(2, (2, 4, 4))
        >>> cross_entropy(binary_logits(logits), labels).backward()
        >>> torch.allclose(binary_logits(logits).softmax(1)[:, 1:], logits.sigmoid())
        True
    """
    _check_one_channel("logits", logits)
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def binary_probabilities(probabilities: Float[Tensor, "n 1 *space"]) -> Float[Tensor, "n 2 *space"]:
    r"""Turn one probability per pixel into the probabilities of two classes, background and foreground.

    $$p \mapsto (1 - p, p)$$

    **Convention.** Use this for the output of a sigmoid, with parts that accept `kind="probabilities"`. If you have
    logits, [`binary_logits`][udakit.binary.binary_logits] is more accurate.

    Args:
        probabilities: probability of the foreground, in [0, 1], (N, 1, *space).

    Returns:
        The probabilities of two classes, (N, 2, *space), in the dtype of `probabilities`.

    Raises:
        TypeError: `probabilities` is not a float tensor.
        ValueError: `probabilities` does not have one channel.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.25]).view(1, 1, 1, 1).requires_grad_()
        >>> both = binary_probabilities(p)
        >>> both[:, 1].sum().backward()
        >>> both.flatten().tolist()
        [0.75, 0.25]
    """
    _check_one_channel("probabilities", probabilities)
    return torch.cat([1 - probabilities, probabilities], dim=1)


def _check_one_channel(name: str, x: Tensor) -> None:
    check_maps(name, x, "N, 1")
    if x.shape[1] != 1:
        hint = " Add the channel axis with .unsqueeze(1)." if x.ndim < 5 else ""
        if x.shape[1] == 2:
            hint = " Two channels are already two classes."
        raise ValueError(
            f"Expected `{name}` to be {space_form('N, 1', x.ndim - 2)}, one {'logit' if name == 'logits' else 'value'} "
            f"per pixel, but got {shape_of(x)}.{hint}"
        )
