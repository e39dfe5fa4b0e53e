"""Scores of a net's predictions on unlabelled images, computed in one pass over a data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_classes,
    check_device,
    check_flag,
    check_generator,
    check_integer,
    check_mask_like,
    check_option,
    check_scores,
    drawn_by,
    shape_of,
)
from udakit._reduce import KINDS, LOG_2, Kind, cut_evenly, full_precision, is_eager_on_cpu, may_look, select, upcast
from udakit._state import FullPrecisionState, gather_ranks, sum_ranks

_PIECE = 2**18  # numbers that fit the cache of a core from the softmax to the sums
_ROWS = 12  # of a product of 14 to 32 classes at a time; a CPU takes up to 1.6 times as long for all at once
_ROW = 1024  # pixels that a block of threads of a GPU adds up in a product
_SUMS = ("class_pixels", "gram", "probabilities", "sums")
_DENSITY_TEMPERATURE = 0.05


class LabelFreeScores(FullPrecisionState):
    r"""Seven scores of softmax maps, computed from sums over the pixels of a data set.

    Let $P$ be the $N \times C$ matrix of the probabilities of all pixels, $\bar p$ its mean row and $G = P^\top P$.

    | key | value | better, according to its source |
    |---|---|---|
    | `confidence` | $\frac1N \sum_p \max_c P_{pc}$ | higher |
    | `negative_entropy` | $\frac1N \sum_{p,c} P_{pc} \log P_{pc}$ | higher |
    | `information_maximization` | $H(\bar p) - \frac1N \sum_p H(P_p)$ | higher |
    | `nuclear_norm` | $\lVert P \rVert_* / \sqrt{N C}$ | higher |
    | `class_correlation` | $\operatorname{tr}(G) / \lVert G \rVert_F$ | lower |
    | `neighbourhood_density` | mean row entropy of $\operatorname{softmax}(f f^\top / 0.05)$ | higher |
    | `matrix_norm` | $\left(\frac{1}{N C} \sum_{p,c} P_{pc}^4\right)^{1/4}$ | higher |

    Here $f$ are the unit rows of $P$ at `samples` random pixels of an image, and the mean is over these pixels and all
    images.

    **Which direction is right.** The direction of the source does not hold everywhere. Compared with the true mIoU, the
    nuclear norm, information maximisation, the class correlation and the density follow the *share* of the rarer class:
    they are right on one pair and wrong on the same pair in the other direction. Confidence, entropy and the matrix
    norm cannot tell a collapsed net from a good one. The most reliable score was `confidence` times
    the mean of `ConsistencyScore.class_iou`, weighted by the root of each class's `class_share`.

    **Convention.** There is no gradient. The state consists of sums (float64, at most C x C) and counts (int64); no map
    is kept. Merged over several processes, the counts are equal to those of one process, and the sums are within 1e-6
    (the entropy within 2e-5 where all pixels are alike, because float32 rounds them alike). `neighbourhood_density`
    draws its pixels with replacement and includes the similarity of a pixel to itself; merged values are equal only in
    distribution. Pixels that are not `valid` are left out, whatever their values. With a NaN at a valid pixel,
    `compute` raises an error. No other method reads from the device.

    **Source.** Entropy, and its difference to the entropy of the mean: Morerio et al. 2018, Shi and Sha 2012. Nuclear
    norm: Cui et al. 2020 (BNM). Class correlation: Tu et al. 2023. Density: Saito et al. 2021 (SND), as in its
    segmentation code, which however divides by one image less. Matrix norm: Xie et al. 2024 (MaNo), which replaces the
    softmax with a Taylor polynomial for nets that are not confident; here P is always the softmax.

    Attributes:
        class_pixels: int64 buffer (C,), number of pixels of each predicted class.
        pixels: int64 buffer (), number of valid pixels so far.
        gram: float64 buffer (C, C), the matrix G.

    Args:
        num_classes: C, at least 2.
        kind: "logits" | "probabilities".
        samples: number of pixels per image for `neighbourhood_density`; 0 leaves this score out.
        generator: generator of the draw of these pixels, on the device of the logits.

    Example:
        >>> import torch
        >>> scores = LabelFreeScores(3, samples=0)
        >>> for _ in range(2):
        ...     scores.update(10 * torch.eye(3).view(1, 3, 1, 3))
        >>> found = scores.compute()
        >>> round(float(found["class_correlation"]), 3), scores.class_share.tolist()
        (1.732, [0.3333333333333333, 0.3333333333333333, 0.3333333333333333])
    """

    class_pixels: Tensor
    pixels: Tensor
    images: Tensor
    gram: Tensor
    probabilities: Tensor
    sums: Tensor
    density: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        kind: Kind = "logits",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_classes(num_classes)
        check_option("kind", kind, KINDS)
        check_integer("samples", samples, 0)
        check_generator(generator, getattr(generator, "device", torch.device("cpu")))
        self.num_classes, self.samples, self.generator = num_classes, samples, generator
        self.kind: Kind = kind
        for name in ("pixels", "images"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("class_pixels", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("gram", torch.zeros(num_classes, num_classes, dtype=torch.float64))
        self.register_buffer("probabilities", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # confidence, entropy, fourth powers
        self.register_buffer("density", torch.zeros((), dtype=torch.float64))

    @property
    def class_share(self) -> Float[Tensor, "c"]:
        """Fraction of the pixels so far that are predicted as each class, (C,); 0 before the first batch."""
        return self.class_pixels.double() / self.pixels.clamp_min(1)

    def reset(self) -> None:
        """Reset to the initial state."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "n c *space"], *, valid: Bool[Tensor, "n *space"] | None = None) -> None:
        """Update the sums with a batch.

        Args:
            logits: logits (N, C, *space), or probabilities with `kind="probabilities"`.
            valid: True where a pixel counts.

        Raises:
            TypeError: `logits` is not a float tensor, or `valid` is not bool.
            ValueError: the shapes or devices do not match.
        """
        check_scores("logits", logits, self.kind)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"Expected `logits` to have {self.num_classes} classes, but got {shape_of(logits)}.")
        check_device("gram", self.gram, logits, "logits")
        if valid is not None:
            check_mask_like(valid, logits)
            valid = valid.flatten(1)
        if self.samples:
            check_generator(self.generator, logits.device)
        maps = logits.detach().flatten(2)
        with full_precision(maps):
            for sums in self._sums(maps, valid):
                for name, part in zip(_SUMS, sums, strict=True):
                    getattr(self, name).add_(part)
            if self.samples:
                self._add_density(maps, valid)
        self.pixels.add_(maps.shape[0] * maps.shape[2] if valid is None else valid.sum())

    def _sums(self, maps: Tensor, valid: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
        """Yield the sums over each piece, in its precision; they are added up in float64."""
        room = None
        for scores, inside in _pieces(maps, valid):
            scores = upcast(scores)
            if room is None and type(scores) is Tensor and is_eager_on_cpu(scores):
                # Kept over the pieces, of which the first is the largest: new memory takes as long as filling it.
                room = scores.new_empty((2, scores.numel()))
            first, second = (None, None) if room is None else room[:, : scores.numel()].view(2, *scores.shape)
            if inside is not None:
                scores = select(inside.unsqueeze(1).expand_as(scores), scores)
            top = scores.amax(1, keepdim=True)
            depth = torch.sub(scores, top, out=first)
            if self.kind == "logits":
                depth.mul_(1 / LOG_2)
                p = torch.exp2(depth, out=second)
                total = p.sum(1)
                confidence, log_total = total.reciprocal(), total.log_()
                if inside is not None:
                    confidence, log_total = confidence.where(inside, 0), log_total.where(inside, 0)
                p.mul_(confidence.unsqueeze(1))
                entropy = log_total.sum() - LOG_2 * _dot_with_exponents(p, depth)
            else:
                p, confidence, entropy = scores, top, -torch.xlogy(scores, scores).sum()
            counts, gram, by_class = _counts(depth.sign_(), inside), _gram(p), p.sum((0, 2))
            fourth = torch.square(p, out=second).square_().sum()
            yield counts, gram, by_class, torch.stack([confidence.sum(), entropy, fourth])

    def _add_density(self, maps: Tensor, valid: Tensor | None) -> None:
        n, _, pixels = maps.shape
        if pixels == 0:
            return
        device = maps.device
        pick = torch.randint(2**62, (n, self.samples), **drawn_by(self.generator), device=device)
        if valid is None:
            index, some = pick % pixels, torch.ones(n, dtype=torch.bool, device=device)
        else:
            # The k-th valid pixel is the first at which the count of valid pixels reaches k + 1.
            so_far = valid.cumsum(1)
            number = so_far[:, -1:]
            index, some = torch.searchsorted(so_far, pick % number.clamp_min(1) + 1), number.squeeze(1) > 0
            index = index.clamp_max(pixels - 1)
        scores = upcast(maps.gather(2, index.unsqueeze(1).expand(-1, maps.shape[1], -1))).mT
        p = scores.softmax(2) if self.kind == "logits" else scores
        rows = p / torch.linalg.vector_norm(p, dim=2, keepdim=True).clamp_min(1e-30)
        log_similarity = (rows @ rows.mT / _DENSITY_TEMPERATURE).log_softmax(2)
        entropy = -(log_similarity.exp() * log_similarity).sum(2).mean(1)
        # Through a view: compiled by torch 2.10, a change of a 0-dimensional float64 buffer itself is lost.
        self.density.view(1).add_(entropy.where(some, 0).sum())
        self.images.add_(some.sum())

    def merged(self) -> LabelFreeScores:
        """Return the merged scores of all ranks. This object keeps its own; every rank must make the call."""
        whole = LabelFreeScores(self.num_classes, kind=self.kind, samples=self.samples, generator=self.generator)
        whole.to(self.gram.device)
        integers = ("class_pixels", "pixels", "images")
        counts = sum_ranks(torch.cat([getattr(self, name).flatten() for name in integers]))
        for name, part in zip(integers, torch.split(counts, [self.num_classes, 1, 1]), strict=True):
            getattr(whole, name).copy_(part.view_as(getattr(whole, name)))
        floats = ("gram", "probabilities", "sums", "density")
        for name, ranks in zip(floats, gather_ranks(*(getattr(self, name).flatten() for name in floats)), strict=True):
            getattr(whole, name).copy_(ranks.sum(0).view_as(getattr(whole, name)))
        return whole

    def compute(self, *, sync: bool = False) -> dict[str, Float[Tensor, ""]]:
        """Return the scores of all pixels so far. It reads from the device, so call it once per evaluation.

        Args:
            sync: whether to use the pixels of all ranks; every rank must make the call. Without a process group there
                is one rank.

        Returns:
            The scores, float64 scalars, by the keys listed above.

        Raises:
            ValueError: there was no valid pixel so far, or one was NaN or infinite. `reset` forgets it.
        """
        check_flag("sync", sync)
        if sync:
            return self.merged().compute()
        if self.pixels == 0:
            raise ValueError("Expected `update` to be called with a valid pixel before `compute`, but got none.")
        state = torch.cat([self.sums, self.gram.flatten(), self.density.flatten()])
        if not state.isfinite().all():
            raise ValueError(
                f"Expected `logits` to be finite at every valid pixel, but got NaN or infinity among {int(self.pixels)}"
                " pixels. Such a net has no score."
            )
        n, mean = self.pixels.double(), self.probabilities / self.pixels
        confidence, entropy, fourth = self.sums / n
        found = {
            "confidence": confidence,
            "negative_entropy": -entropy,
            "information_maximization": -torch.xlogy(mean, mean).sum() - entropy,
            "nuclear_norm": torch.linalg.eigvalsh(self.gram).clamp_min(0).sqrt().sum() / (n * self.num_classes).sqrt(),
            "class_correlation": self.gram.trace() / torch.linalg.matrix_norm(self.gram),
            "neighbourhood_density": self.density / self.images.clamp_min(1),
            "matrix_norm": (fourth / self.num_classes) ** 0.25,
        }
        if not self.samples:
            del found["neighbourhood_density"]
        return found

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"num_classes={self.num_classes}, kind={self.kind!r}, samples={self.samples}"


def _counts(signs: Tensor, valid: Tensor | None) -> Tensor:
    """Number of pixels of each class, (C,): those whose first 0 along axis 1 is there, where all others are negative.

    It may change `signs`.
    """
    n, c, pixels = signs.shape
    if valid is None and may_look(signs):
        counts = signs.sum((0, 2)) + n * pixels  # how many zeros: where no pixel has two, that is all
        if float(counts.sum()) == n * pixels:
            return counts.long()
    # The first 0, or C where there is none (NaN). On the CPU, `max` with indices takes as long as everything else here.
    rank = torch.arange(c, 0, -1, dtype=signs.dtype, device=signs.device).view(1, -1, 1)
    first = c - signs.add_(1).mul_(rank).amax(1).nan_to_num_(0).long()
    if valid is not None:
        first = first.where(valid, c)
    counts = torch.zeros(c + 1, dtype=torch.int64, device=signs.device)
    return counts.index_add(0, first.flatten(), torch.ones_like(first).flatten())[:-1]


def _gram(p: Tensor) -> Tensor:
    """P^T P of (n, C, pixels), (C, C)."""
    c = p.shape[1]
    if not (_ROWS + 1 < c <= 32 and is_eager_on_cpu(p)):
        return torch.matmul(p, p.mT).sum(0)
    gram = p.new_empty((c, c))
    for i in range(0, c, _ROWS):
        rows = torch.matmul(p[:, i : i + _ROWS], p[:, i:].mT).sum(0)  # the rest is the mirror image
        gram[i : i + _ROWS, i:], gram[i:, i : i + _ROWS] = rows, rows.mT
    return gram


def _dot_with_exponents(p: Tensor, exponents: Tensor) -> Tensor:
    """Sum of p times its exponents of 2, where 0 times -inf is 0."""
    if may_look(p):
        found = torch.dot(p.flatten(), exponents.flatten())
        if not found.isnan():
            return found
    return torch.sum(torch.linalg.vecdot(p, exponents.clamp_min_(-1100.0)))  # where 2^x is 0


def _pieces(maps: Tensor, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut (N, C, pixels) into pieces that fit the cache of a CPU; a GPU takes everything at once, in short rows."""
    if maps.device.type != "cpu":
        yield _short_rows(maps, valid)
        return
    n, c, pixels = maps.shape
    if torch.compiler.is_compiling() or maps.numel() <= _PIECE:
        yield maps, valid
        return
    width = max(64, _PIECE // c // 64 * 64)
    group = max(1, width // max(pixels, 1))
    for k in range(0, n, group):
        for start in range(0, pixels, width):
            cut = slice(k, k + group), slice(start, start + width)
            yield maps[cut[0], :, cut[1]], None if valid is None else valid[cut]


def _short_rows(maps: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(N, C, pixels) as (N parts, C, pixels of a part): N long products would be left to N blocks of threads."""
    n, _, pixels = maps.shape
    parts, more = cut_evenly(pixels, _ROW)
    if parts == 1:
        return maps, valid
    if more:  # pixels that do not count
        valid = torch.ones_like(maps[:, 0], dtype=torch.bool) if valid is None else valid
        maps, valid, pixels = F.pad(maps, (0, more)), F.pad(valid, (0, more)), pixels + more
    maps = torch.unflatten(maps, 2, (parts, pixels // parts)).transpose(1, 2).flatten(0, 1)
    return maps, None if valid is None else valid.reshape(n * parts, pixels // parts)
