"""Histogram matching without sorting: each channel's values take the places of the style's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_integer
from udakit.mixing.images import join, restore, row_blocks
from udakit.mixing.style import check_content_style

# A float's sign, exponent and first three bits of its mantissa: 8 cells an octave, of either sign.
CELL_BITS = 12
CELLS = 1 << CELL_BITS
REST = 32 - CELL_BITS
EXACT = 2**10  # pixels of an image up to which sorting is quicker than counting
SAMPLES = 2**15  # pixels of a channel by which bins are shared out to cells


def histogram_transfer(
    content: Float[Tensor, "n k *space"], style: Float[Tensor, "n k *space2"], *, bins: int = 4096
) -> Float[Tensor, "n k *space"]:
    r"""Give each channel of each image the histogram of another one: $x' = F_s^{-1}(F_c(x))$.

    **Convention.** Any number of channels, each by itself, in one, two or three dimensions. Bins follow the pixels:
    where an image has many values they are narrow, so that a pixel far away from all others (no data as -32767) takes
    none from them. Places are told apart to about 1 / `bins` of the pixels. Equal values stay equal: all of a bin take
    the place of its middle, so that a flat surface stays flat. Nothing is sorted but images of 1024 pixels at most,
    whose places are exact. Images are taken as they are,
    normalised or not; the result lies in the range of the style. A step function of the content: no gradient flows.
    Float32 inside. A NaN in the style makes NaN of its channel of its image, and of no other: nothing hides it, and
    `check_images` finds it. A NaN in the content ranks highest.

    Args:
        content: (N, K, *space), what keeps its layout, of any size.
        style: what gives its values, of any size, with the same batch size and number of channels.
        bins: number of bins that the pixels of a channel are shared out to, at least 2.

    Returns:
        Images in the dtype and memory format of `content`.

    Raises:
        TypeError: images that are not float.
        ValueError: unequal numbers of channels, unequal batch sizes, or fewer than two bins.

    Example:
        >>> import torch
        >>> content = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(1, 3, 1, 4)
        >>> style = torch.tensor([7.0, 5.0, 6.0, 8.0]).expand(1, 3, 1, 4)
        >>> histogram_transfer(content, style)[0, 0].round(decimals=1)
        tensor([[5., 6., 7., 8.]])
    """
    check_integer("bins", bins, 2)
    check_content_style(content, style, same_size=False)
    if content.numel() == 0 or style.numel() == 0:  # nothing to give, or to give it to
        return restore(content.detach().clone(), content)
    x, s = (image.detach().float().flatten(2) for image in (content, style))
    if max(x.shape[2], s.shape[2]) <= EXACT:
        return restore(_exact(x, s).view(content.shape), content)
    own_bins, own_counts, _, _ = _histogram(x, bins)
    _, counts, first, wide = _histogram(s, bins)
    # Places in the two distributions as exact integers, over the common denominator 2 * own pixels * style pixels.
    middle = (2 * own_counts.cumsum(2) - own_counts) * s.shape[2]
    above = counts.cumsum(2) * (2 * x.shape[2])
    place = torch.searchsorted(above, middle)
    size = counts.gather(2, place) * (2 * x.shape[2])
    within = 1 - (above.gather(2, place) - middle).float() / size.clamp_min(1)
    # The cell of that bin, and how far up in it: cells are straight lines between their floats.
    cell = _cells(first, counts.shape[2]).gather(2, place)
    share = (place - first.gather(2, cell) + within) / wide.gather(2, cell)
    low, high = _float(cell << REST), _float((cell + 1) << REST)
    value = torch.lerp(low, high, share)
    value = torch.minimum(torch.maximum(value, s.amin(2, keepdim=True)), s.amax(2, keepdim=True))
    return restore(join([value.gather(2, index.long()) for index in own_bins]).view(content.shape), content)


def _exact(x: Tensor, s: Tensor) -> Tensor:
    """The style's value at the middle rank of each pixel of (N, K, P)."""
    # A search stumbles over NaN, and warns of strides.
    x = x.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf")).contiguous()
    own, values = x.sort(dim=2).values, s.sort(dim=2).values
    twice = torch.searchsorted(own, x) + torch.searchsorted(own, x, right=True)
    value = values.gather(2, (twice * s.shape[2] - 1) // (2 * x.shape[2]))
    return torch.where(values[:, :, -1:].isnan(), values[:, :, -1:], value)  # a NaN is the last of those sorted


def _histogram(x: Tensor, bins: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The bin of each value in stripes, the count of each bin; of each cell the first bin, and how many bins it has.

    A cell is split into as many equal bins as its share of `bins` tells, and one more: with twice the pixels an image
    has bins half as wide there. For the share some of the pixels do; the bins count all of them.
    """
    pixels = torch.zeros(*x.shape[:2], CELLS, dtype=torch.int64, device=x.device)
    one = torch.ones((), dtype=torch.int64, device=x.device)
    some = _cell(_key(x[:, :, :: max(x.shape[2] // SAMPLES, 1)]))
    pixels.scatter_add_(2, some, one.expand_as(some))
    keys = [_key(block) for block in row_blocks(x)]
    wide = pixels * bins // max(some.shape[2], 1) + 1
    first = wide.cumsum(2) - wide
    # One look-up for both: the first bin above, the number of bins below.
    packed = (first << 32) | wide
    counts = torch.zeros(*x.shape[:2], bins + CELLS, dtype=torch.int64, device=x.device)
    indices: list[Tensor] = []
    for key in keys:
        found = packed.gather(2, _cell(key))
        index = ((key & (2**REST - 1)) * (found & 0xFFFFFFFF) >> REST) + (found >> 32)
        counts.scatter_add_(2, index, one.expand_as(index))
        indices.append(index.int())
    return indices, counts, first, wide


def _cells(first: Tensor, bins: int) -> Tensor:
    """The cell of each bin: how many cells begin up to it, but for one."""
    begins = torch.zeros(*first.shape[:2], bins, dtype=torch.int64, device=first.device)
    return begins.scatter_(2, first, 1).cumsum(2) - 1


def _key(x: Tensor) -> Tensor:
    """Floats as int32 of the same order: their bits, backwards for negative ones; -0.0 is 0.0."""
    bits = (x + 0.0).view(torch.int32)
    return torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF)


def _cell(key: Tensor) -> Tensor:
    cell: Tensor = key >> REST
    return (cell + CELLS // 2).long()


def _float(key: Tensor) -> Tensor:
    """The float whose ordered bits are `key`, counted from the lowest."""
    bits = key - 2**31
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32)
    value: Tensor = bits.view(torch.float32)
    return value
