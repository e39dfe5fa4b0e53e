"""Maps of classes: the arg-max, counts, and values that are looked up by class."""

from __future__ import annotations

import torch
from torch import Tensor

from udakit._reduce.eager import is_large
from udakit._reduce.precision import exp_, plain, upcast

BLOCK = 2**18  # elements of a class map processed at once on the CPU; they fit the cache


def top_class(scores: Tensor) -> Tensor:
    """`scores.argmax(dim=1)`, (N, *space) of (N, C, *space)."""
    if by_blocks(scores):
        return top_by_blocks(scores, confidence=False)[0]
    return scores.max(dim=1).indices  # twice as fast as `argmax` on the CPU


def by_blocks(scores: Tensor) -> bool:
    """Whether `top_by_blocks` is faster than `max`, which is not vectorised on the CPU."""
    return is_large(scores) and scores.shape[1] <= 255


def top_by_blocks(scores: Tensor, *, confidence: bool) -> tuple[Tensor, Tensor]:
    """The arg-max class, and with `confidence` its softmax, otherwise its score; for the CPU, in pieces.

    The largest score comes from a vectorised maximum. Its class comes from a minimum over bytes, which are c where
    class c has that score and 255 elsewhere. A pixel with a NaN has class 0.
    """
    maps = plain(scores.detach()).flatten(2)
    n, c, size = maps.shape
    labels, top = maps.new_empty((n, size), dtype=torch.int64), upcast(maps[:, 0]).new_empty((n, size))
    ids = torch.arange(c, dtype=torch.uint8, device=maps.device).unsqueeze(1)
    pixels = max(BLOCK // c, 1)
    buffer = top.new_empty(c * min(pixels, size))  # allocating for each block would cost more than the arithmetic
    bits = maps.new_empty(buffer.shape, dtype=torch.bool)
    for i in range(n):
        for j in range(0, size, pixels):
            z = upcast(maps[i, :, j : j + pixels])
            most = top[i, j : j + pixels]
            torch.amax(z, dim=0, out=most)
            lower = torch.lt(z, most, out=bits[: z.numel()].view(z.shape)).view(torch.uint8)
            labels[i, j : j + pixels] = lower.mul_(255).bitwise_or_(ids).amin(0)
            if confidence:
                # The softmax at its largest entry. It is exact at any magnitude, unlike exp(max - logsumexp).
                shifted = torch.sub(z, most, out=buffer[: z.numel()].view(z.shape))
                torch.sum(exp_(shifted), dim=0, out=most).reciprocal_()
    space = scores.shape[2:]
    return labels.view(n, *space), top.view(n, *space)


def fraction(part: Tensor, whole: Tensor) -> Tensor:
    """Quotient of counts, float32, 0 where there is nothing; torch would give it the default dtype."""
    return part.float() / whole.clamp_min(1)


def count_ids(ids: Tensor, bins: int) -> Tensor:
    """Count each of 0..bins-1, int64; other ids are an error. `bincount` would make a GPU wait."""
    counts = torch.zeros(bins, dtype=torch.int64, device=ids.device)
    if ids.device.type != "cpu" and not torch.compiler.is_compiling():
        return counts.scatter_(0, ids.flatten(), 1, reduce="add")  # saves a launch
    one = torch.ones((), dtype=torch.int64, device=ids.device)  # a map of ones would be a pass over memory
    return counts.scatter_add_(0, ids.flatten(), one.expand(ids.numel()))


def divisor(count: int, length: int) -> int:
    """The largest number up to 512 of equal parts of `count`, each of at least `length`; 1 if there is none.

    Compiled, it is 32 or 1: with `count` dynamic, each number that is tried is a condition of the graph, and each
    result is another graph.
    """
    if torch.compiler.is_compiling():
        return 32 if count >= 32 * length and count % 32 == 0 else 1
    return next((parts for parts in range(min(count // length, 512), 1, -1) if count % parts == 0), 1)


def cut_evenly(count: int, length: int) -> tuple[int, int]:
    """A number of equal parts of about `length`, and how much must be added to `count` for that.

    Nothing is added where `divisor` finds half of the parts that we want, or more. Compiled, it never is.
    """
    parts, wanted = divisor(count, length), min(count // max(length, 1), 512)
    if torch.compiler.is_compiling() or 2 * parts >= wanted:
        return parts, 0
    return wanted, -count % wanted


def class_ids(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels as int64 ids 0..C-1; ignored pixels and unknown ids become C."""
    labels = labels.long()
    ids = torch.where(labels.clamp(0, num_classes - 1) == labels, labels, num_classes)
    return torch.where(labels == ignore_index, num_classes, ids) if 0 <= ignore_index < num_classes else ids


def look_up(values: Tensor, ids: Tensor) -> Tensor:
    """`values[ids]` of (C,) and a map of ids, in a sixth of the time on the CPU."""
    return values.index_select(0, ids.flatten()).view(ids.shape)
