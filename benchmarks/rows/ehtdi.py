"""EHTDI part by part."""

from __future__ import annotations

from typing import Any

from benchmarks.rows.common import POLICY, Group, setting
from benchmarks.rows.diga import diga_ablation

# The paper's weights are for up to 250k steps; at 0.1 a mixture would hardly move a net in a few hundred. All terms
# beside the source loss are ten times as heavy here, so that they keep the paper's proportions among themselves.
WEIGHTS = {
    "mix_weight": 1.0,
    "paste_weight": 1.0,
    "boundary_weight": 1.0,
    "boundary_paste_weight": 0.1,
    "pixel_contrast": 0.1,
    "prototype_contrast": 0.1,
}
# What each row has beside the loss on the class mix. The band of a paste needs the paste.
PARTS: dict[str, tuple[str, ...]] = {
    "ehtdi_class_mix": (),
    "ehtdi_paste": ("paste_weight",),
    "ehtdi_boundary": ("paste_weight", "boundary_weight", "boundary_paste_weight"),
    "ehtdi_pixel_contrast": ("pixel_contrast",),
    "ehtdi_prototype_contrast": ("prototype_contrast",),
    "ehtdi_all": tuple(WEIGHTS),
}


def options(pair: str) -> dict[str, Any]:
    """Options of the whole method for a few hundred steps; the EMA teacher labels, as in the other recipes' rows."""
    policy = {k: v for k, v in POLICY[pair].items() if k != "translate"}  # this recipe renders nothing anew
    return {"labels_from": "teacher", **policy, **WEIGHTS}


def row(pair: str) -> dict[str, Any]:
    """The whole method, as a row of the main table."""
    return {"recipe": "ehtdi", "options": options(pair), "lr": setting(pair).adaptation_lr}


def ehtdi_ablation(pair: str = "camvid") -> dict[str, dict[str, Any]]:
    """Rows of one stage of half the pair's steps from the warm start; each stands alone, none starts from another."""
    whole = {**row(pair), "share": 0.5}

    def with_options(**changes: Any) -> dict[str, Any]:
        return {**whole, "options": {**whole["options"], **changes}}

    rows = {"source_only_half": diga_ablation(pair)["source_only_half"]}  # the same runs as in DiGA's table
    for name, parts in PARTS.items():
        rows[name] = with_options(**{k: 0.0 for k in WEIGHTS if k not in ("mix_weight", *parts)})
    rows["ehtdi_all_student"] = with_options(labels_from="student")
    return rows


GROUP = Group(ehtdi_ablation, ("camvid",), (0, 1, 2))
