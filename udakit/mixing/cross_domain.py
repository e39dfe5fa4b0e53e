"""CrDoMix: two renderings of one source image, mixed by classes; the layout, and so the label, stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from udakit._checks import (
    check_callable,
    check_labels_like,
    check_mask_like,
    check_range,
    check_same_shape,
    kind_of,
    shape_of,
)
from udakit.mixing._random import Generators, check_generators
from udakit.mixing.batch import RESIZE_HINT, paste
from udakit.mixing.class_mix import ClassMix
from udakit.mixing.classes import Rounding, Scope
from udakit.mixing.images import check_image_batch
from udakit.teachers import unwrap_model


def cross_domain_mix(
    augmented: Float[Tensor, "n k *space"], translated: Float[Tensor, "n k *space"], mask: Bool[Tensor, "n *space"]
) -> Float[Tensor, "n k *space"]:
    r"""Mix an augmented and a target-styled rendering of the same source images.

    $$x' = M \odot x^a + (1 - M) \odot x^{s \to t}$$

    **Convention.** True takes the augmented side. Both show the same scene, so that the label of the source image is
    the label of the mixture.

    **Source.** DiGA (CVPR 2023).

    Args:
        augmented: x^a.
        translated: x^{s->t}, of the same shape.
        mask: bool (N, *space).

    Returns:
        Images of the same shape.

    Raises:
        TypeError: images that are not float, or a mask that is not bool.
        ValueError: unequal sizes.

    Example:
        >>> import torch
        >>> augmented = torch.ones(1, 3, 1, 2, requires_grad=True)
        >>> mixed = cross_domain_mix(augmented, torch.zeros(1, 3, 1, 2), torch.tensor([[[True, False]]]))
        >>> mixed.sum().backward()
        >>> mixed[0, 0].detach()
        tensor([[1., 0.]])
    """
    check_image_batch("augmented", augmented)
    check_image_batch("translated", translated)
    check_same_shape(translated, augmented, name="translated", reference_name="augmented", hint=RESIZE_HINT)
    check_mask_like(mask, augmented, name="mask", reference_name="augmented")
    return paste(mask, augmented, translated)


def _check_rendering(name: str, rendering: object, images: Tensor) -> None:
    if not isinstance(rendering, Tensor) or rendering.shape != images.shape:
        given = shape_of(rendering) if isinstance(rendering, Tensor) else kind_of(rendering)
        raise ValueError(f"Expected `{name}` to return images of the shape {shape_of(images)}, but got {given}.")


class CrossDomainMix(nn.Module):
    r"""CrDoMix of source images: augment, translate, draw classes, mix.

    $$x^a = \beta\,\text{Aug}(x) + (1 - \beta)\,x, \qquad M = [\,y \in K\,], \qquad
    |K| = \lfloor n / 2 \rfloor \text{ of the } n \text{ classes of the image}$$

    **Convention.** Ignored pixels always take the augmented side. Both renderings are made without a graph: they are
    data. Modules given as `translate` and `augment` become submodules.

    **Source.** DiGA (CVPR 2023): blend 0.4 in the warm-up, 0.3 in self-training; its released draw counts the ignored
    pixels among the n: `include_ignore=True`.

    Args:
        num_classes: C.
        translate: `translate(source_images, target_images) -> images` of the source's shape, for example
            `fourier_transfer` or a learned net.
        augment: `augment(images) -> images`, for example a `StrongAugment`; the generator is handed on when the
            callable has an argument `generator`.
        blend: beta in [0, 1].
        fraction: share of the present classes.
        rounding: "down" | "up".
        scope: "image" | "batch".
        candidates: classes that may be drawn.
        include_ignore: count the ignored pixels as one more class in n.
        paste_ignore: ignored pixels always take the augmented side.
        ignore_index: the label that is no class.

    Raises:
        ValueError: an unknown option; in `forward` sizes that do not match, also those of the two callables' results.

    Example:
        >>> import torch
        >>> from udakit.mixing import StrongAugment, fourier_transfer
        >>> mix = CrossDomainMix(4, fourier_transfer, StrongAugment(mean=None, std=None))
        >>> images, target_images = torch.rand(2, 2, 3, 16, 16)
        >>> labels = torch.arange(4).repeat(2, 16, 4)
        >>> mixed, mask = mix(images, labels, target_images)
        >>> mixed.shape, mask.float().mean().item()
        (torch.Size([2, 3, 16, 16]), 0.5)
    """

    def __init__(
        self,
        num_classes: int,
        translate: Callable[[Tensor, Tensor], Tensor],
        augment: Callable[..., Tensor],
        blend: float = 0.4,
        *,
        fraction: float = 0.5,
        rounding: Rounding = "down",
        scope: Scope = "image",
        candidates: Sequence[int] | Bool[Tensor, "c"] | None = None,
        include_ignore: bool = False,
        paste_ignore: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_callable("translate", translate, "translate(source_images, target_images)")
        check_callable("augment", augment, "augment(images)")
        check_range("blend", blend, 0.0, 1.0)
        self.classes = ClassMix(
            num_classes,
            fraction=fraction,
            rounding=rounding,
            scope=scope,
            candidates=candidates,
            include_ignore=include_ignore,
            paste_ignore=paste_ignore,
            ignore_index=ignore_index,
        )
        self.translate = translate
        self.augment = augment
        self.blend = blend
        self._hand_on_generator = _takes_generator(augment)

    def forward(
        self,
        images: Float[Tensor, "n k *space"],
        labels: Integer[Tensor, "n *space"],
        target_images: Float[Tensor, "n k *space2"],
        *,
        generator: Generators | None = None,
    ) -> tuple[Float[Tensor, "n k *space"], Bool[Tensor, "n *space"]]:
        """Return the mixed images, whose labels are still `labels`, and the mask."""
        check_image_batch("images", images)
        check_image_batch("target_images", target_images)
        if target_images.ndim != images.ndim:
            raise ValueError(
                f"Expected `target_images` to have as many axes as `images` {shape_of(images)}, "
                f"but got {shape_of(target_images)}."
            )
        check_labels_like(labels, images, reference_name="images")
        check_generators(generator, len(images), images.device)
        mask = self.classes.draw_mask(labels, generator=generator)
        with torch.no_grad():
            augmented = self.augment(images, generator=generator) if self._hand_on_generator else self.augment(images)
            _check_rendering("augment", augmented, images)
            augmented = torch.lerp(images, augmented.to(images.dtype), self.blend)
            translated = self.translate(images, target_images)
            _check_rendering("translate", translated, images)
            return cross_domain_mix(augmented, translated.to(images.dtype), mask), mask

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"blend={self.blend}"


def _takes_generator(augment: Callable[..., Tensor]) -> bool:
    function = unwrap_model(augment).forward if isinstance(augment, nn.Module) else augment
    try:
        return "generator" in inspect.signature(function).parameters
    except ValueError:  # a builtin such as torch.clone has no signature
        return False
