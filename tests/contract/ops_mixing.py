"""Entries of udakit.mixing. A Module that draws is held to the same draw and application, written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import udakit
from contract.registry import Call, Operation, Sample
from udakit import SegBatch


def _pair(s: Sample) -> tuple[SegBatch, SegBatch]:
    return SegBatch(s.images(), s.labels(), s.weight()), SegBatch(s.images(), s.labels(), s.weight())


def _chosen(s: Sample, columns: int) -> Tensor:
    return s.tag(torch.rand(s.n, columns, generator=s.generator) < 0.5, "chosen")


def _class_mask(s: Sample) -> Call:
    return Call((s.labels(), _chosen(s, s.c)), {}, {"paste_ignore": True})


def _class_mask_ignored_column(s: Sample) -> Call:
    return Call((s.labels(), _chosen(s, s.c + 1)), {}, {"num_classes": s.c})


def _strong_draw(s: Sample) -> udakit.StrongAugmentDraw:
    draw = udakit.draw_strong_augment(
        s.n,
        greyscale_probability=0.5,
        sharpness_probability=0.7,
        blur_sigma=(0.3, 0.6),
        gamma=(1.0, 2.0),
        noise_probability=0.5,
        generator=s.generator,
    )
    return draw._replace(**{k: s.tag(v, "batch_values") for k, v in draw._asdict().items() if isinstance(v, Tensor)})


def _statistics(s: Sample) -> dict[str, Tensor]:
    mean, std = (s.tag(torch.tensor(v), "other") for v in ((0.5, 0.4, 0.6), (0.2, 0.3, 0.25)))
    return {"mean": mean, "std": std}


def _draw_and_mix(
    source: SegBatch, target: SegBatch, *, generator: torch.Generator | None = None, paste_ignore: bool, **options: Any
) -> Any:
    chosen = udakit.draw_classes(source.labels, generator=generator, **options)
    mask = udakit.class_mask(
        source.labels, chosen, num_classes=options["num_classes"], paste_ignore=paste_ignore, ignore_index=255
    )
    return udakit.class_mix(source, target, mask), mask


def _draw_and_augment(
    images: Tensor, *, mean: Tensor, std: Tensor, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError("Expected `generator` on the device of the images: the function takes the device by itself.")
    draw = udakit.draw_strong_augment(len(images), generator=generator, device=images.device, **options)
    return udakit.strong_augment(images, draw, mean=mean, std=std)


def _draw_and_cross(
    images: Tensor,
    labels: Tensor,
    target_images: Tensor,
    *,
    num_classes: int,
    translate: Callable[[Tensor, Tensor], Tensor],
    augment: Callable[[Tensor], Tensor],
    blend: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    chosen = udakit.draw_classes(labels, num_classes=num_classes, rounding="down", generator=generator)
    mask = udakit.class_mask(labels, chosen, paste_ignore=True)
    augmented = images + blend * (augment(images) - images)
    return udakit.cross_domain_mix(augmented, translate(images, target_images), mask), mask


def _check_images(images: Tensor, **options: Any) -> Tensor:
    udakit.check_images(images, **options)
    return images


def _move_mean(images: Tensor, target_images: Tensor) -> Tensor:
    own, other = (x.flatten(2).mean(2).view(*x.shape[:2], *(1,) * (images.ndim - 2)) for x in (images, target_images))
    return images + (other - own)


def _darken(images: Tensor) -> Tensor:
    return images - 1


READS = "it reads the values because it is asked to"
NO_MODULE = {"module": "a pure function without state; ClassMix and CrossDomainMix are the Modules that use it"}
DRAWS = {"kind": "draw", "grad": (), "output": "other"}
MAPS = {"kind": "map", "exempt": NO_MODULE}
ANY_SIZE = {**NO_MODULE, "shape_errors.size": "only statistics of the style are used: it may have any size"}


def _mask_tokens(s: Sample) -> Call:
    """Tokens in the place of classes: their order does not matter."""
    tokens = s.tag(s.normal(s.n, s.c, s.d), "batch_class_vectors")
    mask = s.tag(torch.rand(s.n, s.c, generator=s.generator) < 0.5, "chosen")
    return Call((tokens, mask, s.tag(s.normal(1, 1, s.d), "other")))


OPERATIONS = [
    Operation(
        "draw_classes",
        lambda s: Call((s.labels(),), {}, {"num_classes": s.c}),
        udakit.draw_classes,
        kind="draw",
        grad=(),
        output="chosen",
        exempt=NO_MODULE,
    ),
    Operation(
        "draw_classes[batch]",
        lambda s: Call(
            (s.labels(),),
            {},
            {
                "num_classes": s.c,
                "scope": "batch",
                "candidates": range(s.c),
                "include_ignore": True,
                "rounding": "down",
            },
        ),
        udakit.draw_classes,
        kind="draw",
        grad=(),
        output="chosen",
        exempt=NO_MODULE,
    ),
    Operation(
        "class_mask",
        _class_mask,
        udakit.class_mask,
        grad=(),
        output="mask",
        inductor=True,
        wrong={"num_classes": (0, -1, 2.5, "3", True)},
        **MAPS,
    ),
    Operation(
        "class_mask[ignored column]",
        _class_mask_ignored_column,
        udakit.class_mask,
        grad=(),
        output="mask",
        wrong={"num_classes": (0, -1, 2.5, "3", True)},
        **MAPS,
    ),
    Operation(
        "paste",
        lambda s: Call((s.mask(), s.images(), s.images())),
        udakit.paste,
        grad=(1, 2),
        output="images",
        covers=("SegBatch",),
        **MAPS,
    ),
    Operation(
        "class_mix",
        lambda s: Call((*_pair(s), s.mask())),
        udakit.class_mix,
        grad=(0, 1),
        output=("images", "labels", "weight"),
        **MAPS,
    ),
    Operation(
        "ClassMix",
        lambda s: Call(_pair(s), {}, {"num_classes": s.c, "include_ignore": True, "paste_ignore": False}),
        _draw_and_mix,
        udakit.ClassMix,
        kind="draw",
        grad=(0, 1),
        output=("images", "labels", "weight", "mask"),
    ),
    Operation(
        "ClassMix[candidates]",
        lambda s: Call(
            _pair(s),
            {},
            {
                "num_classes": s.c,
                "candidates": s.tag(torch.ones(s.c, dtype=torch.bool), "class_values"),
                "fraction": 0.7,
                "paste_ignore": True,
            },
        ),
        _draw_and_mix,
        udakit.ClassMix,
        kind="draw",
        grad=(0, 1),
        output=("images", "labels", "weight", "mask"),
    ),
    Operation(
        "target_paste",
        lambda s: Call((*_pair(s), s.weight()), {"extra_mask": s.mask()}, {"threshold": 0.6}),
        udakit.target_paste,
        udakit.TargetPaste,
        kind="map",
        grad=(0, 1),
        output=("images", "labels", "weight", "mask"),
        covers=("TargetPaste",),
    ),
    Operation(
        "cross_domain_mix",
        lambda s: Call((s.images(), s.images(), s.mask())),
        udakit.cross_domain_mix,
        grad=(0, 1),
        output="images",
        **MAPS,
    ),
    Operation(
        "CrossDomainMix",
        lambda s: Call(
            (s.images(), s.labels(), s.tag(s.normal(s.n, 3, s.h // 2, s.w // 2), "images")),
            {},
            {"num_classes": s.c, "translate": _move_mean, "augment": _darken, "blend": 0.4},
        ),
        _draw_and_cross,
        udakit.CrossDomainMix,
        kind="draw",
        grad=(),
        output=("images", "mask"),
    ),
    Operation(
        "boundary_band",
        lambda s: Call((s.mask(),)),
        udakit.boundary_band,
        grad=(),
        output="mask",
        inductor=True,
        **MAPS,
        space="test_mixing_masks.py::test_boundary_band",
    ),
    Operation(
        "boundary_band[2]",
        lambda s: Call((s.mask(),), {}, {"kernel_size": 2}),
        udakit.boundary_band,
        grad=(),
        output="mask",
        **MAPS,
        space="test_mixing_masks.py::test_boundary_band",
    ),
    Operation(
        "draw_box_mask",
        lambda s: Call((s.n, (s.h, s.w)), {}, {"device": "cpu"}),
        udakit.draw_box_mask,
        exempt=NO_MODULE,
        **DRAWS,
        space="test_mixing_masks.py::test_box_is_one_box_of_the_area",
    ),
    Operation(
        "draw_block_mask",
        lambda s: Call((s.n, (s.h, s.w)), {}, {"block_size": 3, "device": "cpu"}),
        udakit.draw_block_mask,
        exempt=NO_MODULE,
        **DRAWS,
        space="test_mixing_masks.py::test_blocks_follow_mic",
    ),
    Operation(
        "draw_token_mask",
        lambda s: Call((s.n, s.h), {}, {"ratio": 0.5, "prefix": 1, "device": "cpu"}),
        udakit.draw_token_mask,
        space="none",
        exempt=NO_MODULE,
        **DRAWS,
    ),
    Operation(
        "mask_tokens",
        _mask_tokens,
        udakit.mask_tokens,
        kind="map",
        grad=(0, 2),
        output="batch_class_vectors",
        space="none",
        exempt={"module": "the mask token is a parameter of the net"},
    ),
    Operation(
        "fourier_transfer",
        lambda s: Call((s.images(), s.images()), {}, {"beta": 0.15}),
        udakit.fourier_transfer,
        output="images",
        **MAPS,
        space="test_mixing_style.py::test_fourier_transfer_in_any_space",
    ),
    Operation(
        "color_transfer",
        lambda s: Call((s.images01(), s.images01()), {}, {"mean": (0.1, 0.0, 0.1), "std": (0.8, 0.9, 0.8)}),
        udakit.color_transfer,
        kind="map",
        output="images",
        exempt=ANY_SIZE,
        space="two",
    ),
    Operation(
        "histogram_transfer",
        lambda s: Call((s.images(), s.images())),
        udakit.histogram_transfer,
        kind="map",
        grad=(),
        output="images",
        exempt=ANY_SIZE,
    ),
    Operation(
        "check_images",
        lambda s: Call((s.images01(),), {}, {"mean": (0.1, 0.0, 0.1), "std": (0.8, 0.9, 0.8)}),
        _check_images,
        kind="map",
        grad=(),
        output="images",
        exempt={**NO_MODULE, "fake_tensors": READS, "no_device_copy": READS, "compile": READS},
    ),
    Operation(
        "draw_strong_augment",
        lambda s: Call(
            (s.n,),
            {},
            {
                "greyscale_probability": 0.3,
                "sharpness_probability": 0.3,
                "gamma": (0.5, 2.0),
                "noise_probability": 0.3,
                "device": "cpu",
            },
        ),
        udakit.draw_strong_augment,
        covers=("StrongAugmentDraw",),
        exempt=NO_MODULE,
        **DRAWS,
        space="none",
    ),
    Operation(
        "strong_augment",
        lambda s: Call((s.images(), _strong_draw(s)), {}, {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}),
        udakit.strong_augment,
        kind="map",
        output="images",
        exempt={"module": "StrongAugment draws by itself, and has its own entry"},
        inductor=True,
        space="test_mixing_augment.py::test_images_of_any_channels_in_any_space",
    ),
    Operation(
        "StrongAugment",
        lambda s: Call((s.images(),), {}, {**_statistics(s), "greyscale_probability": 0.5, "blur_sigma": (0.3, 0.6)}),
        _draw_and_augment,
        udakit.StrongAugment,
        kind="draw",
        output="images",
        space="test_mixing_augment.py::test_images_of_any_channels_in_any_space",
    ),
]
