"""The recipe that tries candidates and keeps one: whose step it is, what is kept, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gta2cs
from gta2cs.checkpoints import load_checkpoint, load_net
from gta2cs.datasets import build_pair
from gta2cs.evaluation import evaluating
from gta2cs.inference import prefixes_of
from gta2cs.recipes import Combined, Preparation
from gta2cs.recipes.combined import LONG, RISING, SHARED, UNTRAINED, ahead, options_of, slowed
from tiny import tiny_net, without_scores
from udakit import EMATeacher

TWO = {"a": {}, "b": {"selector": "argmax"}}
LABELLING = {"running": {"teacher_mode": "eval", "record_mixed": False}, "batch": {"teacher_mode": "batch_statistics"}}


def config_of(out: Path, steps: int = 6, **changes) -> train_gta2cs.Config:
    options = {"candidates": TWO, "trial": 0.67, "images": 4, "shared": {}, **changes.pop("options", {})}
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(crop=(64, 64)),
        net=tiny_net(),
        stages=[train_gta2cs.Stage("combined", steps=steps, lr=1e-3, options=options)],
        batch_size=2,
        score_images=2,
        eval_every=0,
        out=out,
        **changes,
    )


def build(**options) -> Combined:
    net = tiny_net()
    torch.manual_seed(0)
    student = net.build(8)
    recipe = Combined.build(student, 8, {"candidates": LABELLING, **options}, lambda **changes: net.build(8, **changes))
    assert isinstance(recipe, Combined)
    return recipe


@pytest.mark.slow
def test_a_resumed_trial_is_bit_identical_and_the_winner_is_deployed(tmp_path, monkeypatch):
    without_scores(monkeypatch)
    train_gta2cs.main(config_of(tmp_path / "whole"))
    for stop in (3, 5):  # in the middle of the trial, and after its end
        killed = tmp_path / f"killed{stop}"
        from gta2cs import stage

        save = stage.save_checkpoint

        def dies(path: Path, value: dict, save=save, stop=stop) -> None:
            save(path, value)
            if value["step"] == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(stage, "save_checkpoint", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_gta2cs.main(config_of(killed, save_every=1))
        monkeypatch.setattr(stage, "save_checkpoint", save)
        train_gta2cs.main(config_of(killed, resume=True))
        whole, resumed = (load_checkpoint(x / "stage1_combined" / "last.pt") for x in (tmp_path / "whole", killed))
        assert whole["recipe"].keys() == resumed["recipe"].keys()
        assert all(torch.equal(value, resumed["recipe"][name]) for name, value in whole["recipe"].items())

    saved = load_checkpoint(tmp_path / "whole" / "stage1_combined" / "last.pt")["recipe"]
    done, trial, kept = saved["progress"].tolist()
    assert (done, trial) == (6, 4)
    name = list(TWO)[kept]
    assert torch.equal(saved["student.head.weight"], saved[f"candidates.{name}.student.head.weight"])
    other = saved[f"candidates.{list(TWO)[1 - kept]}.student.head.weight"]
    assert not torch.equal(saved["student.head.weight"], other)
    net = tiny_net().build(len(build_pair("toy").classes.names))
    load_net(net, tmp_path / "whole" / "stage1_combined" / "last.pt")  # as predict.py does


def test_the_candidate_that_contradicts_itself_least_is_kept_and_a_lost_class_counts_as_zero():
    recipe = build(candidates=TWO, shared={}, trial=0.5)
    recipe.images = torch.randn(5, 3, 64, 64)
    first, second = (candidate.student for candidate in recipe.candidates.values())
    torch.nn.init.normal_(first.head.weight, std=3.0)  # several classes
    with evaluating(first), torch.no_grad():
        logits = first(recipe.images).logits
        ids, mirrored = logits.argmax(1), first(recipe.images.flip(-1)).logits.flip(-1).argmax(1)
    present = [c for c in range(8) if (ids == c).float().mean() >= 1e-3]
    assert len(present) > 1
    iou = [((ids == c) & (mirrored == c)).sum() / ((ids == c) | (mirrored == c)).sum() for c in present]
    wanted = sum(iou) / len(iou) * logits.softmax(1).amax(1).mean()
    assert recipe.scores_of({"alone": {"student": first}})["alone"] == pytest.approx(float(wanted), rel=1e-4)

    torch.nn.init.zeros_(second.head.weight)  # one class everywhere: never contradicts itself
    second.head.bias.data = torch.nn.functional.one_hot(torch.tensor(present[0]), 8).float()
    alone = recipe.scores_of({"constant": {"student": second}})["constant"]
    assert recipe.scores_of({"a": {"student": first}, "constant": {"student": second}})["constant"] <= alone / 2
    both = recipe.scores_of({"a": {"student": first, "teacher": first}, "constant": {"student": second}})
    assert both["a"] == pytest.approx(recipe.scores_of({"a": {"student": first}, "b": {"student": second}})["a"])
    recipe.done, recipe.trial_steps = 3, 4
    recipe.after_step()
    best = max(recipe.scores, key=recipe.scores.__getitem__)
    assert recipe.active is recipe.candidates[best]
    assert recipe.student is recipe.active.student


def test_candidates_take_turns_and_start_from_the_same_net():
    recipe = build(trial=0.5)
    assert list(recipe.candidates) == list(LABELLING)
    first = recipe.student.state_dict()
    for candidate in recipe.candidates.values():
        assert all(torch.equal(value, first[name]) for name, value in candidate.student.state_dict().items())
    turns = []
    for recipe.done in range(6):
        turns.append(next(name for name, c in recipe.candidates.items() if c is recipe.active))
    assert turns == 3 * list(LABELLING)
    assert len(recipe.extra_param_groups(1e-3)) >= len(LABELLING) - 1


def test_without_a_trial_the_labels_that_teachers_would_begin_with_decide():
    recipe = build()
    one, other = recipe.candidates.values()
    assert one.student is other.student is recipe.student
    recipe.images = torch.randn(4, 3, 64, 64) + 1
    by_batch, running = (recipe.scores_of({"a": {"teacher": c.teacher}})["a"] for c in (one, other))
    assert by_batch != running  # the statistics are not the same: each labels in its own way
    assert recipe.extra_param_groups(1e-3) == []
    batch = SimpleNamespace(target_images=torch.randn(4, 3, 64, 64), source_images=torch.randn(4, 3, 64, 64))
    for wanted in LABELLING:
        recipe = build()
        for name, candidate in recipe.candidates.items():
            sure = 50.0 if name == wanted else 0.0  # one class everywhere: consistent, and as sure as its logits say
            bias = torch.zeros(8)
            bias[0] = sure
            torch.nn.init.zeros_(candidate.teacher.module.head.weight)
            candidate.teacher.module.head.bias.data = bias
        recipe.prepare(Preparation(lambda start, stop: [batch] * (stop - start)))
        assert recipe.names[recipe.kept] == wanted
        assert recipe.progress.tolist() == [0, 0, recipe.kept]
        assert recipe.scores[wanted] == pytest.approx(1, abs=1e-4)
        assert recipe.active is recipe.candidates[wanted]


def decided(**options) -> tuple[Combined, dict[str, torch.Tensor]]:
    """A recipe that has kept its second candidate, and what a checkpoint held before the other one was freed."""
    recipe = build(images=2, **options)
    for candidate, sure in zip(recipe.candidates.values(), (0.0, 50.0), strict=True):
        torch.nn.init.zeros_(candidate.teacher.module.head.weight)
        candidate.teacher.module.head.bias.data = torch.tensor([sure, *7 * [0.0]])
    batch = SimpleNamespace(target_images=torch.randn(2, 3, 64, 64), source_images=torch.randn(2, 3, 64, 64))
    data = Preparation(lambda start, stop: [batch] * (stop - start))
    others = dict(recipe.state_dict())
    recipe.prepare(data)
    assert recipe.kept == 1
    return recipe, {**others, **recipe.state_dict()}


def test_the_teacher_that_was_not_taken_is_freed_and_both_kinds_of_checkpoint_resume():
    first, second = LABELLING
    recipe, with_others = decided()
    assert list(recipe.candidates) == [second]
    assert sum(isinstance(module, EMATeacher) for module in recipe.modules()) == 1
    assert not [name for name in recipe.state_dict() if name.startswith(f"candidates.{first}.")]
    assert [name for name in with_others if name.startswith(f"candidates.{first}.")]  # as older versions wrote it
    for saved in (recipe.state_dict(), with_others):
        assert prefixes_of(saved) == {"student": "student", "teacher": f"candidates.{second}.teacher.module"}
        again = build(images=2)
        again.load_state_dict(saved)
        assert (again.kept, list(again.candidates)) == (1, [second])
        assert again.active is again.candidates[second]
        assert again.student is again.active.student
        assert again.nets().keys() == {"student", "teacher"}
        assert all(torch.equal(value, recipe.state_dict()[name]) for name, value in again.state_dict().items())
        again.load_state_dict(saved)  # also where the other is gone already


def test_a_checkpoint_of_other_candidates_is_refused_by_their_names():
    recipe, _ = decided()
    with pytest.raises(ValueError, match=f"it has the candidate {[*LABELLING][1]}, and this run has other"):
        build(images=2, candidates={"other": {}}).load_state_dict(recipe.state_dict())


def test_decisions_of_a_net_that_nothing_has_trained_are_called_so():
    batch = SimpleNamespace(target_images=torch.randn(1, 3, 64, 64), source_images=torch.randn(1, 3, 64, 64))
    data = Preparation(lambda start, stop: [batch] * (stop - start), trained=False)
    alone = {"candidates": {"a": {}}}
    for options, said in (
        ({}, True),
        ({"match_style": False}, True),
        ({"match_style": False, "trial": 0.5}, False),
        ({"match_style": False, "trial": 0.1}, True),  # no step a candidate: decided at once
        (alone, True),
        ({**alone, "match_style": False}, False),
        ({**alone, "shared": {"translate": "none"}}, False),
    ):
        recipe = build(images=1, **options)
        recipe.trains_for(10)
        recipe.prepare(data)
        assert (UNTRAINED in recipe.decisions[:1]) == said
        trained = build(images=1, **options)
        trained.prepare(data._replace(trained=True))
        assert UNTRAINED not in trained.decisions


class ByBrightness(torch.nn.Module):
    """Two classes by brightness: as sure as the images are far from grey, and never at odds with the mirror image."""

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        bright = images.mean(1, keepdim=True)
        return SimpleNamespace(logits=torch.cat([bright, -bright], 1))


@pytest.mark.parametrize("dull", ["source", "target", "neither"])
def test_source_takes_targets_colours_only_where_target_in_those_of_source_is_understood_better(dull, tmp_path):
    """A net that is surer of images rich in contrast: which domain has the contrast decides."""
    torch.manual_seed(0)
    rich, flat = 0.3 * torch.randn(4, 3, 16, 16), 0.03 * torch.randn(4, 3, 16, 16)
    source, target = {"source": (flat, rich), "target": (rich, flat), "neither": (flat, flat.flip(0))}[dull]
    recipe = build(candidates={"a": {}, "b": {"translate": "none"}}, shared={"translate": "color"})
    recipe.num_classes, recipe.student = 2, ByBrightness()
    recipe.images = target
    recipe.match_style(source)
    expected = "color" if dull == "target" else "none"
    assert [c.options.translate for c in recipe.candidates.values()] == [expected, "none"]

    again = build(candidates={"a": {}, "b": {"translate": "none"}}, shared={"translate": "color"})
    again._load_from_state_dict(dict(recipe.state_dict()), "", {}, False, [], [], [])
    assert [c.options.translate for c in again.candidates.values()] == [expected, "none"]


def test_the_teacher_labels_with_half_of_the_statistics_of_target_unless_told_otherwise():
    net = tiny_net()
    recipe = Combined.build(net.build(8), 8, {}, lambda **changes: None)
    teacher = recipe.candidates["blended"].teacher
    assert (teacher.mode, teacher.running_share, teacher.buffers_policy) == ("batch_statistics", 0.5, "ema")
    images = torch.randn(2, 3, 64, 64)
    ends = [EMATeacher(recipe.student, mode=mode)(images).logits for mode in ("batch_statistics", "eval")]
    assert all((teacher(images).logits - end).abs().max() > 0 for end in ends)


def test_a_teacher_is_slower_in_a_long_stage():
    assert slowed(0.99, 0) == slowed(0.99, 300) == 0.99
    assert slowed(0.99, 900) == pytest.approx(1 - 1 / 300)
    assert slowed(0.99, 10**5) == 0.999
    assert slowed(0.9995, 10**5) == 0.9995
    for options, expected in (
        ({}, 1 - 1 / 300),
        ({"slow_teacher": False}, 0.99),
        ({"shared": {"ema": 0.98}}, 0.98),  # who gives one gets it
        ({"candidates": {"a": {"ema": 0.0}}}, 0.0),
    ):
        recipe = build(**{"candidates": {"a": {}}, **options})
        recipe.trains_for(900)
        assert recipe.active.teacher.decay == pytest.approx(expected)
    recipe = build(candidates={"a": {}, "b": {}, "c": {"ema": 0.5}}, trial=0.9)
    recipe.trains_for(3000)  # each 900 in the trial, one of them 300 more
    assert recipe.trial_steps == 2700
    assert [c.steps for c in recipe.candidates.values()] == [1200] * 3
    assert [c.teacher.decay for c in recipe.candidates.values()] == pytest.approx([1 - 1 / 400] * 2 + [0.5])
    recipe.trains_for(1)
    assert recipe.trial_steps == 0


def test_the_labels_of_a_long_stage_become_more():
    """Unless somebody has said which labels: then they stay as they are."""
    for options, expected in (
        ({}, (0.6, 0.9, True)),
        ({"shared": {"threshold": 0.9}}, (0.6, 0.9, True)),
        ({"rising_share": False}, (0.6, None, False)),
        ({"shared": {"share": 0.5}}, (0.5, None, False)),
        ({"shared": {"share_end": 0.8}}, (0.6, 0.8, False)),
        ({"candidates": {"a": {"confidence_weight": True}}}, (0.6, None, True)),
        ({"candidates": {"a": {"selector": "argmax"}}}, None),
    ):
        recipe = build(**{"candidates": {"a": {}}, "images": 1, "match_style": False, **options})
        for steps, found in ((LONG, None), (LONG + 1, expected)):
            recipe.trains_for(steps)
            told = recipe.active.options
            if found is not None:
                assert (told.share, told.share_end, told.confidence_weight) == found
    assert told.share_end is None
    assert told.selector == "argmax"

    silent, asked = build(candidates={"a": {}}), build(candidates={"a": {}}, shared=RISING)
    for recipe in (silent, asked):
        recipe.trains_for(2 * LONG)
    assert vars(silent.active.options) == vars(asked.active.options)

    batch = SimpleNamespace(target_images=torch.randn(1, 3, 64, 64), source_images=torch.randn(1, 3, 64, 64))
    told = build(candidates={"a": {}, "b": {}}, trial=0.5, images=1, match_style=False)
    told.trains_for(900)  # 225 of the trial and the 450 after it, for whichever is kept
    told.prepare(Preparation(lambda start, stop: [batch] * (stop - start), trained=True))
    assert told.decisions == [
        "675 steps: the teacher averages over 225 of them",
        "675 steps: labels rise from 60% to 90% of each class, weighed by confidence",
    ]

    mixed = build(candidates={"a": {"share": 0.5}, "b": {"ema": 0.9}}, images=1, match_style=False)
    mixed.trains_for(600)  # nothing is said of a candidate whose labels stay as they are
    mixed.prepare(Preparation(lambda start, stop: [batch] * (stop - start), trained=True))
    assert mixed.decisions[:2] == [
        "a: 600 steps: the teacher averages over 200 of them",
        "b: 600 steps: labels rise from 60% to 90% of each class, weighed by confidence",
    ]


def test_a_resumed_long_stage_goes_on_from_its_share_or_as_an_earlier_version_began_it():
    def long(state=None):
        recipe = build(candidates={"a": {}})
        recipe.trains_for(2 * LONG)
        if state is not None:
            recipe.load_state_dict(state)
        return recipe

    recipe = long()
    recipe.keep(0)
    assert long(recipe.state_dict()).active.options.share_end == 0.9  # also when no step was done
    for _ in range(LONG):
        recipe.after_step()
    assert recipe.active.selector.share == pytest.approx(0.75)
    assert long(recipe.state_dict()).active.selector.share == pytest.approx(0.75)

    earlier = recipe.state_dict()
    del earlier["candidates.a.course"]
    constant = long(earlier)
    constant.after_step()
    for recipe in (constant, long(constant.state_dict())):  # and when that is resumed again
        assert recipe.active.selector.share == 0.6
        assert (recipe.active.options.share_end, recipe.active.options.confidence_weight) == (None, False)


def test_what_a_long_stage_refuses_is_said_at_once():
    with pytest.raises(ValueError, match=r"(?s)threshold.*1.5.*of candidate 'a' or of `shared`"):
        build(candidates={"a": {}}, shared={"threshold": 1.5})
    build(candidates={"a": {}}, shared={"threshold": 1.5}, rising_share=False)  # which does not look at it


def test_shared_options_are_added_to_those_of_the_policy_and_other_channels_have_no_colours():
    recipe = build(shared={"jitter": 0.3})
    options = [c.options for c in recipe.candidates.values()]
    assert {(o.jitter, o.selector, o.translate) for o in options} == {(0.3, "class_quantile", "color")}
    net = tiny_net()
    for channels, wanted in ((4, "histogram"), (3, "color")):
        found = Combined.build(net.build(8, channels), 8, {}, lambda **changes: None)
        assert {c.options.translate for c in found.candidates.values()} == {wanted}


def test_a_later_candidate_has_to_be_ahead_by_more_than_differences_that_say_nothing():
    assert ahead([0.700, 0.705]) == 0
    assert ahead([0.700, 0.750]) == 1
    assert ahead([0.700, 0.705, 0.712]) == 2
    assert ahead([0.7]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": {}}, "`candidates` to name at least one"),
        ({"trial": 1.0}, r"`trial` to be a fraction in \[0, 1\)"),
        ({"images": 0}, "`images` to be at least 1"),
        ({"images": "all"}, "`images` of recipe Combined to be a whole number, but got 'all'"),
        ({"candidates": {"running": None}}, "`candidates` of recipe Combined to be a table"),
        ({"shared": {"jiter": 0.3}}, r"'jiter'\. It is an option of candidate 'blended' or of `shared`"),
        (
            {"candidates": {"a": {"teacher_mode": "eval", "teacher_running_share": 0.5}}},
            r"`teacher_running_share` to be a share in \[0, 1\], with .* got 0\.5 with eval",
        ),
        ({"candidates": {"a": {"teacher_mode": "evl"}}}, r"`teacher_mode` .* one of \[.*'evl'\. .* candidate 'a'"),
        ({"shared": {"share": "most"}}, "`share` of recipe Dacs to be a number, but got 'most'"),
        ({"shared": {"translate": "colour"}}, "`translate` to be one of"),
        ({"candidates": {"eval": {"teacher_mode": "eval"}}}, "another name for candidate 'eval'"),
        ({"candidates": {"a.b": {}}}, "another name for candidate 'a.b'"),
    ],
)
def test_bad_options_are_named_before_any_data_is_read(options, message):
    stages = [train_gta2cs.Stage("source_only", steps=1), train_gta2cs.Stage("combined", steps=1, options=options)]
    with pytest.raises(ValueError, match=message):
        train_gta2cs.check_stages(train_gta2cs.Config(stages=stages))


def test_another_selector_leaves_what_belongs_to_that_of_the_policy():
    assert options_of({}, {})["share"] == SHARED["share"]
    for shared, own in (({"selector": "argmax"}, {}), ({}, {"selector": "argmax"})):
        given = options_of(shared, own)
        assert "share" not in given
        assert given["translate_share"] == SHARED["translate_share"]
    recipe = build(candidates={"a": {}, "b": {"selector": "argmax"}})
    assert [c.options.selector for c in recipe.candidates.values()] == ["class_quantile", "argmax"]


def test_the_share_reaches_its_end_also_after_a_trial():
    recipe = build(shared={"share_end": 0.9}, trial=0.5, images=1, match_style=False)
    batch = SimpleNamespace(target_images=torch.randn(1, 3, 64, 64), source_images=torch.randn(1, 3, 64, 64))
    recipe.trains_for(8)
    recipe.prepare(Preparation(lambda start, stop: [batch] * (stop - start)))
    for _ in range(8):
        recipe.after_step()
    assert recipe.active.done == 6  # two of the trial's four, and the four after it
    assert recipe.active.selector.share == pytest.approx(0.9)


def test_a_run_names_what_it_keeps(tmp_path, capsys):
    train_gta2cs.main(config_of(tmp_path, dry_run=True, options={"candidates": {"only": {}}}))
    saved = load_checkpoint(tmp_path / "stage1_combined" / "last.pt")
    assert saved["recipe"]["progress"].tolist() == [2, 0, 0]
    untrained, decision = json.loads(saved["history"])["decisions"]
    assert untrained == UNTRAINED
    assert decision.startswith("color: consistency of target ")
    assert decision in capsys.readouterr().out
    assert f"## Decided without labels\n\n- {untrained}\n- {decision}\n" in (tmp_path / "report.md").read_text()
    assert json.loads(saved["history"])["losses"][-1]["terms"]["source"] > 0
