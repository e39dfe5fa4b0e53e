"""DiGA part by part."""

from __future__ import annotations

from typing import Any

from benchmarks.rows.common import POLICY, Group, setting

# Chosen on seed 0: on day -> dusk, where BatchNorm statistics of target hurt, so do those of source in target's style.
OWN = {"camvid": {"record_mixed": False, "translate": "color"}}


def policy(pair: str) -> dict[str, Any]:
    """Source images are augmented, as in every other row."""
    return {**POLICY[pair], **OWN.get(pair, {}), "augment_source": True}


def row(pair: str, **changes: Any) -> dict[str, Any]:
    """The whole method, as a row of the main table, but for `changes` of the options."""
    options = {**policy(pair), **changes}
    stages = [{"recipe": "diga_warmup"}, {"recipe": "diga"}]
    return {"stages": stages, "options": options, "lr": setting(pair).adaptation_lr}


def diga_ablation(pair: str = "camvid") -> dict[str, dict[str, Any]]:
    """Rows of DiGA part by part: each one stage of half the pair's steps, from the warm start or another row's end.

    But for `diga_recorded` and `diga_clean_source`, the main row nearer to the paper: Fourier styling and statistics of
    all views, and with the labels on clean source images, too.
    """
    common = {k: v for k, v in policy(pair).items() if k != "translate"}
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
    common["translate"] = "color"
    rows |= {k: {"recipe": "diga", "options": {**common, **v}, "start": "warmup_color"} for k, v in selectors.items()}
    halves = {name: {**entry, "share": 0.5} for name, entry in rows.items()}
    whole = {"translate": "fourier", "record_mixed": True}
    return {
        **halves,
        "diga_recorded": row(pair, **whole),
        "diga_clean_source": row(pair, **whole, augment_source=False),
    }


GROUP = Group(diga_ablation, ("camvid",), (0, 1))
