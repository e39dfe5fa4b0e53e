"""Histogram matching without sorting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_integer
from udakit._reduce import is_run_on_cpu
from udakit.mixing.images import restore
from udakit.mixing.style import check_content_style

# The sign, the exponent and the first three mantissa bits of a float: 8 cells per octave for each sign.
CELL_BITS = 12
CELLS = 1 << CELL_BITS
INFINITY = 0x7F800000  # the bits of +inf, above which are those of NaN
HALF = CELLS // 2  # the cells of negative numbers, whose bits count from zero downwards
REST = 32 - CELL_BITS
EXACT = 2**12  # up to this many pixels, sorting is faster than counting
STRIPE = 2**18  # elements counted at once on the CPU: the maps of that size stay in its cache
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
    x, s = (image.detach().float().flatten(2).flatten(0, 1) for image in (content, style))
    if max(x.shape[1], s.shape[1]) <= EXACT:
        return restore(_exact(x, s).view(content.shape), content)
    bins = min(bins, 2**20)  # float32 does not resolve more
    index, counts, _, _ = _histogram(x, bins)
    values = _value_of_bins(counts, *_histogram(s, bins)[1:], s, x.shape[1])
    return restore(values.flatten().index_select(0, index.flatten()).view(content.shape), content)


def _value_of_bins(own: Tensor, counts: Tensor, first: Tensor, wide: Tensor, s: Tensor, pixels: int) -> Tensor:
    """The style's value at the middle rank of each bin of the content, of which `own` are the counts."""
    times, unit = _common_ranks(pixels, s.shape[1])
    middle = own.cumsum(1).mul_(2).sub_(own).mul_(times)
    upto = counts.cumsum(1)
    place = _places(upto, middle, unit, s.shape[1])
    above = upto.gather(1, place).mul_(unit).sub_(middle).float()
    size = counts.gather(1, place).float().mul_(unit).clamp_min_(1)
    within = above.div_(size).neg_().add_(1)
    value = _value_at(place, within, first, wide, counts.shape[1])
    return torch.minimum(torch.maximum(value, s.amin(1, keepdim=True)), s.amax(1, keepdim=True))


def _common_ranks(pixels: int, style_pixels: int) -> tuple[int, int]:
    """Factors with which twice a rank of the content, and a rank of the style, are integers of the same size."""
    # A compiler would make a graph for each divisor.
    common = 1 if torch.compiler.is_compiling() else math.gcd(2 * pixels, style_pixels)
    return style_pixels // common, 2 * pixels // common


def _floor_divide_(x: Tensor, divisor: int) -> Tensor:
    """`x // divisor` in place; a division of int64 takes five times as long as a shift."""
    if torch.compiler.is_compiling() or divisor & (divisor - 1):
        return x.div_(divisor, rounding_mode="floor")
    return x.bitwise_right_shift_(divisor.bit_length() - 1)


def _places(upto: Tensor, middle: Tensor, unit: int, pixels: int) -> Tensor:
    """The first bin whose cumulative count, times `unit`, reaches `middle`.

    On the CPU a binary search takes longer than to count, for each number of pixels, the bins that do not reach it.
    """
    if not is_run_on_cpu(upto):
        return torch.searchsorted(upto * unit, middle)
    one = torch.ones((), dtype=torch.int32, device=upto.device)
    below = torch.zeros(len(upto), pixels + 1, dtype=torch.int32, device=upto.device)
    below.scatter_add_(1, upto, one.expand_as(upto))
    # A bin of the content before its lowest value has rank 0, and no pixel.
    rank = _floor_divide_(middle - 1, unit).clamp_min_(0)
    return below.cumsum_(1).gather(1, rank).long()


def _exact(x: Tensor, s: Tensor) -> Tensor:
    """The style's value at the middle rank of each pixel of (R, P)."""
    x = x.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))  # a NaN equals no other
    (own, order), values = x.sort(dim=1), s.sort(dim=1).values
    # Equal values are a group, and have one rank.
    group = torch.zeros_like(order)
    group[:, 1:] = (own[:, 1:] != own[:, :-1]).cumsum(1)
    one = torch.ones((), dtype=torch.int64, device=x.device)
    counts = torch.zeros_like(order).scatter_add_(1, group, one.expand_as(group))
    times, unit = _common_ranks(x.shape[1], s.shape[1])
    twice = counts.cumsum(1).mul_(2).sub_(counts).mul_(times).sub_(1)
    rank = _floor_divide_(twice, unit).clamp_max_(s.shape[1] - 1)  # those after the last group belong to no pixel
    value = values.gather(1, rank).gather(1, group)
    value = torch.where(values[:, -1:].isnan(), values[:, -1:], value)  # a NaN is the last of those sorted
    return torch.empty_like(value).scatter_(1, order, value)


def _histogram(x: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bin of each value of rows (R, P), the count of each bin, and the first bin and number of bins of each cell.

    A cell gets a number of equal bins in proportion to its pixels, plus one, so that bins are narrow where an image has
    many values. These numbers come from a sample of the pixels; the counts are over all pixels. The bins of a row are
    numbered after those of the rows before it.
    """
    rows, pixels = x.shape
    number = torch.arange(rows, dtype=torch.int32, device=x.device).unsqueeze(1)
    cells, begins = number * CELLS + HALF, number * (bins + CELLS)
    one = torch.ones((), dtype=torch.int32, device=x.device)
    some = x[:, :: pixels // SAMPLES | 1].view(torch.int32)  # an odd step visits all columns of the usual widths
    at = (some >> REST).add_(cells).flatten()
    members = torch.zeros(rows * CELLS, dtype=torch.int32, device=x.device).index_add_(0, at, one.expand_as(at))
    wide = _by_value(members.view(rows, CELLS)).float().mul_(bins).div_(max(some.shape[1], 1)).int().add_(1)
    first = wide.cumsum(1, dtype=torch.int32).sub_(wide)  # not of floats, which is not deterministic on a GPU
    start, step = _lines(first, wide, bins)
    counts = torch.zeros(rows * (bins + CELLS), dtype=torch.int32, device=x.device)
    index = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    numbers = min(x.numel(), STRIPE) if is_run_on_cpu(x) else x.numel()
    spare = torch.empty(2, numbers, dtype=torch.float32, device=x.device)
    for r, p in _stripes(x):
        bits, here = x[r, p].view(torch.int32), index[r, p]
        flat = here.view(-1)
        place, of_cell = spare[:, : len(flat)]
        place.copy_(torch.bitwise_and(bits, 2**REST - 1, out=here).view(-1))
        torch.bitwise_right_shift(bits, REST, out=here).add_(cells[r])
        # Two operations instead of `addcmul`: a fused multiply-add in only a part of the loop would round equal values
        # differently.
        place.mul_(torch.index_select(step, 0, flat, out=of_cell))
        place.add_(torch.index_select(start, 0, flat, out=of_cell))
        here.copy_(place.view(here.shape)).add_(begins[r])
        counts.index_add_(0, flat, one.expand_as(flat))
    return index, counts.view(rows, -1), first, wide


def _stripes(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pieces of rows (R, P) on the CPU, some rows or some pixels of one. A GPU and a compiler take all at once."""
    rows, pixels = x.shape
    if not is_run_on_cpu(x):
        yield slice(None), slice(None)
        return
    together, length = max(STRIPE // pixels, 1), max(min(pixels, STRIPE), 1)
    for r in range(0, rows, together):
        for p in range(0, pixels, length):
            yield slice(r, r + together), slice(p, p + length)


def _lines(first: Tensor, wide: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Start and step of the line that maps the low bits of a float to its bin, for each cell in the order of the bits.

    The line ends slightly below the first bin of the next cell, so that rounding to float32 never reaches that bin.
    """
    length = wide.float().sub_((bins + CELLS) / 2**22)
    start, step = first.float(), length / 2**REST
    start[:, :HALF] += length[:, :HALF]  # a negative number falls as its bits grow
    step[:, :HALF].neg_()
    # -0.0 equals 0.0. The other negative numbers in its cell are subnormal and count as 0, too.
    start[:, HALF - 1] = start[:, HALF]
    step[:, HALF - 1] = 0
    return _by_value(start).flatten(), _by_value(step).flatten()


def _by_value(cells: Tensor) -> Tensor:
    """Reorder cells from the order of their bits to that of their values, or back."""
    return torch.cat([cells[..., :HALF].flip(-1), cells[..., HALF:]], dim=-1)


def _value_at(place: Tensor, within: Tensor, first: Tensor, wide: Tensor, bins: int) -> Tensor:
    """The value in bin `place`, at the share `within` of it. In a cell, floats are as far apart as their bits."""
    begins = torch.zeros(len(first), bins, dtype=torch.int32, device=first.device).scatter_(1, first.long(), 1)
    cell = begins.cumsum_(1).sub_(1).gather(1, place)  # the number of cells that begin at or before it, minus one
    at = cell.long()
    share = (place - first.gather(1, at) + within).div_(wide.gather(1, at))
    bits = cell.sub_(HALF).mul_(2**REST).add_(share.mul_(2**REST).int())
    return _float(bits.clamp_(-INFINITY - 1, INFINITY))  # infinities share their cells with NaN


def _float(key: Tensor) -> Tensor:
    """The float of ordered bits: those of a negative number, but for the sign, are inverted."""
    value: Tensor = (key ^ (key >> 31).bitwise_and_(2**31 - 1)).view(torch.float32)
    return value
