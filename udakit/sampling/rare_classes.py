"""Images drawn so that rare classes are seen."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.utils.data import Sampler

from udakit._checks import check_generator, check_integer, check_range, check_tensor, kind_of, shape_of


def rare_class_probabilities(class_pixels: Num[Tensor, "c"], *, temperature: float = 0.01) -> Float[Tensor, "c"]:
    r"""Probability of drawing each class, higher the rarer it is.

    $$P(c) = \operatorname{softmax}_c\!\left((1 - f_c) / T\right), \qquad f_c = n_c \,/\, \textstyle\sum_k n_k$$

    **Convention.** A class that never occurs is dropped, not favoured: probability 0, and no part of the softmax. With
    no pixel at all every probability is 0.

    **Source.** DAFormer, T = 0.01.

    Args:
        class_pixels: n, pixels of each class in the whole data set (`count_classes(...).sum(0)`).
        temperature: T > 0; a large one makes the classes equally likely.

    Returns:
        Probabilities, float32 (float64 for float64 counts).

    Raises:
        ValueError: counts that are not (C,), negative or not finite, or a `temperature` that is not positive.

    Example:
        >>> rare_class_probabilities(torch.tensor([900, 100, 0]), temperature=1.0)
        tensor([0.3100, 0.6900, 0.0000])
    """
    check_range("temperature", temperature, 0.0, open_low=True)
    check_tensor("class_pixels", class_pixels, "a tensor (C,)")
    if class_pixels.ndim != 1:
        raise ValueError(
            f"Expected `class_pixels` to be (C,), but got {shape_of(class_pixels)}. "
            "Counts per image, (images, C), become that by .sum(0)."
        )
    _check_counts(class_pixels)
    counts = class_pixels if class_pixels.dtype == torch.float64 else class_pixels.float()
    occurs = counts > 0
    frequency = counts / counts.sum().clamp_min(torch.finfo(counts.dtype).tiny)
    # The rarest class sits at 0, so that a small temperature cannot overflow; a dropped class gets no weight at all.
    rarest = torch.where(occurs, frequency, torch.inf).amin()
    weight = torch.where(occurs, torch.exp((torch.where(occurs, rarest, 0) - frequency) / temperature), 0)
    return weight / weight.sum().clamp_min(torch.finfo(counts.dtype).tiny)


def _check_counts(class_pixels: Tensor) -> None:
    """Raise unless there is a class and all counts are finite and 0 at least; reads them, once before training."""
    if not class_pixels.shape[-1]:
        raise ValueError(f"Expected `class_pixels` to have a class at least, but got {shape_of(class_pixels)}.")
    if not bool(((class_pixels >= 0) & (class_pixels < float("inf"))).all()):
        raise ValueError("Expected `class_pixels` to be counts of pixels, finite and 0 at least, but got others.")


class RareClassSampler(Sampler[int]):
    """Draws a class by `rare_class_probabilities`, then one of the images that show enough of it.

    **Convention.** An image counts for a class from `min_pixels` of it. A class that reaches it in no image is drawn
    from all images that show any of it; a class in no image is never drawn. A generator is read on the CPU.

    There are three ways to draw, all of one distribution: iterate (a plain `Sampler` for a `DataLoader`), `draw` with a
    generator of yours, or `at(seed, index)`, a pure function of its arguments: sample number `index` is the same image
    in whatever order, process or resumed run it is asked for, so resuming needs no loader state.

    **Source.** DAFormer's rare-class sampling, where the limit is 3000 pixels of a 1280 x 720 label and a class that
    misses it is an assertion error.

    Args:
        class_pixels: pixels of each class in each image, (images, C), from `count_classes` or `read_class_stats`.
        temperature: of `rare_class_probabilities`.
        min_pixels: an `int` counts pixels, a `float` below 1 is a share of the image's labelled pixels.
        num_samples: length of one iteration; the number of images by default.
        generator: for iterating; None seeds one from torch's default generator at each iteration.

    Raises:
        ValueError: counts that are not (images, C) or all 0, or an option out of range.

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
            counts = torch.as_tensor(class_pixels, device="cpu")  # a sampler draws indices for the loader, on the host
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"Expected `class_pixels` to be numbers (images, C), but got {kind_of(class_pixels)}. "
                "count_classes and read_class_stats make them."
            ) from error
        if counts.ndim != 2:
            raise ValueError(
                f"Expected `class_pixels` to be (images, C), but got {shape_of(counts)}. count_classes makes it."
            )
        _check_counts(counts)
        if not bool((counts > 0).any()):
            raise ValueError("Expected `class_pixels` to count a pixel of some class, but got only zeros.")
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
        # On the host (see `counts`) and read once, here: a draw then costs two random numbers and two look-ups.
        self._images: list[list[int]] = [column.nonzero().flatten().tolist() for column in chosen.T]
        self._cumulative: list[float] = self.class_probabilities.cumsum(0).tolist()
        self._last = int(self.class_probabilities.nonzero().max())

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        """Draw one (image index, class id) from `generator`."""
        # Of a CPU generator that the caller hands in: reading it waits for nothing.
        by_class, by_image = torch.rand(2, generator=generator, dtype=torch.float64, device="cpu").tolist()
        # bisect_right never lands on a class of probability 0; rounding of the last sum must not pass the last class.
        class_id = min(bisect.bisect_right(self._cumulative, by_class), self._last)
        images = self._images[class_id]
        return images[min(int(by_image * len(images)), len(images) - 1)], class_id

    def at(self, seed: int, index: int) -> tuple[int, int]:
        """Return the (image index, class id) of sample number `index` under `seed`, whatever was drawn before."""
        return self.draw(torch.Generator().manual_seed(_mix(seed, index)))

    def __iter__(self) -> Iterator[int]:
        """Yield `num_samples` image indices."""
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        for _ in range(self.num_samples):
            yield self.draw(generator)[0]

    def __len__(self) -> int:
        """Return the number of samples of one iteration."""
        return self.num_samples


def _mix(seed: int, index: int) -> int:
    """Make one well-mixed 63-bit seed of two numbers (the finaliser of SplitMix64)."""
    word = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 1) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return (x ^ (x >> 31)) >> 1
