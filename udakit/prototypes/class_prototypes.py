"""Class prototypes that follow the class means of the features."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from udakit._checks import check_flag, check_integer, check_labels_like, check_option, check_range
from udakit._reduce import plain
from udakit._state import gather_ranks
from udakit.prototypes._class_state import ClassState, finite_rows
from udakit.prototypes._distances import class_distances
from udakit.prototypes.means import class_sums, means_of

__all__ = ["ClassPrototypes"]

Mode = Literal["ema", "mean"]
MODES = get_args(Mode)


class ClassPrototypes(ClassState):
    r"""One vector for each class, updated with the class means of the features.

    $$\eta_c \leftarrow (1 - m)\, \eta_c + m\, v_c \quad\text{("ema")}, \qquad
    \eta_c \leftarrow \eta_c + \frac{v_c - \eta_c}{n_c + 1},\ n_c \leftarrow n_c + 1 \quad\text{("mean")}$$

    for one class mean $v_c$ after another, in the order of the images. The first vector of a class is copied.

    **Convention.** Updates are detached. With `per_image=True`, every image with at least `min_pixels` pixels of a
    class gives one vector; otherwise the whole batch gives one. The sequence of updates is computed exactly, in
    closed form, without a loop over images or classes. A vector that is not finite is left out. The state stays
    float32 whatever dtype the Module is cast to, because in bfloat16 a step of 1e-4 would be lost to rounding. A
    class that has not been seen is infinitely far from every pixel.

    **Source.** DiGA uses momentum 1e-4 for each vector of an image and class, at least 5 pixels, features that are not
    normalised, and the L2 distance (not squared). Its prototypes start as the running mean ("mean") over a pass on the
    target data. In DiGA's released code, classes that were never seen compete as zero vectors (`include_unseen=True`).

    Attributes:
        prototypes: float32 buffer (C, D).
        counts: int64 buffer (C,), the number of vectors seen so far.
        averaging: bool buffer (), whether the mode is "mean", so that a resumed run continues in the same mode.

    Args:
        num_classes: C, the number of classes.
        dim: D, the number of channels of the features.
        momentum: m in [0, 1], for mode "ema".
        mode: "ema" | "mean". It can be changed at any time, for example to `mode = "ema"` after a pass in "mean".
        per_image: whether to use one vector per image and class, or one per batch and class.
        min_pixels: smallest number of pixels for a vector.
        ignore_index: the label of the pixels to ignore.

    Example:
        >>> import torch
        >>> prototypes = ClassPrototypes(3, 2, momentum=0.5, min_pixels=1)
        >>> features = torch.tensor([[2.0, 0.0], [4.0, 0.0]]).view(2, 2, 1, 1)
        >>> prototypes.update(features, torch.zeros(2, 1, 1, dtype=torch.int64))
        >>> prototypes.prototypes[0], prototypes.seen
        (tensor([3., 0.]), tensor([ True, False, False]))
        >>> prototypes.distances(features).flatten(1).tolist()
        [[1.0, inf, inf], [1.0, inf, inf]]
    """

    prototypes: Tensor
    averaging: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        momentum: float = 1e-4,
        mode: Mode = "ema",
        per_image: bool = True,
        min_pixels: int = 5,
        *,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index, ("prototypes",))
        check_range("momentum", momentum, 0.0, 1.0)
        check_flag("per_image", per_image)
        check_integer("min_pixels", min_pixels)
        self.momentum, self.per_image, self.min_pixels = momentum, per_image, min_pixels
        self.register_buffer("averaging", torch.zeros((), dtype=torch.bool))
        self.mode = mode

    @property
    def mode(self) -> Mode:
        """How a vector updates the prototype: "ema" or "mean"."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        check_option("mode", mode, MODES)
        self._mode: Mode = mode
        self.averaging.fill_(mode == "mean")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load the mode, too. Older states do not have it and leave the mode unchanged."""
        averaging = state_dict.setdefault(f"{prefix}averaging", self.averaging)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.mode = "mean" if averaging else "ema"

    def update(
        self, features: Float[Tensor, "n d *space"], labels: Integer[Tensor, "n *space"], *, sync: bool = False
    ) -> None:
        """Update the prototypes with the class means of a batch.

        Args:
            features: features of the batch, (N, D, *space).
            labels: labels or pseudo-labels at the size of the features; `ignore_index` where there is none.
            sync: whether to use the batches of all ranks, in rank order, as one process would use the concatenated
                batch. The ranks may have batches of different sizes. Every rank must make the call. Without a process
                group there is one rank.

        Raises:
            TypeError: `features` is not a float tensor, or `labels` is neither int64 nor uint8.
            ValueError: the shapes do not match.
        """
        check_flag("sync", sync)
        self._check(features)
        check_labels_like(labels, features, reference_name="features")
        with torch.no_grad():
            sums, pixels = class_sums(features, labels, self.num_classes, self.ignore_index)
            sums = sums.float()
            if not self.per_image:
                sums, pixels = sums.sum(0, keepdim=True), pixels.sum(0, keepdim=True)
                if sync:
                    sums, pixels = (x.sum(0) for x in gather_ranks(sums, pixels))
            vectors = means_of(sums, pixels, self.min_pixels)
            present = (pixels >= self.min_pixels) & finite_rows(vectors)
            first, spread, number = self._summarise(vectors, present)
            if sync and self.per_image:
                first, spread, number = gather_ranks(first, spread, number)
            else:
                first, spread, number = first[None], spread[None], number[None]
            self._merge(first, spread, number)

    def _summarise(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summarise the images of a rank as sufficient statistics of a fixed size.

        They are `first` (C, D), the first vector, `spread` (C, D), the weighted sum of the differences from it, and
        `number` (C,). With differences, a constant stays the same to the last bit.
        """
        so_far = present.cumsum(0)
        number = so_far[-1] if len(so_far) else present.sum(0)
        first = torch.where((present & (so_far == 1)).unsqueeze(-1), vectors, 0).sum(0)
        weight = self.momentum * self._kept(number - so_far) if self.mode == "ema" else torch.ones_like(vectors[..., 0])
        spread = torch.where(present.unsqueeze(-1), weight.unsqueeze(-1) * (vectors - first), 0).sum(0)
        return first, spread, number

    def _merge(self, first: Tensor, spread: Tensor, number: Tensor) -> None:
        """Apply the statistics of the ranks (R, ...), one after another, in closed form."""
        alone = len(number) == 1
        so_far = number if alone else number.cumsum(0)
        total = so_far[-1]
        # `first` is 0 for number 0.
        opening = first[0] if alone else torch.where((so_far == number).unsqueeze(-1), first, 0).sum(0)
        start = torch.where(self.seen.unsqueeze(-1), self.prototypes, opening)
        step = self._moved(number) if self.mode == "ema" else number.float()
        change = spread + step.unsqueeze(-1) * (first - start)
        if self.mode == "mean":
            change = change * (self.counts + total).clamp_min(1).float().reciprocal().unsqueeze(-1)
        elif not alone:
            change = change * self._kept(total - so_far).unsqueeze(-1)
        change = change[0] if alone else change.sum(0)
        self.prototypes.copy_(torch.where((total > 0).unsqueeze(-1), start + change, self.prototypes))
        self.counts.add_(total)

    def _log_keep(self) -> float:
        # log(1 - m), kept finite for m = 1, so that zero steps still give exp(0) = 1.
        return math.log1p(-self.momentum) if self.momentum < 1 else -1e4

    def _kept(self, steps: Tensor) -> Tensor:
        """(1 - m)^steps."""
        return torch.exp(self._log_keep() * steps.float())

    def _moved(self, steps: Tensor) -> Tensor:
        """1 - (1 - m)^steps, without the cancellation that would cost four digits at m = 1e-4."""
        return -torch.expm1(self._log_keep() * steps.float())

    def distances(
        self, features: Float[Tensor, "n d *space"], *, include_unseen: bool = False
    ) -> Float[Tensor, "n c *space"]:
        r"""L2 distance (not squared) of every feature pixel to every prototype.

        **Convention.** The distance is computed as $\|f\|^2 - 2 f^\top \eta + \|\eta\|^2$ in float64 (float32 on MPS,
        which has no float64), so the cancellation between nearly equal vectors does not show in float32. Gradients flow
        to the features, and are 0 where the distance is 0. They cannot be differentiated again. `forward` is this
        function.

        Args:
            features: features, (N, D, *space).
            include_unseen: whether classes that were never seen compete as zero vectors, as in DiGA's released code;
                otherwise their distance is +inf.

        Returns:
            The distances, (N, C, *space), float32 (float64 for float64 features).
        """
        check_flag("include_unseen", include_unseen)
        self._check(features)
        centres = self.prototypes.to(torch.float32 if features.device.type == "mps" else torch.float64)
        square = centres.square().sum(1, keepdim=True)
        if not include_unseen:
            square = torch.where(self.seen.unsqueeze(1), square, float("inf"))
        distance = class_distances(plain(features).flatten(2), centres, square)
        return distance.view(*distance.shape[:2], *features.shape[2:])

    def forward(
        self, features: Float[Tensor, "n d *space"], *, include_unseen: bool = False
    ) -> Float[Tensor, "n c *space"]:
        """Return `distances`."""
        return self.distances(features, include_unseen=include_unseen)

    def assign(
        self, features: Float[Tensor, "n d *space"], *, include_unseen: bool = False
    ) -> Int64[Tensor, "n *space"]:
        """Nearest prototype of every feature pixel.

        Ties go to the lowest id. While no class has been seen, the result is `ignore_index`.
        """
        with torch.no_grad():
            distance, labels = self.distances(features, include_unseen=include_unseen).min(dim=1)
            return labels.where(distance < float("inf"), self.ignore_index)

    def set_(self, prototypes: Float[Tensor, "c d"], counts: Integer[Tensor, "c"] | None = None) -> Self:
        """Set the prototypes. Every non-zero row counts as seen.

        Args:
            prototypes: one row for each class, (C, D); they are copied.
            counts: number of vectors of each class, from which mode "mean" continues, not negative. By default it is 1
                for every non-zero row.

        Raises:
            TypeError: `prototypes` are not float, or `counts` are not integers.
            ValueError: the shapes do not match, or a count is negative (looked at on the CPU only).
        """
        self._take(counts, prototypes=prototypes)
        with torch.no_grad():
            self.counts.clamp_(min=(self.prototypes != 0).any(1).long())
        return self

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, momentum={self.momentum:g}, mode={self.mode!r}, "
            f"per_image={self.per_image}, min_pixels={self.min_pixels}, ignore_index={self.ignore_index}"
        )
