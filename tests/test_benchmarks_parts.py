"""The benchmarks of parts and of adaptation after deployment: what runs, what is compared, what the tables say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import adaptation, adaptation_rows, after_deployment, harness, parts, parts_cost
from gta2cs.recipes import Dacs


def run_of(pair: str, part: str, seed: int, student: float, teacher: float, start: float = 40.0) -> dict:
    nets = [(s, net, v - (200 - s) / 10) for s in (100, 200) for net, v in (("student", student), ("teacher", teacher))]
    checkpoints = [{"step": step, "net": net, "miou": value} for step, net, value in nets]
    return {"pair": pair, "part": part, "seed": seed, "steps": 200, "start": start, "checkpoints": checkpoints}


def results_of(runs: list[dict]) -> dict[str, dict]:
    return {f"{r['pair']}/{r['part']}/{r['seed']}": r for r in runs}


@pytest.mark.parametrize("part", sorted(parts.PARTS))
def test_a_part_changes_its_own_options_alone(part: str) -> None:
    base = parts.configure("nuclei", parts.BASE, 0, None, Path("cache"))
    config = parts.configure("nuclei", part, 0, None, Path("cache"))
    own = parts.PARTS[part][1]
    (stage,), (plain,) = config.stages, base.stages
    Dacs.parse(stage.options)
    assert {k: v for k, v in stage.options.items() if plain.options.get(k, object()) != v} == own
    assert dataclasses.replace(config, stages=base.stages, out=base.out) == base
    assert config.init == adaptation.warm_start("nuclei", 0, Path("cache"))
    policy = adaptation.configure("nuclei", parts.POLICY, 0, None, Path("cache"))
    assert base.stages[0].options == {**policy.stages[0].options, "selector": "confident_ratio"}
    assert base.data == policy.data
    assert base.init == policy.init


def test_gains_are_over_dacs_of_the_same_seed() -> None:
    runs = [run_of("nuclei", "dacs", 0, 60.0, 65.0), run_of("nuclei", "dacs", 1, 50.0, 55.0)]
    runs += [run_of("nuclei", "mic_random", 0, 62.0, 64.0), run_of("nuclei", "mic_random", 1, 53.0, 56.0)]
    runs += [run_of("nuclei", "rectified", 1, 49.0, 55.0), run_of("nuclei", "aligned", 2, 70.0, 70.0)]
    results = results_of(runs)
    assert parts.gains(results, "nuclei", "mic_random") == [2.0, 3.0]
    assert parts.gains(results, "nuclei", "mic_random", "teacher") == [-1.0, 1.0]
    assert parts.gains(results, "nuclei", "rectified") == [-1.0]
    assert parts.gains(results, "nuclei", "aligned") == [], "DACS has not run with this seed"
    text = parts.table(results)
    assert "| source-only start | 40.0 ± 0.0 [2] | |  |" in text
    assert "| DACS alone | 55.0 ± 7.1 [2] |  |  |" in text
    assert "| masked consistency, random blocks | 57.5 ± 6.4 [2] | +2.5 (+2.0, +3.0) | +0.0 (−1.0, +1.0) |" in text
    assert "| rectified labels (ProDA) | 49.0 [1] | −1.0 | +0.0 |" in text
    assert "symmetric cross-entropy" not in text
    assert "toy" not in text
    assert parts.table({}) == parts.published({}) == "Not measured yet.\n"
    assert "| +2.1 on HRDA | +2.5 (+2.0, +3.0) |" in parts.published(results)


def test_the_guard_counts_what_was_kept_back_and_what_was_deployed() -> None:
    runs = []
    for seed, (student, score) in enumerate([(30.0, 0.4), (38.0, 0.6), (50.0, 0.7), (50.0, 0.3), (40.5, 0.3)]):
        run = run_of("nuclei", "dacs", seed, student, student)
        known = {"scores": {adaptation_rows.SCORE: score}, "shares": [1.0]}
        run["checkpoints"] = [{**c, **known} for c in run["checkpoints"]]
        runs.append({**run, "source_only": {**known, "miou": 40.0, "scores": {adaptation_rows.SCORE: 0.5}}})
    runs.append(run_of("toy", "dacs", 0, 60.0, 60.0))  # of before the start's scores were kept
    (line,) = [x for x in parts.guard(results_of(runs)).splitlines() if x.startswith("| nuclei")]
    cells = [c.strip() for c in line.split("|")[2:-1]]
    assert cells[:6] == ["5", "2", "1", "2", "1", "+1.7"]
    assert cells[6] == "−2.4", "a tie goes to the first evaluation, ten points below: 28, 40 and three times the start"
    assert "game" not in parts.guard(results_of(runs))
    assert parts.guard({}) == "Not measured yet.\n"


def test_the_pages_are_those_of_the_json() -> None:
    results, policy = adaptation.load(parts.RESULTS), adaptation.load(adaptation.RESULTS)
    sections = {
        "parts": (parts.table(results), parts.PAGE),
        "parts_published": (parts.published(results), parts.SUMMARY),
        "masked_trial": (parts.trial(results), parts.MASKED),
        "guard": (parts.guard({**policy, **results}), parts.SCORES),
        "weights": (parts.weights({**policy, **results}), parts.SCORES),
    }
    for name, (text, page) in sections.items():
        assert harness.section(name, text) in page.read_text(encoding="utf-8"), "run benchmarks/parts.py --table"


def test_after_deployment_says_what_each_way_gains() -> None:
    def found(shift: float) -> dict[str, float]:
        rows = {name: 50.0 + shift + 2 * i for i, name in enumerate(after_deployment.ROWS)}
        return rows | {"statistics_information" + after_deployment.KEPT: 47.0 + shift}

    agreement = {name: float(name == "entropy") for name in after_deployment.ROWS}
    picks = {"agreement": agreement, "expected_accuracy": {**agreement, "source_only": 2.0}}
    results = {f"nuclei/{s}": {"pair": "nuclei", "seed": s, "miou": found(s), **picks} for s in (0, 1)}
    text = after_deployment.table(results)
    assert "| | nuclei |" in text
    assert "| source-only | 50.5 ± 0.7 [2] |" in text
    assert "| BatchNorm's statistics | 52.5 ± 0.7 [2] (+2.0) |" in text
    assert "agree with most | 54.5 ± 0.7 [2] (+4.0) |" in text
    assert "expected accuracy | 50.5 ± 0.7 [2] (+0.0) |" in text
    assert "in its place | 47.5 ± 0.7 [2] (−3.0) |" in text
    assert after_deployment.table({}) == "Not measured yet.\n"


@pytest.mark.parametrize("name", [name for name in after_deployment.ROWS if name != "source_only"])
def test_a_way_moves_what_its_name_says(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    module = after_deployment.source_free()
    options = {"steps": 2, **after_deployment.ROWS[name][1]}
    if "loss_of" in options:
        options["loss_of"] = getattr(module, options["loss_of"])
    adapted = module.adapt(net, torch.randn(4, 3, 8, 8) + 2, **options).last.state_dict()
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, adapted[key])}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"} if "statistics" in name else set()
    learned = set() if name == "statistics" else {"1.weight", "1.bias"}
    assert moved == statistics | learned


def test_the_cost_is_that_of_a_whole_step() -> None:
    step = parts_cost.Step("feature_distillation")
    trained = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in step.recipe.projection.parameters()} <= trained
    before = step.recipe.student.head.weight.detach().clone()
    step()
    assert not torch.equal(before, step.recipe.student.head.weight)
    assert step.done == 1
