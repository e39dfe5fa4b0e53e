"""Options of how self-training labels and learns: views, class shares, thresholds, losses, distillation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gta2cs.nets import build_net
from gta2cs.recipes import RECIPES, Dacs, DigaWarmup, Draws, Duda, Ehtdi, Preparation, SelfTraining
from test_recipes_masked import CLASSES, batch, build, net, step
from udakit import (
    AdaptiveThresholdSelector,
    class_mask,
    feature_distillation_loss,
    hflip_average,
    pixel_prototype_contrast_loss,
    symmetric_cross_entropy,
)

PLAIN = {"selector": "argmax"}


@pytest.mark.parametrize("name", ["dacs", "diga", "ehtdi", "duda"])
@pytest.mark.parametrize("option", ["mirror_teacher", "align"])
def test_every_recipe_takes_it_and_other_labels_come_of_it(name: str, option: str) -> None:
    own = PLAIN if name in ("dacs", "diga") else {}
    plain, changed = step(build(name, net(), **own)), step(build(name, net(), **own, **{option: True}))
    assert set(plain) == set(changed)
    term = "kd" if name == "duda" else "mix"
    assert not torch.equal(plain[term], changed[term])
    torch.testing.assert_close(plain["source"], changed["source"])


def test_labels_are_the_mean_over_two_views() -> None:
    recipe = build("dacs", net(), **PLAIN, mirror_teacher=True).train()
    images = batch().target_images
    output = recipe.look(recipe.teacher, images)
    expected = hflip_average(lambda x: recipe.teacher(x).logits, images)
    torch.testing.assert_close(output.logits.softmax(1), expected)
    torch.testing.assert_close(output.features, recipe.teacher(images).features)
    assert not output.logits.requires_grad


def test_shares_are_those_of_source() -> None:
    recipe = build("dacs", net(), **PLAIN, align=True).train()
    logits = recipe.teacher(batch().target_images).logits
    labels = torch.zeros_like(batch().source_labels)
    labels[0] = 1  # source has classes 0 and 1 alone
    aligned = recipe.aligned(logits, labels, None).softmax(1)
    weighted = logits.softmax(1) * torch.tensor([0.5, 0.5, 0.0, 0.0]).view(1, -1, 1, 1)
    weighted = weighted / logits.softmax(1).mean((0, 2, 3)).view(1, -1, 1, 1)
    torch.testing.assert_close(aligned, weighted / weighted.sum(1, keepdim=True))
    assert recipe.alignment.source_share.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_shares_survive_a_checkpoint() -> None:
    recipe = build("dacs", net(), **PLAIN, align=True)
    step(recipe)
    state = recipe.state_dict()
    assert state["alignment.source_batches"] == state["alignment.target_batches"] == 1


def test_adaptive_thresholds_are_a_selector() -> None:
    recipe = build("dacs", net(), selector="adaptive", threshold_momentum=0.5)
    before = recipe.selector.threshold.clone()
    assert isinstance(recipe.selector, AdaptiveThresholdSelector)
    step(recipe)
    assert not torch.equal(before, recipe.selector.threshold)


def test_any_selector_can_have_the_weight_by_confidence() -> None:
    weighted = step(build("dacs", net(), **PLAIN, threshold=0.3, confidence_weight=True))
    ratio = step(build("dacs", net(), selector="confident_ratio", threshold=0.3))
    assert all(torch.equal(weighted[name], term) for name, term in ratio.items())
    assert not torch.equal(weighted["mix"], step(build("dacs", net(), **PLAIN))["mix"])
    with pytest.raises(ValueError, match="`confidence_weight` to be false with `selector` confident_ratio"):
        build("dacs", net(), selector="confident_ratio", confidence_weight=True)


@pytest.mark.parametrize("selector", ["argmax", "threshold", "adaptive", "class_quantile", "rectified"])
@pytest.mark.parametrize("half", [False, True])
def test_the_weight_by_confidence_multiplies_what_a_selector_keeps_and_the_log_shows_that(
    selector: str, half: bool
) -> None:
    found = []
    options = {"selector": selector, "threshold": 0.3, "share": 0.9, "ignore_top": 4, "mix_fraction": 0.3}
    for changes in ({}, {"confidence_weight": True}, {"confidence_weight": True, "threshold": 1.0}):
        recipe = build("dacs", net(), **{**options, **changes}).train()
        recipe.prepare(Preparation(lambda start, stop: [batch()]))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(recipe(batch(), Draws(0, 0, range(2), torch.device("cpu"))))
    kept, weighed, doubted = found
    torch.testing.assert_close(weighed.selection.kept, kept.selection.kept)
    before, after = kept.shared.mixed.weight, weighed.shared.mixed.weight
    of_target = after != before
    (ratio,) = (after[of_target] / before[of_target]).unique()
    assert 0 < ratio < 1
    assert (before[:, :4] * ~of_target[:, :4]).unique().tolist() == [0, 1]  # no label there, or source's
    assert doubted.shared.mixed.weight.unique().tolist() == [0, 1]  # no pixel is sure: source's labels alone
    assert all(term.isfinite() for losses in found for term in losses.terms.values())


def mixed_of(recipe: Dacs, student: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the student made of the mixture of the last step, and the mixture's labels."""
    draws = Draws(0, 0, range(2), torch.device("cpu"))
    mask = class_mask(batch().source_labels, recipe.draw_classes(batch().source_labels, draws))
    pseudo = recipe.teacher(batch().target_images).logits.argmax(1)
    return student(student.seen[-1]).logits, batch().source_labels.where(mask, pseudo)


def test_the_loss_on_pseudo_labels_can_be_symmetric() -> None:
    options = {**PLAIN, "augment_source": False, "augment_mixed": False, "pseudo_loss": "symmetric_cross_entropy"}
    recipe = build("dacs", student := net(), **options)
    terms = step(recipe)
    logits, labels = mixed_of(recipe, student)
    torch.testing.assert_close(terms["mix"], symmetric_cross_entropy(logits, labels, reduction="mean_all"))
    plain = step(build("dacs", net(), **{**options, "pseudo_loss": "cross_entropy"}))
    torch.testing.assert_close(terms["source"], plain["source"])
    assert not torch.equal(terms["mix"], plain["mix"])


def test_pixels_are_drawn_to_prototypes_of_the_teacher_on_source() -> None:
    options = {**PLAIN, "augment_source": False, "augment_mixed": False, "prototype_contrast": 0.5}
    recipe = build("dacs", student := net(), **options)
    terms = step(recipe)
    held = recipe.contrasts["prototype_contrast"].prototypes
    assert bool(held.seen.any())
    _, labels = mixed_of(recipe, student)
    features = [student(x).features for x in (batch().source_images, student.seen[-1])]
    expected = sum(
        pixel_prototype_contrast_loss(f, y, held.prototypes, seen=held.seen)
        for f, y in zip(features, (batch().source_labels, labels), strict=True)
    )
    torch.testing.assert_close(terms["prototype_contrast"], 0.5 * expected)
    terms["prototype_contrast"].backward()
    assert float(student.encoder[0].weight.grad.abs().sum()) > 0


FPN = {"arch": "fpn", "num_classes": CLASSES, "weights": "random", "decoder_pyramid_channels": 16}


def test_features_are_distilled_from_the_net_as_it_was_made() -> None:
    torch.manual_seed(0)
    student, reference = (build_net(**FPN, decoder_segmentation_channels=32) for _ in range(2))
    options = {**PLAIN, "augment_source": False, "augment_mixed": False, "feature_distillation": 0.1}
    recipe = Dacs.build(student, CLASSES, options, lambda: reference).train()
    assert not any(p.requires_grad for p in recipe.reference.parameters())
    assert [len(group["params"]) for group in recipe.extra_param_groups(1.0, 3.0)] == [6]
    assert recipe.extra_param_groups(1.0, 3.0)[0]["lr"] == 3.0
    encoded, images = torch.randn(2, 320, 1, 1, requires_grad=True), torch.randn(2, 3, 32, 32)
    loss = recipe._distil(encoded, images)
    torch.testing.assert_close(
        loss, feature_distillation_loss(recipe.projection(encoded), reference.eval().encode(images))
    )
    recipe(batch(), Draws(0, 0, range(2), torch.device("cpu"))).terms["feature_distillation"].backward()
    assert all(p.grad is not None for p in recipe.projection.parameters())
    assert float(next(student.encoder.parameters()).grad.abs().sum()) > 0
    with pytest.raises(ValueError, match=r"`reference` .* for feature_distillation > 0"):
        Dacs(student, CLASSES, Dacs.parse(options))


def test_the_warm_up_labels_nothing() -> None:
    for option in ("mirror_teacher", "align"):
        with pytest.raises(ValueError, match=f"'{option}'"):
            DigaWarmup.parse({option: True})
        for recipe in (Dacs, Ehtdi, Duda, SelfTraining):
            assert recipe.parse({option: True}) is not None


def test_the_share_of_each_class_rises_evenly_and_a_resumed_run_goes_on_from_it() -> None:
    options = {"selector": "class_quantile", "share": 0.5, "share_end": 0.9}
    recipe = build("dacs", net(), **options)
    recipe.trains_for(4)
    shares = []
    for _ in range(4):
        recipe.after_step()
        shares.append(recipe.selector.share)
    assert shares == pytest.approx([0.6, 0.7, 0.8, 0.9])

    stopped = build("dacs", net(), **options)
    stopped.trains_for(4)
    for _ in range(2):
        stopped.after_step()
    resumed = build("dacs", net(), **options)
    resumed.trains_for(4)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.selector.share == pytest.approx(0.7)
    resumed.after_step()
    assert resumed.selector.share == pytest.approx(0.8)

    constant = build("dacs", net(), selector="class_quantile", share=0.5)
    constant.after_step()
    assert constant.selector.share == 0.5
    earlier = constant.state_dict()
    del earlier["course"]  # checkpoints of before it existed stay readable
    resumed.load_state_dict(earlier)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"selector": "threshold", "threshold": 1.5}, "threshold"),
        ({"selector": "argmax", "threshold": -1.0, "confidence_weight": True}, "threshold"),
        ({"selector": "class_quantile", "share": 1.5}, "share"),
        ({"selector": "adaptive", "threshold_momentum": 2.0}, "momentum"),
        ({"ema": 1.5}, "ema"),
    ],
)
def test_a_value_out_of_range_is_refused_before_the_stages_before_train(wrong: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `{name}` to be"):
        RECIPES["dacs"].parse(wrong)
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be.* an option of candidate 'blended' or of `shared`"):
        RECIPES["combined"].parse({"shared": wrong})


@pytest.mark.parametrize("wrong", [{"selector": "argmax", "share_end": 0.9}, {"share_end": 1.1}, {"share_end": 0}])
def test_a_rising_share_is_one_of_class_quantiles(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="`share_end` to be a share"):
        build("dacs", net(), **{"selector": "class_quantile", **wrong})
