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
HALF = CELLS // 2  # the cells of negative numbers, whose bits count from zero downwards
REST = 32 - CELL_BITS
EXACT = 2**12  # up to this many pixels, sorting is faster than counting
STRIPE = 2**16  # elements counted at once on the CPU: their ids, of 8 bytes each, stay in its cache
SAMPLES = 2**13  # number of pixels of a channel from which the bins of each cell are chosen


def histogram_transfer(
    content: Float[Tensor, "n k *space"], style: Float[Tensor, "n k *space2"], *, bins: int = 4096
) -> Float[Tensor, "n k *space"]:
    r"""Give each channel of each image the histogram of another image: $x' = F_s^{-1}(F_c(x))$.

    **Convention.** Images may have any number of channels and one, two or three dimensions. Each channel is matched by
    itself, on the images as given, normalised or not. The result is in the range of the style. It is a step function of
    the content, so no gradient flows. The arithmetic is in float32.

    Bins are narrow where an image has many values, so a far outlier (such as -32767 for missing data) does not take
    bins from the other values. Ranks are resolved to about 1 / `bins` of the pixels. All values of a bin get the rank
    of its middle, so equal values stay equal. If neither image has more than 4096 pixels, they are sorted instead,
    which makes the ranks exact.

    A NaN in the style makes the result NaN in that channel of that image, and nowhere else; `check_images` finds it. A
    NaN in the content ranks highest.

    Args:
        content: the images that keep their layout, (N, K, *space), of any size.
        style: the images that give their values, of any size, with the same batch size and number of channels.
        bins: number of bins for the values of a channel, at least 2; more than 2^20 have no further effect.

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
    bins = min(bins, 2**20)  # float32 does not resolve more
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
    x = x.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))  # a NaN equals no other
    (own, order), values = x.sort(dim=2), s.sort(dim=2).values
    # Equal values are a group, and have one rank.
    group = torch.zeros_like(order)
    group[:, :, 1:] = (own[:, :, 1:] != own[:, :, :-1]).cumsum(2)
    one = torch.ones((), dtype=torch.int64, device=x.device)
    counts = torch.zeros_like(order).scatter_add_(2, group, one.expand_as(group))
    twice = 2 * counts.cumsum(2) - counts
    rank = (twice * s.shape[2] - 1) // (2 * x.shape[2])  # the entries after the last group belong to no pixel
    value = values.gather(2, rank.clamp_max(s.shape[2] - 1)).gather(2, group)
    value = torch.where(values[:, :, -1:].isnan(), values[:, :, -1:], value)  # a NaN is the last of those sorted
    return torch.empty_like(value).scatter_(2, order, value)


def _histogram(x: Tensor, bins: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The bin of each value (in stripes), the count of each bin, and the first bin and number of bins of each cell.

    A cell gets a number of equal bins in proportion to its pixels, plus one, so that bins are narrow where an image has
    many values. These numbers come from a sample of the pixels; the counts are over all pixels.
    """
    pixels = torch.zeros(*x.shape[:2], CELLS, dtype=torch.int64, device=x.device)
    one = torch.ones((), dtype=torch.int64, device=x.device)
    some = x[:, :, :: x.shape[2] // SAMPLES | 1]  # an odd step visits all columns of the usual widths
    at = ((some.view(torch.int32) >> REST) + HALF).long()
    pixels.scatter_add_(2, at, one.expand_as(at))
    wide = _by_value(pixels) * bins // max(some.shape[2], 1) + 1
    first = wide.cumsum(2) - wide
    start, step = _lines(first, wide, bins)
    rows = torch.arange(HALF, HALF + len(start), CELLS, dtype=torch.int32, device=x.device).view(*x.shape[:2], 1)
    counts = torch.zeros(*x.shape[:2], bins + CELLS, dtype=torch.int64, device=x.device)
    indices: list[Tensor] = []
    for block in row_blocks(x, STRIPE):
        bits = block.view(torch.int32)
        at = (bits >> REST).add_(rows).flatten()
        place = (bits & (2**REST - 1)).float()
        # Two operations instead of `addcmul`: a fused multiply-add in only a part of the loop would round equal values
        # differently.
        place.mul_(step.index_select(0, at).view_as(place)).add_(start.index_select(0, at).view_as(place))
        index = place.long()
        counts.scatter_add_(2, index, one.expand_as(index))
        indices.append(index.int())
    return indices, counts, first, wide


def _lines(first: Tensor, wide: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Start and step of the line that maps the low bits of a float to its bin, for each cell in the order of the bits.

    The line ends slightly below the first bin of the next cell, so that rounding to float32 never reaches that bin.
    """
    start, length = first.float(), wide.float() - (bins + CELLS) / 2**22
    step = length / 2**REST
    start[..., :HALF] += length[..., :HALF]  # a negative number falls as its bits grow
    step[..., :HALF].neg_()
    # -0.0 equals 0.0. The other negative numbers in its cell are subnormal and count as 0, too.
    start[..., HALF - 1] = start[..., HALF]
    step[..., HALF - 1] = 0
    return _by_value(start).flatten(), _by_value(step).flatten()


def _by_value(cells: Tensor) -> Tensor:
    """Reorder cells from the order of their bits to that of their values, or back."""
    return torch.cat([cells[..., :HALF].flip(-1), cells[..., HALF:]], dim=-1)


def _cells(first: Tensor, bins: int) -> Tensor:
    """The cell of each bin, which is the number of cells that begin at or before it, minus one."""
    begins = torch.zeros(*first.shape[:2], bins, dtype=torch.int64, device=first.device)
    return begins.scatter_(2, first, 1).cumsum(2) - 1


def _float(key: Tensor) -> Tensor:
    """The float whose ordered bits are `key`, counted from the lowest."""
    bits = key - 2**31
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32)
    value: Tensor = bits.view(torch.float32)
    return value
