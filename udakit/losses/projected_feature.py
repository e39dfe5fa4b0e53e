"""Feature distillation between nets with different numbers of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from udakit._checks import check_device, check_flag, check_integer, check_maps, check_mask_like, check_option, shape_of
from udakit._reduce import Reduction, check_reduction, full_precision, interpolate, select, upcast
from udakit.losses._unit import unit_vectors
from udakit.losses.feature_distance import feature_distance_loss
from udakit.losses.kd import Resize


class ProjectedFeatureLoss(nn.Module):
    r"""Distance between a small net's features, after a learned 1x1 projection, and those of a large net.

    $$\ell_p = \lVert u(W f_p + b) - u(r_p) \rVert_2, \qquad u(x) = x / \lVert x \rVert \text{ or } x$$

    **Convention.** As in `feature_distance_loss`, the distance is not squared, the teacher is detached, and "mean" is
    over the `valid` feature pixels. By default unit vectors are compared, so the loss is at most 2 whatever the scale
    of the teacher's features. The projection has parameters: pass those of this Module to the optimiser, too. It is not
    needed after training.

    **Source.** FitNets (Romero et al. 2015) for the projection. It can be added to DUDA's distillation of logits.

    Args:
        dim: number of channels of the student's features.
        reference_dim: number of channels of the teacher's features.
        normalize: whether to compare unit vectors.
        resize: what to do when the sizes differ: "error" raises, "student" or "teacher" resizes the other map to that
            net's size by linear interpolation.
        reduction: "mean" | "mean_all" | "sum" | "none".

    Example:
        >>> import torch
        >>> criterion = ProjectedFeatureLoss(16, 64, resize="student")
        >>> features = torch.randn(2, 16, 8, 8, requires_grad=True)
        >>> criterion(features, torch.randn(2, 64, 4, 4)).backward()
        >>> criterion.projection.weight.grad.shape
        torch.Size([64, 16, 1, 1])
    """

    def __init__(
        self,
        dim: int,
        reference_dim: int,
        *,
        normalize: bool = True,
        resize: Resize = "error",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_integer("dim", dim)
        check_integer("reference_dim", reference_dim)
        check_flag("normalize", normalize)
        check_option("resize", resize, get_args(Resize))
        check_reduction(reduction)
        self.projection = nn.Conv2d(dim, reference_dim, kernel_size=1)
        self.normalize = normalize
        self.resize: Resize = resize
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "n d *space"],
        reference_features: Float[Tensor, "n e *space2"],
        *,
        valid: Bool[Tensor, "n *space"] | None = None,
    ) -> Tensor:
        """Project the student's features and compare them with the teacher's.

        Args:
            features: features of the student.
            reference_features: features of the teacher.
            valid: True where a feature pixel counts, at the size after `resize`.

        Returns:
            A float32 scalar (float64 for float64 features), or (N, *space) for "none".

        Raises:
            TypeError: a map is not a float tensor, or `valid` is not bool.
            ValueError: the shapes do not match.
        """
        self._check("features", features, "dim", self.projection.in_channels)
        self._check("reference_features", reference_features, "reference_dim", self.projection.out_channels)
        check_device("reference_features", reference_features, features, "features")
        check_device("projection.weight", self.projection.weight, features, "features")
        x, reference = upcast(features), upcast(reference_features.detach())
        if valid is not None and self.resize != "teacher":
            check_mask_like(valid, features, reference_name="features")
            x = select(valid.unsqueeze(1), x)  # otherwise a NaN outside would enter the gradient of the projection
        weight, bias = upcast(self.projection.weight).to(x.dtype), self.projection.bias
        with full_precision(x):
            # Without two spatial axes, use a map of one column: the projection works on single pixels. Without any
            # pixel, which conv2d refuses, use one of zeros that is taken away again.
            empty = 0 in x.shape[2:]
            flat = x if x.ndim == 4 and not empty else x.flatten(2).unsqueeze(3)
            flat = F.pad(flat, (0, 0, 0, 1)) if empty else flat
            flat = F.conv2d(flat, weight, None if bias is None else bias.to(x.dtype))
            flat = flat[:, :, :0] if empty else flat
            x = flat.view(*flat.shape[:2], *x.shape[2:])
        if x.ndim == reference.ndim and x.shape[2:] != reference.shape[2:] and self.resize == "student":
            reference = interpolate(reference, x.shape[2:], name="reference_features")
        elif x.ndim == reference.ndim and x.shape[2:] != reference.shape[2:] and self.resize == "teacher":
            x = interpolate(x, reference.shape[2:], name="features")
        elif x.shape[0] != reference.shape[0] or x.shape[2:] != reference.shape[2:]:
            hint = ' Pass resize="student" or resize="teacher" to interpolate.' if len(x) == len(reference) else ""
            raise ValueError(
                f"Expected `reference_features` to have the batch and size of `features` {shape_of(features)}, "
                f"but got {shape_of(reference_features)}.{hint}"
            )
        if self.normalize:
            x, reference = unit_vectors(x), unit_vectors(reference)
        return feature_distance_loss(x, reference, valid=valid, reduction=self.reduction)

    if TYPE_CHECKING:
        __call__ = forward  # a call has forward's types; nn.Module's has none

    @staticmethod
    def _check(name: str, x: Tensor, option: str, dim: int) -> None:
        check_maps(name, x, "N, D")
        if x.shape[1] != dim:
            raise ValueError(
                f"Expected `{name}` to have {dim} channels, the `{option}` of the loss, but got {shape_of(x)}."
            )

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return f"normalize={self.normalize}, resize={self.resize!r}, reduction={self.reduction!r}"
