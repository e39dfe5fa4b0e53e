"""Find the net that agrees most with the ensemble of several nets (EnsV)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import (
    check_device,
    check_flag,
    check_integer,
    check_mask_like,
    check_option,
    check_same_shape,
    check_scores,
    is_sequence,
    kind_of,
)
from udakit._reduce import fraction, upcast
from udakit._state import FullPrecisionState, sum_ranks

EnsembleKind = Literal["probabilities", "logits"]
KINDS = get_args(EnsembleKind)
Candidates = Float[Tensor, "k n c *space"] | Sequence[Float[Tensor, "n c *space"]]


def ensemble_agreement(
    probabilities: Candidates,
    *,
    kind: EnsembleKind = "probabilities",
    valid: Bool[Tensor, "n *space"] | None = None,
) -> Float[Tensor, "k"]:
    r"""Fraction of pixels at which each candidate agrees with the arg-max of the candidates' mean.

    $$a_k = \frac{1}{N} \#\{p : \arg\max_c P^{(k)}_{pc} = \arg\max_c \tfrac1K \sum_j P^{(j)}_{pc}\}$$

    **Convention.** The result is detached. It is counted over the `valid` pixels, and is 0 if there are none. A
    candidate that is NaN or infinite at a pixel is left out of the mean there, and counts as disagreeing.

    **Source.** EnsV (Hu et al. 2024), which keeps the candidate with the highest agreement.

    Args:
        probabilities: probabilities of the candidates for one batch, as one tensor (K, N, C, *space) or as K tensors
            (N, C, *space).
        kind: "probabilities" | "logits".
        valid: True where a pixel counts.

    Returns:
        The agreement of each candidate in [0, 1], (K,), float32; higher is closer to the ensemble.

    Raises:
        TypeError: a map is not a float tensor, or `valid` is not bool.
        ValueError: there is no candidate, the shapes do not match, or `kind` is unknown.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]).view(3, 1, 2, 1)
        >>> ensemble_agreement(p)
        tensor([1., 1., 0.])
    """
    check_option("kind", kind, KINDS)
    agreeing, pixels = _agreement(_candidates(probabilities, kind), kind, valid)
    return fraction(agreeing, pixels)


class EnsembleAgreement(FullPrecisionState):
    """[`ensemble_agreement`][udakit.validation.ensemble_agreement] over a whole data set, accumulated over its batches.

    **Convention.** Counts (int64) add up over batches and, with `sync`, over ranks; the result is bit-equal to that of
    one process. A call adds a batch and returns the agreement on that batch.

    Attributes:
        agreeing: int64 buffer (K,), number of pixels at which each candidate agrees.
        pixels: int64 buffer (), number of valid pixels.

    Args:
        candidates: K, the number of candidates.
        kind: "probabilities" | "logits".

    Example:
        >>> import torch
        >>> agreement = EnsembleAgreement(2, kind="logits")
        >>> for _ in range(3):
        ...     _ = agreement([net(torch.rand(1, 3, 4, 4)) for net in [torch.nn.Conv2d(3, 5, 1)] * 2])
        >>> agreement.compute().shape
        torch.Size([2])
    """

    agreeing: Tensor
    pixels: Tensor

    def __init__(self, candidates: int, *, kind: EnsembleKind = "probabilities") -> None:
        super().__init__()
        check_integer("candidates", candidates)
        check_option("kind", kind, KINDS)
        self.candidates = candidates
        self.kind: EnsembleKind = kind
        self.register_buffer("agreeing", torch.zeros(candidates, dtype=torch.int64))
        self.register_buffer("pixels", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Reset to the initial state."""
        self.agreeing.zero_()
        self.pixels.zero_()

    def forward(
        self, probabilities: Candidates, *, valid: Bool[Tensor, "n *space"] | None = None
    ) -> Float[Tensor, "k"]:
        """Add a batch and return the agreement on it. The arguments are those of the function."""
        maps = _candidates(probabilities, self.kind)
        if len(maps) != self.candidates:
            raise ValueError(f"Expected `probabilities` to have {self.candidates} candidates, but got {len(maps)}.")
        check_device("agreeing", self.agreeing, maps[0], "probabilities")
        agreeing, pixels = _agreement(maps, self.kind, valid)
        self.agreeing.add_(agreeing)
        self.pixels.add_(pixels)
        return fraction(agreeing, pixels)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def compute(self, *, sync: bool = False) -> Float[Tensor, "k"]:
        """Return the agreement over all pixels so far, with `sync` those of all ranks; 0 before the first batch."""
        check_flag("sync", sync)
        counts = torch.cat([self.agreeing, self.pixels.view(1)])
        counts = sum_ranks(counts) if sync else counts
        return fraction(counts[:-1], counts[-1])

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"candidates={self.candidates}, kind={self.kind!r}"


def _candidates(probabilities: Candidates, kind: EnsembleKind) -> list[Tensor]:
    if not isinstance(probabilities, Tensor) and not is_sequence(probabilities):
        raise TypeError(
            "Expected `probabilities` to be a tensor (K, N, C, *space) or K tensors (N, C, *space), "
            f"but got {kind_of(probabilities)}."
        )
    if len(probabilities) == 0:
        raise ValueError("Expected `probabilities` to have at least one candidate, but got none.")
    maps = list(probabilities)
    for x in maps:
        check_scores("probabilities", x, kind)
        check_same_shape(x, maps[0], name="probabilities", reference_name="probabilities")
    return maps


@torch.no_grad()
def _agreement(maps: list[Tensor], kind: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The number of pixels at which each agrees, (K,) int64, and of pixels that count, () int64."""
    if valid is not None:
        check_mask_like(valid, maps[0], reference_name="probabilities")
    total: Tensor | None = None
    labels, sound = [], []
    for x in maps:
        p = upcast(x)
        p = p.softmax(1) if kind == "logits" else p
        finite = p.sum(1).isfinite()
        known = torch.where(finite.unsqueeze(1), p, 0)
        total = known if total is None else total.add_(known)
        labels.append(x.max(1).indices)
        sound.append(finite)
    assert total is not None
    leader = total.max(1).indices
    inside = torch.ones_like(sound[0]) if valid is None else valid
    agreeing = [((own == leader) & finite & inside).sum() for own, finite in zip(labels, sound, strict=True)]
    return torch.stack(agreeing), inside.sum()
