"""DUDA: a small net adapted alone and through a large one, the pair's own net."""

from __future__ import annotations

from typing import Any

from benchmarks.rows.common import PAIRS, POLICY, Group, net_config, setting

SEVERAL = ["large teacher", "large student", "own"]
ONE = ["large teacher"]


def pre(pair: str, **options: Any) -> dict[str, Any]:
    """Pre-adaptation: DACS, as in its own row, adapts the large net; both nets start from their own warm start."""
    base_options = {**setting(pair).augment, **POLICY[pair]}
    return {
        "recipe": "duda_pre",
        "net": "small",
        "lr": setting(pair).adaptation_lr,
        "options": {"large": net_config(pair), "base_options": base_options, **options},
        "checkpoints": {"large_init": "warm"},
    }


def tuned(pair: str, large_from: str, teachers: list[str], **options: Any) -> dict[str, Any]:
    """Fine-tuning with the frozen large nets that another row ended with."""
    policy = {k: v for k, v in POLICY[pair].items() if k != "translate"}
    return {
        "recipe": "duda",
        "net": "small",
        "lr": setting(pair).adaptation_lr,
        "options": {**policy, "large": net_config(pair), "teachers": teachers, **options},
        "checkpoints": {"large_from": large_from},
    }


def second_half(pair: str, teachers: list[str], before: str = "duda_pre_half", **options: Any) -> dict[str, Any]:
    """Fine-tuning for the other half of the steps, from where a half of pre-adaptation ended."""
    return {**tuned(pair, before, teachers, **options), "share": 0.5, "start": before}


def duda(pair: str = "toy") -> dict[str, dict[str, Any]]:
    """Rows of the small net: each the pair's steps from its warm start, the halves together.

    The large net's own rows are those of `duda_pre` and `duda_pre_half`.
    """
    adapt = {"lr": setting(pair).adaptation_lr, "options": POLICY[pair]}
    return {
        "small_source_only": {"recipe": "source_only", "net": "small"},
        "small_dacs": {"recipe": "dacs", "net": "small", **adapt},
        "small_kd": tuned(pair, "duda_pre", ONE, inconsistency=False),
        "duda_pre": pre(pair),
        "duda_pre_half": {**pre(pair), "share": 0.5},
        "duda_plain": second_half(pair, SEVERAL, inconsistency=False),
        "duda": second_half(pair, SEVERAL),
    }


def duda_ablation(pair: str = "camvid") -> dict[str, dict[str, Any]]:
    """DUDA part by part, beside the rows of its own table that they differ from."""
    beside = {k: v for k, v in duda(pair).items() if k in ("duda_pre", "duda_pre_half", "duda_plain", "duda")}
    return {
        **beside,
        "duda_pre_hard": pre(pair, kd_weight=0.0),
        "duda_one_plain": second_half(pair, ONE, inconsistency=False),
        "duda_one": second_half(pair, ONE),
        "duda_large": second_half(pair, SEVERAL[:2]),
        "duda_max_confidence": second_half(pair, SEVERAL, fuse="max_confidence"),
        "duda_agreement": second_half(pair, SEVERAL, fuse="agreement"),
        "duda_sharp": second_half(pair, SEVERAL, weight_temperature=0.25),
        "duda_features": second_half(pair, SEVERAL, feature_weight=0.1),
    }


GROUP = Group(duda, tuple(PAIRS), (0, 1, 2))
ABLATION = Group(duda_ablation, ("camvid",), (0, 1))
