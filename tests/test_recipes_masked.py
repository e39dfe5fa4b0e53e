"""Masked consistency (MIC) as an option of every self-training recipe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gta2cs.loading import Batch
from gta2cs.nets import SegOutput
from gta2cs.recipes import Dacs, Diga, DigaWarmup, Draws, Duda, Ehtdi
from udakit import cross_entropy

CLASSES, SIZE = 4, (16, 24)


class TinyNet(nn.Module):
    """Notes what it sees; BatchNorm, so that statistics can be spoilt."""

    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.head = nn.Conv2d(6, CLASSES, 1)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> SegOutput:
        self.seen.append(images)
        features = self.encoder(images).relu()
        return SegOutput(self.head(features), features, features)


def net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


def batch() -> Batch:
    images = torch.randn(2, 2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    labels = images[0].mean(1).mul(3).add(2).clamp(0, CLASSES - 1).long()
    return Batch(images[0], labels, None, images[1], None, None)


def step(recipe: nn.Module) -> dict[str, torch.Tensor]:
    return recipe.train()(batch(), Draws(0, 0, range(2), torch.device("cpu"))).terms


def build(name: str, student: nn.Module, **options: object) -> nn.Module:
    if name == "duda":
        return Duda(student, CLASSES, Duda.parse(options), {"large teacher": net()})
    kinds = {"dacs": Dacs, "diga": Diga, "ehtdi": Ehtdi}
    return kinds[name].build(student, CLASSES, dict(options), net)


@pytest.mark.parametrize("name", ["dacs", "diga", "ehtdi", "duda"])
def test_every_recipe_has_the_term_and_nothing_else_changes(name: str) -> None:
    options = {"selector": "argmax"} if name in ("dacs", "diga") else {}
    plain = step(build(name, net(), **options))
    masked = step(build(name, student := net(), mask_weight=2.0, mask_block=8, **options))
    assert set(masked) == {*plain, "masked"}
    for term, value in plain.items():
        torch.testing.assert_close(masked[term], value)
    masked["masked"].backward()
    assert float(masked["masked"].detach()) > 0
    assert float(student.head.weight.grad.abs().sum()) > 0


def masked_views(student: TinyNet, block: int) -> list[torch.Tensor]:
    """(N, rows, columns) of each view that has an empty block: True where removed."""
    found = []
    for images in student.seen:
        cells = (images == 0).all(1).float().unfold(1, block, block).unfold(2, block, block).mean((-1, -2))
        if bool((cells == 1).any()):
            assert bool(((cells == 0) | (cells == 1)).all()), "a block is removed whole or not at all"
            found.append(cells == 1)
    return found


def test_complements_cover_the_image_once() -> None:
    step(build("dacs", student := net(), mask_weight=1.0, mask_ratio=0.5, mask_block=8, mask_complements=True))
    one, other = masked_views(student, 8)
    assert torch.equal(one, ~other)
    step(build("dacs", student := net(), mask_weight=1.0, mask_ratio=0.5, mask_block=8))
    assert len(masked_views(student, 8)) == 1


def test_the_term_is_the_loss_of_the_masked_images() -> None:
    options = {"mask_weight": 0.5, "mask_block": 8, "augment_mixed": False, "selector": "threshold", "threshold": 0.3}
    recipe = build("dacs", student := net(), **options)
    teacher_logits = recipe.train().teacher(batch().target_images).logits
    student.seen.clear()
    masked = step(recipe)["masked"]
    seen = student.seen[-1]
    kept = (seen != 0).any(1, keepdim=True)
    torch.testing.assert_close(seen, batch().target_images * kept)
    pseudo = recipe.selector(teacher_logits)
    expected = 0.5 * cross_entropy(
        student(seen).logits, pseudo.labels, pixel_weight=pseudo.weight, reduction="mean_all"
    )
    torch.testing.assert_close(masked, expected)


def test_running_statistics_do_not_see_empty_blocks() -> None:
    statistics = []
    for weight in (0.0, 1.0):
        step(build("dacs", student := net(), mask_weight=weight, mask_block=8))
        statistics.append(student.encoder[1].running_mean.clone())
    assert torch.equal(*statistics)


def test_the_warm_up_has_no_labels_to_be_consistent_with() -> None:
    with pytest.raises(ValueError, match="'mask_weight'"):
        DigaWarmup.parse({"mask_weight": 1.0})
