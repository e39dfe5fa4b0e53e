"""The reference loop end to end, tiny: it runs, resumes exactly, refuses what does not fit, runs on two ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gta2cs
from gta2cs.checkpoints import load_checkpoint, load_net, save_checkpoint
from gta2cs.datasets import build_pair
from gta2cs.evaluation import Score, evaluate, evaluating
from gta2cs.recipes import RECIPES, Draws
from gta2cs.report import markdown_table
from gta2cs.samples import ClassSet
from tiny import ARGUMENTS, small_pair, tiny_net
from udakit import draw_classes

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_gta2cs.py"
TINY = [*ARGUMENTS, "--data.crop=[64,64]", "--batch_size=2", "--log_every=1", "--score_images=2"]


def tiny_config(out: Path, *stages: train_gta2cs.Stage, **changes) -> train_gta2cs.Config:
    return train_gta2cs.Config(
        data=train_gta2cs.DataConfig(crop=(64, 64)),
        net=tiny_net(),
        stages=list(stages),
        batch_size=2,
        log_every=1,
        out=out,
        dry_run=True,
        **changes,
    )


def run_script(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, **options
    )


def test_dry_run_of_the_default_command_leaves_everything_to_look_at(tmp_path):
    done = run_script("--dry-run", *TINY, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "results.json").exists()  # a finished run would still be there
    assert "source_only, step 1 of 2: source " in done.stdout  # without a terminal a plain line, no bar
    results = json.loads((tmp_path / "dry_run" / "results.json").read_text())
    assert list(results)[:2] == ["source_only", "source_only + BatchNorm statistics of target"]
    assert {"dacs, student", "dacs, teacher"} <= set(results)
    for name in ("panels.png", "curves.png"):
        assert (tmp_path / "dry_run" / name).read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "dry_run" / "report.md").read_text()
    assert "| dacs, student |" in report
    assert "A dry run of two steps a stage" in report
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "stage",
    [
        train_gta2cs.Stage("dacs", options={"selector": "class_quantile", "batch_norm": "joint"}),
        train_gta2cs.Stage("dacs", options={"selector": "threshold", "feature_distance": 0.005, "ignore_bottom": 8}),
        train_gta2cs.Stage("dacs", options={"selector": "argmax", "teacher_mode": "eval", "augment_source": False}),
    ],
    ids=lambda stage: stage.options["selector"],
)
def test_options_of_dacs(tmp_path, stage):
    rows = train_gta2cs.main(tiny_config(tmp_path, stage))
    assert set(rows) == {"dacs, student", "dacs, teacher", "chosen without labels"}


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("dacs", {}), ("diga", {"translate": "learned", "translator_steps": 3})],
    ids=["dacs", "diga with a learned translator"],
)
def test_killed_and_resumed_run_is_bit_identical(tmp_path, recipe, options):
    """Killed is a real process; the whole run and the resumed one are this one, which need not start anew."""
    stage = {"recipe": recipe, "steps": 6, "lr": 0.001, "lr_warmup": 2, "options": options}
    data = ["--data.pair=folder", f"--data.data_root={small_pair(tmp_path / 'data')}"]
    arguments = [*TINY, *data, "--save_every=2", "--eval_every=0", f"--stages={json.dumps([stage])}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_gta2cs.main(train_gta2cs.parse([*arguments, f"--out={whole}"]))

    checkpoint = killed / f"stage1_{recipe}" / "last.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, f"--out={killed}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not checkpoint.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(checkpoint)["step"] < 6, "the run was over before it could be killed"

    train_gta2cs.main(train_gta2cs.parse([*arguments, f"--out={killed}", "--resume"]))
    first, second = load_checkpoint(whole / f"stage1_{recipe}" / "last.pt"), load_checkpoint(checkpoint)
    assert first["step"] == second["step"] == 6
    assert first["recipe"].keys() == second["recipe"].keys()
    for name, value in first["recipe"].items():
        assert torch.equal(value, second["recipe"][name]), name
    losses = [json.loads(c["history"])["losses"] for c in (first, second)]
    assert losses[0] == losses[1]


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path, monkeypatch):
    """The losses of a step were finite, and a file may be due before the log and the scores look at the next ones."""

    def spoilt(self):
        self.done = getattr(self, "done", 0) + 1
        if self.done == 2:
            next(self.student.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(RECIPES["source_only"], "after_step", spoilt)
    data = ["--data.pair=folder", f"--data.data_root={small_pair(tmp_path / 'data')}"]
    seldom = ["--save_every=1", "--eval_every=0", "--log_every=0"]
    stages = '--stages=[{"recipe": "source_only", "steps": 4}]'
    with pytest.raises(
        FloatingPointError, match=r"finite weights, but after step 2 .* checkpoint is of step 1, --resume"
    ):
        train_gta2cs.main(train_gta2cs.parse([*TINY, *data, *seldom, stages, f"--out={tmp_path / 'out'}"]))
    saved = load_checkpoint(tmp_path / "out" / "stage1_source_only" / "last.pt")
    assert saved["step"] == 1
    assert all(value.isfinite().all() for value in saved["recipe"].values())


def test_resume_refuses_another_configuration(tmp_path):
    stage = train_gta2cs.Stage("source_only")
    train_gta2cs.main(tiny_config(tmp_path, stage))
    with pytest.raises(ValueError, match=r"same configuration.*seed: 0 -> 1"):
        train_gta2cs.main(tiny_config(tmp_path, stage, seed=1, resume=True))
    with pytest.raises(
        ValueError, match=r"select: balanced_consistency -> last\. Take .* last step .* in its last\.pt"
    ):
        train_gta2cs.main(tiny_config(tmp_path, stage, select="last", resume=True))


def test_resume_names_what_an_earlier_version_did_not_save(tmp_path):
    stage = train_gta2cs.Stage("source_only")
    train_gta2cs.main(tiny_config(tmp_path, stage))
    (path,) = tmp_path.glob("stage1_*/last.pt")
    saved = load_checkpoint(path)
    del saved["recipe"][next(iter(saved["recipe"]))]
    save_checkpoint(path, saved)
    with pytest.raises(ValueError, match=r"of this run, but it does not fit: Error.*: Missing key.*student"):
        train_gta2cs.main(tiny_config(tmp_path, stage, resume=True))


def test_resume_refuses_other_classes(tmp_path, monkeypatch):
    stage = train_gta2cs.Stage("source_only")
    train_gta2cs.main(tiny_config(tmp_path, stage))
    opened = train_gta2cs.open_pair

    def renamed(config):
        pair = opened(config)
        names = ("cell", *pair.classes.names[1:])
        return dataclasses.replace(pair, classes=dataclasses.replace(pair.classes, names=names))

    monkeypatch.setattr(train_gta2cs, "open_pair", renamed)
    with pytest.raises(
        ValueError, match=r"Expected the classes of .*last\.pt, \['.*, but the data has \['cell', .* Take"
    ):
        train_gta2cs.main(tiny_config(tmp_path, stage, resume=True))


def test_a_refused_resume_changes_nothing_and_a_new_run_leaves_no_old_stage(tmp_path):
    stages = [train_gta2cs.Stage("source_only"), train_gta2cs.Stage("source_only")]
    rows = train_gta2cs.main(tiny_config(tmp_path, *stages))
    assert "source_only" in rows  # a recipe that comes twice keeps both rows
    assert "source_only (stage 2)" in rows
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"these values differ: seed: 0 -> 7"):
        train_gta2cs.main(tiny_config(tmp_path, *stages, resume=True, seed=7))
    assert (tmp_path / "config.yaml").read_text() == before
    with pytest.raises(ValueError, match=r"best\.pt .* differ: stages\.1\.lr: 0\.0001 -> 0\.1\. Take"):
        train_gta2cs.main(tiny_config(tmp_path, stages[0], train_gta2cs.Stage("source_only", lr=0.1), resume=True))
    assert (tmp_path / "config.yaml").read_text() == before
    train_gta2cs.main(tiny_config(tmp_path, stages[0]))
    assert not (tmp_path / "stage2_source_only" / "last.pt").exists()


@pytest.mark.parametrize(
    "stage",
    [
        train_gta2cs.Stage("diga", options={"translate": "learned"}),
        train_gta2cs.Stage("combined", options={"candidates": {"one": {"translate": "learned"}}}),
    ],
    ids=lambda stage: stage.recipe,
)
def test_a_learned_translator_wants_three_channels(tmp_path, stage):
    config = tiny_config(tmp_path / "out", stage)
    config.data.channels = 1
    with pytest.raises(ValueError, match=r"`translate` of (diga|combined) .* `data\.channels` 1, but got 'learned'"):
        train_gta2cs.main(config)
    assert not (tmp_path / "out").exists()


def test_a_scheduler_s_sigterm_ends_a_run_as_ctrl_c_does(monkeypatch, capsys):
    def stopped(config):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("nothing stopped")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train_gta2cs, "parse", lambda: None)
    monkeypatch.setattr(train_gta2cs, "main", stopped)
    try:
        assert train_gta2cs.command() == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "Stopped before the first step.\n"


class Faulty(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise KeyError("Expected nothing of this cause")
        except KeyError as error:
            raise ValueError("Expected a.png to be an image,\nbut it is none.") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_named_in_a_line_whoever_reads_it(monkeypatch, capsys, workers):
    monkeypatch.setattr(train_gta2cs, "parse", lambda: None)
    loader = torch.utils.data.DataLoader(Faulty(), num_workers=workers)
    monkeypatch.setattr(train_gta2cs, "main", lambda config: list(loader))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert train_gta2cs.command() == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "Expected a.png to be an image,\nbut it is none.\n"


def test_a_bad_file_met_before_the_first_step_is_named_as_one_met_later(tmp_path, monkeypatch):
    def broken(self, preparation):
        raise OSError("Cannot read /data/a.png: it is damaged.")

    monkeypatch.setattr(RECIPES["source_only"], "prepare", broken)
    with pytest.raises(OSError, match=r"--check-data lists all such files\. Stopped in stage 1 of 1"):
        train_gta2cs.main(tiny_config(tmp_path, train_gta2cs.Stage("source_only")))


def test_a_check_of_folders_that_are_not_there_is_a_report(tmp_path, capsys):
    config = tiny_config(tmp_path / "out", train_gta2cs.Stage("source_only"), check_data=True)
    config.data = train_gta2cs.DataConfig(pair="folder", data_root=tmp_path / "none")
    with pytest.raises(SystemExit) as ended:
        train_gta2cs.main(config)
    assert ended.value.code == 1
    assert "refused: Expected a folder" in capsys.readouterr().out


def test_options_that_a_method_fixes_are_refused():
    with pytest.raises(ValueError, match=r"options of recipe Ehtdi .* but got 'augment_mixed'"):
        RECIPES["ehtdi"].parse({"augment_mixed": False})
    assert not RECIPES["diga"].parse({"augment_mixed": False}).augment_mixed


def test_two_processes_train_one_net(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)),
            *("--dry-run", "--net.weights=random", *TINY[len(ARGUMENTS) :], f"--out={tmp_path}"),
            '--stages=[{"recipe": "diga", "steps": 2}]',
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alarms = [line for line in done.stdout.splitlines() if line.startswith("step 2: class ")]
    assert alarms, "random nets should have changed their shares"
    assert len(set(alarms)) == len(alarms), "both processes print"
    assert done.stdout.count("share of target's BatchNorm statistics in the chosen net by ") == 1
    saved = load_checkpoint(checkpoint := tmp_path / "dry_run" / "stage1_diga" / "last.pt")
    assert saved["world_size"] == 2
    assert saved["parameters_agree"], "the ranks' students differ after an optimiser step"
    # The score that the ranks found together is that of the net that was saved, on the same two images.
    pair = build_pair("toy")
    net = train_gta2cs.NetConfig(**json.loads(saved["config"])["net"]).build(len(pair.classes.names))
    load_net(net, checkpoint)
    alone = evaluate(net, pair.target_val, pair.classes, limit=2)
    assert json.loads(saved["history"])["scores"][-1]["nets"]["student"]["iou"] == alone.to_json()["iou"]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`recipe` to be one of .*'dasc'"):
        train_gta2cs.main(tiny_config(tmp_path, train_gta2cs.Stage("dasc")))
    with pytest.raises(ValueError, match=r"options of recipe Dacs .*'tau'"):
        train_gta2cs.main(tiny_config(tmp_path, train_gta2cs.Stage("dacs", options={"tau": 1})))
    with pytest.raises(ValueError, match=r"`stages`"):
        train_gta2cs.main(tiny_config(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        load_net(torch.nn.Linear(1, 1), tmp_path / "missing.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pt to hold tensors saved by torch"):
        load_net(torch.nn.Linear(1, 1), broken)
    other = tmp_path / "other.pt"
    torch.save({"recipe": {"student.weight": torch.zeros(3, 3)}}, other)
    with pytest.raises(ValueError, match=r"to be the configured net, but 2 tensors .*weight"):
        load_net(torch.nn.Linear(1, 1), other)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"dacs", "duda", "duda_pre"}))
def test_every_recipe_runs_two_steps(tmp_path, name):
    rows = train_gta2cs.main(tiny_config(tmp_path, train_gta2cs.Stage(name)))
    assert all(0 <= score.miou <= 100 for score in rows.values())
    terms = json.loads(load_checkpoint(tmp_path / f"stage1_{name}" / "last.pt")["history"])["losses"][-1]["terms"]
    assert terms["source"] > 0
    assert all(np.isfinite(v) for v in terms.values())


@pytest.mark.parametrize("base", ["dacs", "ehtdi"])
def test_duda_adapts_a_small_net_through_a_large_one(tmp_path, base):
    stages = [
        train_gta2cs.Stage(
            "duda_pre", options={"large": {"encoder": "tu-tf_efficientnet_lite1", "weights": "random"}, "base": base}
        ),
        train_gta2cs.Stage("duda"),
    ]
    rows = train_gta2cs.main(tiny_config(tmp_path, *stages))
    assert {"duda_pre, student", "duda_pre, large student", "duda_pre, large teacher", "duda, student"} <= set(rows)
    saved = load_checkpoint(tmp_path / "stage2_duda" / "last.pt")["recipe"]
    before = load_checkpoint(tmp_path / "stage1_duda_pre" / "last.pt")["recipe"]
    weight = "head.weight"
    assert torch.equal(saved[f"large.large_teacher.module.{weight}"], before[f"base.teacher.module.{weight}"])
    assert not torch.equal(saved[f"student.{weight}"], before[f"student.{weight}"])


def test_duda_asks_for_its_first_stage(tmp_path):
    with pytest.raises(ValueError, match=r"the stage before `duda` to be `duda_pre`"):
        train_gta2cs.main(tiny_config(tmp_path, train_gta2cs.Stage("duda")))


def test_a_large_net_that_is_not_there_is_named_before_the_first_stage_trains(tmp_path):
    first, missing = train_gta2cs.Stage("source_only"), str(tmp_path / "none.pt")
    for name, stage in (("large_init", "duda_pre"), ("large_from", "duda")):
        with pytest.raises(FileNotFoundError, match=rf"`stages\.1\.options\.{name}` to be a checkpoint, .*none\.pt"):
            train_gta2cs.main(tiny_config(tmp_path / "out", first, train_gta2cs.Stage(stage, options={name: missing})))
    assert not (tmp_path / "out").exists()
    inside = {"large_init": str(tmp_path / "out" / "stage1_source_only" / "last.pt")}
    train_gta2cs.check_large_nets(tiny_config(tmp_path / "out", first, train_gta2cs.Stage("duda_pre", options=inside)))


def test_what_cannot_be_built_replaces_no_earlier_run(tmp_path):
    """`--overwrite` is about the run that begins."""
    out, broken = tmp_path / "out", tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    out.mkdir()
    for name in ("results.json", "best.pt"):
        (out / name).write_text("an earlier one's")
    with pytest.raises(ValueError, match=r"broken\.pt to hold tensors"):
        train_gta2cs.main(tiny_config(out, train_gta2cs.Stage("duda_pre", options={"large_init": str(broken)})))
    assert {path.name for path in out.iterdir()} == {"results.json", "best.pt"}


def test_draws_depend_on_seed_step_and_sample_alone():
    labels = torch.randint(8, (4, 6, 6))

    def drawn(seed, step, samples, rows):
        draws = Draws(seed, step, samples, torch.device("cpu"))
        return draws(lambda i, g: draw_classes(labels[rows][i : i + 1], num_classes=8, generator=g))

    whole = drawn(3, 7, range(4), [0, 1, 2, 3])
    split = torch.cat([drawn(3, 7, range(2), [0, 1]), drawn(3, 7, range(2, 4), [2, 3])])
    assert torch.equal(whole, split)
    assert not torch.equal(whole, drawn(3, 8, range(4), [0, 1, 2, 3]))
    assert not torch.equal(whole, drawn(4, 7, range(4), [0, 1, 2, 3]))


CLASSES = ClassSet(("a", "b", "c"), np.zeros((3, 3), np.uint8), {"mIoU": (0, 1, 2), "mIoU2": (0, 1)})


def test_score_is_the_data_set_confusion_matrix_and_skips_what_never_occurs():
    score = Score.of(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), CLASSES)
    assert score.iou["a"] == pytest.approx(50.0)
    assert score.iou["b"] == pytest.approx(100 * 4 / 7)
    assert np.isnan(score.iou["c"])
    assert score.miou == score.means["mIoU2"] == pytest.approx((50 + 400 / 7) / 2)
    again = Score.from_json(json.loads(json.dumps(score.to_json())))
    assert again.means["mIoU"] == pytest.approx(score.miou, abs=0.01)
    assert "| net | **mIoU** | **mIoU2** | a | b | c |" in markdown_table({"x": score}, CLASSES)
    assert "–" in markdown_table({"x": score}, CLASSES)


def test_evaluating_restores_every_mode():
    net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm2d(1))
    net[1].eval()
    with evaluating(net):
        assert not net[0].training
    assert net[0].training
    assert not net[1].training
