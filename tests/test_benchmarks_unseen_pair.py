"""The pair that no training option was chosen on: a user's command, and rivals that go on from its first stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_gta2cs
from benchmarks import unseen_pair
from benchmarks.adaptation_tables import BY_CLASS, STATISTICS_OF


def test_rivals_go_on_from_the_first_stage_for_as_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}

    def main(config: train_gta2cs.Config) -> None:
        runs[config.out.name] = config
        config.out.mkdir(parents=True)
        (config.out / "results.json").write_text(json.dumps({"source_only": {"means": {"mIoU": 50.0 + len(runs)}}}))

    monkeypatch.setattr(train_gta2cs, "main", main)
    kinds = {kind: {"miou": 60.0 + k, "scores": {BY_CLASS: k % 2}} for k, kind in enumerate(STATISTICS_OF)}
    monkeypatch.setattr(unseen_pair, "with_target_statistics", lambda config, path: kinds)
    for _ in range(2):  # what is finished is read, not trained
        assert unseen_pair.run(7, tmp_path) == {
            "policy": {"source_only": 51.0},
            "source": {"source_only": 52.0, unseen_pair.BY_SCORE: 61.0},
            "oracle": {"source_only": 53.0},
        }
    policy, source, oracle = runs.values()
    first, adapting = policy.stages
    assert (policy.data.pair, policy.seed, first.recipe, adapting.recipe) == (
        unseen_pair.PAIR,
        7,
        "source_only",
        "combined",
    )
    for rival in (source, oracle):
        (stage,) = rival.stages
        assert stage == train_gta2cs.Stage(**{**vars(first), "steps": adapting.steps})
        assert rival.init == policy.out / "stage1_source_only" / "last.pt"
    assert oracle.data.oracle
    assert not source.data.oracle


def test_the_table_has_shares_of_the_gap() -> None:
    rows = {"policy": {}, "source": {}, "oracle": {}}
    for k, (name, row) in enumerate(unseen_pair.ROWS.values()):
        rows[name][row] = 50.0 + 2 * k
    text = unseen_pair.table({"0": rows})
    assert "| source-only | 54.0 [1] |  |" in text
    assert "| combined | 60.0 [1] | 60 % |" in text
    assert "| where adaptation starts | 50.0 [1] | −40 % |" in text
    assert unseen_pair.table({}) == "Not measured yet.\n"
