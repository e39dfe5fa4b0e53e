"""The scale of target, found without labels, and what the loop makes of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_gta2cs
from gta2cs.checkpoints import load_checkpoint
from gta2cs.label_free import LabelFree
from gta2cs.matching import Rescaled, match_scale
from gta2cs.nets import SegOutput
from gta2cs.stage import StageState
from tiny import tiny_net, without_scores


class Mean(nn.Module):
    """Each pixel's logits are its colours: scaling there and back changes a flat image by nothing."""

    def forward(self, images):
        return SegOutput(images, images, images)


def score_of(curve):
    """A score that depends on the scale alone, and the scales that were asked for."""
    asked = []

    def score(net, known=None):
        factor = net.factor if isinstance(net, Rescaled) else 1.0
        asked.append(factor)
        return LabelFree({"confident_consistency": curve(math.log2(factor))}, [])

    return score, asked


@pytest.mark.parametrize("best", [-1.5, -1, -0.5, 0, 0.5, 1, 1.5])
def test_the_smaller_scale_with_the_highest_score_is_found_and_a_larger_one_is_never_taken(best):
    score, asked = score_of(lambda x: 0.9 - 0.1 * abs(x - best))
    scale, found = match_scale(score, Mean())
    assert math.log2(scale) == pytest.approx(min(best, 0))
    assert sorted(asked) == pytest.approx(list(found))
    assert len(asked) == len(set(asked)) <= 2 + 3
    if best >= 0:
        assert len(asked) == 2  # source would be shrunk: no need to know how far


def test_a_scale_at_which_classes_are_lost_is_compared_by_the_classes_of_scale_1():
    """One class everywhere never contradicts itself: the loop's score counts the lost one as 0."""
    shares = [0.9, 0.1]
    told = []

    def score(net, known):
        told.append(known)
        return LabelFree({"confident_consistency": 0.5}, shares)

    match_scale(score, Mean())
    assert told == [None, shares]


@pytest.mark.parametrize("start", [0.5, 0.9])
def test_a_scale_has_to_take_away_a_tenth_of_what_the_score_lacks(start):
    for share, expected in ((0.09, 1), (0.11, math.sqrt(0.5))):
        score, _ = score_of(lambda x, gain=share * (1 - start): start + (gain if abs(x + 0.5) < 0.1 else 0))
        assert match_scale(score, Mean())[0] == pytest.approx(expected)


def test_a_score_that_rises_in_both_directions_says_something_else():
    score, asked = score_of(lambda x: 0.5 + 0.05 * abs(x))
    assert match_scale(score, Mean())[0] == 1
    assert len(asked) == 3


def test_enlarged_images_go_through_the_net_one_at_a_time():
    """Four images of 1024 x 2048 at scale 2.8 would not fit."""
    seen = []

    class Counting(Mean):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    images = torch.rand(3, 3, 16, 24)
    whole = Rescaled(Mean(), 2.0)
    alone = torch.cat([whole(image).logits for image in images.split(1)])
    assert torch.equal(Rescaled(Counting(), 2.0)(images).logits, alone)
    Rescaled(Counting(), 0.5)(images)
    assert seen == [1, 1, 1, 3]


def test_a_rescaled_net_answers_at_the_size_that_came():
    images = torch.rand(2, 3, 31, 48)
    for factor in (0.35, 1 / math.sqrt(2), 2.8):
        assert Rescaled(Mean(), factor)(images).logits.shape == images.shape
        flat = images.mean((2, 3), keepdim=True).expand_as(images).contiguous()
        torch.testing.assert_close(Rescaled(Mean(), factor)(flat).logits, flat)


def test_source_crops_are_scaled_by_it_in_every_later_stage_and_after_a_resume(tmp_path, monkeypatch):
    seen = []
    without_scores(monkeypatch)
    monkeypatch.setattr(train_gta2cs, "match_scale", lambda score, net: (0.5, {0.5: 0.9, 1.0: 0.7}))
    made = train_gta2cs.StepData

    def noting(*args, **options):
        if "source_scale" in options:
            seen.append(options["source_scale"])
        return made(*args, **options)

    monkeypatch.setattr(train_gta2cs, "StepData", noting)

    def config(resume=False, **data):
        return train_gta2cs.Config(
            data=train_gta2cs.DataConfig(crop=(64, 64), source_scale=(0.5, 1.5), target_scale=(0.9, 1.2), **data),
            net=tiny_net(),
            stages=[train_gta2cs.Stage(r, 1, options=o) for r, o in STAGES],
            batch_size=1,
            score_images=1,
            out=tmp_path / "run",
            resume=resume,
            overwrite=not resume,
        )

    STAGES = [("source_only", {}), ("dacs", {}), ("dacs", {})]
    train_gta2cs.main(config())
    assert seen == [(0.5, 1.5)] * 3  # dacs does not ask for it by itself
    seen.clear()
    train_gta2cs.main(config(match_scale=True))
    assert seen == [(0.5, 1.5), (1.8, 2.4), (1.8, 2.4)]
    history = load_checkpoint(tmp_path / "run" / "stage2_dacs" / "last.pt")["history"]
    assert '"source_factor": 2.0' in history
    assert '"scale_scores": {"0.50": 0.9, "1.00": 0.7}' in history

    seen.clear()
    (tmp_path / "run" / "stage3_dacs" / "last.pt").unlink()
    monkeypatch.setattr(
        train_gta2cs, "match_scale", lambda score, net: pytest.fail("a resumed run does not look again")
    )
    train_gta2cs.main(config(resume=True, match_scale=True))
    assert seen[-1] == (1.8, 2.4)


def test_a_net_that_has_learned_nothing_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gta2cs, "match_scale", lambda score, net: pytest.fail("there is no trained net"))
    run = SimpleNamespace(
        config=train_gta2cs.Config(stages=[train_gta2cs.Stage("combined", 1)]), trained=False, source_factor=None
    )
    state = StageState(run, 0, SimpleNamespace(MATCH_SCALE=True, student=None), None, [])
    train_gta2cs.match_source_scale(state)
    assert state.history == {"source_factor": None}
