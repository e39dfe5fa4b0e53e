"""Shared code of contrasts between feature pixels and classes: checks, valid pixels, cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from udakit._checks import (
    check_device,
    check_flag,
    check_float,
    check_ignore_index,
    check_labels_like,
    check_maps,
    check_per_class,
    check_range,
    check_weight_like,
    kind_of,
    shape_of,
)
from udakit._reduce import check_reduction, class_ids, look_up, select


def check_contrast_options(temperature: float, normalize: bool, ignore_index: int, reduction: str) -> None:
    """Raise unless the options that these contrasts share are valid."""
    check_range("temperature", temperature, 0.0, open_low=True)
    check_flag("normalize", normalize)
    check_ignore_index(ignore_index)
    check_reduction(reduction)


def check_contrast(
    features: Tensor,
    labels: Tensor,
    vectors: Tensor,
    name: str,
    *,
    seen: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
) -> None:
    """Raise unless features, labels and the class vectors (C, D), called `name`, match each other."""
    check_maps("features", features, "N, D")
    check_labels_like(labels, features, reference_name="features")
    check_float(name, vectors, 2, "(C, D)")
    if vectors.shape[1] != features.shape[1]:
        raise ValueError(
            f"Expected `{name}` to be (C, D) matching `features` {shape_of(features)}, but got {shape_of(vectors)}."
        )
    check_device(name, vectors, features, "features")
    if seen is not None:
        check_per_class("seen", seen, len(vectors), reference=vectors, reference_name=name)
        if seen.dtype != torch.bool:
            raise TypeError(
                f"Expected `seen` to be a bool tensor, but got {kind_of(seen)}. "
                "Pass the `.seen` of a ClassPrototypes or ClassDistributions."
            )
    if pixel_weight is not None:
        check_weight_like(pixel_weight, features, reference_name="features")
    check_ignore_index(ignore_index, len(vectors))


def counted_ids(
    labels: Tensor, vectors: Tensor, seen: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Class ids (N, *space), 0 where there is none, the mask of pixels that count, and the seen classes (C,).

    By default, a class counts as seen if its vector is not all zero.
    """
    seen = vectors.detach().ne(0).any(dim=1) if seen is None else seen
    ids = class_ids(labels, len(vectors), ignore_index)
    inside = ids < len(vectors)
    ids = torch.where(inside, ids, 0)
    return ids, inside & look_up(seen, ids), seen


def seen_rows(vectors: Tensor, seen: Tensor) -> Tensor:
    """The vectors, 0 for unseen classes: a NaN there would reach the gradient of every pixel."""
    return select(seen.unsqueeze(1), vectors)


def seen_cross_entropy(logits: Tensor, ids: Tensor, valid: Tensor, seen: Tensor) -> Tensor:
    """Cross-entropy of logits (N, C, *space) over the seen classes; 0 at pixels that do not count."""
    # Finite, because a pixel without any candidate would otherwise give NaN. Such a pixel is ignored.
    logits = torch.where(seen.view(-1, *[1] * (logits.ndim - 2)), logits, torch.finfo(logits.dtype).min / 4)
    return F.cross_entropy(logits, torch.where(valid, ids, -100), reduction="none")
