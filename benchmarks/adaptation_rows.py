"""The runs of benchmarks/adaptation.py: pairs, rows, and the options that a row has, the same on every pair.

A pair brings its paths, net, crop and numbers of steps; all that a method or an augmentation could be tuned by is the
policy's.
"""

from __future__ import annotations

from typing import Any

from benchmarks.results_page import STATISTICS
from gta2cs.label_free import DEFAULT
from gta2cs.recipes.combined import CANDIDATES, SHARED
from gta2cs.recipes.duda import LITE2

HALF = {"decoder_pyramid_channels": 128, "decoder_segmentation_channels": 64}  # of an FPN: time
FPN = {"arch": "fpn", "options": HALF}
STREET: dict[str, Any] = {"net": {"arch": "deeplabv3plus"}, "crop": (160, 208), "warm": 600, "steps": 400}
NUCLEI: dict[str, Any] = {"net": FPN, "crop": (128, 128), "warm": 200, "steps": 600}
# What is a pair's own: net, crop, steps. Nothing that a method could be tuned by.
PAIRS: dict[str, dict[str, Any]] = {
    "toy": {"net": FPN, "crop": (128, 192), "warm": 300, "steps": 450},
    "nuclei": NUCLEI,
    "nuclei_backwards": NUCLEI,
    "camvid": STREET,
    "carla2camvid": STREET,
}
# Street pairs that came last. A pair's name in the loop and, where the domains change places, its two folders.
FURTHER: dict[str, dict[str, Any]] = {
    "carla2dusk": STREET,
    "dusk2day": {**STREET, "of": "camvid", "folders": ("camvid/target", "camvid/source")},
    "day2carla": {**STREET, "of": "carla2camvid", "folders": ("camvid/source", "carla")},
}
STREETS = {"camvid", "carla2camvid", *FURTHER}
TOGETHER = dict.fromkeys(STREETS, STREETS)  # share images
# Source-only nets that the rows of a seed start from, by what differs from the pair's net. DUDA has a larger one, too.
STARTS: dict[str, dict[str, Any]] = {"warm": {}, "warm_large": LITE2}
LR = {"source_only": 3e-4, "oracle": 3e-4}
ADAPTATION_LR = 3e-4
SCORE = DEFAULT  # that deploys a net
TITLES = {
    "source_only": "source-only",
    STATISTICS: "source-only, BatchNorm's statistics of target",
    "dacs_defaults": "DACS, options of its paper",
    "dacs_batch": "DACS, labels by statistics of target batches",
    "dacs_running": "DACS, labels by running statistics of source",
    "diga": "DiGA",
    "ehtdi": "EHTDI",
    "duda": "DUDA, beside a larger net",
    "combined": "combined",
    "steady": "combined, with 60 % of each class to the end",
    "quick": "that, with a teacher as quick as in short runs",
    "weighed": "combined, with 90 % of each class, weighed by confidence",
    "rising": "combined, from 60 to 90 % of each class, weighed by confidence",
    "decided": "combined as it was before",
    "ablation_unmatched": "DACS, labels by statistics of target batches, scale not matched",
    "oracle": "oracle",
}
WARM_UP = 20  # steps of linear warm-up of the learning rate, in every stage
EVERY = 100  # steps between scores

# What the policy chooses between. Images and augmentation, the same for every row of a policy ...
SCALES = {"source_scale": (0.6, 1.7), "target_scale": (0.8, 1.25)}
AUGMENT: dict[str, Any] = {"jitter": SHARED["jitter"]}
MATCH = {"match_scale": True}  # of every row that adapts
DEFAULT_DATA = {"match_scale": False, "source_scale": (1.0, 1.0), "target_scale": (1.0, 1.0)}
# ... and how DACS labels: by statistics of source or of the target batch. `combined` takes half of each.
LABELLING: dict[str, dict[str, Any]] = {
    "running": {"teacher_mode": "eval", "record_mixed": False},
    "batch": {"teacher_mode": "batch_statistics"},
}
SETTINGS: dict[str, dict[str, Any]] = {name: {**SHARED, **own} for name, own in LABELLING.items()}
# In more than 300 steps, too, labels stay as many as they begin, and the teacher as quick.
STEADY: dict[str, Any] = {"rising_share": False}
QUICK: dict[str, Any] = {"slow_teacher": False, **STEADY}
# `combined` before: the score chose between the two, and no source steps came first.
DECIDED = {**QUICK, "candidates": LABELLING}
# Forms of `combined`, all with source steps first: row -> options. The first three are the same in up to 300 steps.
COMBINED: dict[str, dict[str, Any]] = {
    "combined": {},
    "steady": STEADY,
    "quick": QUICK,
    "weighed": {"shared": {"share": 0.9, "confidence_weight": True}},
    "rising": {"shared": {"share_end": 0.9, "confidence_weight": True}},
}
BLENDED = {"teacher_mode": "batch_statistics", "teacher_running_share": 0.5, "buffers": "ema"}
# `combined` without source steps first: row -> (title, how its teacher labels)
AT_ONCE: dict[str, tuple[str, dict[str, Any]]] = {
    "running_at_once": ("running statistics of source", LABELLING["running"]),
    "batch_at_once": ("statistics of the target batch", LABELLING["batch"]),
    "recorded_at_once": ("half of each, the running ones also of mixed images", BLENDED),
    "blended_at_once": ("half of each", {**BLENDED, "record_mixed": False}),
}
EHTDI = {
    "labels_from": "teacher",
    "mix_weight": 1.0,
    "paste_weight": 1.0,
    "boundary_weight": 0.1,
    "boundary_paste_weight": 0.01,
    "pixel_contrast": 0.1,
    "prototype_contrast": 0.1,
}
# The larger net adapts as in `combined` after its source steps, and the row's net learns beside it.
DUDA = {"large": LITE2, "base_options": {**SHARED, **CANDIDATES["blended"]}}
ABLATION: dict[str, dict[str, Any]] = {
    "ablation_unmatched": {"recipes": ["dacs"], "options": SETTINGS["batch"], "data": {"match_scale": False}},
}
# `combined` without one of its parts: name -> (title, changes: `options` of combined, `data`, `recipes`).
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "start": ("source steps first", {"recipes": ["combined"], "options": QUICK}),
    "match": ("the matched scale", {"data": {"match_scale": False}}),
    "scales": ("random scales of target and of matched source", {"data": {"target_scale": (1.0, 1.0)}}),
    "colors": ("colours of target", {"options": {"shared": {"translate": "none"}}}),
    "balance": (
        "class balance, with a weight by confidence",
        {"options": {"shared": {"selector": "confident_ratio"}}},
    ),
    "running": (
        "blended statistics: those of source alone",
        {"options": {"candidates": {"only": LABELLING["running"]}}},
    ),
    "batch": (
        "blended statistics: those of the batch alone",
        {"options": {"candidates": {"only": LABELLING["batch"]}}},
    ),
}
# What was tried, each change of the `decided` row alone: name -> (title, changes: `shared` to the options, `data` to
# the data, `recipes`, `lr`).
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("no random scales", {"data": {"target_scale": (1.0, 1.0)}}),
    "ratio": ("a weight by confidence in place of class balance", {"shared": {"selector": "confident_ratio"}}),
    "ratio_fixed": (
        "that, and no random scales",
        {"shared": {"selector": "confident_ratio"}, "data": {"target_scale": (1.0, 1.0)}},
    ),
    "late": ("half of the steps on source first", {"recipes": ["source_only", "combined"]}),
    "share": ("90 % of each class", {"shared": {"share": 0.9}}),
    "mirror": ("labels of the mean over mirror images", {"shared": {"mirror_teacher": True}}),
    "adaptive": ("adaptive thresholds", {"shared": {"selector": "adaptive"}}),
    "aligned": ("aligned class shares", {"shared": {"align": True}}),
    "quick": ("a quicker teacher (0.98)", {"shared": {"ema": 0.98}}),
    "slow": ("a slower teacher (0.996)", {"shared": {"ema": 0.996}}),
    "half": ("half of the weight on the mixture", {"shared": {"mix_weight": 0.5}}),
    "jitter": ("jitter 0.8", {"shared": {"jitter": 0.8}}),
    "clean": ("source not augmented", {"shared": {"augment_source": False}}),
    "distance": ("feature distance to ImageNet (0.005)", {"shared": {"feature_distance": 0.005}}),
    "prototypes": ("prototype contrast (0.1)", {"shared": {"prototype_contrast": 0.1}}),
    "symmetric": ("symmetric cross-entropy", {"shared": {"pseudo_loss": "symmetric_cross_entropy"}}),
    "masked": (
        "masked consistency (weight 0.5, ratio 0.5)",
        {"shared": {"mask_weight": 0.5, "mask_ratio": 0.5}},
    ),
    "rare": (
        "source images of rare classes more often (0.1)",
        {"data": {"rare_class_temperature": 0.1, "rare_class_pixels": 100, "rare_class_image_pixels": 500}},
    ),
    "unstyled": ("source in its own colours", {"shared": {"translate": "none"}}),
    "histogram": ("histograms in place of colours", {"shared": {"translate": "histogram"}}),
    "styled": ("every source image in the style of target", {"shared": {"translate_share": 1.0}}),
    "joint": ("one forward for both batches", {"shared": {"batch_norm": "joint"}}),
    "lr": ("learning rate 1e-4", {"lr": 1e-4}),
}


def combined_row(options: dict[str, Any], changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row of `combined` with these options, after source steps unless the changes say otherwise."""
    options = {"source_only": AUGMENT, "combined": options}
    return {"recipes": ["source_only", "combined"], "own": True, **(changes or {}), "options": options}


def tried_row(name: str) -> dict[str, Any]:
    """The row of a change."""
    _, change = TRIED[name]
    return combined_row({"shared": change.get("shared", {}), **DECIDED}, {"recipes": ["combined"], **change})


def without_row(name: str) -> dict[str, Any]:
    """The row of `combined` without a part."""
    _, change = WITHOUT[name]
    return combined_row(change.get("options", {}), change)


WITHOUT_ROWS = {f"without_{name}": without_row(name) for name in WITHOUT}
TRIED_ROWS = {f"tried_{name}": tried_row(name) for name in TRIED}
LR |= {f"tried_{name}": change["lr"] for name, (_, change) in TRIED.items() if "lr" in change}
LONGER = 4  # times the steps
LONGER_ROWS = ("source_only", "dacs_batch", "diga", "ehtdi", "combined", "steady", "quick", "weighed")
BAD: dict[str, dict[str, Any]] = {  # runs made bad on purpose, for the study of the scores
    "bad_argmax": {"options": {"selector": "argmax", "jitter": 0.2}},
    "bad_threshold": {"options": {"selector": "threshold", "threshold": 0.99, "jitter": 0.2}},
    # Options of the paper, and labels by statistics of source: on nuclei the rarer class vanishes.
    "bad_eval": {"own": True, "data": DEFAULT_DATA, "options": {"teacher_mode": "eval"}},
}


def rows_of() -> dict[str, dict[str, Any]]:
    """Every row: its stages, their options, changes to the data. Rows of DACS are the settings to choose from."""
    rows: dict[str, dict[str, Any]] = {
        "source_only": {"recipes": ["source_only"]},
        "dacs_defaults": {"recipes": ["dacs"], "own": True, "data": DEFAULT_DATA},
        **{f"dacs_{name}": {"recipes": ["dacs"], "options": options} for name, options in SETTINGS.items()},
        **{name: combined_row(options) for name, options in COMBINED.items()},
        "decided": {"recipes": ["combined"], "own": True, "options": DECIDED},
        **{
            name: {"recipes": ["combined"], "own": True, "options": {**QUICK, "candidates": {"only": own}}}
            for name, (_, own) in AT_ONCE.items()
        },
        "diga": {"recipes": ["diga_warmup", "diga"], "options": {"augment_source": True, "translate": "color"}},
        "ehtdi": {"recipes": ["ehtdi"], "options": EHTDI},
        "duda": {"recipes": ["duda_pre"], "own": True, "options": DUDA, "large_start": "warm_large"},
        "oracle": {"recipes": ["source_only"], "data": {"oracle": True}},
    }
    rows |= {f"longer_{name}": {**rows[name], "times": LONGER} for name in LONGER_ROWS}
    rows |= ABLATION | WITHOUT_ROWS | TRIED_ROWS
    return rows | {name: {"recipes": ["dacs"], "bad": True, **row} for name, row in BAD.items()}


GROUPS: dict[str, tuple[str, ...]] = {
    "main": ("source_only", *(f"dacs_{name}" for name in SETTINGS), "combined", "oracle"),
    "methods": ("dacs_defaults", "diga", "ehtdi", "duda"),
    "labelling": ("decided", *AT_ONCE),
    "weighed": ("weighed", "rising"),
    "ablation": tuple(ABLATION),
    "without": tuple(WITHOUT_ROWS),
    "longer": tuple(f"longer_{name}" for name in LONGER_ROWS),
    "tried": tuple(TRIED_ROWS),
    "bad": tuple(BAD),
}
