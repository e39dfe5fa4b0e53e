"""DiGA part by part."""

from __future__ import annotations

from typing import Any

from benchmarks.rows.common import POLICY, Group, setting


def row(pair: str, *, augment_source: bool = True) -> dict[str, Any]:
    """The whole method, as a row of the main table: source images are augmented, as in every other row."""
    options = {**POLICY[pair], "augment_source": augment_source}
    stages = [{"recipe": "diga_warmup"}, {"recipe": "diga"}]
    return {"stages": stages, "options": options, "lr": setting(pair).adaptation_lr}


def diga_ablation(pair: str = "camvid") -> dict[str, dict[str, Any]]:
    """Rows of DiGA part by part: each one stage of half the pair's steps, from the warm start or another row's end.

    But for `diga_clean_source`, the main row with the labels on clean source images, as in the paper.
    """
    common = {**{k: v for k, v in POLICY[pair].items() if k != "translate"}, "augment_source": True}
    warmups = {"warmup_no_crdomix": {"crdomix": False}}
    warmups |= {f"warmup_{name}": {"translate": name} for name in ("none", "color", "fourier", "histogram", "learned")}
    selectors: dict[str, dict[str, Any]] = {
        "self_consensus": {"selector": "consensus"},
        "self_threshold_0.9": {"selector": "threshold", "threshold": 0.9},
        "self_threshold_0.968": {"selector": "threshold", "threshold": 0.968},
        "self_confident_ratio": {"selector": "confident_ratio"},
        "self_class_quantile": {"selector": "class_quantile", "share": 0.5},
        "self_argmax": {"selector": "argmax"},
    }
    rows: dict[str, dict[str, Any]] = {"source_only_half": {"recipe": "source_only"}}
    rows |= {k: {"recipe": "diga_warmup", "options": {**common, **v}} for k, v in warmups.items()}
    rows |= {k: {"recipe": "diga", "options": {**common, **v}, "start": "warmup_fourier"} for k, v in selectors.items()}
    halves = {name: {**entry, "share": 0.5} for name, entry in rows.items()}
    return {**halves, "diga_clean_source": row(pair, augment_source=False)}


GROUP = Group(diga_ablation, ("camvid",), (0, 1))
