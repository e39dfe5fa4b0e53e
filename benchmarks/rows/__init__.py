"""The rows of the results tables, a file a table: which recipe, which options, where it starts."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import diga, duda, ehtdi, main
from benchmarks.rows.common import PAIRS, Group, net_config, setting

GROUPS: dict[str, Group] = {
    "main": main.GROUP,
    "diga_ablation": diga.GROUP,
    "ehtdi_ablation": ehtdi.GROUP,
    "duda": duda.GROUP,
    "duda_ablation": duda.ABLATION,
}


def row_of(pair: str, name: str) -> dict[str, Any]:
    return {k: v for group in GROUPS.values() for k, v in group.rows(pair).items()}[name]


__all__ = ["GROUPS", "PAIRS", "Group", "net_config", "row_of", "setting"]
