"""The loop's choice without labels: scores on target training images, best.pt, alarm, verdict, and no label at all."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_gta2cs
from gta2cs import choosing, html, label_free
from gta2cs.checkpoints import load_checkpoint, save_checkpoint
from gta2cs.comparison import Comparison, title
from gta2cs.evaluation import Score
from gta2cs.histories import read_run
from gta2cs.inference import Trained
from gta2cs.label_free import LabelFree, measure
from gta2cs.report import gain_sentence
from gta2cs.samples import ClassSet, Unlabelled
from gta2cs.summary import compared, domains, headlines, panels_of
from gta2cs.target_statistics import has_statistics, try_target_statistics, with_shares
from gta2cs.verdict import label_free_tables, verdict
from tiny import tiny_net, without_scores

CLASSES = ClassSet(("a", "b", "c"), torch.zeros(3, 3, dtype=torch.uint8).numpy())
IMAGES = Unlabelled(
    [str(k) for k in range(30)],
    [torch.randint(0, 256, (3, 70, 80), generator=torch.Generator().manual_seed(k)).byte() for k in range(30)],
)


class Net(nn.Module):
    """Logits from the function that it is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return SimpleNamespace(logits=self.function(images))


def pixels(images):
    return 3 * images


def constant(images):
    return torch.zeros_like(images) + torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)


def test_a_net_of_single_pixels_scores_1_under_every_view_that_moves_pixels():
    found = measure(Net(pixels), IMAGES, CLASSES, count=5, views=("mirror", "shift", "crop"))
    assert [found.scores[f"{view}_consistency"] for view in ("mirror", "shift", "crop")] == [1, 1, 1]
    assert sum(found.shares) == pytest.approx(1)
    assert LabelFree.from_json(json.loads(json.dumps(found.to_json()))).scores["confidence"] == pytest.approx(
        found.scores["confidence"], rel=1e-5
    )


def test_a_net_that_lost_its_classes_is_not_called_consistent():
    known = measure(Net(pixels), IMAGES, CLASSES, count=4)
    collapsed = measure(Net(constant), IMAGES, CLASSES, count=4, known=known.shares)
    assert collapsed.scores["mirror_consistency"] == pytest.approx(1 / 3)
    assert collapsed.scores["mirror_worst_class"] == 0
    assert measure(Net(constant), IMAGES, CLASSES, count=4).scores["mirror_consistency"] == 1


def test_classes_count_by_the_root_of_their_pixels_in_the_default_score_and_old_runs_have_it_too():
    found = measure(
        Net(lambda x: x + torch.linspace(-1, 1, x.shape[-1]) * torch.tensor([1, 0, -1]).view(3, 1, 1)),
        IMAGES,
        CLASSES,
        count=5,
    )
    iou = found.class_iou["mirror"]
    roots = [share**0.5 for share in found.shares]
    weighted = sum(root * value for root, value in zip(roots, iou, strict=True)) / sum(roots)
    weighted *= found.scores["confidence"]
    assert found.scores["balanced_consistency"] == pytest.approx(weighted, rel=1e-5)
    assert weighted < found.scores["confidence"]
    saved = found.to_json()
    del saved["scores"]["balanced_consistency"]
    assert LabelFree.from_json(saved).scores["balanced_consistency"] == pytest.approx(weighted, rel=1e-5)
    assert LabelFree.from_json({"scores": {"confidence": 1.0}, "shares": [0.0], "class_iou": {}}).scores == {
        "confidence": 1.0
    }


def test_the_same_few_images_and_the_same_numbers_at_every_call():
    assert label_free.picked(100, 4) == [12, 37, 62, 87]
    assert label_free.picked(3, 24) == [0, 1, 2]
    net = Net(pixels)
    assert measure(net, IMAGES, CLASSES, count=4).scores == measure(net, IMAGES, CLASSES, count=4).scores


def test_bad_nets_and_data_are_named():
    with pytest.raises(ValueError, match="Expected target training images"):
        measure(Net(pixels), Unlabelled([], []), CLASSES)
    with pytest.raises(ValueError, match="Expected `logits` to be finite"):
        measure(Net(lambda x: x * float("nan")), IMAGES, CLASSES, count=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"select": "mirror"},
            r"`select` to be one of \['last', 'source_or_last', 'mirror_consistency'.* got 'mirror'",
        ),
        ({"select": "-last"}, r"with a minus before them, but got '-last'"),
        ({"select": "--confidence"}, r"with a minus before them, but got '--confidence'"),
        ({"score_views": ["zoom"]}, r"`score_views` to be among \['mirror', .* got \['zoom'\]"),
        ({"score_images": 0}, "`score_images` to be at least 1, but got 0"),
        ({"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
        ({"eval_every": -1}, "`eval_every` to be at least 0, but got -1"),
        ({"data": train_gta2cs.DataConfig(workers=-1)}, r"`data\.workers` to be at least 0, but got -1"),
        ({"stages": [train_gta2cs.Stage(steps=0)]}, r"`stages\.0\.steps` to be at least 1, but got 0"),
        ({"stages": [train_gta2cs.Stage(lr=-1.0)]}, r"`stages\.0\.lr` to be at least 0, but got -1\.0"),
        ({"weight_decay": float("nan")}, r"`weight_decay` to be at least 0, but got nan"),
        ({"head_multiplier": -1.0}, r"`head_multiplier` to be at least 0, but got -1\.0"),
        ({"data": train_gta2cs.DataConfig(crop=(0, 64))}, r"`crop` to be two positive numbers .* but got \(0, 64\)"),
        ({"data": train_gta2cs.DataConfig(source_scale=(2, 1))}, r"`source_scale` to be \(low, high\) .* \(2, 1\)"),
        ({"data": train_gta2cs.DataConfig(rare_class_temperature=0)}, r"`data\.rare_class_temperature` .* got 0"),
        *(
            ({"stages": [train_gta2cs.Stage(options={name: 3.0})]}, rf"`{name}` to be in \[0, .*\], but got 3\.0")
            for name in ("jitter", "hue", "blur", "ema", "mix_fraction", "mask_ratio")
        ),
        (
            {"stages": [train_gta2cs.Stage("combined", options={"shared": {"jitter": 3.0}})]},
            r"`jitter` to be in \[0, 1\], but got 3\.0\. It is an option of candidate 'blended'",
        ),
        (
            {"stages": [train_gta2cs.Stage("dacs"), train_gta2cs.Stage("duda")]},
            "the stage before `duda` to be `duda_pre`, or .* but got dacs and no checkpoint",
        ),
    ],
)
def test_options_are_checked_before_any_data_is_looked_at(tmp_path, changes, message):
    config = train_gta2cs.Config(**{"stages": [train_gta2cs.Stage()], "out": tmp_path / "run", **changes})
    config.data.pair = "folder"  # without a folder
    with pytest.raises(ValueError, match=message):
        train_gta2cs.main(config)
    assert not (tmp_path / "run").exists()


def test_alarm_in_both_directions_once_and_for_two_classes():
    alarm = choosing.ShareAlarm(("background", "nuclei"), [0.9, 0.1])
    assert alarm("student", [0.97, 0.03]) == []
    (gone,) = alarm("student", [0.98, 0.02])
    assert gone == (
        "class 'nuclei' shrinks: the student predicts it at 2 % of the pixels, the source-only net at 10 % "
        "(being lost, or too much before?)"
    )
    assert alarm("student", [0.99, 0.01]) == []
    (grown,) = alarm("student", [0.55, 0.45])
    assert "'nuclei' grows" in grown
    assert grown.endswith("(taken for it too often now, or missed before?)")
    assert len(alarm("teacher", [0.1, 0.9])) == 2
    assert choosing.ShareAlarm(("a", "b"), [1.0, 0.0])("student", [0.9999, 0.0001]) == []


def offers(tmp_path, select, candidates, source_only=None, shares=(), before=None):
    """Which of (name, value, step) candidates is chosen, and which were written; `before` was chosen already."""
    config = train_gta2cs.Config(
        stages=[train_gta2cs.Stage("source_only"), train_gta2cs.Stage("dacs", steps=20)], select=select, out=tmp_path
    )
    run = SimpleNamespace(config=config, choice=before, is_main=True, source_only=source_only)
    nets = {"student": nn.Conv2d(1, 1, 1), "teacher": nn.Conv2d(1, 1, 1)}
    state = SimpleNamespace(
        run=run,
        index=1,
        steps=20,
        stage=config.stages[1],
        recipe=SimpleNamespace(nets=lambda: nets),
        done=0,
        history={"name": "dacs", "scores": []},
    )
    chooser = object.__new__(choosing.Choosing)
    chooser.state, chooser.first = state, 1
    for name, value, step in candidates:
        scores = {"mirror_consistency": value, "balanced_consistency": value, "class_correlation": value}
        net = nets.get(name, nets["student"])
        chooser._offer(name if name == "source_only" else "dacs", name, net, LabelFree(scores, list(shares)), step=step)
        if name == "source_only" and source_only is None:
            run.source_only = LabelFree(scores, list(shares))
    return run.choice


CANDIDATES = [
    ("source_only", 0.5, 0), ("student", 0.4, 10), ("teacher", 0.8, 10), ("student", 0.6, 20), ("teacher", 0.7, 20),
]  # fmt: skip


@pytest.mark.parametrize(
    ("select", "net", "step"),
    [
        ("mirror_consistency", "teacher", 10),
        ("-mirror_consistency", "student", 10),
        ("class_correlation", "student", 10),  # its source calls a lower one better
        ("-class_correlation", "teacher", 10),
        ("last", "student", 20),
        ("source_or_last", "student", 20),
    ],
)
def test_select(tmp_path, select, net, step):
    choice = offers(tmp_path, select, CANDIDATES)
    assert (choice.net, choice.step) == (net, step)
    saved = json.loads(load_checkpoint(tmp_path / "best.pt")["choice"])
    assert (saved["net"], saved["step"]) == (net, step)


@pytest.mark.parametrize("select", ["mirror_consistency", "source_or_last"])
def test_the_source_only_net_stays_where_nothing_is_better(tmp_path, select):
    choice = offers(tmp_path, select, [("source_only", 0.9, 0), *CANDIDATES[1:]])
    assert choice.net == "source_only"
    assert choice.title == "source-only net"


@pytest.mark.parametrize(
    ("shares", "net"),
    [([0.98, 0.02], "source_only"), ([0.97, 0.03], "student"), ([0.0, 1.0], "source_only")],
)
@pytest.mark.parametrize("select", ["mirror_consistency", "source_or_last"])
def test_a_net_that_has_lost_a_class_is_not_chosen(tmp_path, select, shares, net):
    """One class everywhere never contradicts itself; a net on the way there contradicts itself less."""
    before = LabelFree({}, [0.9, 0.1])
    choice = offers(tmp_path, select, [CANDIDATES[0], ("student", 0.9, 20)], before, shares)
    assert choice.net == net
    assert offers(tmp_path, "last", [CANDIDATES[0], ("student", 0.9, 20)], before, shares).net == "student"
    assert label_free.collapsed([0.005, 0.9], [0.0, 0.9]) == []  # too small to tell


@pytest.mark.parametrize(("value", "taken"), [(0.4, False), (0.6, True)])
def test_without_best_pt_a_net_is_still_compared_with_the_source_only_net(tmp_path, value, taken):
    """As where the file was lost before the run was resumed."""
    source = LabelFree({"mirror_consistency": 0.5}, [0.9, 0.1])
    choice = offers(tmp_path, "mirror_consistency", [("student", value, 20)], source, [0.9, 0.1])
    assert (choice is not None) == taken == (tmp_path / "best.pt").exists()
    assert offers(tmp_path, "mirror_consistency", [("student", float("nan"), 20)], source, [0.9, 0.1]) is None


def test_the_verdict_names_the_class_that_was_lost():
    source, last = (
        LabelFree({"balanced_consistency": 0.5}, [0.9, 0.1]),
        LabelFree({"balanced_consistency": 0.9}, [0.99, 0.01]),
    )
    choice = choosing.Choice("source_only", 0, 0, "source_only", "balanced_consistency", 0.5)
    classes = SimpleNamespace(names=("background", "nuclei"))
    run = SimpleNamespace(
        choice=choice, source_only=source, config=train_gta2cs.Config(), pair=SimpleNamespace(classes=classes)
    )
    words = verdict(run, [{"name": "dacs", "label_free": [{"nets": {"student": last.to_json()}}]}])
    assert "**Use the source-only net** (`best.pt`). The last student has 0.900 against 0.500" in words
    assert ", but it predicts less than a quarter of the source-only net's pixels as nuclei. No score can tell" in words
    assert "if the student is right, use `stage1_dacs/last.pt`." in words
    worse = LabelFree({"balanced_consistency": 0.4}, [0.99, 0.01])
    words = verdict(run, [{"name": "dacs", "label_free": [{"nets": {"student": worse.to_json()}}]}])
    assert "0.400 against 0.500 of balanced consistency, and it predicts less than a quarter" in words
    run.choice, run.config.select = choosing.Choice("dacs", 0, 20, "student", "last", 0.9), "last"
    words = verdict(run, [{"name": "dacs", "label_free": [{"nets": {"student": last.to_json()}}]}])
    assert "0.900, the source-only net's 0.500, but it predicts less than a quarter of the source-only net's" in words
    assert "looks better" not in words


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ("class_correlation", "reaches its class correlation (lower is better) of 1.200; the last student has 1.300"),
        ("-class_correlation", "reaches its class correlation of 1.200; the last student has 1.300"),
        ("source_or_last", "The last student has 0.400 of balanced consistency, the source-only net 0.500. The adapt"),
    ],
)
def test_the_verdict_says_which_direction_is_better_and_what_was_compared(select, words):
    source = LabelFree({"class_correlation": 1.2, "balanced_consistency": 0.5}, [0.9, 0.1])
    last = LabelFree({"class_correlation": 1.3, "balanced_consistency": 0.4}, [0.9, 0.1])
    run = SimpleNamespace(
        choice=choosing.Choice("source_only", 0, 0, "source_only", choosing.score_of(select), 0.0),
        source_only=source,
        config=train_gta2cs.Config(select=select),
        pair=SimpleNamespace(classes=SimpleNamespace(names=("background", "nuclei"))),
    )
    assert words in verdict(run, [{"name": "dacs", "label_free": [{"nets": {"student": last.to_json()}}]}])


def test_a_choice_among_nets_of_one_class_is_called_none():
    scores = {"balanced_consistency": 0.99, "mirror_consistency": 1.0}
    source, student = LabelFree(scores, [1.0, 0.0]), LabelFree(scores, [0.9995, 0.0005])
    run = SimpleNamespace(
        choice=choosing.Choice("dacs", 1, 20, "student", "balanced_consistency", 0.99),
        source_only=source,
        config=train_gta2cs.Config(),
        pair=SimpleNamespace(classes=SimpleNamespace(names=("background", "nuclei"))),
    )

    def words():
        entry = {"step": 20, "nets": {"student": student.to_json()}}
        return verdict(run, [{"name": "source_only"}, {"name": "dacs", "label_free": [entry]}])

    said = "**The chosen net predicts only background.** Such a net cannot contradict itself"
    assert said in words()
    student.shares = [0.99, 0.01]
    assert said not in words()
    run.choice = choosing.Choice("source_only", 1, 0, "source_only", "balanced_consistency", 0.99)
    assert said in words()


def test_the_report_shows_few_scores_and_folds_the_others_away(tmp_path):
    names = [f"class {i}" for i in range(19)]
    found = LabelFree(dict.fromkeys(label_free.DIRECTIONS, 0.5), [1 / 19] * 19)
    better = LabelFree(dict.fromkeys(label_free.DIRECTIONS, 0.6), [1 / 19] * 19)
    entry = {"nets": {"student": better.to_json(), "teacher": found.to_json()}}
    choice = choosing.Choice("combined", 0, 20, "student")
    run = SimpleNamespace(source_only=found, config=train_gta2cs.Config(select="class_correlation"), choice=choice)
    text = label_free_tables(run, [{"name": "combined", "label_free": [entry]}], names)
    shown, rest = text.split("<details>")
    first = shown.splitlines()[2]
    assert first.startswith("| net, on target training images | class correlation (lower is better) | balanced cons")
    assert "| combined, student | 0.600 | 0.600 | 0.600 | 0.600 |" in shown
    assert "| class 18 | 5.3 | 5.3 | 5.3 |" in shown
    assert max(map(len, shown.splitlines()[3:] + rest.splitlines())) <= 100
    assert all(name.replace("_", " ") in rest for name in label_free.DIRECTIONS)
    earlier = {
        "step": 20,
        "nets": {"student": LabelFree(dict.fromkeys(label_free.DIRECTIONS, 0.7), [0.0] * 19).to_json()},
    }
    again = label_free_tables(run, [{"name": "combined", "label_free": [earlier, entry]}], names)
    assert "| chosen: student of combined, step 20 | 0.700 |" in again, "the chosen net is not among the last ones"
    classes = ClassSet(tuple(names), torch.arange(57, dtype=torch.uint8).view(19, 3).numpy())
    page = html.render(text, tmp_path, classes)
    assert "<details><summary>All scores</summary>" in page
    assert page.count("</details>") == 1
    assert page.count('class="swatch"') == 19
    assert "<td>class 18" not in page, "no swatch"
    table = page.split("<details>")[0]
    assert table.count('<td class="best">0.500</td>') == 2, "the lower correlation is the better one"
    assert table.count('<td class="best">0.600</td>') == 3
    assert 'class="best"' not in page.split("<details>")[1]


def test_panels_show_what_was_turned_down():
    names = ["source_only", "dacs, student", "dacs, teacher", choosing.CHOSEN]
    run = SimpleNamespace(choice=choosing.Choice("dacs", 1, 20, "teacher"))
    assert list(compared(run, names).items()) == [
        ("source_only", "source_only"),
        ("chosen without labels: teacher", choosing.CHOSEN),
    ]
    run.choice = choosing.Choice("source_only", 1, 0, "source_only")
    assert list(compared(run, names).items()) == [
        ("chosen without labels: source-only net", choosing.CHOSEN),
        ("dacs, student", "dacs, student"),
    ]
    run.choice.target_statistics = True
    assert list(compared(run, names)) == ["source_only", "chosen without labels: source-only net, target statistics"]
    run.choice = choosing.Choice("source_only", 0, 60, "student")
    assert list(compared(run, ["source_only", choosing.CHOSEN])) == ["source_only", "chosen without labels: student"]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 3), (30, 4)])
def test_panels_show_an_image_once(count, rows):
    images = Unlabelled(IMAGES.names[:count], IMAGES.images[:count])
    pair = SimpleNamespace(target_val=None, target_train=images)
    run = SimpleNamespace(pair=pair, device="cpu", choice=choosing.Choice("dacs", 1, 20, "teacher"))
    panels = panels_of(run, {"source_only": Net(pixels), choosing.CHOSEN: Net(constant)})
    assert len({panel["image"].tobytes() for panel in panels}) == len(panels) == rows
    assert list(panels[0]) == ["image", "source_only", "chosen without labels: teacher", "confidence of the chosen"]
    assert panels[0]["confidence of the chosen"] == pytest.approx(np.full((70, 80), 2.718281828 / 4.718281828))


# --- BatchNorm statistics of target ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "trained", "taken"),
    [(0.9, 0.7, True), (0.6, 0.85, False), (0.9, None, False), (0.7, None, True)],
)
def test_a_later_stage_is_compared_with_the_chosen_net_as_it_was_trained(tmp_path, value, trained, taken):
    """`value` is that with the statistics of target, which the later nets do not have; older runs kept only that."""
    before = choosing.Choice("dacs", 0, 6, "student", "balanced_consistency", value, 0.5, trained)
    choice = offers(tmp_path, "balanced_consistency", [("student", 0.8, 10)], before=before)
    assert (choice is not before) == taken


@pytest.mark.parametrize("recipes", [["source_only", "dacs"], ["dacs", "dacs"]])
def test_the_title_of_a_choice_says_which_stage_of_two_alike(tmp_path, recipes):
    config = train_gta2cs.Config(stages=[train_gta2cs.Stage(r, steps=20) for r in recipes], out=tmp_path)
    run = SimpleNamespace(config=config, choice=None, is_main=True, source_only=None)
    recipe = SimpleNamespace(nets=lambda: {"student": nn.Conv2d(1, 1, 1)})
    chooser = object.__new__(choosing.Choosing)
    chooser.state = SimpleNamespace(run=run, index=1, steps=20, recipe=recipe, done=20, history={})
    chooser.first = 1
    scores = {"balanced_consistency": 0.5}
    chooser._offer("dacs", "student", recipe.nets()["student"], LabelFree(scores, []), step=20)
    again = " (stage 2)" if recipes[0] == "dacs" else ""
    assert run.choice.title == f"student of dacs{again}, step 20"


def offered_statistics(monkeypatch, tmp_path, values, *, select="balanced_consistency", lost=(), net=None):
    """What `try_target_statistics` makes of a chosen net whose scores are `values` with 0, 50 and 100 % of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)) if net is None else net
    said, choice = [], choosing.Choice("dacs", 1, 20, "teacher", choosing.score_of(select), 0.5)
    run = SimpleNamespace(
        config=train_gta2cs.Config(select=select, out=tmp_path),
        choice=choice,
        is_main=True,
        source_only=LabelFree({}, [0.9, 0.1]),
        console=SimpleNamespace(print=lambda text, **_: said.append(text)),
    )
    asked = iter(range(3))

    def score(*args, **kwargs):
        k = next(asked)
        if values[k] is None:
            raise choosing.NoScoreError("Expected a score, but got none.")
        return LabelFree(
            {choice.score: values[k] - 1, label_free.BY_CLASS: values[k]}, [1, 0] if k in lost else [0.9, 0.1]
        )

    monkeypatch.setattr(choosing, "score_without_labels", score)
    history = {"name": "dacs", "scores": []}
    images = [5 + 2 * torch.randn(4, 3, 8, 8) for _ in range(3)]
    return run, net, try_target_statistics(run, net, images, history), history, said, images


@pytest.mark.parametrize(
    ("values", "options", "share"),
    [
        ((0.5, 0.6, 0.7), {}, 1.0),
        ((0.5, 0.7, 0.6), {}, 0.5),
        ((0.7, 0.6, 0.5), {}, 0.0),
        ((0.5, 0.5, 0.5), {}, 0.0),
        ((0.5, 0.6, 0.7), {"select": "-confidence"}, 1.0),  # `select` compares nets; here a net is compared with itself
        ((0.5, 0.6, 0.7), {"lost": {2}}, 0.5),
        ((0.5, 0.6, 0.7), {"lost": {1, 2}}, 0.0),
        ((0.5, 0.6, 0.7), {"select": "last"}, None),
        ((0.5, 0.6, 0.7), {"select": "source_or_last"}, None),
        ((0.5, 0.6, 0.7), {"net": nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 1))}, None),
        ((0.5, None, 0.7), {}, None),
    ],
)
def test_the_chosen_net_takes_the_statistics_of_target_where_its_score_says_so(
    monkeypatch, tmp_path, values, options, share
):
    run, net, found, history, said, images = offered_statistics(monkeypatch, tmp_path, values, **options)
    assert run.choice.target_statistics == (share or 0)
    assert ("target_statistics" in history) == (share is not None)
    assert "".join(said).count("(has lost a class)") == len(options.get("lost", ()))
    if not share:
        assert found is net
        assert not (tmp_path / "best.pt").exists()
        assert len(said) == (share is not None or None in values)
        return
    everything = torch.cat(images)
    assert torch.allclose(found[0].running_mean, share * everything.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(found[0].running_var, (1 - share) + share * everything.var((0, 2, 3)), rtol=0.05)
    assert torch.equal(net[0].running_mean, torch.zeros(3)), "the net itself does not change"
    assert torch.equal(found[1].weight, net[1].weight)
    saved = load_checkpoint(tmp_path / "best.pt")
    assert torch.equal(saved["recipe"]["student.0.running_mean"], found[0].running_mean)
    assert json.loads(saved["choice"]) == dataclasses.asdict(run.choice) == history["target_statistics"]["choice"]
    assert run.choice.value == max(values) - 1 if not options else True, "of the score that chose the net"
    assert run.choice.as_trained == run.choice.trained == 0.5
    assert history["target_statistics"]["trained"]["scores"][label_free.BY_CLASS] == values[0]
    of = "BatchNorm statistics of target" if share == 1 else "50% of target's BatchNorm statistics"
    assert run.choice.title == f"teacher of dacs, step 20, with {of}"
    (line,) = said
    assert line.endswith(f"{share:.0%} is taken")
    assert "confident consistency, %: 0%: 50.0, 50%:" in line


def test_a_resumed_run_keeps_the_statistics_that_it_took(monkeypatch, tmp_path):
    run, _, found, history, _, images = offered_statistics(monkeypatch, tmp_path, (0.5, 0.6, 0.7))
    again = {"name": "dacs", "scores": []}
    assert try_target_statistics(run, found, images, again) is found
    assert again["target_statistics"] == json.loads(json.dumps(history["target_statistics"]))


def test_a_run_whose_best_net_has_the_statistics_of_target(monkeypatch, tmp_path):
    """Table, report, panels, compare_runs.py and predict.py mean the same net, also after the run is resumed."""
    score = choosing.score_without_labels

    def better_with_them(run, net, *args, whose, **kwargs):
        found = score(run, net, *args, whose=whose, **kwargs)
        if whose.endswith("with BatchNorm statistics of target"):
            found = dataclasses.replace(found, shares=run.source_only.shares)
            found.scores |= dict.fromkeys(("balanced_consistency", "confident_consistency"), 0.99)
        return found

    monkeypatch.setattr(choosing, "score_without_labels", better_with_them)
    rows = train_gta2cs.main(tiny(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "- share of target's BatchNorm statistics in the chosen net by confident consistency, %: 0%: " in text
    assert "100%: 99.0; 100% is taken" in text
    assert "with BatchNorm statistics of target | 0.990 |" in text
    assert "with BatchNorm statistics of target" in text.split("**Use the ")[1]
    assert "The chosen one, with BatchNorm statistics of target, has 0.990." in text
    nets = read_run(tmp_path)
    chosen = nets.checkpoints[-1]
    assert chosen["scores"]["balanced_consistency"] == 0.99
    assert chosen["truth_miou"] == pytest.approx(rows[choosing.CHOSEN].means["mIoU"], abs=0.01)
    assert nets.chosen is Comparison([nets], "balanced_consistency").best(nets) is chosen
    assert nets.file_of(chosen) == tmp_path / "best.pt"
    assert Trained.open(tmp_path).title == title(chosen)
    assert title(chosen).endswith(", with BatchNorm statistics of target")
    assert nets.last["net"] == "student"
    assert sum(nets.file_of(net) == tmp_path / "best.pt" for net in [nets.start, *nets.checkpoints]) == 1
    with torch.no_grad():
        values = {k: v.clone() for k, v in Trained.open(tmp_path).net().state_dict().items()}
    again = train_gta2cs.main(dataclasses.replace(tiny(tmp_path), resume=True))
    assert again[choosing.CHOSEN] == rows[choosing.CHOSEN]
    assert read_run(tmp_path).checkpoints[-1] == chosen
    assert all(torch.equal(v, values[k]) for k, v in Trained.open(tmp_path).net().state_dict().items())
    (tmp_path / "history.json").unlink()  # as where it is stopped before the report
    assert read_run(tmp_path).file_of(read_run(tmp_path).checkpoints[-1]) == tmp_path / "best.pt"
    assert read_run(tmp_path).checkpoints[-1]["scores"] == chosen["scores"]


def test_a_finished_run_that_gets_another_stage_is_not_finished(tmp_path, monkeypatch):
    """Its history would tell of another `best.pt` than there is."""
    train_gta2cs.main(tiny(tmp_path))
    longer = dataclasses.replace(tiny(tmp_path), resume=True)
    longer.stages = [*longer.stages, train_gta2cs.Stage("dacs", steps=2)]
    monkeypatch.setattr(train_gta2cs, "try_target_statistics", stop)
    with pytest.raises(KeyboardInterrupt):
        train_gta2cs.main(longer)
    assert not read_run(tmp_path).finished
    assert read_run(tmp_path).recipe == "dacs → dacs"
    assert not [*tmp_path.glob("report*"), *tmp_path.glob("*.png"), *tmp_path.glob("*.json")], "they say it is finished"


def scores_in_turn(monkeypatch, values):
    """Let the nets of a run have these scores, in the order in which they are scored."""
    given = iter(values)

    def scored(*args, **options):
        found = measure(*args, **options)
        even = [1 / len(found.shares)] * len(found.shares)
        return dataclasses.replace(found, scores={**found.scores, "balanced_consistency": next(given)}, shares=even)

    monkeypatch.setattr(choosing, "measure", scored)


@pytest.mark.parametrize(("last", "net"), [(0.1, "source_only"), (0.4, "student")])
def test_source_or_last_of_a_run_that_gets_another_stage_is_that_of_all_its_stages(tmp_path, monkeypatch, last, net):
    """The last student of the shorter run is none of the two, however good it is."""
    config = tiny(tmp_path, select="source_or_last")
    scores_in_turn(monkeypatch, [0.3, 0.3, 0.5, 0.5])  # of the first stage, where dacs starts, student, teacher
    train_gta2cs.main(config)
    assert json.loads((tmp_path / "history.json").read_text())["choice"]["net"] == "student"
    scores_in_turn(monkeypatch, [last, last])
    longer = dataclasses.replace(config, resume=True, stages=[*config.stages, train_gta2cs.Stage("dacs", steps=2)])
    train_gta2cs.main(longer)
    choice = json.loads((tmp_path / "history.json").read_text())["choice"]
    assert (choice["net"], choice["value"]) == (net, 0.3 if net == "source_only" else last)
    held = load_checkpoint(tmp_path / "best.pt")["recipe"]
    file = "stage1_source_only" if net == "source_only" else "stage3_dacs"
    student = load_checkpoint(tmp_path / file / "last.pt")["recipe"]
    assert all(torch.equal(value, student[name]) for name, value in held.items())
    assert read_run(tmp_path).chosen["net"] == net
    assert Trained.open(tmp_path).title == title(read_run(tmp_path).chosen)


def test_source_or_last_of_a_run_without_a_stage_on_source(tmp_path, monkeypatch):
    """Its start is in no checkpoint of a stage; a file of its own keeps it, whatever becomes of `init`."""
    config = tiny(tmp_path, select="source_or_last")
    config.stages = config.stages[1:]
    scores_in_turn(monkeypatch, [0.3, 0.5, 0.5])
    train_gta2cs.main(config)
    assert json.loads((tmp_path / "history.json").read_text())["choice"]["net"] == "student"
    scores_in_turn(monkeypatch, [0.2, 0.2])
    train_gta2cs.main(dataclasses.replace(config, resume=True, stages=[*config.stages, train_gta2cs.Stage("dacs")]))
    choice = json.loads((tmp_path / "history.json").read_text())["choice"]
    assert (choice["net"], choice["value"], choice["stage"]) == ("source_only", 0.3, 0)
    held, start = (load_checkpoint(tmp_path / f"{name}.pt")["recipe"] for name in ("best", "source_only"))
    assert all(torch.equal(value, start[name]) for name, value in held.items())
    trained = load_checkpoint(tmp_path / "stage1_dacs" / "last.pt")["recipe"]
    assert not all(torch.equal(value, trained[name]) for name, value in held.items())


def test_equal_scores_are_equal_after_a_run_is_resumed_too(tmp_path, monkeypatch):
    """The history keeps six digits."""
    config = tiny(tmp_path, select="source_or_last")
    scores_in_turn(monkeypatch, [1 / 3] * 4)
    train_gta2cs.main(config)
    before = json.loads((tmp_path / "history.json").read_text())["choice"]
    assert before["net"] == "source_only"
    train_gta2cs.main(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "history.json").read_text())["choice"] == before


def test_source_or_last_where_a_stage_is_taken_back(tmp_path, monkeypatch):
    """A stage that was not finished has changed nothing, and one that is has decided anew."""
    config = tiny(tmp_path, select="source_or_last")
    scores_in_turn(monkeypatch, [0.3, 0.3, 0.5, 0.5])
    train_gta2cs.main(config)
    before = json.loads((tmp_path / "history.json").read_text())["choice"]
    longer = dataclasses.replace(config, resume=True, stages=[*config.stages, train_gta2cs.Stage("dacs")])
    with monkeypatch.context() as patched:
        patched.setattr(train_gta2cs.TrainingStep, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            train_gta2cs.main(longer)
    train_gta2cs.main(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "history.json").read_text())["choice"] == before
    assert json.loads(load_checkpoint(tmp_path / "best.pt")["choice"]) == before


@pytest.mark.parametrize("select", ["source_or_last", "balanced_consistency"])
def test_a_resumed_run_without_best_pt_has_its_source_only_net(tmp_path, monkeypatch, select):
    config = tiny(tmp_path, select=select, save_every=1)
    scores_in_turn(monkeypatch, [0.3, 0.3, *[0.2] * 9])
    with monkeypatch.context() as patched:
        patched.setattr(train_gta2cs.TrainingStep, "__call__", stopped_in_the_second_stage)
        with pytest.raises(KeyboardInterrupt):
            train_gta2cs.main(config)
    assert (tmp_path / "stage2_dacs" / "last.pt").is_file()
    (tmp_path / "best.pt").unlink()
    train_gta2cs.main(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "history.json").read_text())["choice"]["net"] == "source_only"


def stopped_in_the_second_stage(self, batch, step=train_gta2cs.TrainingStep.__call__):
    if self.state.index == 1 and self.state.done == 1:
        raise KeyboardInterrupt
    return step(self, batch)


def stop(*args):
    raise KeyboardInterrupt


def test_the_verdict_compares_nets_with_the_statistics_of_their_training():
    """Otherwise a net that `confident_consistency` changed can look worse than the one that it was better than."""
    found = {name: {"class_correlation": value} for name, value in (("student", 1.1), ("source", 1.2), ("taken", 1.3))}
    as_json = {name: LabelFree(scores, [0.9, 0.1]).to_json() for name, scores in found.items()}
    choice = choosing.Choice("dacs", 0, 20, "student", "class_correlation", 1.3, target_statistics=0.5)
    run = SimpleNamespace(
        choice=choice,
        source_only=LabelFree.from_json(as_json["source"]),
        config=train_gta2cs.Config(select="class_correlation"),
    )
    entry = {"step": 20, "nets": {"student": as_json["student"]}}
    words = verdict(run, [{"name": "dacs", "label_free": [entry], choosing.STATISTICS: as_json["taken"]}])
    assert "is 1.100, the source-only net's 1.200 (-0.100), the last student's 1.100." in words
    assert "The chosen one, with 50% of target's BatchNorm statistics, has 1.300." in words


@pytest.mark.parametrize(
    ("layer", "has"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.BatchNorm2d(3, momentum=None, affine=False), True),
        (nn.BatchNorm2d(3, track_running_stats=False), False),
        (nn.GroupNorm(1, 3), False),
    ],
)
def test_only_nets_with_running_statistics_take_those_of_target(layer, has):
    net = nn.Sequential(layer, nn.Conv2d(3, 2, 1))
    assert has_statistics(net) == has
    if has:
        shares = with_shares(net, [torch.randn(2, 3, 4, 4) + 5])
        assert [found[0].running_mean.mean().item() > 0 for found in shares.values()] == [False, True, True]


def tiny(out, **changes):
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(crop=(64, 64)),
        net=tiny_net(),
        stages=[train_gta2cs.Stage("source_only", steps=2), train_gta2cs.Stage("dacs", steps=2)],
        batch_size=2,
        log_every=1,
        out=out,
        dry_run=True,
        **changes,
    )


def test_a_target_without_any_label(tmp_path, monkeypatch):
    """No score against truth; the rest is there, and the chosen net serves predict.py, panels and report."""
    opened = train_gta2cs.open_pair
    monkeypatch.setattr(train_gta2cs, "open_pair", lambda c: dataclasses.replace(opened(c), target_val=None))
    rows = train_gta2cs.main(tiny(tmp_path))
    assert rows == {}
    text = (tmp_path / "report.md").read_text()
    assert "Target has no label" in text
    assert "| dacs, teacher |" in text
    assert "Use the " in text
    for name in ("panels.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    history = json.loads((tmp_path / "history.json").read_text())
    assert [len(stage["label_free"]) for stage in history["stages"]] == [1, 1]
    assert set(history["stages"][1]["label_free"][0]["nets"]) == {"student", "teacher"}
    trained = Trained.open(tmp_path)
    assert trained.path == tmp_path / "best.pt"
    assert trained.names == ("student",)
    trained.net()
    again = train_gta2cs.main(dataclasses.replace(tiny(tmp_path), resume=True))  # all stages are done: it reports again
    assert again == {}
    assert json.loads((tmp_path / "history.json").read_text())["choice"] == history["choice"]


@pytest.mark.parametrize("first", [True, False], ids=["labels go", "labels come"])
def test_labels_of_target_that_go_or_come_before_a_run_is_resumed(tmp_path, monkeypatch, first):
    opened = train_gta2cs.open_pair

    def some(labelled):
        without = lambda config: dataclasses.replace(opened(config), target_val=None)  # noqa: E731
        monkeypatch.setattr(train_gta2cs, "open_pair", opened if labelled else without)

    some(first)
    train_gta2cs.main(tiny(tmp_path))
    some(not first)
    rows = train_gta2cs.main(dataclasses.replace(tiny(tmp_path), resume=True))
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text.split("## ")[0]
    if first:
        assert rows == {}
        assert "Target has no label" in text
        assert " points of mIoU" not in text
    else:
        assert next(iter(rows)) == "source_only"
        assert {"dacs, student", "dacs, teacher", choosing.CHOSEN} < {*rows}
        assert "over source_only +" not in text


def test_a_run_that_starts_with_a_net_of_another_run_is_compared_with_it(tmp_path):
    before = train_gta2cs.main(tiny(tmp_path / "before"))
    config = tiny(tmp_path / "run", init=tmp_path / "before" / "stage1_source_only" / "last.pt")
    config.stages = config.stages[1:]
    rows = train_gta2cs.main(config)
    assert next(iter(rows)) == "source_only (init)"
    assert rows["source_only (init)"] == before["source_only"]
    assert "source_only (init)" in gain_sentence(rows)


def test_a_start_that_nothing_has_trained_is_called_so_wherever_it_is_compared(tmp_path):
    config = dataclasses.replace(tiny(tmp_path), stages=[train_gta2cs.Stage("dacs", steps=2)])
    train_gta2cs.main(config)
    said = "othing had trained the last layer of the net that adaptation started from"
    assert said in (tmp_path / "report.md").read_text()
    assert said in Comparison([read_run(tmp_path)], "balanced_consistency").text()


def test_a_stage_on_source_after_one_that_adapts_is_compared_too(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    config.stages = [*config.stages, train_gta2cs.Stage("source_only", steps=2)]
    scores_in_turn(monkeypatch, [0.3, 0.3, 0.5, 0.4, 0.9, 0.9, 0.9, 0.9])
    train_gta2cs.main(config)
    run = read_run(tmp_path)
    assert run.recipe == "dacs → source_only"
    assert Comparison([run], "balanced_consistency").best(run) is run.chosen
    assert title(run.chosen).startswith("student of source_only (stage 3), step 2")
    assert run.as_trained(run.chosen)["scores"]["balanced_consistency"] == 0.9


def test_a_resumed_run_does_not_repeat_its_alarms(tmp_path, monkeypatch):
    shares = iter([[0.5, 0.5], [0.5, 0.5], *[[0.99, 0.01]] * 4])

    def scored(*args, **options):
        found = measure(*args, **options)
        return dataclasses.replace(found, shares=[*next(shares), *[0.0] * (len(found.shares) - 2)])

    monkeypatch.setattr(choosing, "measure", scored)
    config = tiny(tmp_path, select="last")
    config.stages[1].steps, config.dry_run, config.eval_every, config.save_every = 4, False, 2, 2
    config.score_images = 2
    saving, stopped = train_gta2cs.Saving.__call__, []

    def killed(self, state, losses):
        saving(self, state, losses)
        if state.index == 1 and state.done == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(train_gta2cs.Saving, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        train_gta2cs.main(config)
    train_gta2cs.main(dataclasses.replace(config, resume=True))
    alarms = json.loads((tmp_path / "history.json").read_text())["stages"][1]["alarms"]
    assert len(alarms) == len({alarm.partition(": ")[2] for alarm in alarms})
    assert {alarm.partition(":")[0] for alarm in alarms} == {"dacs, step 2"}


def test_a_run_from_before_the_score_existed_is_resumed(tmp_path):
    config = tiny(tmp_path, select="source_or_last")
    train_gta2cs.main(config)
    choice = json.loads((tmp_path / "history.json").read_text())["choice"]
    for path in (tmp_path / "best.pt", *tmp_path.glob("stage*/last.pt")):
        saved = load_checkpoint(path)
        history = json.loads(saved["history"])
        nets = [net for entry in history["label_free"] for net in entry["nets"].values()]
        for found in [*nets, *([history["source_only"]] if "source_only" in history else [])]:
            del found["scores"]["balanced_consistency"]
        saved["history"] = json.dumps(history)
        if path.name == "best.pt":
            saved["choice"] = json.dumps({**choice, "score": "confident_consistency", "value": 0.123})
        save_checkpoint(path, saved)
    for name in ("history.json", "report.md", "curves.png"):
        (tmp_path / name).unlink()
    train_gta2cs.main(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "history.json").read_text())["choice"] == pytest.approx(choice)
    assert "balanced consistency" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").exists()


def stopped_before_it_saves(config, monkeypatch, stage, value):
    """A run that is killed in a stage after an evaluation, before the checkpoint; every net has the score `value`."""

    def killed(self, state, losses):
        if state.index == stage and state.done == state.steps:
            raise KeyboardInterrupt
        saving(self, state, losses)

    saving = train_gta2cs.Saving.__call__
    with monkeypatch.context() as patched:
        scores_in_turn(patched, iter(value, None))
        patched.setattr(train_gta2cs.Saving, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_gta2cs.main(config)


def test_what_a_stopped_run_chose_is_not_taken_for_another_one_s(tmp_path, monkeypatch):
    """`best.pt` is written at every evaluation, so it can hold a net that no checkpoint leads to."""
    rising = iter(range(2, 100))
    stages = [train_gta2cs.Stage("dacs"), train_gta2cs.Stage("dacs")]
    config = dataclasses.replace(tiny(tmp_path), stages=stages)
    stopped_before_it_saves(config, monkeypatch, 0, lambda: next(rising))
    assert json.loads(load_checkpoint(tmp_path / "best.pt")["choice"])["value"] > 2
    other = dataclasses.replace(config, stages=[train_gta2cs.Stage("dacs", lr=0.001), stages[1]], resume=True)
    stopped_before_it_saves(other, monkeypatch, 1, lambda: 1.0)
    best = load_checkpoint(tmp_path / "best.pt")
    assert json.loads(best["choice"])["value"] == 1.0
    assert json.loads(best["config"])["stages"][0]["lr"] == 0.001

    stopped_before_it_saves(other, monkeypatch, 1, lambda: next(rising))  # ahead of the second stage's checkpoints
    assert json.loads(load_checkpoint(tmp_path / "best.pt")["choice"])["stage"] == 1
    third = dataclasses.replace(other, stages=[other.stages[0], train_gta2cs.Stage("dacs", options={"ema": 0.9})])
    before = (tmp_path / "best.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"best\.pt to have the same configuration.*stages\.1\.options\.ema: .* -> 0\.9"
    ):
        train_gta2cs.main(third)
    with pytest.raises(ValueError, match=r"best\.pt to have the same configuration.*stages"):
        train_gta2cs.main(dataclasses.replace(other, stages=other.stages[:1]))
    assert (tmp_path / "best.pt").read_bytes() == before
    train_gta2cs.main(other)
    assert json.loads((tmp_path / "history.json").read_text())["choice"]["stage"] == 1


def test_a_finished_run_without_its_chosen_net_says_what_is_left(tmp_path):
    config = tiny(tmp_path)
    train_gta2cs.main(config)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"chosen without labels in .*best\.pt.*`compare_runs\.py .*` ranks"):
        train_gta2cs.main(dataclasses.replace(config, resume=True))


def test_a_nan_net_leaves_no_half_written_choice(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("Expected `logits` to be finite at every valid pixel, but got NaN.")

    monkeypatch.setattr(choosing, "measure", broken)
    with pytest.raises(
        ValueError,
        match=r"Expected a label-free score of the student of source_only, step 2, but got none\. Expected `log",
    ):
        train_gta2cs.main(tiny(tmp_path))
    assert not (tmp_path / "best.pt").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("score", "value", "level"),
    [
        ("balanced_consistency", 0.505, True),
        ("balanced_consistency", 0.51, True),
        ("balanced_consistency", 0.515, False),
        ("class_correlation", 0.2, False),  # the lower, the better: far ahead
        ("matrix_norm", 0.505, False),  # nothing is known of its differences
    ],
)
def test_a_verdict_calls_nets_level_only_by_a_score_whose_differences_are_known(score, value, level):
    both = {"balanced_consistency": 0.5, score: 0.5}, {"balanced_consistency": 0.5, score: value}
    source, last = (LabelFree(scores, []) for scores in both)
    choice, config = choosing.Choice("dacs", 1, 20, "student", score, value), train_gta2cs.Config()
    run = SimpleNamespace(choice=choice, source_only=source, config=config)
    words = verdict(run, [{"label_free": [{"nets": {"student": last.to_json()}}]}])
    assert "Use the adapted net" in words
    assert ("the two are level" in words) is level


def test_the_best_of_a_stage_is_of_all_nets_that_can_be_deployed():
    nets = {"student": 40.0, "teacher": 42.5, "large student": 60.0, "other": None}
    entry = {"step": 10, "miou": 40.0, "nets": {name: {"means": {"mIoU": value}} for name, value in nets.items()}}
    assert headlines({"scores": [entry]}) == [40.0, 42.5]
    carla = {"mIoU11": 30.0, "mIoU10": 33.0}  # its eleventh class never occurs in source
    assert headlines({"scores": [{"nets": {"student": {"means": carla}}}]}) == [33.0]
    score = Score({"Sky": 33.0}, carla)
    assert score.miou == 33.0
    rows = {"source_only": score, "dacs": Score({"Sky": 34.0}, {"mIoU11": 31.0, "mIoU10": 34.0})}
    assert "gains 1.0 points of mIoU10" in gain_sentence(rows)


def test_the_title_names_the_folders_of_own_data(tmp_path, monkeypatch):
    assert domains(train_gta2cs.DataConfig()) == "toy"
    own = partial(train_gta2cs.DataConfig, pair="folder")
    assert domains(own(data_root=Path("/data/mine"))) == "mine/source → mine/target"
    assert domains(own(data_root=Path("/data/mine"), target_root=Path("/b/lab"))) == "mine/source → b/lab"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UDAKIT_DATA", ".")
    assert domains(own()) == f"{tmp_path.name}/source → {tmp_path.name}/target"
    assert headlines({"scores": []}) == []


def test_the_log_says_that_adaptation_starts_from_a_net_of_one_class(tmp_path, monkeypatch, capsys):
    names = train_gta2cs.open_pair(tiny(tmp_path)).classes.names
    shares = [float(i == 1) for i in range(len(names))]
    one = LabelFree(dict.fromkeys(("balanced_consistency", "confident_consistency"), 0.9), shares)
    monkeypatch.setattr(choosing, "measure", lambda *args, **options: one)
    train_gta2cs.main(tiny(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert f"The net that dacs starts from predicts only '{names[1]}' on target. {choosing.ONE_CLASS}" in said
    assert f"**The chosen net predicts only {names[1]}.**" in (tmp_path / "report.md").read_text()


def test_the_log_says_that_adaptation_starts_from_a_net_that_nothing_has_trained(tmp_path, monkeypatch, capsys):
    without_scores(monkeypatch)
    for stages, said in ((["dacs"], True), (["source_only", "dacs"], False)):
        config = dataclasses.replace(tiny(tmp_path, overwrite=True), stages=[train_gta2cs.Stage(r) for r in stages])
        train_gta2cs.main(config)
        assert (choosing.BY_CHANCE in " ".join(capsys.readouterr().out.split())) is said


@pytest.mark.parametrize("score", label_free.RELIABILITY)
def test_a_score_that_is_turned_round_is_none_that_the_study_found_reliable(score):
    for select, words in ((score, label_free.RELIABILITY[score]), (f"-{score}", label_free.UNRELIABLE)):
        assert label_free.reliability(score, label_free.direction_of(select)) == words
    assert label_free.reliability("nuclear_norm", 1) == label_free.UNRELIABLE
