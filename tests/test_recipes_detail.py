"""HRDA's detail crop has its share in every cross-entropy of every recipe, not in some."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gta2cs.nets import DETAIL_WEIGHT, SegOutput
from gta2cs.recipes import Dacs, Diga, DigaWarmup, Draws, Duda, DudaPre, Ehtdi, SourceOnly
from test_recipes_masked import CLASSES, TinyNet, batch, net
from udakit import crop_detail, cross_entropy, draw_detail_box, symmetric_cross_entropy


class DetailNet(TinyNet):
    """A detail crop whose logits come from a head of their own: who has a gradient there has counted it."""

    def __init__(self) -> None:
        super().__init__()
        self.detail_head = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> SegOutput:
        output = super().forward(images)
        size = (images.shape[-2], images.shape[-1])
        box = draw_detail_box(len(images), size, detail=(size[0] // 2, size[1] // 2), device=images.device)
        detail = (self.detail_head(crop_detail(images, box)), box)
        return SegOutput(output.head_logits, output.features, output.encoded, None, detail)


def recipe_of(name: str, student: nn.Module) -> nn.Module:
    kinds = {"source_only": SourceOnly, "dacs": Dacs, "diga_warmup": DigaWarmup, "diga": Diga, "ehtdi": Ehtdi}
    if name == "duda":
        return Duda(student, CLASSES, Duda.parse({}), {"large teacher": net()})
    options = {"selector": "argmax"} if name in ("dacs", "diga") else {}
    if name == "duda_pre":
        options = {"base_options": {"selector": "argmax"}}
        return DudaPre.build(student, CLASSES, options, lambda **changes: net())
    return kinds[name].build(student, CLASSES, options, net)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("source_only", {"source"}),
        ("dacs", {"source", "mix"}),
        ("diga_warmup", {"source"}),
        ("diga", {"source", "mix"}),
        ("ehtdi", {"source", "mix", "paste"}),
        ("duda_pre", {"small_source", "small_mix"}),
        ("duda", {"source"}),
    ],
)
def test_the_detail_counts_in_every_cross_entropy(name: str, terms: set[str]) -> None:
    torch.manual_seed(0)
    student = DetailNet()
    losses = recipe_of(name, student).train()(batch(), Draws(0, 0, range(2), torch.device("cpu"))).terms
    counted = set()
    for term, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, student.detail_head.weight, retain_graph=True, allow_unused=True)
        if gradient is not None and bool(gradient.any()):
            counted.add(term)
    assert counted == terms


@pytest.mark.parametrize("first", [False, True])
def test_the_share_is_a_tenth_whether_or_not_the_logits_are_there(first: bool) -> None:
    torch.manual_seed(0)
    labels = batch().source_labels
    output = DetailNet()(batch().source_images)
    if first:
        _ = output.logits
    logits, box = output.detail
    for kind, loss in (("cross_entropy", cross_entropy), ("symmetric_cross_entropy", symmetric_cross_entropy)):
        whole, detail = loss(output.head_logits, labels), loss(logits, crop_detail(labels, box))
        expected = (1 - DETAIL_WEIGHT) * whole + DETAIL_WEIGHT * detail
        torch.testing.assert_close(getattr(output, kind)(labels), expected)
