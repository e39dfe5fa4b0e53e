"""Histogram matching without sorting."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_integer
from udakit.mixing.images import join, restore, row_blocks
from udakit.mixing.style import check_content_style

# The sign, the exponent and the first three mantissa bits of a float: 8 cells per octave for each sign.
CELL_BITS = 12
CELLS = 1 << CELL_BITS
REST = 32 - CELL_BITS
EXACT = 2**10  # up to this many pixels, sorting is faster than counting
SAMPLES = 2**15  # number of pixels of a channel that decide how bins are distributed over cells


def histogram_transfer(
    content: Float[Tensor, "n k *space"], style: Float[Tensor, "n k *space2"], *, bins: int = 4096
) -> Float[Tensor, "n k *space"]:
    r"""Give each channel of each image the histogram of another image: $x' = F_s^{-1}(F_c(x))$.

    **Convention.** Images may have any number of channels and one, two or three dimensions. Each channel is matched by
    itself, on the images as given, normalised or not. The result is in the range of the style. It is a step function of
    the content, so no gradient flows. The arithmetic is in float32.

    Bins are narrow where an image has many values, so a far outlier (such as -32767 for missing data) does not take
    bins from the other values. Ranks are resolved to about 1 / `bins` of the pixels. All values of a bin get the rank
    of its middle, so equal values stay equal. Only images of at most 1024 pixels are sorted, which makes their ranks
    exact.

    A NaN in the style makes that channel of that image NaN and no other; `check_images` finds it. A NaN in the content
    ranks highest.

    Args:
        content: the images that keep their layout, (N, K, *space), of any size.
        style: the images that give their values, of any size, with the same batch size and number of channels.
        bins: number of bins for the values of a channel, at least 2.

    Returns:
        Images in the dtype and memory format of `content`.

    Raises:
        TypeError: an image tensor is not float.
        ValueError: the numbers of channels or the batch sizes differ, or there are fewer than two bins.

    Example:
        >>> import torch
        >>> content = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(1, 3, 1, 4)
        >>> style = torch.tensor([7.0, 5.0, 6.0, 8.0]).expand(1, 3, 1, 4)
        >>> histogram_transfer(content, style)[0, 0].round(decimals=1)
        tensor([[5., 6., 7., 8.]])
    """
    check_integer("bins", bins, 2)
    check_content_style(content, style, same_size=False)
    if content.numel() == 0 or style.numel() == 0:  # no values to give or to change
        return restore(content.detach().clone(), content)
    x, s = (image.detach().float().flatten(2) for image in (content, style))
    if max(x.shape[2], s.shape[2]) <= EXACT:
        return restore(_exact(x, s).view(content.shape), content)
    own_bins, own_counts, _, _ = _histogram(x, bins)
    _, counts, first, wide = _histogram(s, bins)
    # Ranks in the two distributions as exact integers, with the common denominator 2 * own pixels * style pixels.
    middle = (2 * own_counts.cumsum(2) - own_counts) * s.shape[2]
    above = counts.cumsum(2) * (2 * x.shape[2])
    place = torch.searchsorted(above, middle)
    size = counts.gather(2, place) * (2 * x.shape[2])
    within = 1 - (above.gather(2, place) - middle).float() / size.clamp_min(1)
    # The cell of that bin and the position in it: values are interpolated linearly between the floats of a cell.
    cell = _cells(first, counts.shape[2]).gather(2, place)
    share = (place - first.gather(2, cell) + within) / wide.gather(2, cell)
    low, high = _float(cell << REST), _float((cell + 1) << REST)
    value = torch.lerp(low, high, share)
    value = torch.minimum(torch.maximum(value, s.amin(2, keepdim=True)), s.amax(2, keepdim=True))
    return restore(join([value.gather(2, index.long()) for index in own_bins]).view(content.shape), content)


def _exact(x: Tensor, s: Tensor) -> Tensor:
    """The style's value at the middle rank of each pixel of (N, K, P)."""
    # searchsorted cannot handle NaN, and warns about strides.
    x = x.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf")).contiguous()
    own, values = x.sort(dim=2).values, s.sort(dim=2).values
    twice = torch.searchsorted(own, x) + torch.searchsorted(own, x, right=True)
    value = values.gather(2, (twice * s.shape[2] - 1) // (2 * x.shape[2]))
    return torch.where(values[:, :, -1:].isnan(), values[:, :, -1:], value)  # sorting puts NaN last


def _histogram(x: Tensor, bins: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The bin of each value (in stripes), the count of each bin, and the first bin and the number of bins of each cell.

    A cell is split into equal bins in proportion to its number of pixels, plus one. Where an image has twice the
    pixels, its bins are half as wide. A sample of the pixels decides the proportions; the bins count all pixels.
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
    """The cell of each bin: the number of cells that begin up to it, minus one."""
    begins = torch.zeros(*first.shape[:2], bins, dtype=torch.int64, device=first.device)
    return begins.scatter_(2, first, 1).cumsum(2) - 1


def _key(x: Tensor) -> Tensor:
    """Floats as int32 in the same order: their bits, reversed in order for negative floats; -0.0 equals 0.0."""
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
