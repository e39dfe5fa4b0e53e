"""Runs compared without labels: ranks, page, what the labels say of it, sweeps, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

import compare_runs
import train_gta2cs
from gta2cs.checkpoints import save_checkpoint
from gta2cs.comparison import Comparison, where
from gta2cs.config import CONFIGS
from gta2cs.histories import read_run
from gta2cs.inference import Trained
from tiny import NET, small_pair


def net(value):
    return {"scores": {"mirror_consistency": value, "balanced_consistency": value}, "shares": [1.0], "class_iou": {}}


def write_run(folder, values, truths, *, start=0.5, pair="toy"):
    folder.mkdir()
    stages = [
        {
            "name": "dacs",
            "steps": 10 * len(values),
            "source_only": net(start),
            "source_only_truth": {"means": {"mIoU": 50.0}} if truths else None,
            "scores": [
                {"step": 10 * (k + 1), "nets": {"student": {"means": {"mIoU": truth}}}}
                for k, truth in enumerate(truths)
            ],
            "label_free": [{"step": 10 * (k + 1), "nets": {"student": net(v)}} for k, v in enumerate(values)],
        }
    ]
    config = {"data": {"pair": pair}, "seed": 0}
    (folder / "history.json").write_text(json.dumps({"config": config, "stages": stages, "choice": None}))
    return folder


def test_the_best_net_of_the_best_run_and_how_right_that_was(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a", [0.6, 0.55], [60.0, 55.0]),
        write_run(tmp_path / "b", [0.7, 0.9], [64.0, 62.0]),
        write_run(tmp_path / "c", [0.3, 0.2], [30.0, 20.0]),
    ]
    page = tmp_path / "page.html"
    assert compare_runs.main([*map(str, runs), "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "Use the student of dacs, step 20, in" in printed
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == ["1. b", "2. a", "3. c"]
    assert "3. c: source-only net, balanced consistency 0.500" in printed
    text = page.read_text()
    assert "an mIoU of 62.0, the best of all 64.0: the choice loses 2.0" in text
    assert "45.7 in the mean" in text  # of the last students: 55, 62, 20
    assert text.count("data:image/png;base64,") == 2
    assert "<script" not in text


def test_a_net_that_has_lost_a_class_is_not_chosen(tmp_path):
    folder = write_run(tmp_path / "a", [0.6, 0.9], [60.0, 20.0])
    saved = json.loads((folder / "history.json").read_text())
    (stage,) = saved["stages"]
    for found, shares in (
        (stage["source_only"], [0.9, 0.1]),
        *(
            (entry["nets"]["student"], shares)
            for entry, shares in zip(stage["label_free"], ([0.8, 0.2], [0.99, 0.01]), strict=True)
        ),
    ):
        found["shares"] = shares
    (folder / "history.json").write_text(json.dumps(saved))
    found = Comparison([read_run(folder)], "balanced_consistency")
    assert found.best(found.runs[0])["truth_miou"] == 60.0
    text = found.text()
    assert "0.600, the highest of 2 nets that kept their classes" in text
    assert "The chosen net has an mIoU of 60.0" in text  # not the one with the highest score
    assert text.index("| student of dacs, step 10 |") < text.index("| student of dacs, step 20 (a class shrank) |")


def test_a_step_counts_within_its_stage(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [0.6, 0.7], [60.0, 61.0])
    saved = json.loads((folder / "history.json").read_text())
    (stage,) = saved["stages"]
    source = {"name": "source_only", "steps": 100, "scores": [], "label_free": []}
    saved["stages"] = [source, stage, source, {**stage, "name": "diga"}, {**stage, "name": "diga", "steps": 30}]
    (folder / "history.json").write_text(json.dumps(saved))
    run = read_run(folder)
    assert [(n["step"], n["stage"], n["stage_step"]) for n in run.checkpoints] == [
        (110, "dacs", 10), (120, "dacs", 20), (230, "diga", 10), (240, "diga", 20),
        (250, "diga (stage 5)", 10), (260, "diga (stage 5)", 20),
    ]  # fmt: skip
    assert run.start["step"] == 100
    assert run.last["stage"] == "diga (stage 5)"
    assert compare_runs.main([str(folder), "--page", str(tmp_path / "page.html")]) == 0
    assert "Use the student of dacs, step 20, in" in capsys.readouterr().out


def test_the_page_says_which_file_holds_a_net(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [0.9, 0.8, 0.7, 0.6], [])
    saved = json.loads((folder / "history.json").read_text())
    for entry in saved["stages"][0]["label_free"]:
        entry["nets"]["teacher"] = net(0.5)
    saved["choice"] = {"recipe": "dacs", "stage": 0, "step": 20, "net": "student"}
    (folder / "history.json").write_text(json.dumps(saved))
    (folder / "stage1_dacs").mkdir()
    for name in ("best.pt", "stage1_dacs/last.pt", "stage1_dacs/step_000030.pt", "stage1_dacs/step_000040.pt"):
        (folder / name).touch()
    assert compare_runs.main([str(folder), "--page", str(tmp_path / "page.html")]) == 0
    assert "step 10, in " + str(folder) + ". No file holds this net" in " ".join(capsys.readouterr().out.split())
    run = read_run(folder)
    text = Comparison([run], "balanced_consistency").text()
    for step, name, file in (
        (10, "student", "not kept"),
        (20, "student", "`best.pt`"),
        (20, "teacher", "not kept"),
        (30, "teacher", "`stage1_dacs/step_000030.pt`"),
        (40, "student", "`stage1_dacs/last.pt`"),
        (40, "teacher", "`stage1_dacs/last.pt`"),
    ):
        assert f"| {name} of dacs, step {step} | a | {file} |" in text
    assert run.file_of(run.start) is None, "the run began with a net of another file"
    run.choice = {"recipe": "source_only", "stage": 0, "step": 0, "net": "source_only"}
    assert run.file_of(run.start) == folder / "best.pt"
    last = run.checkpoints[-1]
    assert where(run, last) == f"It is in `{folder / 'stage1_dacs' / 'last.pt'}`, with `--net teacher`."


def with_statistics_of_target(folder, value, *, base="student", step=20, select="balanced_consistency", truth=None):
    """Let a run have chosen a net and given it target's BatchNorm statistics, with which its score is `value`."""
    saved = json.loads((folder / "history.json").read_text())
    choice = {"recipe": "dacs", "stage": 0, "step": step, "net": base, "score": "x", "value": value}
    choice["target_statistics"] = 1.0
    saved["stages"][0]["target_statistics"] = {"choice": choice, **net(value)}
    if truth is not None:
        saved["stages"][0]["target_statistics"]["truth"] = {"means": {"mIoU": truth}}
    saved["config"]["select"] = select
    (folder / "history.json").write_text(json.dumps({**saved, "choice": choice}))
    (folder / "best.pt").touch()
    return folder


@pytest.mark.parametrize("value", [0.95, 0.2])
def test_the_net_to_use_is_the_one_that_the_run_deploys(tmp_path, capsys, value):
    """Statistics are chosen by another score, so by this one the net may look worse with those of target."""
    folder = with_statistics_of_target(write_run(tmp_path / "a", [0.6, 0.9], [60.0, 62.0]), value, truth=70.0)
    other = write_run(tmp_path / "b", [0.92], [50.0])
    page = tmp_path / "page.html"
    assert compare_runs.main([str(folder), "--page", str(page)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1. a: student of dacs, step 20, with BatchNorm statistics of target, balanced consistency 0.900" in said
    assert f"as it is in best.pt it has {value:.3f}. It is in {folder / 'best.pt'}." in said
    assert "itself chose another net" not in said
    run = read_run(folder)
    compared = Comparison([run], "balanced_consistency")
    assert compared.best(run) is run.chosen is run.checkpoints[-1]
    text = compared.text()
    assert "**: its balanced consistency is 0.900, the highest of 3 nets. That is with" in text
    assert "The chosen net has an mIoU of 70.0" in text
    assert text.index("step 20, with BatchNorm statistics of target | a | `best.pt`") < text.index("step 20 | a | not")
    assert [r.folder.name for r in Comparison([run, read_run(other)], "balanced_consistency").runs] == ["b", "a"]


def test_a_source_only_net_with_statistics_of_target(tmp_path):
    folder = write_run(tmp_path / "a", [0.4], [])
    run = read_run(with_statistics_of_target(folder, 0.3, base="source_only", step=0))
    found = Comparison([run], "balanced_consistency")
    assert found.best(run) is run.chosen is run.checkpoints[-1]
    assert "**Use the source-only net, with BatchNorm statistics of target, in `a`**: its balanced" in found.text()
    assert found.other_choices() == []


@pytest.mark.parametrize(
    ("select", "by"), [("last", " (`select: last`)"), ("-balanced_consistency", " (`select: -bal"), ("", ",")]
)
def test_a_run_that_chose_otherwise_is_named(tmp_path, capsys, select, by):
    folder = write_run(tmp_path / "a", [0.9, 0.6], [])
    saved = json.loads((folder / "history.json").read_text())
    saved["config"]["select"] = select
    saved["choice"] = {"recipe": "dacs", "stage": 0, "step": 20, "net": "student", "target_statistics": 0.0}
    (folder / "history.json").write_text(json.dumps(saved))
    assert compare_runs.main([str(folder), "--page", str(tmp_path / "page.html")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1. a: student of dacs, step 10" in said
    assert "a itself chose another net" in said
    assert f"predict.py --checkpoint {folder} mean" in said
    run = read_run(folder)
    assert f"chose another net{by}" in Comparison([run], "balanced_consistency").text()
    saved["choice"] |= {"net": "source_only", "recipe": "source_only", "step": 0}
    (folder / "history.json").write_text(json.dumps(saved))
    (line,) = Comparison([read_run(folder)], "balanced_consistency").other_choices()
    assert "the source-only net: the one in its `best.pt`" in line


def test_of_equal_nets_the_run_s_own_choice_is_used(tmp_path):
    folder = write_run(tmp_path / "a", [0.9, 0.9], [])
    saved = json.loads((folder / "history.json").read_text())
    saved["config"]["select"] = "balanced_consistency"
    saved["choice"] = {"recipe": "dacs", "stage": 0, "step": 20, "net": "student"}
    (folder / "history.json").write_text(json.dumps(saved))
    run = read_run(folder)
    assert Comparison([run], "balanced_consistency").best(run)["step"] == 20


def test_the_source_only_net_is_in_the_last_file_of_the_stage_before(tmp_path):
    folder = write_run(tmp_path / "a", [0.6], [])
    saved = json.loads((folder / "history.json").read_text())
    saved["stages"].insert(0, {"name": "source_only", "steps": 100, "scores": [], "label_free": []})
    (folder / "history.json").write_text(json.dumps(saved))
    file = folder / "stage1_source_only" / "last.pt"
    file.parent.mkdir()
    file.touch()
    run = read_run(folder)
    assert run.file_of(run.start) == file


def test_a_run_that_was_stopped_keeps_what_it_has_chosen_so_far(tmp_path):
    (stage,) = json.loads((write_run(tmp_path / "whole", [0.6, 0.7], []) / "history.json").read_text())["stages"]
    config = json.dumps(train_gta2cs.plain(train_gta2cs.Config(stages=[train_gta2cs.Stage()])))
    checkpoint = {"recipe": {}, "config": config, "history": json.dumps(stage), "step": 10}
    save_checkpoint(tmp_path / "part" / "stage1_dacs" / "last.pt", checkpoint)
    run = read_run(tmp_path / "part")
    assert [run.file_of(net) and run.file_of(net).name for net in run.checkpoints] == ["last.pt", None]
    choice = json.dumps({"recipe": "dacs", "stage": 0, "step": 20, "net": "student"})
    save_checkpoint(tmp_path / "part" / "best.pt", {**checkpoint, "choice": choice})
    run = read_run(tmp_path / "part")
    assert [run.file_of(net).name for net in run.checkpoints] == ["last.pt", "best.pt"]


def test_a_run_that_was_resumed_with_other_views_has_a_score_of_some_nets_only(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [0.6, 0.7, 0.8], [60.0, 61.0, 62.0])
    saved = json.loads((folder / "history.json").read_text())
    for entry, value in zip(saved["stages"][0]["label_free"][1:], (0.3, 0.2), strict=True):
        entry["nets"]["student"]["scores"]["shift_consistency"] = value
    (folder / "history.json").write_text(json.dumps(saved))
    assert compare_runs.main([str(folder), "--score", "shift_consistency", "--page", str(tmp_path / "page.html")]) == 0
    assert "1. a: student of dacs, step 20, shift consistency 0.300" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "rank correlation over 2 nets" in page


def test_without_labels(tmp_path):
    run = write_run(tmp_path / "a", [0.6], [])
    assert compare_runs.main([str(run), "--page", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "Target has no labels" in text
    assert "How right" not in text
    assert "mIoU</th>" not in text
    assert "true mIoU of the chosen" not in text


def changed_run(folder, change):
    """A run whose history is changed in place."""
    saved = json.loads((folder / "history.json").read_text())
    change(saved)
    (folder / "history.json").write_text(json.dumps(saved))
    return folder


def test_the_truth_of_a_chosen_net_that_is_not_known_is_not_that_of_another(tmp_path):
    run = read_run(with_statistics_of_target(write_run(tmp_path / "a", [0.6, 0.9], [60.0, 62.0]), 0.8))
    text = Comparison([run], "balanced_consistency").text()
    assert "The best of all nets has an mIoU of 62.0, the chosen one is not compared with its truth yet." in text


def test_truth_of_some_nets_only_and_values_that_are_all_alike(tmp_path):
    """Labels that went before the run was resumed; a rank correlation of equal values is none."""
    run = read_run(write_run(tmp_path / "a", [0.5, 0.5, 0.5], [60.0, 62.0]))
    text = Comparison([run], "balanced_consistency").text()
    assert "the best of all 62.0" in text
    assert "in the mean" not in text
    assert "Spearman" not in text
    assert "nan" not in text


def test_labels_that_have_no_class(tmp_path):
    """Their mIoU is none, which is not a broken file."""
    run = read_run(write_run(tmp_path / "a", [0.6, 0.7], [None, None]))
    assert "Target has no labels" in Comparison([run], "balanced_consistency").text()


def test_numbers_have_no_negative_zero(tmp_path):
    folder = write_run(tmp_path / "a", [-0.0001, -0.0002], [])
    assert "-0.000" not in Comparison([read_run(folder)], "balanced_consistency").text()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda saved: saved["config"].update(score_images=4), "images"),
        (lambda saved: saved["config"]["data"].update(target_size=[64, 64]), "images"),
        (lambda saved: saved["stages"][0]["label_free"][0]["nets"]["student"].update(shares=[0.5, 0.5]), "classes"),
    ],
)
def test_scores_of_other_images_or_classes_are_not_compared(tmp_path, change, what):
    runs = [write_run(tmp_path / "a", [0.6], []), changed_run(write_run(tmp_path / "b", [0.6], []), change)]
    with pytest.raises(ValueError, match=f"Expected runs on one pair, with the same images and .*, but got {what} "):
        Comparison([read_run(run) for run in runs], "balanced_consistency")


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["stages"][0]["label_free"][0]["nets"]["student"]["scores"].update(confidence="high"),
        lambda saved: saved["stages"][0]["label_free"][0]["nets"]["student"].update(shares=[None]),
        lambda saved: saved["stages"][0]["scores"][0]["nets"]["student"].update(means={}),
        lambda saved: saved["stages"][0]["scores"][0]["nets"]["student"].update(means={"mIoU": "good"}),
        lambda saved: saved.update(stages=[]),
        lambda saved: saved.update(choice={"stage": 0, "step": 10, "net": None}),
    ],
)
def test_a_history_that_is_wrong_inside_is_one_line(tmp_path, capsys, change):
    folder = changed_run(write_run(tmp_path / "a", [0.6], [60.0]), change)
    assert compare_runs.main([str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "history.json to be as train_gta2cs.py wrote it, but it is not so inside" in said


def test_a_run_that_was_stopped_is_called_so(tmp_path, capsys):
    saved = json.loads((write_run(tmp_path / "whole", [0.6], []) / "history.json").read_text())
    config = json.dumps(train_gta2cs.plain(train_gta2cs.Config(stages=[train_gta2cs.Stage()])))
    checkpoint = {"recipe": {}, "config": config, "history": json.dumps(saved["stages"][0])}
    save_checkpoint(tmp_path / "part" / "stage1_dacs" / "last.pt", checkpoint)
    runs = [str(tmp_path / name) for name in ("whole", "part")]
    assert compare_runs.main([*runs, "--page", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "1. whole: student" in printed
    assert "2. part (not finished): student" in printed
    page = (tmp_path / "page.html").read_text()
    assert "<td>part (not finished)</td>" in page
    assert "part is not finished: it goes on with its own command and <code>--resume</code>." in page


def test_a_run_that_was_stopped_before_it_adapted_is_called_so(tmp_path, capsys):
    whole = write_run(tmp_path / "whole", [0.6], [])
    stage = {**json.loads((whole / "history.json").read_text())["stages"][0], "name": "source_only"}
    del stage["source_only"]
    stages = [train_gta2cs.Stage("source_only"), train_gta2cs.Stage("dacs")]
    for name, planned in (("early", stages), ("source", stages[:1])):
        config = json.dumps(train_gta2cs.plain(train_gta2cs.Config(stages=planned)))
        checkpoint = {"recipe": {}, "config": config, "history": json.dumps(stage)}
        save_checkpoint(tmp_path / name / "stage1_source_only" / "last.pt", checkpoint)
    runs = [str(tmp_path / name) for name in ("whole", "early", "source")]
    assert compare_runs.main([*runs, "--page", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "early (stopped before it adapted): student of source_only" in printed
    assert "early is not finished: its nets are those of its source-only stage." in printed
    assert "source (not finished): student of source_only" in printed


def test_a_run_that_was_stopped_in_its_first_steps_of_adaptation_has_its_source_only_net(tmp_path, capsys):
    """There is no checkpoint of that stage yet, but `best.pt` holds the net, with its scores."""
    stage = json.loads((write_run(tmp_path / "other", [0.6], [55.0]) / "history.json").read_text())["stages"][0]
    source = {**stage, "name": "source_only", "steps": 10}
    del source["source_only"]
    stages = [train_gta2cs.Stage("source_only"), train_gta2cs.Stage("dacs")]
    config = json.dumps(train_gta2cs.plain(train_gta2cs.Config(stages=stages)))
    folder = tmp_path / "run"
    checkpoint = {"recipe": {}, "config": config, "history": json.dumps(source), "step": 10}
    save_checkpoint(folder / "stage1_source_only" / "last.pt", checkpoint)
    choice = {"recipe": "source_only", "stage": 1, "step": 0, "net": "source_only", "value": 0.6}
    begun = {"name": "dacs", "scores": [], "label_free": [], "source_only": net(0.65)}
    save_checkpoint(folder / "best.pt", {**checkpoint, "choice": json.dumps(choice), "history": json.dumps(begun)})
    run = read_run(folder)
    assert run.chosen is run.start
    assert (run.start["step"], run.start["truth_miou"]) == (10, 55.0)
    assert run.file_of(run.start) == folder / "best.pt"
    assert compare_runs.main([str(folder), "--page", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "1. run (stopped before it adapted): source-only net, balanced consistency 0.650" in printed
    assert "best.pt" in printed


@pytest.mark.parametrize(("value", "level"), [(0.51, True), (0.505, True), (0.52, False), (0.4, False)])
def test_a_net_level_with_the_source_only_net_is_called_so(tmp_path, value, level):
    write_run(tmp_path / "a", [value], [])
    text = Comparison([read_run(tmp_path / "a")], "balanced_consistency").text()
    assert ("The run's source-only net is level with it" in text) is level


def test_what_is_refused(tmp_path, capsys):
    toy = write_run(tmp_path / "a", [0.6], [])
    other = write_run(tmp_path / "b", [0.6], [], pair="nuclei")
    for arguments, message in (
        ([], "folders of runs"),
        ([str(tmp_path / "none")], "to be the folder of a run"),
        ([str(toy), str(other)], "runs on one pair"),
        ([str(toy), "--score", "luck"], "`score` to be one of"),
        ([str(toy), "--score=--confidence"], "`score` to be one of"),
        ([str(toy), "--score", "nuclear_norm"], "to have the score 'nuclear_norm'"),
    ):
        assert compare_runs.main(arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "early").mkdir()
    saved = json.loads((toy / "history.json").read_text())
    saved["stages"][0]["label_free"] = []  # a checkpoint came before the first evaluation
    (tmp_path / "early" / "history.json").write_text(json.dumps(saved))
    assert compare_runs.main([str(tmp_path / "early")]) == 2
    assert "it was stopped before the first evaluation of dacs" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        compare_runs.main([str(toy), "--out", str(tmp_path / "page")])
    assert "--config and --out are about the runs of a --sweep" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        *((text, "not so inside") for text in (b"[]", b"null", b"{}", b'{"config": 1, "stages": [], "choice": null}')),
        (b'{"config": {}, "stages": [{"name": "dacs"}], "choice": null}', "not so inside"),
    ],
)
def test_a_history_that_the_loop_did_not_write_is_named(tmp_path, capsys, text, why):
    (tmp_path / "history.json").write_bytes(text)
    assert compare_runs.main([str(tmp_path), "--page", str(tmp_path / "page.html")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"Expected {tmp_path / 'history.json'} to be as train_gta2cs.py wrote it, but it is {why}" in said
    assert not (tmp_path / "page.html").exists()


def test_a_history_with_a_choice_of_another_kind_is_named(tmp_path):
    folder = write_run(tmp_path / "a", [0.6], [])
    saved = json.loads((folder / "history.json").read_text())
    for choice in (3, {"net": "student"}, []):
        (folder / "history.json").write_text(json.dumps({**saved, "choice": choice}))
        with pytest.raises(ValueError, match=r"history\.json to be as train_gta2cs\.py wrote it"):
            read_run(folder)


def test_settings_of_a_sweep(tmp_path):
    base = {"seed": 0, "stages": [{"recipe": "source_only"}, {"recipe": "dacs", "lr": 1e-4}]}
    path = tmp_path / "sweep.yaml"
    path.write_text("- {name: plain}\n- {stages.1.options.selector: argmax, seed: 3}\n")
    settings = compare_runs.settings_of(path, base)
    assert settings["plain"] == base
    assert settings["setting2"]["stages"][1] == {"recipe": "dacs", "lr": 1e-4, "options": {"selector": "argmax"}}
    assert settings["setting2"]["seed"] == 3
    for text, message in (
        ("- {name: a}\n- {name: a}\n", "'a' occurs twice"),
        ("- {stages.7.lr: 1}\n", "'stages.7.lr' to be a path"),
        ("- {out: runs/mine}\n", r"settings of .*sweep\.yaml without `out`"),
        ("seed: 1\n", "to be a list of settings"),
        (": [\n", r"sweep\.yaml to be YAML, but it cannot be read"),
        *((f"- {{name: {name}}}\n", "to be the name of a folder in `out`") for name in ("../up", "a/b", "..", "''")),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            compare_runs.settings_of(path, base)


def test_the_sweep_of_the_help_is_one_that_runs(tmp_path):
    path, file = tmp_path / "sweep.yaml", tmp_path / "setting.yaml"
    path.write_text("\n".join(line.strip() for line in compare_runs.__doc__.splitlines() if line.startswith("    - ")))
    settings = compare_runs.settings_of(path, yaml.safe_load((CONFIGS / "dacs_toy.yaml").read_text()))
    assert [*settings] == ["plain", "quantile", "slower"]
    for config in settings.values():
        file.write_text(yaml.safe_dump(config))
        train_gta2cs.check_stages(train_gta2cs.parse(["--config", str(file)]))


def test_a_wrong_option_of_a_sweep_is_found_before_anything_runs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text("- {name: plain}\n- {name: typo, stages.1.options.selectr: argmax}\n")
    monkeypatch.setattr(train_gta2cs, "main", lambda run: pytest.fail("trained"))
    assert compare_runs.main(["--sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "selectr" in said
    assert "This is the setting 'typo' of" in said
    path.write_text("- {name: plain}\n- {name: kind, data.crop: 3}\n")
    with pytest.raises(SystemExit):
        compare_runs.main(["--sweep", str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "data.crop" in said
    assert "This is the setting 'kind' of" in said
    assert not (tmp_path / "out").exists()


def test_folders_of_two_people_do_not_compare(tmp_path):
    for name, root in (("a", "/one"), ("b", "/two")):
        folder = write_run(tmp_path / name, [0.6], [], pair="folder")
        saved = json.loads((folder / "history.json").read_text())
        saved["config"]["data"]["data_root"] = root
        (folder / "history.json").write_text(json.dumps(saved))
    runs = [read_run(tmp_path / name) for name in "ab"]
    with pytest.raises(ValueError, match=r"Expected runs on one pair, .*, but got pair folder /one and folder /two"):
        Comparison(runs, "balanced_consistency")
    assert Comparison(runs[:1] * 2, "balanced_consistency").text().startswith("# folder /one: 2 runs")


def test_a_sweep_runs_what_is_not_finished(tmp_path, monkeypatch, capsys):
    config, path, out = tmp_path / "base.yaml", tmp_path / "sweep.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({"seed": 0, "stages": [{"recipe": "dacs", "steps": 5}]}))
    path.write_text("- {name: one}\n- {name: two, seed: 2}\n- {name: bad, seed: 3}\n")
    seen = []

    def train(run):
        seen.append((run.out.name, run.seed, run.resume))
        if run.out.name == "bad":
            raise FloatingPointError("A loss is not finite.")
        write_run(run.out, [0.6 if run.seed else 0.7], [])
        saved = json.loads((run.out / "history.json").read_text())
        (run.out / "history.json").write_text(json.dumps({**saved, "config": train_gta2cs.plain(run)}))

    monkeypatch.setattr(train_gta2cs, "main", train)
    arguments = ["--sweep", str(path), "--config", str(config), "--out", str(out)]
    assert compare_runs.main(arguments) == 0
    assert seen == [("one", 0, True), ("two", 2, True), ("bad", 3, True)]
    assert "bad is left out: A loss is not finite." in capsys.readouterr().out
    assert (out / "compared.html").is_file()
    assert compare_runs.main(arguments) == 0
    assert [name for name, *_ in seen[3:]] == ["bad"]  # the others are finished
    path.write_text("- {name: one}\n- {name: two, seed: 5}\n")
    assert compare_runs.main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "these values differ: seed: 2 -> 5." in said
    assert "Here that is another `name`. This is the setting 'two' of" in said
    assert yaml.safe_load((out / "two.yaml").read_text())["seed"] == 2


@pytest.mark.slow
def test_a_sweep_names_the_nets_that_its_runs_deploy(tmp_path, capsys):
    """Every setting tries target's BatchNorm statistics; page, report and predict.py then mean one net."""
    config, path, out = tmp_path / "base.yaml", tmp_path / "sweep.yaml", tmp_path / "out"
    data = {"pair": "folder", "data_root": str(small_pair(tmp_path / "data")), "crop": [64, 64]}
    stages = [{"recipe": "source_only", "steps": 1}, {"recipe": "dacs", "steps": 1}]
    config.write_text(yaml.safe_dump({"data": data, "net": NET, "stages": stages, "batch_size": 2}))
    path.write_text("- {name: plain}\n- {name: other, seed: 1}\n- {name: last, select: last}\n")
    arguments = ["--sweep", str(path), "--config", str(config), "--out", str(out)]
    assert compare_runs.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("share of target's BatchNorm statistics in the chosen net") == 2  # `last` keeps its own
    said = {line.split(": ")[0][3:]: line for line in printed.splitlines() if line[:3] in ("1. ", "2. ", "3. ")}
    for name in ("plain", "other"):
        title = Trained.open(out / name).title
        assert said[name].split(": ")[1].startswith(f"{title}, balanced consistency")
        assert f"{title}" in (out / name / "report.md").read_text().split("**Use the ")[1]
        assert f"{name} itself chose" not in printed
    assert Trained.open(out / "last").title == "student of dacs, step 1"
    assert ("last itself chose" in printed) is not ("last: student of dacs, step 1" in said["last"])
    assert (out / "compared.html").is_file()
    assert compare_runs.main(arguments) == 0
    assert "BatchNorm statistics in the chosen net" not in capsys.readouterr().out, "nothing runs again"
