"""SePiCo's contrast in the recipe: statistics of the teacher's source features, a gradient for the student."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gta2cs.recipes import Dacs, Draws
from test_recipes_masked import CLASSES, SIZE, batch, net
from udakit import SegBatch


def test_statistics_are_those_of_the_teacher_on_source() -> None:
    recipe = Dacs.build(net(), CLASSES, {"contrast": 1.0, "augment_source": False, "selector": "argmax"}, net).train()
    held = recipe.contrasts["contrast"].distributions
    losses = recipe(batch(), Draws(0, 0, range(2), torch.device("cpu")))
    features = F.normalize(recipe.teacher(batch().source_images).features, dim=1)
    for c in range(CLASSES):
        pixels = features.movedim(1, -1)[batch().source_labels == c]
        assert held.counts[c] == len(pixels)
        torch.testing.assert_close(held.means[c], pixels.mean(0))
    losses.terms["contrast"].backward()
    assert float(recipe.student.encoder[0].weight.grad.abs().sum()) > 0
    assert recipe.student.head.weight.grad is None
    assert held.counts.sum() == 2 * SIZE[0] * SIZE[1]


def test_rejected_pixels_take_no_part() -> None:
    recipe = Dacs.build(net(), CLASSES, {"contrast": 1.0}, net).train()
    recipe.contrasts["contrast"].update(recipe.teacher(batch().source_images).features, batch().source_labels)
    mixed = recipe.translate(batch(), Draws(0, 0, range(2), torch.device("cpu")))
    nothing = SegBatch(mixed, batch().source_labels, torch.zeros(2, *SIZE))
    assert float(recipe.contrasts["contrast"](torch.randn(2, 6, *SIZE), nothing)) == 0
