"""Every recipe on every pair."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import diga, ehtdi
from benchmarks.rows.common import PAIRS, POLICY, Group, setting


def recipe_configs(pair: str = "toy") -> dict[str, dict[str, Any]]:
    """Rows of the table: the recipe, its options, and changes to the data.

    A row of several `stages` gives each an equal share of the pair's steps; `options` are then those of all stages.
    `from_imagenet` leaves out the warm start and takes its steps as well: the toy pair's oracle never sees the game.
    """
    oracle = {"recipe": "source_only", "data": {"oracle": True}}
    if pair == "toy":
        oracle |= {"from_imagenet": True, "lr": 6e-4, "options": {"augment_source": False}}
    adapt = {"options": POLICY[pair], "lr": setting(pair).adaptation_lr}
    return {
        "source_only": {"recipe": "source_only"},
        "dacs": {"recipe": "dacs", **adapt},
        "diga": diga.row(pair),
        "ehtdi": ehtdi.row(pair),
        "oracle": oracle,
    }


GROUP = Group(recipe_configs, tuple(PAIRS), (0, 1, 2))
