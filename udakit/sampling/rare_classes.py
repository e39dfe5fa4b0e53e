"""Draw images so that rare classes are seen often enough."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.utils.data import Sampler

from udakit._checks import check_generator, check_integer, check_range, check_tensor, kind_of, shape_of
from udakit._reduce import is_eager_on_cpu


def rare_class_probabilities(class_pixels: Num[Tensor, "c"], *, temperature: float = 0.01) -> Float[Tensor, "c"]:
    r"""Probability of drawing each class, which is higher for rarer classes.

    $$P(c) = \operatorname{softmax}_c\!\left((1 - f_c) / T\right), \qquad f_c = n_c \,/\, \textstyle\sum_k n_k$$

    **Convention.** A class that never occurs gets probability 0 and is left out of the softmax. If there are no pixels
    at all, every probability is 0.

    **Source.** DAFormer, with T = 0.01.

    Args:
        class_pixels: n, the number of pixels of each class in the whole data set, (C,): `count_classes(...).sum(0)`.
        temperature: T > 0; a large value makes the classes equally likely.

    Returns:
        The probabilities, (C,), float32 (float64 for float64 counts).

    Raises:
        ValueError: the counts are not (C,), or are negative or not finite, or `temperature` is not positive.

    Example:
        >>> rare_class_probabilities(torch.tensor([900, 100, 0]), temperature=1.0)
        tensor([0.3100, 0.6900, 0.0000])
    """
    check_range("temperature", temperature, 0.0, open_low=True)
    check_tensor("class_pixels", class_pixels, "a tensor (C,)")
    if class_pixels.ndim != 1:
        raise ValueError(
            f"Expected `class_pixels` to be (C,), but got {shape_of(class_pixels)}. "
            "Sum the counts of the images, (images, C), with .sum(0)."
        )
    _check_counts(class_pixels)
    counts = class_pixels if class_pixels.dtype == torch.float64 else class_pixels.float()
    occurs = counts > 0
    frequency = torch.where(occurs, counts / counts.sum(), torch.inf)
    # The rarest class is at 0, so that a small temperature cannot overflow. A class that never occurs is at -inf.
    weight = ((frequency.amin() - frequency) / temperature).softmax(0)
    return torch.where(occurs, weight, 0)  # of counts that are all 0, the softmax is NaN


def _check_counts(class_pixels: Tensor) -> None:
    """Raise unless there is a class and all counts are finite and at least 0; counts on a GPU are not read."""
    if not class_pixels.shape[-1]:
        raise ValueError(f"Expected `class_pixels` to have at least one class, but got {shape_of(class_pixels)}.")
    if type(class_pixels) is not Tensor or not is_eager_on_cpu(class_pixels):
        return
    # Read from the CPU's memory, a number a class: as operations on a tensor it would take four times as long.
    if not all(0 <= count < math.inf for count in class_pixels.flatten().tolist()):
        raise ValueError("Expected `class_pixels` to be pixel counts, finite and at least 0, but got other values.")


class RareClassSampler(Sampler[int]):
    """Draw a class with `rare_class_probabilities`, then one of the images that show enough of it.

    **Convention.** An image counts for a class if it has at least `min_pixels` pixels of it. If no image has that many,
    the class is drawn from all images that show any of it. A class in no image is never drawn. Generators must be on
    the CPU.

    There are three ways to draw from the same distribution. Iterate, as with any `Sampler` of a `DataLoader`. Call
    `draw` with your own generator. Or call `at(seed, index)`, a pure function of its arguments: sample number `index`
    is the same image in any order, process or resumed run, so resuming needs no loader state.

    **Source.** DAFormer's rare-class sampling, with a limit of 3000 pixels of a 1280 x 720 label. There, a class that
    does not reach the limit raises an assertion error.

    Args:
        class_pixels: number of pixels of each class in each image, (images, C), from `count_classes` or
            `read_class_stats`.
        temperature: temperature of `rare_class_probabilities`.
        min_pixels: smallest number of pixels as an `int`, or as a `float` below 1 a fraction of the labelled pixels of
            the image.
        num_samples: length of one iteration; by default the number of images.
        generator: generator for iterating; None seeds one from torch's default generator at each iteration.

    Raises:
        ValueError: the counts are not (images, C) or are all 0, or an option is out of range.

    Example:
        >>> class_pixels = torch.tensor([[9000, 0], [9000, 0], [5000, 4000]])
        >>> sampler = RareClassSampler(class_pixels)
        >>> image, class_id = sampler.at(seed=1, index=7)
        >>> image, class_id
        (2, 1)
    """

    def __init__(
        self,
        class_pixels: Num[Tensor, "images c"],
        *,
        temperature: float = 0.01,
        min_pixels: int | float = 3000,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        try:
            counts = torch.as_tensor(class_pixels, device="cpu")  # a sampler draws indices for the loader, on the CPU
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"Expected `class_pixels` to be numbers (images, C), but got {kind_of(class_pixels)}. "
                "count_classes and read_class_stats return them."
            ) from error
        if counts.ndim != 2:
            raise ValueError(
                f"Expected `class_pixels` to be (images, C), but got {shape_of(counts)}. count_classes returns it."
            )
        _check_counts(counts)
        if not bool((counts > 0).any()):
            raise ValueError("Expected `class_pixels` to have a positive count, but got only zeros.")
        if isinstance(min_pixels, float) and min_pixels < 1:
            check_range("min_pixels", min_pixels, 0.0)
            limit = min_pixels * counts.sum(1, keepdim=True)
        else:
            check_range("min_pixels", min_pixels, 0)
            limit = torch.tensor(min_pixels, device="cpu")
        if num_samples is not None:
            check_integer("num_samples", num_samples)
        if generator is not None and not isinstance(generator, torch.Generator):
            check_generator(generator, torch.device("cpu"))
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(
                f"Expected `generator` to be on the CPU, but got one on '{generator.device}'. "
                "Make it with torch.Generator()."
            )
        self.class_probabilities = rare_class_probabilities(counts.sum(0).double(), temperature=temperature)
        self.num_samples = len(counts) if num_samples is None else num_samples
        self.generator = generator
        shows = counts > 0
        enough = shows & (counts >= limit)
        chosen = torch.where(enough.any(0), enough, shows)
        # Read once, here, on the CPU (see `counts`), so that a draw costs two random numbers and two look-ups.
        self._images: list[list[int]] = [column.nonzero().flatten().tolist() for column in chosen.T]
        self._cumulative: list[float] = self.class_probabilities.cumsum(0).tolist()
        self._last = int(self.class_probabilities.nonzero().max())

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        """Draw one (image index, class id) from `generator`."""
        # The caller's generator is on the CPU, so reading from it does not wait.
        by_class, by_image = torch.rand(2, generator=generator, dtype=torch.float64, device="cpu").tolist()
        # bisect_right never selects a class of probability 0; `min` is for a last sum that is rounded below 1.
        class_id = min(bisect.bisect_right(self._cumulative, by_class), self._last)
        images = self._images[class_id]
        return images[min(int(by_image * len(images)), len(images) - 1)], class_id

    def at(self, seed: int, index: int) -> tuple[int, int]:
        """Return the (image index, class id) of sample number `index` for `seed`, whatever was drawn before."""
        return self.draw(torch.Generator().manual_seed(_mix(seed, index)))

    def __iter__(self) -> Iterator[int]:
        """Yield `num_samples` image indices."""
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64, device="cpu").random_()))
        for _ in range(self.num_samples):
            yield self.draw(generator)[0]

    def __len__(self) -> int:
        """Return the number of samples of one iteration."""
        return self.num_samples


def _mix(seed: int, index: int) -> int:
    """Make a well-mixed 63-bit seed from two numbers (with the finaliser of SplitMix64)."""
    word = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 1) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return (x ^ (x >> 31)) >> 1
