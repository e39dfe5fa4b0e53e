"""Soft pseudo-labels that are weighted by the distance to each class prototype (ProDA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from udakit._checks import check_maps, check_range, check_same_shape, check_scores
from udakit._reduce import Kind, exp_, is_large, learns, upcast
from udakit.prototypes import ClassPrototypes
from udakit.pseudo_labels._by_prototypes import PrototypeSelector
from udakit.pseudo_labels._renormalise import Place, renormalised, renormalised_in_pieces
from udakit.pseudo_labels.selection import others


def rectify_probabilities(
    probabilities: Float[Tensor, "n c *space"], distances: Float[Tensor, "n c *space"], *, temperature: float = 1.0
) -> Float[Tensor, "n c *space"]:
    r"""Weight class probabilities by the proximity of the class prototypes, and renormalise.

    $$\tilde p_c = \frac{\omega_c\, p_c}{\sum_k \omega_k\, p_k}, \qquad
    \omega = \operatorname{softmax}_c(-d_c / T)$$

    **Convention.** The probabilities of each pixel sum to 1. A class at distance +inf (one that has not been seen) gets
    0. A pixel keeps its probabilities if every class with a positive probability is at +inf. Gradients flow to both
    arguments; detach those of a teacher. Computations use at least float32.

    **Source.** ProDA (Zhang et al., CVPR 2021), eq. 3 and 4. It uses fixed probabilities of the warm-up net, and
    distances of the momentum net's features, at the size of the features. Its option `proto_temperature` multiplies the
    distances where T divides them; both are 1.

    Args:
        probabilities: class probabilities, for example a softmax.
        distances: distance of each feature pixel to each prototype, for example from `ClassPrototypes.distances`.
        temperature: T > 0; the distances are divided by it.

    Returns:
        The rectified probabilities, float32 (float64 for float64 probabilities).

    Raises:
        TypeError: a tensor is not float.
        ValueError: the shapes do not match, or `temperature` is not above 0.

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
    d = upcast(distances).to(p.dtype)
    if learns(p) or learns(d) or not is_large(p) or type(p) is not Tensor or type(d) is not Tensor:
        return renormalised(p, _proximity_(torch.where(_positive(p), d, float("inf")), 1, temperature))
    maps, far, never = p.flatten(2), d.flatten(2), p.new_tensor(float("inf"))

    def weight(place: Place, out: Tensor) -> Tensor:
        return _proximity_(torch.where(_positive(maps[place]), far[place], never, out=out), 1, temperature)

    return renormalised_in_pieces(maps, weight)[0].view(p.shape)


def _positive(p: Tensor) -> Tensor:
    """`p > 0`, in a third of the time on a CPU; True for NaN as well."""
    return p.clamp_min(0).bool()


def _proximity_(distances: Tensor, dim: int, temperature: float) -> Tensor:
    """The weights, written over the distances, which are +inf for a class without a probability.

    The denominator of the softmax cancels. Relative to the nearest class at least one weight is 1.
    """
    nearest = distances.detach().amin(dim, keepdim=True)
    nearest = torch.where(nearest == float("inf"), 0, nearest)
    return exp_(distances.sub_(nearest), -1 / temperature)


class RectifiedSelector(PrototypeSelector):
    r"""Take the arg-max of class probabilities that are rectified by the prototypes.

    $$\hat y = \arg\max_c p_c\, \omega_c, \qquad \omega = \operatorname{up}(\operatorname{softmax}(-d / T))$$

    The rectification is [`rectify_probabilities`][udakit.pseudo_labels.rectify_probabilities].

    **Convention.** The results are detached. The softmax of the distances (not the distances) is upsampled to the size
    of the logits, linearly in each axis and with align_corners=False. A valid pixel is kept if its rectified confidence
    is at least `threshold`; by default all are kept. `confidence` is the rectified confidence. A pixel at which every
    class with a positive probability has weight 0 keeps the label of the classifier. The `ClassPrototypes` does not
    become a submodule, so save its state separately.

    **Source.** ProDA. It uses the probabilities of the warm-up net, computed once, and the features of the momentum
    net: `selector(fixed, features, kind="probabilities")`. It also has a threshold on the rectified confidence
    (`train_thred`), which is 0.

    Args:
        prototypes: the class prototypes to compare with.
        temperature: T > 0; the distances are divided by it.
        threshold: lowest rectified confidence of a pixel that is kept, in [0, 1].
        ignore_index: the label of rejected pixels.
        exclude: ids of classes that are never predicted; the arg-max and its confidence are taken over the other
            classes.

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

    def scores(self, logits: Tensor, features: Tensor, kind: Kind) -> tuple[Tensor, Kind]:
        """The rectified probabilities."""
        near = self.nearness(features, logits.shape[2:], temperature=self.temperature, exclude=self.exclude)
        p = others(logits, kind, self.exclude)
        return renormalised(p, near.to(p.dtype)), "probabilities"

    def keep(
        self, labels: Tensor, confidence: Tensor, valid: Tensor | None, num_classes: int, features: Tensor | None
    ) -> Tensor:
        """Whether the rectified confidence reaches the threshold."""
        kept = confidence >= self.threshold
        return kept if valid is None else kept & valid

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"temperature={self.temperature:g}, threshold={self.threshold:g}, {super().extra_repr()}"
