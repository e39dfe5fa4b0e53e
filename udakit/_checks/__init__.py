"""Argument checks: one message form, static facts only (shapes, dtypes, devices, options), never a tensor's values.

"Expected `name` to be ..., but got ...." Where the usual cause is known, another sentence says what to do.
"""

from udakit._checks.devices import as_device, check_device, check_generator, draw_device, drawn_by
from udakit._checks.form import is_integer, is_sequence, kind_of, shape_of, space_form
from udakit._checks.maps import (
    axis_hint,
    check_confidence,
    check_label_map,
    check_labels_like,
    check_maps,
    check_mask,
    check_mask_like,
    check_scores,
    check_spatial,
    check_two_dimensional,
    check_weight_like,
)
from udakit._checks.nets import net_logits
from udakit._checks.options import (
    check_callable,
    check_classes,
    check_flag,
    check_ignore_index,
    check_integer,
    check_numbers,
    check_option,
    check_pair,
    check_range,
    check_size,
    warn_user,
)
from udakit._checks.tensors import check_float, check_per_class, check_same_shape, check_tensor, check_weight_option

__all__ = [
    "as_device",
    "axis_hint",
    "check_callable",
    "check_classes",
    "check_confidence",
    "check_device",
    "check_flag",
    "check_float",
    "check_generator",
    "check_ignore_index",
    "check_integer",
    "check_label_map",
    "check_labels_like",
    "check_maps",
    "check_mask",
    "check_mask_like",
    "check_numbers",
    "check_option",
    "check_pair",
    "check_per_class",
    "check_range",
    "check_same_shape",
    "check_scores",
    "check_size",
    "check_spatial",
    "check_tensor",
    "check_two_dimensional",
    "check_weight_like",
    "check_weight_option",
    "draw_device",
    "drawn_by",
    "is_integer",
    "is_sequence",
    "kind_of",
    "net_logits",
    "shape_of",
    "space_form",
    "warn_user",
]
