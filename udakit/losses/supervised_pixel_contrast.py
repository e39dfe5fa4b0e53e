"""Supervised contrast between labelled feature pixels, computed on a sample of fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from udakit._checks import (
    check_flag,
    check_generator,
    check_ignore_index,
    check_integer,
    check_labels_like,
    check_maps,
    check_option,
    check_range,
    drawn_by,
)
from udakit._reduce import (
    LOG_2,
    Reduction,
    check_reduction,
    class_ids,
    first_derivative_only,
    full_precision,
    reduce_pixels,
    refuse_transforms,
    upcast,
)
from udakit.losses._unit import unit_vectors

Denominator = Literal["negatives", "all"]
DENOMINATORS = get_args(Denominator)


def supervised_pixel_contrast_loss(
    features: Float[Tensor, "n d *space"],
    labels: Integer[Tensor, "n *space"],
    *,
    num_classes: int,
    temperature: float = 0.1,
    max_anchors: int = 64,
    denominator: Denominator = "negatives",
    normalize: bool = True,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""] | Float[Tensor, "c max_anchors"]:
    r"""Pull sampled pixels of the same class together and push pixels of different classes apart.

    $$\ell_i = \frac{1}{|P_i|} \sum_{j \in P_i} -\log \frac{\exp(f_i \cdot f_j / \tau)}{\exp(f_i \cdot f_j / \tau) +
    \sum_{k \in N_i} \exp(f_i \cdot f_k / \tau)}$$

    P_i are the other sampled pixels of i's class and N_i the sampled pixels of other classes, over the whole batch.
    With `denominator="all"` the sum runs over all sampled pixels except i, which is SupCon.

    **Convention.** `max_anchors` pixels of each class in the batch are drawn uniformly (all of them if there are
    fewer). They serve as anchors, positives and negatives. "mean" is over the anchors that have a positive. With
    "negatives", a batch with a single class gives 0. Ignored pixels and ids outside 0..C-1 are left out. Gradients flow
    through both sides.

    **Source.** ContrastiveSeg (Wang et al. 2021). Its code limits the anchors per image and class, picks half of them
    from wrongly predicted pixels, and multiplies the loss by temperature / 0.07. "all" is SupCon (Khosla et al. 2020).

    **Cost.** With A = `max_anchors`, the loss needs at most 5 (C A)^2 numbers at a time beyond the inputs and their
    gradient: 28 MiB in float32 for C = 19 and A = 64, whatever the size of the features. The draw needs another 8
    numbers for each feature pixel. The loss cannot be differentiated twice.

    Args:
        features: embeddings, at any stride.
        labels: class ids at the size of the features (`udakit.downscale_labels`), or `ignore_index`.
        num_classes: C, the number of classes in `labels`.
        temperature: tau > 0; the similarities are divided by it.
        max_anchors: number of pixels drawn from each class.
        denominator: "negatives" | "all", the pixels over which the denominator sums.
        normalize: scale the features to unit length; a zero vector stays zero.
        ignore_index: the label of the pixels to ignore.
        reduction: "mean" | "mean_all" | "sum" | "none".
        generator: generator of the draw, on the device of `features`.

    Returns:
        A float32 scalar (float64 for float64 features), or (C, max_anchors) for "none", with 0 where there is no
        anchor.

    Raises:
        TypeError: `features` is not a float tensor, or `labels` is neither int64 nor uint8.
        ValueError: the shapes do not match, an option is out of range, or the generator is on another device.

    Example:
        >>> import torch
        >>> features = torch.randn(2, 8, 16, 16, requires_grad=True)
        >>> labels = torch.randint(3, (2, 16, 16))
        >>> supervised_pixel_contrast_loss(features, labels, num_classes=3).backward()
    """
    _check_options(num_classes, temperature, max_anchors, denominator, normalize, ignore_index, reduction)
    check_maps("features", features, "N, D")
    check_labels_like(labels, features, reference_name="features")
    check_generator(generator, features.device)
    if labels.numel() == 0:
        return reduce_pixels(features.sum() * upcast(features).new_zeros(num_classes, max_anchors), reduction=reduction)
    pixels, classes, rank, count = _draw_anchors(labels, num_classes, max_anchors, ignore_index, generator)
    drawn = rank < count
    z = upcast(_rows(features.flatten(2), pixels))
    z = torch.where(drawn.unsqueeze(1), z, 0)  # a row that is not drawn holds another pixel, perhaps NaN
    if normalize:
        z = unit_vectors(z)
    if denominator == "negatives":
        left_out = classes == classes.unsqueeze(1)
    else:
        left_out = torch.eye(len(drawn), dtype=torch.bool, device=z.device)
    own, partners = _own_columns(rank, count, max_anchors)
    refuse_transforms(z, vmap=True)
    spread: Tensor = _Spread.apply(z, left_out | ~drawn, own, temperature)
    loss = F.softplus(spread) if denominator == "negatives" else spread
    positives = partners.sum(dim=1)
    loss = torch.where(partners, loss, 0).sum(dim=1) / positives.clamp_min(1)
    valid = drawn & (positives > 0)
    if reduction != "none":
        return reduce_pixels(loss, valid, reduction=reduction)
    spare = num_classes * max_anchors
    slots = torch.where(valid, classes * max_anchors + rank, spare)
    every = loss.new_zeros(spare + 1).scatter(0, slots, loss)
    return every[:-1].view(num_classes, max_anchors)


def _draw_anchors(
    labels: Tensor, num_classes: int, max_anchors: int, ignore_index: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random subset of the pixels of each class: flat pixel indices, classes, ranks, and pixels drawn of that class.

    Rows are sorted by class, then by rank: A of each class, or all pixels if those are fewer. A row whose rank is not
    below the number drawn is not drawn.
    """
    ids = class_ids(labels, num_classes, ignore_index).flatten()
    # A random order, then a stable sort by class: the first A of each class are a uniform subset.
    order = torch.rand(ids.shape, **drawn_by(generator), device=ids.device, dtype=torch.float32).argsort()
    order = order[ids[order].argsort(stable=True)]
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids, torch.ones_like(ids))
    first = counts.cumsum(0) - counts
    drawn = counts.clamp_max(max_anchors).mul_(torch.arange(num_classes + 1, device=ids.device) < num_classes)
    if len(ids) <= num_classes * max_anchors:
        ids = ids[order]
        rank = torch.arange(len(ids), device=ids.device) - first[ids]
        return order, ids, rank, drawn[ids]
    slots = torch.arange(num_classes * max_anchors, device=ids.device)
    classes, rank = slots // max_anchors, slots % max_anchors
    return order[(first[classes] + rank).clamp_max(len(ids) - 1)], classes, rank, drawn[classes]


def _rows(x: Tensor, pixels: Tensor) -> Tensor:
    """The pixels (rows, D) of (N, D, P)."""
    size = x.shape[2]
    if len(pixels) == len(x) * size:  # all of them: moving whole rows is quicker than collecting their numbers
        return x.transpose(1, 2).flatten(0, 1).index_select(0, pixels)
    # Index first, so that the rest works on the sample and not on the whole map.
    return x[pixels // size, :, pixels % size]


def _own_columns(rank: Tensor, count: Tensor, max_anchors: int) -> tuple[Tensor, Tensor]:
    """The columns of each row's class, (rows, A), and which of them are drawn and not the row itself."""
    rows = torch.arange(len(rank), device=rank.device)
    column, rank = rows[:max_anchors], rank.unsqueeze(1)
    own = (rows.unsqueeze(1) - rank + column).clamp_max_(len(rank) - 1)
    return own, (column < count.unsqueeze(1)) & (column != rank)


class _Spread(torch.autograd.Function):
    """Log-sum-exp of z z' / temperature over each row, minus the entries of its `own` columns: (rows, A).

    The sum has no pair that is `left_out`.

    Autograd would keep four matrices of all pairs, and multiply twice although the gradient is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, left_out: Tensor, own: Tensor, temperature: float) -> Tensor:
        with full_precision(z):
            similarity = torch.mm(z / (temperature * LOG_2), z.T)
        entries = similarity.gather(1, own)
        lowest = torch.finfo(z.dtype).min
        top = similarity.masked_fill_(left_out, lowest).amax(dim=1, keepdim=True)
        share = similarity.sub_(top.clamp_min(lowest / 2)).exp2_()  # 0 in a row without pairs, too
        total = share.sum(dim=1, keepdim=True)
        share.div_(total.clamp_min(torch.finfo(z.dtype).tiny))  # a row without pairs
        ctx.save_for_backward(z, share, own)
        ctx.temperature = temperature
        return (total.log2_().add_(top) - entries).mul_(LOG_2)

    @staticmethod
    @first_derivative_only("`supervised_pixel_contrast_loss`")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        z, share, own = ctx.saved_tensors
        gradient = (share * grad.sum(dim=1, keepdim=True)).scatter_add_(1, own, -grad)
        with full_precision(z):
            # A transposed copy goes by tiles, a sum with a transposed matrix by columns.
            gradient = gradient.T.contiguous().add_(gradient)
            return torch.mm(gradient, z / ctx.temperature), None, None, None


def _check_options(
    num_classes: int,
    temperature: float,
    max_anchors: int,
    denominator: str,
    normalize: bool,
    ignore_index: int,
    reduction: str,
) -> None:
    check_integer("num_classes", num_classes)
    check_range("temperature", temperature, 0.0, open_low=True)
    check_integer("max_anchors", max_anchors)
    check_option("denominator", denominator, DENOMINATORS)
    check_flag("normalize", normalize)
    check_ignore_index(ignore_index, num_classes)
    check_reduction(reduction)


class SupervisedPixelContrastLoss(nn.Module):
    """Module version of [`supervised_pixel_contrast_loss`][udakit.losses.supervised_pixel_contrast_loss].

    Example:
        >>> import torch
        >>> criterion = SupervisedPixelContrastLoss(2, temperature=1.0)
        >>> features = torch.ones(1, 4, 2, 2)
        >>> criterion(features, torch.tensor([[[0, 0], [1, 1]]]))  # log 3: one positive, two negatives
        tensor(1.0986)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        temperature: float = 0.1,
        max_anchors: int = 64,
        denominator: Denominator = "negatives",
        normalize: bool = True,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(num_classes, temperature, max_anchors, denominator, normalize, ignore_index, reduction)
        self.num_classes = num_classes
        self.temperature = temperature
        self.max_anchors = max_anchors
        self.denominator: Denominator = denominator
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "n d *space"],
        labels: Integer[Tensor, "n *space"],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw anchors, then apply the function with the configuration given at construction."""
        return supervised_pixel_contrast_loss(
            features,
            labels,
            num_classes=self.num_classes,
            temperature=self.temperature,
            max_anchors=self.max_anchors,
            denominator=self.denominator,
            normalize=self.normalize,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            generator=generator,
        )

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return (
            f"num_classes={self.num_classes}, temperature={self.temperature}, max_anchors={self.max_anchors}, "
            f"denominator={self.denominator!r}, normalize={self.normalize}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )
