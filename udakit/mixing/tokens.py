"""Masks of patch tokens, for masked consistency inside a vision transformer."""

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
    """Draw which tokens of each of `n` images are replaced.

    **Convention.** True is replaced, each token by itself with probability `ratio`; the first `prefix` tokens (class
    token, registers) never are.

    **Source.** VFM-UDA (Englert et al., 2024): ratio 0.7, patch tokens alone.

    Args:
        n: number of images.
        tokens: tokens of an image, with the prefix.
        ratio: share replaced, in [0, 1].
        prefix: tokens at the beginning that are kept.
        generator: random numbers are drawn on `device`; a list has one for each image.
        device: of the mask; by default that of the generator, else the CPU.

    Returns:
        Bool (n, tokens).

    Raises:
        ValueError: an option out of range, or a generator on another device.

    Example:
        >>> draw_token_mask(1, 4, ratio=1.0, prefix=1)
        tensor([[False,  True,  True,  True]])
    """
    check_integer("n", n, 0)
    check_integer("tokens", tokens)
    check_range("ratio", ratio, 0.0, 1.0)
    check_integer("prefix", prefix, 0)
    device = device_of_draw(generator, n, device)
    drawn = uniform((n, tokens), generator, device) < ratio
    return drawn & (torch.arange(tokens, device=device) >= prefix)


def mask_tokens(
    tokens: Float[Tensor, "n l d"], mask: Bool[Tensor, "n l"], mask_token: Float[Tensor, "..."]
) -> Float[Tensor, "n l d"]:
    """Replace tokens by the mask token.

    **Convention.** After the patch embedding and before the position embedding is added, so that the net knows where
    something is missing. Gradients flow to what stays and to the mask token. The result has the dtype of `tokens`.

    **Source.** VFM-UDA (Englert et al., 2024), with DINOv2's own, pre-trained mask token.

    Args:
        tokens: patch tokens.
        mask: True where a token is replaced, as `draw_token_mask` draws it.
        mask_token: D numbers of any shape: (D,), or (1, 1, D) as in timm.

    Returns:
        The tokens, some of them replaced.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes that do not match.

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
            f"Expected `mask_token` to have the D = {tokens.shape[2]} numbers of a token, "
            f"but got {shape_of(mask_token)}."
        )
    for name, x in (("mask", mask), ("mask_token", mask_token)):
        check_device(name, x, tokens, "tokens")
    return torch.where(mask.unsqueeze(2), mask_token.reshape(-1).to(tokens.dtype), tokens)
