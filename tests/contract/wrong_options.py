"""Values that an option must refuse, by the option's name: one table for every operation.

An entry of the registry may replace a row (`Operation.wrong`). An option without a row fails the check.
"""

from __future__ import annotations

from typing import Any

import torch

NAN, INF = float("nan"), float("inf")

POSITIVE = (0, -1.0, NAN, INF, "1", None, True)
SHARE = (-0.1, 1.5, NAN, INF, "0.5", None)
SHARE_OPEN = (-0.1, 1.0, NAN, INF, "0.5", None)
NOT_NEGATIVE = (-1.0, NAN, INF, "1", None)
COUNT = (0, -1, 2.5, "3", None, True)
MAYBE_COUNT = (0, -1, 2.5, "3", True)
FLAG = ("no", "false", 1, 0.0, None)
CHOICE = ("nonsense", 3, None)
IGNORE = (None, "255", 255.0, True, 2**70)
GENERATOR = (0, "cpu", ["cpu"])
CALLABLE = (3, "name")

WRONG: dict[str, tuple[Any, ...]] = {
    # shared by many
    "ignore_index": IGNORE,
    "reduction": CHOICE,
    "temperature": POSITIVE,
    "num_classes": COUNT,
    "normalize": FLAG,
    "align_corners": FLAG,
    "sync": FLAG,
    "kind": CHOICE,
    "teacher_kind": CHOICE,
    "resize": CHOICE,
    "divergence": CHOICE,
    "denominator": CHOICE,
    "scope": CHOICE,
    "average": CHOICE,
    "ratio_over": CHOICE,
    "generator": GENERATOR,
    "device": ("gpu", 1.5, True),
    # losses
    "balance": SHARE,
    "reverse_weight": NOT_NEGATIVE,
    "ce_weight": NOT_NEGATIVE,
    "rce_weight": NOT_NEGATIVE,
    "min_probability": (0.0, *SHARE),
    "min_label": (0.0, *SHARE),
    "chunk_rows": MAYBE_COUNT,
    "chunk_size": MAYBE_COUNT,
    "max_anchors": COUNT,
    "size": (8, "8", (0, 4), (4, 4, 4, 4), (4.0, 4), (-1, 4)),
    "weight_range": (2.0, (1.0,), (2.0, 1.0), (-1.0, 1.0), (NAN, 1.0), ("0", 1.0), None),
    "weight_temperature": POSITIVE,
    "weight_fn": CALLABLE,
    "dim": COUNT,
    "reference_dim": COUNT,
    "class_weight": ([1.0, 2.0], 3.0, torch.ones(2, 2)),
    # selectors
    "threshold": SHARE,
    "share": (0.0, *SHARE),
    "momentum": SHARE_OPEN,
    "bins": (1, *COUNT),
    "exclude": (0, "0", (-1,), ("0",), None),
    "include_unseen": FLAG,
    "max_threshold": SHARE,
    # mixing
    "fraction": SHARE,
    "rounding": CHOICE,
    "candidates": (["car"], 1.5, [0.5]),
    "include_ignore": FLAG,
    "paste_ignore": FLAG,
    "blend": SHARE,
    "kernel_size": COUNT,
    "n": (-1, 2.5, "3", None, True),
    "beta": (-0.1, NAN, INF, "1", None),
    "mean": (0.5, (0.5,), "rgb", (NAN, 0.5, 0.5), (INF, 0.5, 0.5)),
    "std": (0.5, (0.5,), "rgb", (NAN, 0.5, 0.5), (INF, 0.5, 0.5), (0.0, 0.5, 0.5), (-1.0, 0.5, 0.5)),
    "draw": (None, {}, 3),
    "brightness": SHARE,
    "contrast": SHARE,
    "saturation": (-0.1, 1.5, NAN, INF, "0.5"),
    "hue": (-0.1, 0.6, NAN, INF, "0.5"),
    "sharpness": SHARE,
    "noise": SHARE,
    "jitter_probability": SHARE,
    "greyscale_probability": SHARE,
    "sharpness_probability": SHARE,
    "blur_probability": SHARE,
    "noise_probability": SHARE,
    "blur_sigma": (1.0, (1.0,), (0.0, 1.0), (2.0, 1.0), (NAN, 1.0), (0.5, INF), ("0", 1.0), None),
    "gamma": (1.0, (1.0,), (0.0, 1.0), (2.0, 1.0), (NAN, 1.0), (0.5, INF), ("0", 1.0), None),
    "tolerance": NOT_NEGATIVE,
    "translate": CALLABLE,
    "augment": CALLABLE,
    "block_size": COUNT,
    "ratio": SHARE,
    "area": (0.5, (0.5,), (0.6, 0.4), (-0.1, 0.5), (NAN, 0.5)),
    # prototypes and teachers
    "per_image": FLAG,
    "mode": CHOICE,
    "buffers": CHOICE,
    "decay": SHARE,
    "warmup": FLAG,
    "share_frozen": FLAG,
    "weights": ([INF, 1.0, 1.0], [NAN, 1.0, 1.0], [-1.0, 1.0, 1.0], [1.0], "abc", 2.0),
    # masks of rows
    "height": COUNT,
    "width": COUNT,
    "top": (-1, 2.5, "3", None),
    "bottom": (-1, 2.5, "3", None),
    # labels and sampling
    "labels": (3, None),
    "table": ([3, 1], {"0": 1}, {0: 1.5}, None),
    "default": (None, "255", 255.0),
    "factor": COUNT,
    "min_ratio": SHARE,
    "load": CALLABLE,
    "progress": CALLABLE,
    "min_pixels": (-1, NAN, INF, "3", None, 2.5),
    "num_samples": MAYBE_COUNT,
    # resolution, tokens, norms
    "cosine_weight": SHARE,
    "tokens": COUNT,
    "prefix": (-1, 2**20, 2.5, "3", None, True),
    "window": (4, "8", (0, 4), (4,), (4.0, 4)),
    "stride": (4, "8", (0, 4), (4,), (4.0, 4), (400, 4)),
    "detail": (4, "8", (0, 4), (4,), (4.0, 4), (400, 4)),
    "divisor": COUNT,
    "box": (4, "8", (0, 4), torch.zeros(2, 2)),
    "source_share": SHARE,
    # scores without labels
    "samples": (-1, 2.5, "3", None, True),
    "transform": CALLABLE,
    "inverse": CALLABLE,
    "axis": (1.5, "1", None, True),
    "offset": (1, (1.5, 2), ("1", 2), None, "12"),
    "margin": (1, (1, 1), ((1,), (0, 1)), ((-1, 0), (0, 1)), ((1.5, 0), (0, 1)), None),
    "degrees": (200.0, NAN, INF, "1", None, True),
    "temperature_range": (2.0, (1.0,), (0.0, 1.0), (2.0, 1.0), (NAN, 1.0), (0.5, INF), ("0", 1.0), None),
}
