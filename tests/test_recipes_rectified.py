"""ProDA's selection in the recipes: fixed labels, centroids from target, nothing else changed."""

from __future__ import annotations

import torch

from gta2cs.loading import Batch
from gta2cs.recipes import Dacs, Diga, Draws, Preparation
from test_recipes_masked import CLASSES, batch, net
from udakit import RectifiedSelector


def prepared(recipe: Dacs | Diga) -> Dacs | Diga:
    def batches(start: int, stop: int) -> list[Batch]:
        return [batch()] * 2

    recipe.train().prepare(Preparation(batches))
    return recipe


def run(recipe: Dacs | Diga) -> None:
    recipe(batch(), Draws(0, 0, range(2), torch.device("cpu"))).total.backward()


def test_dacs_takes_the_rectified_labels_of_the_net_it_started_from() -> None:
    recipe = prepared(Dacs.build(net(), CLASSES, {"selector": "rectified"}, net))
    held = recipe.rectified
    assert held is not None
    before = held.prototypes.prototypes.clone()
    assert bool(held.prototypes.seen.any())
    images = batch().target_images
    expected = held.select(held.labeller(images).logits, recipe.teacher(images).features)
    with torch.no_grad():
        recipe.student.head.weight.add_(1.0)
    recipe.after_step()
    pseudo, _ = held(images, recipe.teacher(images), None)
    assert torch.equal(pseudo.labels, expected.labels)
    run(recipe)
    assert not torch.equal(before, held.prototypes.prototypes)
    assert not any(p.requires_grad for p in held.parameters())


def test_diga_can_select_so_with_its_own_centroids() -> None:
    recipe = prepared(Diga.build(net(), CLASSES, {"selector": "rectified"}, net))
    assert isinstance(recipe.selector, RectifiedSelector)
    assert recipe.selector.prototypes is recipe.prototypes
    run(recipe)
