"""ClassMix: paste the pixels of drawn classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Bool, Integer
from torch import Tensor

from udakit._checks import check_flag, check_mask_like
from udakit._state import FullPrecisionState
from udakit.mixing._random import Generators
from udakit.mixing.batch import SegBatch, check_batches, mix
from udakit.mixing.classes import Rounding, Scope, candidate_mask, check_draw, class_mask, draw_classes


def class_mix(
    source: SegBatch | tuple[Tensor, ...], target: SegBatch | tuple[Tensor, ...], mask: Bool[Tensor, "n *space"]
) -> SegBatch:
    """Paste the images, labels and weights of `source` onto `target` where the mask is True.

    **Convention.** A missing weight counts as 1 if the other side has one; if neither has one, the result has none. Any
    two batches can be mixed: source onto target, target onto source, or target onto target.

    Args:
        source: batch that is taken where the mask is True; a plain tuple (images, labels[, weight]) is accepted.
        target: batch that is kept elsewhere, of the same size.
        mask: bool (N, *space), for example from `class_mask`.

    Returns:
        The mixed batch. Its labels are int64, or uint8 when both sides are.

    Raises:
        TypeError: labels are neither int64 nor uint8, images or weights are not float, or `mask` is not bool.
        ValueError: the sizes differ.

    Example:
        >>> import torch
        >>> source = SegBatch(torch.ones(1, 3, 1, 2), torch.zeros(1, 1, 2, dtype=torch.int64))
        >>> target = SegBatch(torch.zeros(1, 3, 1, 2), torch.full((1, 1, 2), 7), torch.full((1, 1, 2), 0.5))
        >>> mixed = class_mix(source, target, torch.tensor([[[True, False]]]))
        >>> mixed.labels, mixed.weight
        (tensor([[[0, 7]]]), tensor([[[1.0000, 0.5000]]]))
    """
    source, target = check_batches(source, target)
    check_mask_like(mask, source.images, name="mask", reference_name="source.images")
    return mix(mask, source, target)


class ClassMix(FullPrecisionState):
    """Draw classes of the source labels and paste their pixels onto the target batch.

    It calls `draw_classes`, `class_mask` and `class_mix`. The options are those of
    [`draw_classes`][udakit.mixing.draw_classes] and [`class_mask`][udakit.mixing.class_mask]. DACS is `ClassMix(19,
    include_ignore=True)`, and DAFormer adds `scope="batch"`. DiGA's self-training is `ClassMix(19, rounding="down",
    include_ignore=True, paste_ignore=True)`.

    Attributes:
        candidates: bool buffer (C,), the classes that may be drawn, or None for all.

    Example:
        >>> import torch
        >>> source = SegBatch(torch.ones(2, 3, 4, 4), torch.arange(4).expand(2, 4, 4))
        >>> target = SegBatch(torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 9))
        >>> mixed, mask = ClassMix(19)(source, target)
        >>> mask.float().mean().item()
        0.5
    """

    candidates: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        fraction: float = 0.5,
        rounding: Rounding = "up",
        scope: Scope = "image",
        candidates: Sequence[int] | Bool[Tensor, "c"] | None = None,
        include_ignore: bool = False,
        paste_ignore: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_draw(num_classes, fraction, rounding, scope, include_ignore, ignore_index)
        check_flag("paste_ignore", paste_ignore)
        allowed = None if candidates is None else candidate_mask(candidates, num_classes, None)
        self.register_buffer("candidates", allowed)
        self.num_classes = num_classes
        self.fraction = fraction
        self.rounding: Rounding = rounding
        self.scope: Scope = scope
        self.include_ignore = include_ignore
        self.paste_ignore = paste_ignore
        self.ignore_index = ignore_index

    def draw_mask(
        self, labels: Integer[Tensor, "n *space"], *, generator: Generators | None = None
    ) -> Bool[Tensor, "n *space"]:
        """Draw classes of `labels` and mark their pixels. Use this if several mixes need the same mask."""
        chosen = draw_classes(
            labels,
            num_classes=self.num_classes,
            fraction=self.fraction,
            rounding=self.rounding,
            scope=self.scope,
            candidates=self.candidates,
            include_ignore=self.include_ignore,
            ignore_index=self.ignore_index,
            generator=generator,
        )
        return class_mask(
            labels,
            chosen,
            num_classes=self.num_classes,
            paste_ignore=self.paste_ignore,
            ignore_index=self.ignore_index,
        )

    def forward(
        self,
        source: SegBatch | tuple[Tensor, ...],
        target: SegBatch | tuple[Tensor, ...],
        *,
        generator: Generators | None = None,
    ) -> tuple[SegBatch, Bool[Tensor, "n *space"]]:
        """Draw one mask from the source labels, mix with it, and return both."""
        source, target = check_batches(source, target)
        mask = self.draw_mask(source.labels, generator=generator)
        return mix(mask, source, target), mask

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"{self.num_classes}, fraction={self.fraction}, rounding={self.rounding!r}, scope={self.scope!r}, "
            f"include_ignore={self.include_ignore}, paste_ignore={self.paste_ignore}, ignore_index={self.ignore_index}"
        )
