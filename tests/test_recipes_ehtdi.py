"""EHTDI's recipe: its terms against plain formulas, its options, and the rows and configurations that use them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gta2cs
from benchmarks import real_pairs, rows
from gta2cs.loading import Batch
from gta2cs.nets import SegOutput
from gta2cs.recipes import Draws, Ehtdi
from gta2cs.recipes.ehtdi import band_of
from udakit import class_mask, pixel_contrast_loss, prototype_contrast_loss, resize_labels

CLASSES, SIZE, IGNORE = 4, (16, 24), 255
WEIGHTS = rows.ehtdi.WEIGHTS


class TinyNet(nn.Module):
    """What the recipe asks of a net; without BatchNorm, so that two passes agree."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, images: Tensor) -> SegOutput:
        features = self.encoder(images).relu()
        logits = 5 * self.head(features)
        return SegOutput(logits, logits, features)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    source, target = (torch.randn(2, 3, *SIZE, generator=generator) for _ in range(2))
    regions = torch.randint(CLASSES, (2, 4, 6), generator=generator)
    labels = regions.repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, -1] = IGNORE
    return Batch(source, labels, None, target, None, None)


def draws() -> Draws:
    return Draws(0, 3, range(2), torch.device("cpu"))


def recipe(**options) -> Ehtdi:
    torch.manual_seed(0)
    return Ehtdi(TinyNet(), CLASSES, Ehtdi.parse({"paste_threshold": 0.6, **options}))


def plain(**options) -> Ehtdi:
    """The recipe without augmentation: the strong views are the weak ones."""
    made = recipe(**options)
    made.augment = lambda images, draws: images
    return made


# --- the terms -------------------------------------------------------------------------------------------------------


def band_by_loops(mask: Tensor, kernel: int) -> Tensor:
    """Pixels whose neighbourhood inside the image has both values; of 2, the pixel and those above and to the left."""
    before, after = (1, 1) if kernel == 3 else (1, 0)
    band = torch.zeros_like(mask)
    n, h, w = mask.shape
    for i in range(n):
        for y in range(h):
            for x in range(w):
                window = mask[i, max(y - before, 0) : y + after + 1, max(x - before, 0) : x + after + 1]
                band[i, y, x] = window.any() and not window.all()
    return band


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


@pytest.mark.parametrize("kernel", [2, 3])
def test_every_term_is_its_formula(kernel: int) -> None:
    made, data = plain(**WEIGHTS, boundary_kernel=kernel), batch()
    terms = made(data, draws()).terms

    net, source, target = made.student, data.source_images, data.target_images
    confidence, pseudo = net(target).logits.softmax(1).max(1)
    sure = confidence > 0.6
    chosen = class_mask(data.source_labels, made.draw_classes(data.source_labels, draws()))
    assert 0 < sure.float().mean() < 1
    assert 0 < chosen.float().mean() < 1
    mixed, mixed_labels = torch.where(chosen[:, None], source, target), data.source_labels.where(chosen, pseudo)
    pasted, pasted_labels = torch.where(sure[:, None], target, source), pseudo.where(sure, data.source_labels)
    on_mixed, on_pasted = net(mixed).logits, net(pasted).logits
    paste_band = band_by_loops(sure, kernel) & ~chosen
    small = F.avg_pool2d(on_mixed, 8)
    classes = resize_labels(mixed_labels.where(chosen | sure, IGNORE), small.shape[-2:])
    expected = {
        "source": ce(net(source).logits, data.source_labels),
        "mix": ce(on_mixed, mixed_labels),
        "boundary": ce(on_mixed, mixed_labels.where(band_by_loops(chosen, kernel), IGNORE)),
        "paste": ce(on_pasted, pasted_labels),
        "paste_boundary": 0.1 * ce(on_pasted, pasted_labels.where(paste_band, IGNORE)),
        "pixel_contrast": 0.1 * pixel_contrast_loss(small.softmax(1), small.softmax(1), temperature=1 / 20),
        "prototype_contrast": 0.1 * prototype_contrast_loss(small, small, classes, num_classes=CLASSES),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_both_views_of_the_contrasts_learn_and_differ() -> None:
    made = recipe(**{**dict.fromkeys(WEIGHTS, 0.0), "pixel_contrast": 1.0, "prototype_contrast": 1.0})
    terms = made(batch(), draws()).terms
    (terms["pixel_contrast"] + terms["prototype_contrast"]).backward()
    assert made.student.head.weight.grad.abs().max() > 0
    same = plain(**{**dict.fromkeys(WEIGHTS, 0.0), "pixel_contrast": 1.0, "prototype_contrast": 1.0})
    assert not torch.equal(same(batch(), draws()).terms["pixel_contrast"], terms["pixel_contrast"])


def test_a_threshold_that_nothing_reaches_pastes_nothing() -> None:
    made, data = plain(**WEIGHTS, paste_threshold=1.0), batch()
    terms = made(data, draws()).terms
    torch.testing.assert_close(terms["paste"], terms["source"])
    assert terms["paste_boundary"] == 0


@pytest.mark.parametrize("value", [False, True])
def test_an_empty_band_gives_zero_with_a_graph(value: bool) -> None:
    logits = torch.randn(1, CLASSES, 5, 5, requires_grad=True)
    labels, mask = torch.zeros(1, 5, 5, dtype=torch.long), torch.full((1, 5, 5), value)

    def band_loss(mask: Tensor, outside: Tensor | None = None) -> Tensor:
        output = SegOutput(logits, logits, logits)
        return output.cross_entropy_and_band(labels, band_of(mask, outside, 3))[1]

    loss = band_loss(mask)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    one = mask.index_fill(1, torch.tensor([0]), not value)
    assert band_loss(one) > 0
    assert band_loss(one, torch.ones_like(one)) == 0


# --- who labels, what may be pasted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_labels_come_from_the_net_that_is_named(who: str) -> None:
    made, data = recipe(labels_from=who, ema=0.5), batch()
    with torch.no_grad():
        made.student.head.weight.neg_()
    labeller = made.student if who == "student" else made.teacher.module
    predicted = labeller(data.target_images).logits.argmax(1)
    assert not torch.equal(made.student(data.target_images).logits, made.teacher(data.target_images).logits)
    selection = made(data, draws()).selection
    assert selection.predicted.tolist() == torch.bincount(predicted.flatten(), minlength=CLASSES).tolist()
    assert torch.equal(selection.kept, selection.predicted)  # all pixels, no threshold


def test_the_released_code_labels_with_the_student() -> None:
    assert recipe().options.labels_from == "student"


def test_only_candidates_are_pasted_onto_target() -> None:
    made, data = plain(mix_classes=[2], mix_fraction=1.0), batch()
    on_target = made(data, draws()).shared.mixed
    pasted = data.source_labels == 2
    expected = torch.where(pasted[:, None], data.source_images, data.target_images)
    torch.testing.assert_close(on_target.images, expected)


# --- the benchmark's rows --------------------------------------------------------------------------------------------

TERMS = {
    "ehtdi_class_mix": set(),
    "ehtdi_paste": {"paste"},
    "ehtdi_boundary": {"paste", "boundary", "paste_boundary"},
    "ehtdi_pixel_contrast": {"pixel_contrast"},
    "ehtdi_prototype_contrast": {"prototype_contrast"},
    "ehtdi_all": {"paste", "boundary", "paste_boundary", "pixel_contrast", "prototype_contrast"},
}
TERMS["ehtdi_all_student"] = TERMS["ehtdi_all"]


@pytest.mark.parametrize("name", list(TERMS))
def test_a_row_has_the_terms_that_it_is_named_after(name: str) -> None:
    row = rows.ehtdi.ehtdi_ablation("camvid")[name]
    (stage,) = real_pairs.stages_of("camvid", row)
    terms = recipe(**stage.options)(batch(), draws()).terms
    assert set(terms) == {"source", "mix"} | TERMS[name]


@pytest.mark.parametrize("pair", list(real_pairs.PAIRS))
def test_steps_of_the_rows_are_half_of_the_pairs(pair: str) -> None:
    found = rows.ehtdi.ehtdi_ablation(pair)
    assert list(found) == ["source_only_half", *TERMS]
    half = real_pairs.setting(pair).steps // 2
    for name, row in found.items():
        (stage,) = real_pairs.stages_of(pair, row)
        assert stage.steps == half, name
        assert "start" not in row, name
        train_gta2cs.RECIPES[stage.recipe].parse(stage.options)
    (stage,) = real_pairs.stages_of(pair, real_pairs.row_of(pair, "ehtdi"))
    assert stage.steps == 2 * half
    assert stage.lr == real_pairs.setting(pair).adaptation_lr
    assert stage.options["labels_from"] == "teacher"


def test_rows_differ_in_nothing_but_their_parts() -> None:
    found = {k: r["options"] for k, r in rows.ehtdi.ehtdi_ablation("camvid").items() if k != "source_only_half"}
    whole = found["ehtdi_all"]
    for name, options in found.items():
        changed = {k for k in options if options[k] != whole[k]}
        assert options.keys() == whole.keys()
        assert changed <= ({"labels_from"} if name == "ehtdi_all_student" else set(WEIGHTS) - {"mix_weight"}), name
        assert all(options[k] == 0 for k in changed - {"labels_from"}), name


def test_weights_of_the_rows_are_ten_times_the_papers() -> None:
    paper = Ehtdi.Options()
    for name, weight in WEIGHTS.items():
        assert weight == pytest.approx(10 * getattr(paper, name)), name


def test_rows_of_two_tables_with_one_name_are_one_run() -> None:
    for pair in real_pairs.PAIRS:
        seen: dict[str, dict] = {}
        for group in real_pairs.GROUPS.values():
            for name, row in group.rows(pair).items():
                assert seen.setdefault(name, row) == row, name


def test_the_table_shows_the_score_around_boundaries() -> None:
    score = {"iou": {"a": 50.0}, "means": {"mIoU": 50.0, "boundary": 31.0}}
    scores = {"ehtdi, student": score, "ehtdi, teacher": score}
    run = {"pair": "camvid", "recipe": "ehtdi_paste", "seed": 0, "stages": [{"recipe": "ehtdi"}], "rows": scores}
    text = real_pairs.summarize({"camvid/ehtdi_paste/0": run}, "ehtdi_ablation")
    assert "| row | seeds | mIoU | boundary | a |" in text
    assert "| ehtdi_paste, student | 1 | **50.0** | **31.0** | 50.0 |" in text
    assert "ehtdi_paste" not in real_pairs.summarize({"camvid/ehtdi_paste/0": run})


# --- the configurations ----------------------------------------------------------------------------------------------

CONFIGS = Path(train_gta2cs.__file__).parent / "configs"


def config(pair: str) -> train_gta2cs.Config:
    return train_gta2cs.parse(["--config", str(CONFIGS / f"ehtdi_{pair}.yaml")])


@pytest.mark.parametrize("pair", list(real_pairs.PAIRS))
def test_cpu_sized_configurations_are_the_rows(pair: str) -> None:
    warm, stage = config(pair).stages
    shared = real_pairs.setting(pair)
    (wanted,) = real_pairs.stages_of(pair, real_pairs.row_of(pair, "ehtdi"))
    assert stage == wanted
    assert (warm.recipe, warm.steps, warm.options) == ("source_only", shared.warm_steps, shared.augment)


@pytest.mark.parametrize(("pair", "contrast", "classes"), [("gta2cs", 0.01, 19), ("synthia2cs", 0.008997, 16)])
def test_published_configurations(pair: str, contrast: float, classes: int) -> None:
    found = config(pair)
    (stage,) = found.stages
    assert (found.optimizer, found.head_multiplier, found.weight_decay) == ("sgd", 10.0, 5e-4)
    assert (stage.recipe, stage.steps, stage.lr, stage.lr_power) == ("ehtdi", 250_000, 2.5e-4, 0.9)
    assert (found.batch_size, found.data.crop, found.data.target_size) == (2, (512, 512), (640, 1280))
    options = Ehtdi.parse(stage.options)
    assert options.mix_classes == list(range(5, classes))
    assert options.pixel_contrast == options.prototype_contrast == contrast
    assert (options.labels_from, options.ema, options.boundary_kernel) == ("student", 0.999, 2)
    for name in WEIGHTS.keys() - {"pixel_contrast", "prototype_contrast"}:
        assert getattr(options, name) == getattr(Ehtdi.Options(), name), name


def test_the_page_names_every_option_of_its_own() -> None:
    page = (CONFIGS.parents[1] / "docs" / "methods" / "ehtdi.md").read_text(encoding="utf-8")
    table = page.split("## The recipe", 1)[1]
    inherited = {f.name for f in fields(Ehtdi.__mro__[1].Options)}
    missing = [f.name for f in fields(Ehtdi.Options) if f.name not in inherited and f"`{f.name}`" not in table]
    assert not missing


@pytest.mark.slow
def test_dry_run_of_the_toy_configuration(tmp_path: Path) -> None:
    path = str(CONFIGS / "ehtdi_toy.yaml")
    found = train_gta2cs.main(train_gta2cs.parse(["--config", path, "--dry-run", "--out", str(tmp_path)]))
    assert {"source_only", "ehtdi, student", "ehtdi, teacher"} <= set(found)
    assert "boundary" in found["ehtdi, student"].means
