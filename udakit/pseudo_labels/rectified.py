"""Soft pseudo-labels weighed by how near each class prototype is (ProDA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from udakit._checks import check_maps, check_range, check_same_shape, check_scores
from udakit._reduce import Kind, upcast
from udakit.prototypes import ClassPrototypes
from udakit.pseudo_labels._by_prototypes import PrototypeSelector
from udakit.pseudo_labels.selection import PseudoLabels, others


def rectify_probabilities(
    probabilities: Float[Tensor, "n c *space"], distances: Float[Tensor, "n c *space"], *, temperature: float = 1.0
) -> Float[Tensor, "n c *space"]:
    r"""Weigh class probabilities by the nearness of the class prototypes, and renormalise.

    $$\tilde p_c = \frac{\omega_c\, p_c}{\sum_k \omega_k\, p_k}, \qquad
    \omega = \operatorname{softmax}_c(-d_c / T)$$

    **Convention.** Every pixel sums to 1. A class at distance +inf (one never seen) gets 0. A pixel keeps its
    probabilities where every class that has one is at +inf. Gradients flow to both arguments; detach what teaches. The
    arithmetic is in float32 at least.

    **Source.** ProDA (Zhang et al., CVPR 2021), eq. 3 and 4: probabilities of the warm-up net, fixed, and distances of
    the momentum net's features at the size of the features. Its option `proto_temperature` multiplies where T divides;
    both are 1.

    Args:
        probabilities: class probabilities, such as a softmax.
        distances: of each pixel's feature to each prototype, as `ClassPrototypes.distances` gives them.
        temperature: T > 0, a divisor.

    Returns:
        Probabilities, float32 (float64 for float64 probabilities).

    Raises:
        TypeError: tensors that are not float.
        ValueError: unlike shapes, or a temperature that is not above 0.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1).requires_grad_()
        >>> rectified = rectify_probabilities(p, torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
        >>> rectified[:, 1].sum().backward()
        >>> rectified.argmax(1).item(), rectify_probabilities(p, torch.full_like(p, float("inf"))).flatten().tolist()
        (1, [0.6000000238418579, 0.4000000059604645])
    """
    check_range("temperature", temperature, 0.0, open_low=True)
    check_scores("probabilities", probabilities, "probabilities")
    check_maps("distances", distances)
    check_same_shape(distances, probabilities, name="distances", reference_name="probabilities")
    p = upcast(probabilities)
    # The softmax's divisor cancels. Measured from the nearest class that has a probability, one weight at least is 1.
    d = torch.where(p > 0, upcast(distances).to(p.dtype), float("inf"))
    nearest = d.detach().amin(1, keepdim=True)
    nearest = torch.where(nearest == float("inf"), 0, nearest)
    return _weighted(p, torch.exp((nearest - d) / temperature))


def _weighted(p: Tensor, weight: Tensor) -> Tensor:
    """P times weight, renormalised over the classes; `p` where that is 0."""
    product = p * weight
    total = product.sum(1, keepdim=True)
    empty = total <= 0
    return torch.where(empty, p, product / torch.where(empty, 1, total))


class RectifiedSelector(PrototypeSelector):
    r"""Take the arg-max of probabilities that are rectified by the prototypes.

    $$\hat y = \arg\max_c p_c\, \omega_c, \qquad \omega = \operatorname{up}(\operatorname{softmax}(-d / T))$$

    The rectification is [`rectify_probabilities`][udakit.pseudo_labels.rectify_probabilities].

    **Convention.** Detached. The softmax of the distances is upsampled (linear in each axis, align_corners=False) to
    the size of the logits, not the distances. Every valid pixel is kept whose rectified confidence reaches
    `threshold`, by default all of them; `confidence` is the rectified one. A pixel far from every seen prototype with a
    probability keeps the classifier's label. The Module refers to a `ClassPrototypes` without owning it: save that one.

    **Source.** ProDA. It takes the probabilities of the warm-up net, computed once, and the features of the momentum
    net: `selector(fixed, features, kind="probabilities")`. A threshold on the rectified confidence exists there
    (`train_thred`) and is 0.

    Args:
        prototypes: the class prototypes that are compared with.
        temperature: T > 0, a divisor.
        threshold: rectified confidence that a pixel needs, in [0, 1].
        ignore_index: the label of what is rejected.
        exclude: ids of classes that are never predicted; arg-max and confidence are those of the others.

    Example:
        >>> import torch
        >>> from udakit import ClassPrototypes
        >>> prototypes = ClassPrototypes(2, 1).set_(torch.tensor([[-1.0], [1.0]]))
        >>> p = torch.tensor([[0.6, 0.6], [0.4, 0.4]]).view(1, 2, 1, 2)
        >>> features = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
        >>> RectifiedSelector(prototypes)(p, features, kind="probabilities").labels
        tensor([[[0, 1]]])
    """

    def __init__(
        self,
        prototypes: ClassPrototypes,
        temperature: float = 1.0,
        *,
        threshold: float = 0.0,
        ignore_index: int = 255,
        exclude: Sequence[int] = (),
    ) -> None:
        super().__init__(prototypes, ignore_index=ignore_index, exclude=exclude)
        check_range("temperature", temperature, 0.0, open_low=True)
        check_range("threshold", threshold, 0.0, 1.0)
        self.temperature, self.threshold = temperature, threshold

    def forward(
        self,
        logits: Float[Tensor, "n c *space"],
        features: Float[Tensor, "n d *space2"] | None = None,
        *,
        kind: Kind = "logits",
        valid: Bool[Tensor, "n *space"] | Bool[Tensor, "*space"] | None = None,
    ) -> PseudoLabels:
        """Select pseudo-labels; `features` of any stride are needed, the rest is that of every selector.

        Raises:
            TypeError: `features` that are missing or not float.
            ValueError: shapes, class numbers or batch sizes that do not match.
        """
        features = self.needed(logits, features, kind)
        with torch.no_grad():
            near = self.nearness(features, logits.shape[2:], temperature=self.temperature, exclude=self.exclude)
            p = others(logits, kind, self.exclude)
            rectified = _weighted(p, near.to(p.dtype))
        return super().forward(rectified, features, kind="probabilities", valid=valid)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the rectified confidence reaches the threshold."""
        kept = confidence >= self.threshold
        return kept if valid is None else kept & valid

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"temperature={self.temperature:g}, threshold={self.threshold:g}, {super().extra_repr()}"
