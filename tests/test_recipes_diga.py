"""DiGA's recipes and what was added around them: the learned translator, selectors, rounds, quality of a selection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import train_gta2cs
from benchmarks import harness, real_pairs, rows, selection_quality
from benchmarks.rows import duda as rows_of_duda
from gta2cs import learned_translator
from gta2cs.checkpoints import load_checkpoint
from gta2cs.learned_translator import Translator, adain, statistics, train_translator
from gta2cs.loading import Batch
from gta2cs.nets import SegOutput
from gta2cs.recipes import Dacs, Diga, DigaWarmup, Draws, Preparation
from tiny import NET, without_scores
from tiny import tiny_net as tiny_net_config
from udakit import PseudoLabels

CLASSES, SIZE = 4, (16, 24)


class TinyNet(nn.Module):
    """What recipes and translator ask of a net."""

    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> SegOutput:
        features = self.encoder(images).relu()
        return SegOutput(F.interpolate(3 * self.head(features), images.shape[-2:]), features, features)

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, self.encoder(images)]


def tiny_net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


def images_of(step: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(step)) + shift


def batches(start: int, stop: int, *, labels: bool = True):
    """A dark source with labels, a bright target."""
    for step in range(start, stop):
        source = images_of(2 * step, shift=-1.0)
        known = source.mean(1).mul(2).add(4).clamp(0, CLASSES - 1).long() if labels else None
        yield Batch(source, known, None, images_of(2 * step + 1, shift=1.0), None, None)


def draws(step: int = 0) -> Draws:
    return Draws(0, step, range(2), torch.device("cpu"))


# --- the learned translator ------------------------------------------------------------------------------------------


def test_adain_takes_the_statistics_of_the_style_and_leaves_an_image_in_its_own():
    content, style = images_of(0), 2 * images_of(1) + 3
    for own, wanted in zip(statistics(adain(content, style)), statistics(style), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adain(content, content), content)
    flat = adain(content, torch.ones_like(style))
    assert torch.isfinite(flat).all()


@pytest.mark.parametrize("size", [(16, 24), (15, 21)])
def test_translator_keeps_the_size_of_source_and_follows_each_target_image(size):
    translator = Translator(width=4)
    source, target = torch.randn(2, 3, *size), torch.randn(2, 3, 12, 10)
    first = translator(source, target)
    assert first.shape == source.shape
    other = translator(source, torch.stack([target[0], target[1] + 2]))
    torch.testing.assert_close(first[0], other[0])
    assert (first[1] - other[1]).abs().max() > 1e-3


def train(translator: Translator, give=batches, **options) -> Translator:
    train_translator(translator, give, tiny_net(), **{"steps": 6, "lr": 5e-3, **options})
    return translator


def new_translator() -> Translator:
    torch.manual_seed(1)
    return Translator(width=4)


def test_training_a_translator_reads_no_label_and_lowers_its_losses():
    translator, eye = new_translator(), tiny_net().pyramid
    batch = next(batches(0, 1))

    def losses():
        found = learned_translator.translator_losses(translator, eye, batch.source_images, batch.target_images)
        return {name: value.item() for name, value in found.items()}

    before = losses()
    train(translator, lambda start, stop: batches(start, stop, labels=False), steps=60)
    after = losses()
    assert int(translator.steps) == 60
    assert not any(p.requires_grad for p in translator.parameters())
    assert after["style"] < 0.9 * before["style"]
    assert after["reconstruction"] < 0.9 * before["reconstruction"]


def test_interrupted_translator_training_continues_bit_identically(tmp_path, monkeypatch):
    monkeypatch.setattr(learned_translator, "SAVE_EVERY", 2)
    whole = train(new_translator())

    def dies(start, stop):
        yield from batches(start, 5)
        raise KeyboardInterrupt

    path = tmp_path / "translator.pt"
    with pytest.raises(KeyboardInterrupt):
        train(new_translator(), dies, path=path)
    seen = []

    def counted(start, stop):
        seen.append(start)
        return batches(start, stop)

    resumed = train(new_translator(), counted, path=path, resume=True)
    assert seen == [4]
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    train(new_translator(), counted, path=path, resume=True, seed=1)  # of another training: not used
    train(new_translator(), counted, path=path)
    assert seen == [4, 0, 0]


def recipe_of(kind, previous=None, **options):
    options = {"translate": "learned", "translator_steps": 3, **options}
    return kind.build(tiny_net(), CLASSES, options, tiny_net, previous)


def test_a_recipe_trains_its_translator_once_and_hands_it_on():
    first = recipe_of(DigaWarmup)
    random_state = torch.get_rng_state()
    first.prepare(Preparation(batches, seed=3))
    assert torch.equal(torch.get_rng_state(), random_state)
    trained = {k: v for k, v in first.state_dict().items() if k.startswith("translator.")}
    assert int(trained["translator.steps"]) == 3

    again, other = recipe_of(DigaWarmup), recipe_of(DigaWarmup)
    again.prepare(Preparation(batches, seed=3))
    other.prepare(Preparation(batches, seed=4))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.items())
    assert not all(torch.equal(v, other.state_dict()[k]) for k, v in trained.items())

    second = recipe_of(Diga, previous=first, translator_steps=9)
    second.prepare(Preparation(batches, seed=5))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in trained.items())
    restored = recipe_of(Diga)
    restored.load_state_dict(second.state_dict())
    assert int(restored.translator.steps) == 3


@pytest.mark.parametrize("kind", [Dacs, DigaWarmup, Diga])
def test_steps_with_a_learned_translator_leave_it_alone(kind):
    recipe = recipe_of(kind)
    recipe.prepare(Preparation(batches))
    before = {k: v.clone() for k, v in recipe.translator.state_dict().items()}
    losses = recipe(next(batches(0, 1)), draws())
    losses.total.backward()
    assert all(p.grad is None for p in recipe.translator.parameters())
    assert all(torch.equal(v, before[k]) for k, v in recipe.translator.state_dict().items())
    assert recipe.student.head.weight.grad.abs().max() > 0


def test_an_unknown_translator_is_named():
    with pytest.raises(ValueError, match=r"`translate` to be one of .*'learned'.*'lerned'"):
        recipe_of(DigaWarmup, translate="lerned")


# --- the recipes' options --------------------------------------------------------------------------------------------


def test_without_crdomix_the_mixed_view_does_not_depend_on_target():
    batch = next(batches(0, 1))
    other = batch._replace(target_images=batch.target_images + 1)
    with_mix, without = (recipe_of(DigaWarmup, translate="color", crdomix=on) for on in (True, False))
    assert torch.equal(without.crdomix(batch, draws()), without.crdomix(other, draws()))
    assert not torch.equal(with_mix.crdomix(batch, draws()), with_mix.crdomix(other, draws()))
    augmented = without.augment(batch.source_images, draws())
    expected = 0.4 * augmented + 0.6 * batch.source_images
    torch.testing.assert_close(without.crdomix(batch, draws()), expected)


def diga(**options) -> Diga:
    recipe = recipe_of(Diga, translate="none", **options)
    recipe.prepare(Preparation(batches))
    return recipe


@pytest.mark.parametrize("record", [True, False])
def test_statistics_of_mixed_views_are_recorded_or_only_used(record):
    recipe = diga(record_mixed=record)
    recipe.student = norm = torch.nn.BatchNorm2d(3).train()
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(recipe.on_mixed(images), torch.nn.BatchNorm2d(3)(images))
    assert int(norm.num_batches_tracked) == record
    recipe.both(images, images)
    assert int(norm.num_batches_tracked) == (3 if record else 1)
    assert norm.track_running_stats


def test_consensus_is_the_default_selector():
    recipe = diga()
    assert recipe.selector is recipe.consensus


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"selector": "argmax"}, lambda p: torch.ones_like(p)),
        ({"selector": "threshold", "threshold": 0.6}, lambda p: (p >= 0.6).float()),
        # All are kept, with one weight; the log shows what was confident.
        ({"selector": "confident_ratio", "threshold": 0.6}, lambda p: (p >= 0.6).float()),
    ],
    ids=["argmax", "threshold", "confident_ratio"],
)
def test_selectors_of_diga_weigh_the_labellers_pixels(options, kept):
    recipe, batch = diga(**options), next(batches(7, 8))
    selection = recipe(batch, draws()).selection
    confidence, classes = recipe.labeller(batch.target_images).logits.softmax(1).max(1)
    weight = kept(confidence)
    for c in range(CLASSES):
        torch.testing.assert_close(selection.predicted[c], (classes == c).float().sum())
        torch.testing.assert_close(selection.kept[c], weight[classes == c].sum())


def test_class_quantile_keeps_its_share_of_each_class():
    recipe, batch = diga(selector="class_quantile", share=0.25), next(batches(7, 8))
    selection = recipe(batch, draws()).selection
    seen = selection.predicted > 0
    assert seen.sum() > 1
    share = selection.kept[seen] / selection.predicted[seen]
    assert (share >= 0.25).all()
    assert share.mean() < 0.5


def test_all_else_is_equal_between_selectors():
    """The mixture's loss differs, the other terms and the centroids' first update from source do not."""
    batch = next(batches(7, 8))
    terms = [diga(selector=name)(batch, draws()).terms for name in ("consensus", "argmax")]
    assert torch.equal(terms[0]["source"], terms[1]["source"])
    assert torch.equal(terms[0]["skd"], terms[1]["skd"])
    assert not torch.equal(terms[0]["mix"], terms[1]["mix"])


def test_an_unknown_selector_is_named():
    with pytest.raises(ValueError, match=r"`selector` .*'quantile'"):
        diga(selector="quantile")


# --- rounds, checkpoints ---------------------------------------------------------------------------------------------


def test_the_second_round_is_labelled_by_the_student_of_the_first(tmp_path):
    stages = [train_gta2cs.Stage("diga", lr=1e-2, options={"ema": 0.5}) for _ in range(2)]
    train_gta2cs.main(
        train_gta2cs.Config(
            data=train_gta2cs.DataConfig(crop=(32, 32)),
            net=tiny_net_config(),
            stages=stages,
            batch_size=2,
            out=tmp_path,
            dry_run=True,
            keep_checkpoints=True,
        )
    )
    first, second = (load_checkpoint(tmp_path / f"stage{i}_diga" / "last.pt")["recipe"] for i in (1, 2))
    names = [name.removeprefix("student.") for name in first if name.startswith("student.") and "weight" in name]
    assert all(torch.equal(second[f"labeller.module.{name}"], first[f"student.{name}"]) for name in names)
    assert not all(torch.equal(second[f"labeller.module.{name}"], first[f"teacher.module.{name}"]) for name in names)
    kept = load_checkpoint(tmp_path / "stage2_diga" / "step_000002.pt")
    assert "optimizer" not in kept
    assert all(torch.equal(value, second[name]) for name, value in kept["recipe"].items())


# --- quality of a selection ------------------------------------------------------------------------------------------


def test_score_of_a_selection_by_hand():
    labels = torch.tensor([[[0, 0, 1, 255, 1, 0]]])
    truth = torch.tensor([[[0, 1, 1, 1, 255, 2]]])
    weight = torch.tensor([[[1.0, 1.0, 1.0, 0.0, 1.0, 0.5]]])
    pseudo = PseudoLabels(labels, weight, weight, torch.zeros(3))
    found = selection_quality.score(pseudo, truth, ("a", "b", "c"))
    assert found["precision"] == pytest.approx(100 * 2 / 3.5, abs=0.01)
    assert found["coverage"] == pytest.approx(100 * 3.5 / 5, abs=0.01)
    assert found["class_precision"] == {"a": 40.0, "b": 100.0, "c": None}
    assert found["class_coverage"] == {"a": 100.0, "b": pytest.approx(66.67), "c": 50.0}


def test_every_selector_is_scored_on_the_same_logits():
    recipe = diga()
    images = torch.cat([batch.target_images for batch in batches(7, 9)])
    logits, features = selection_quality.label(recipe, images)
    found = selection_quality.selections(recipe, logits, features)
    truth = logits.argmax(1)
    scores = {name: selection_quality.score(pseudo, truth, tuple("abcd")) for name, pseudo in found.items()}
    assert set(scores) >= {"consensus", "threshold 0.9", "threshold 0.968", "class quantile 0.5", "argmax"}
    rectified = scores.pop("rectified")  # the one that gives other labels than the labeller's
    assert rectified["precision"] < 100
    assert all(s["precision"] in (100.0, None) for s in scores.values())
    assert scores["argmax"]["coverage"] == 100.0
    assert 0 < scores["consensus"]["coverage"] < 100.0
    assert 50 <= scores["class quantile 0.5"]["coverage"] < 100
    assert "| consensus | 100.0 |" in selection_quality.markdown({"step": 1, "selectors": scores})


def test_the_page_of_selectors_is_that_of_the_json():
    text = selection_quality.table(json.loads(selection_quality.MEASURED.read_text(encoding="utf-8")))
    page = selection_quality.PAGE.read_text(encoding="utf-8")
    assert harness.section("selectors", text) in page


# --- the benchmark's rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", list(real_pairs.PAIRS))
def test_steps_of_a_row_sum_to_those_of_the_pair(pair):
    shared = real_pairs.setting(pair)
    for name, row in rows.main.recipe_configs(pair).items():
        extra = shared.warm_steps if row.get("from_imagenet") else 0
        assert sum(stage.steps for stage in real_pairs.stages_of(pair, row)) == shared.steps + extra, name
    assert [s.recipe for s in real_pairs.stages_of(pair, real_pairs.row_of(pair, "diga"))] == ["diga_warmup", "diga"]
    for name, row in rows.diga.diga_ablation(pair).items():
        if name.startswith("diga_"):  # the main row, but for some options
            continue
        (stage,) = real_pairs.stages_of(pair, row)
        assert stage.steps == shared.steps // 2, name
        assert row.get("start") in (None, "warmup_color")
        train_gta2cs.RECIPES[stage.recipe].parse(stage.options)


def fake(pair, recipe, seed, stages, rows, **more):
    score = {"iou": {"a": 50.0, "b": None}, "means": {"mIoU": 50.0 + seed}}
    rows = dict.fromkeys(rows, score)
    return {f"{pair}/{recipe}/{seed}": {"pair": pair, "recipe": recipe, "seed": seed, "rows": rows, **stages, **more}}


def test_tables_hold_the_last_stage_of_each_group_between_its_own_markers(tmp_path):
    names = list(real_pairs.sections({}, tmp_path))
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("".join(f"text {n}\n<!-- {n}: begin -->\nold\n<!-- {n}: end -->\n" for n in names) + "rest")
    two = {"stages": [{"recipe": "diga_warmup"}, {"recipe": "diga"}]}
    results = {
        **fake(
            "toy", "source_only", 0, {"stage": {"recipe": "source_only"}}, ["source_only"]
        ),  # as older files have it
        **fake("toy", "diga", 0, two, ["diga_warmup, student", "diga_warmup, teacher", "diga, student"]),
        **fake(
            "toy", "oracle", 0, {"stages": [{"recipe": "source_only"}]}, ["source_only", "source_only + BatchNorm x"]
        ),
    }
    results["toy/diga/0"]["selection"] = [{"step": 2, "selectors": {"argmax": scored(80.0)}}]
    real_pairs.write_tables(results, page)
    text = page.read_text()
    assert "\nold\n" not in text
    assert text.endswith("rest")
    assert "| diga, student | 1 | **50.0** | 50.0 | – |" in text
    assert "| oracle (labelled target) | 1 |" in text
    assert "warmup" not in text
    assert "BatchNorm" not in text
    assert text.count("Not measured yet.") == len(names) - 4
    assert "| argmax | 80.0 | 100.0 | 80.0 | – |" in text
    assert (page.parent / "pictures" / "selection_toy.png").is_file()
    results |= fake("camvid", "self_argmax", 0, {"stages": [{"recipe": "diga"}]}, ["diga, student"], selection=[])
    assert "| self_argmax, student | 1 |" in real_pairs.summarize(results, "diga_ablation")
    assert "self_argmax" not in real_pairs.summarize(results)


def scored(value):
    by_class = {"a": value, "b": None}
    return {"precision": value, "coverage": 100.0, "class_precision": by_class, "class_coverage": by_class}


@pytest.mark.slow
@pytest.mark.parametrize("group", list(real_pairs.GROUPS))
def test_dry_run_of_every_row(group, tmp_path, monkeypatch):
    """With nets of no size, no report and one score: what is tested are stages, options, starts and checkpoints."""
    wide = {**NET, "options": {**NET["options"], "decoder_pyramid_channels": 64}}  # no small net's weights fit into it
    for module in (real_pairs, rows_of_duda):
        monkeypatch.setattr(module, "net_config", lambda pair, name="standard": wide if name == "standard" else NET)
    without_scores(monkeypatch)
    for row in real_pairs.GROUPS[group].rows("toy"):
        result = json.loads(json.dumps(real_pairs.run("toy", row, 0, None, tmp_path / "cache", dry_run=True)))
        assert real_pairs.last_rows(result), row
        assert ("selection" in result) == (result["stages"][-1]["recipe"] == "diga"), row
    assert not list((tmp_path / "cache").rglob("step_*.pt"))


# --- the configurations ----------------------------------------------------------------------------------------------

CONFIGS = Path(train_gta2cs.__file__).parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses_down_to_the_recipes_options(path):
    config = train_gta2cs.parse(["--config", str(path)])
    assert config.stages
    assert config.net.options == yaml.safe_load(path.read_text())["net"].get("options", {})  # none of the toy pair's
    assert config.data.pair == path.stem.rpartition("_")[2]
    for stage in config.stages:
        train_gta2cs.RECIPES[stage.recipe].parse(stage.options)


def test_published_rounds_of_diga_share_one_translator():
    for path in CONFIGS.glob("diga_*2cs.yaml"):
        stages = train_gta2cs.parse(["--config", str(path)]).stages
        assert [stage.recipe for stage in stages] == ["diga_warmup", "diga", "diga"]
        assert {stage.options["translator_steps"] for stage in stages} == {50_000}


@pytest.mark.slow
def test_dry_run_of_the_toy_configuration_and_a_look_at_its_labels(tmp_path, monkeypatch, capsys):
    path = str(CONFIGS / "diga_toy.yaml")
    rows = train_gta2cs.main(train_gta2cs.parse(["--config", path, "--dry-run", "--out", str(tmp_path)]))
    assert {"source_only", "diga_warmup, student", "diga, student", "diga, teacher"} <= set(rows)

    checkpoint, picture = tmp_path / "dry_run" / "stage3_diga" / "last.pt", tmp_path / "consensus.png"
    for more in ([], ["--picture", str(picture)]):
        monkeypatch.setattr("sys.argv", ["selection_quality.py", str(checkpoint), "--images=4", *more])
        selection_quality.main()
    assert "| consensus |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
