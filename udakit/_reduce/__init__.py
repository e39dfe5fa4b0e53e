"""Numerics that all parts share: precision, class maps, masks, means, and where our own passes may run."""

from udakit._reduce.classes import (
    BLOCK,
    by_blocks,
    class_ids,
    count_ids,
    cut_evenly,
    divisor,
    fraction,
    look_up,
    top_by_blocks,
    top_class,
)
from udakit._reduce.eager import (
    first_derivative_only,
    is_batched,
    is_eager_on_cpu,
    is_large,
    is_run_on_cpu,
    is_transformed,
    refuse_transforms,
)
from udakit._reduce.masks import guard, learns, select, softmax_where, zero_where_not_
from udakit._reduce.means import KINDS, Kind, Reduction, check_reduction, divided, reduce_pixels
from udakit._reduce.precision import LOG_2, exp_, full_precision, interpolate, plain, upcast

__all__ = [
    "BLOCK",
    "KINDS",
    "LOG_2",
    "Kind",
    "Reduction",
    "by_blocks",
    "check_reduction",
    "class_ids",
    "count_ids",
    "cut_evenly",
    "divided",
    "divisor",
    "exp_",
    "first_derivative_only",
    "fraction",
    "full_precision",
    "guard",
    "interpolate",
    "is_batched",
    "is_eager_on_cpu",
    "is_large",
    "is_run_on_cpu",
    "is_transformed",
    "learns",
    "look_up",
    "plain",
    "reduce_pixels",
    "refuse_transforms",
    "select",
    "softmax_where",
    "top_by_blocks",
    "top_class",
    "upcast",
    "zero_where_not_",
]
