"""Masks of patch tokens, for masked image consistency inside a vision transformer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_device,
    check_float,
    check_integer,
    check_range,
    check_tensor,
    kind_of,
    shape_of,
)
from udakit.mixing._random import Generators, device_of_draw, uniform


def draw_token_mask(
    n: int,
    tokens: int,
    *,
    ratio: float = 0.7,
    prefix: int = 0,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "n l"]:
    """Draw the tokens to replace in each of `n` images.

    **Convention.** True means replaced. Each token is replaced with probability `ratio`, independently. The first
    `prefix` tokens (class token, registers) are never replaced.

    **Source.** VFM-UDA (Englert et al., 2024), with ratio 0.7 and patch tokens only.

    Args:
        n: number of images.
        tokens: number of tokens of an image, including the prefix.
        ratio: probability that a token is replaced, in [0, 1].
        prefix: number of tokens at the beginning that are always kept.
        generator: generator of the draw, on `device`; or a list with one generator for each image.
        device: device of the mask; by default that of the generator, or the CPU without one.

    Returns:
        Bool (n, tokens).

    Raises:
        ValueError: an option is out of range, or the generator is on another device.

    Example:
        >>> draw_token_mask(1, 4, ratio=1.0, prefix=1)
        tensor([[False,  True,  True,  True]])
    """
    check_integer("n", n, 0)
    check_integer("tokens", tokens)
    check_range("ratio", ratio, 0.0, 1.0)
    check_integer("prefix", prefix, 0)
    if prefix > tokens:
        raise ValueError(f"Expected `prefix` to be at most `tokens` {tokens}, which include it, but got {prefix}.")
    device = device_of_draw(generator, n, device)
    drawn = uniform((n, tokens), generator, device) < ratio
    return drawn & (torch.arange(tokens, device=device) >= prefix)


def mask_tokens(
    tokens: Float[Tensor, "n l d"], mask: Bool[Tensor, "n l"], mask_token: Float[Tensor, "..."]
) -> Float[Tensor, "n l d"]:
    """Replace masked tokens with the mask token.

    **Convention.** Call this after the patch embedding and before the position embedding is added, so that the net
    knows where tokens are missing. Gradients flow to the kept tokens and to the mask token. The result has the dtype of
    `tokens`.

    **Source.** VFM-UDA (Englert et al., 2024), which uses the pre-trained mask token of DINOv2.

    Args:
        tokens: patch tokens, (N, L, D).
        mask: True where a token is replaced, (N, L), for example from `draw_token_mask`.
        mask_token: D numbers in any shape, such as (D,), or (1, 1, D) as in timm.

    Returns:
        The tokens, some of which are replaced, (N, L, D).

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: the shapes do not match.

    Example:
        >>> import torch
        >>> token = torch.zeros(1, 1, 2, requires_grad=True)
        >>> masked = mask_tokens(torch.ones(1, 3, 2), torch.tensor([[False, True, True]]), token)
        >>> masked.sum().backward()
        >>> masked[0, :, 0].tolist(), token.grad.flatten().tolist()
        ([1.0, 0.0, 0.0], [2.0, 2.0])
    """
    check_float("tokens", tokens, 3, "(N, L, D)")
    check_tensor("mask", mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"Expected `mask` to be a bool tensor, but got {kind_of(mask)}.")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"Expected `mask` to be (N, L) matching `tokens` {shape_of(tokens)}, but got {shape_of(mask)}."
        )
    check_float("mask_token", mask_token)
    if mask_token.numel() != tokens.shape[2]:
        raise ValueError(
            f"Expected `mask_token` to have D = {tokens.shape[2]} numbers like a token, but got {shape_of(mask_token)}."
        )
    for name, x in (("mask", mask), ("mask_token", mask_token)):
        check_device(name, x, tokens, "tokens")
    return torch.where(mask.unsqueeze(2), mask_token.reshape(-1).to(tokens.dtype), tokens)
