"""Nets with one logit a pixel, as nets of two classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_maps, shape_of, space_form

__all__ = ["binary_logits", "binary_probabilities"]


def binary_logits(logits: Float[Tensor, "n 1 *space"]) -> Float[Tensor, "n 2 *space"]:
    r"""One logit a pixel as the logits of two classes, background and foreground.

    $$z \mapsto (0, z), \qquad \operatorname{softmax}(0, z)_1 = \operatorname{sigmoid}(z)$$

    **Convention.** Class 1 is what the net was trained to find. `cross_entropy` of the result is
    `F.binary_cross_entropy_with_logits`, value and gradient; every other part of the library takes it as it takes the
    logits of two classes. One logit by itself is refused everywhere: the softmax of a single class is 1 at any value.

    Args:
        logits: what a net with one output channel returns, before the sigmoid.

    Returns:
        Logits of two classes, dtype as given.

    Raises:
        TypeError: `logits` that are not float.
        ValueError: `logits` that do not have one channel.

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
    r"""One probability a pixel as the probabilities of two classes, background and foreground.

    $$p \mapsto (1 - p, p)$$

    **Convention.** For what is a sigmoid already, wherever a part takes `kind="probabilities"`. From logits,
    [`binary_logits`][udakit.binary.binary_logits] is the exact way.

    Args:
        probabilities: of the foreground, in [0, 1].

    Returns:
        Probabilities of two classes, dtype as given.

    Raises:
        TypeError: `probabilities` that are not float.
        ValueError: `probabilities` that do not have one channel.

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
        hint = " Its channel axis comes by .unsqueeze(1)." if x.ndim < 5 else ""
        if x.shape[1] == 2:
            hint = " Two channels are two classes as they are."
        raise ValueError(
            f"Expected `{name}` to be {space_form('N, 1', x.ndim - 2)}, one {'logit' if name == 'logits' else 'value'} "
            f"a pixel, but got {shape_of(x)}.{hint}"
        )
