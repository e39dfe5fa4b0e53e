"""CrDoMix: mix two renderings of a source image by classes. The layout stays, so the label stays valid."""

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

    **Convention.** True takes the augmented side. Both sides show the same scene, so the label of the source image is
    also the label of the mixed image.

    **Source.** DiGA (CVPR 2023).

    Args:
        augmented: x^a, the augmented source images.
        translated: x^{s->t}, the source images in the style of the target domain, of the same shape.
        mask: bool (N, *space), True where the augmented side is taken.

    Returns:
        Images of the same shape.

    Raises:
        TypeError: an image tensor is not float, or `mask` is not bool.
        ValueError: the sizes differ.

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
    r"""CrDoMix of source images: augment them, translate them, draw classes, and mix both renderings.

    $$x^a = \beta\,\text{Aug}(x) + (1 - \beta)\,x, \qquad M = [\,y \in K\,], \qquad
    |K| = \lfloor n / 2 \rfloor \text{ of the } n \text{ classes of the image}$$

    **Convention.** By default, ignored pixels take the augmented side. Both renderings are computed without gradients.
    If `translate` and `augment` are Modules, they become submodules.

    **Source.** DiGA (CVPR 2023), with a blend of 0.4 in the warm-up and 0.3 in self-training. Its released code counts
    the ignored pixels as one of the n classes (`include_ignore=True`).

    Args:
        num_classes: C, the number of classes.
        translate: `translate(source_images, target_images) -> images` of the shape of the source images, for example
            `fourier_transfer` or a learned net.
        augment: `augment(images) -> images`, for example a `StrongAugment`. If it has an argument `generator`, it gets
            the generator of the call.
        blend: beta in [0, 1], the weight of the augmentation.
        fraction: fraction of the present classes to draw.
        rounding: "down" | "up", for the number of classes to draw.
        scope: "image" | "batch", the source of the classes that an image draws from.
        candidates: the classes that may be drawn; None for all.
        include_ignore: whether the ignored pixels count as one more class.
        paste_ignore: whether ignored pixels always take the augmented side.
        ignore_index: the label of ignored pixels.

    Raises:
        ValueError: an option is unknown; in `forward`, the sizes do not match, including those of the images that
            `translate` and `augment` return.

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
        """Return the mixed images and the mask. `labels` are still the labels of the mixed images."""
        check_image_batch("images", images)
        check_image_batch("target_images", target_images)
        if target_images.ndim != images.ndim:
            raise ValueError(
                f"Expected `target_images` to have the number of axes of `images` {shape_of(images)}, "
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
