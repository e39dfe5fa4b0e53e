"""The integration scripts run, tiny and without a network, and do what their comments promise."""

from __future__ import annotations

import importlib.util
import math
import re
import socket
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "integrations"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
PLAIN = ["medical_numpy", "one_logit", "semi_supervised", "smp_net", "torchvision_net", "transformers_segformer"]


def load(name: str) -> ModuleType:
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    if name == "monai_volumes":
        pytest.importorskip("monai", reason="MONAI is not installed: pip install -e '.[monai]'")
    spec = importlib.util.spec_from_file_location(f"integrations_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _offline_and_seeded(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("an integration script opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def check(losses: list[float], steps: int) -> None:
    assert len(losses) == steps
    assert all(math.isfinite(loss) and loss > 0 for loss in losses), losses
    assert len(set(losses)) == steps, "every step had the same loss: nothing was learnt, or nothing drawn"


@pytest.mark.parametrize("name", PLAIN)
def test_two_steps(name):
    check(load(name).main(steps=2, size=64), 2)


def test_medical_slices_learn_from_both_streams():
    losses = load("medical_numpy").main(steps=30, size=32)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_dice_of_one_logit_knows_ignored_pixels_and_weights():
    dice = load("one_logit").dice_loss
    logits, labels = torch.randn(1, 1, 2, 6, dtype=torch.float64), torch.randint(2, (1, 2, 6))
    plain = dice(logits[..., :4], labels[..., :4])
    ignored = labels.clone()
    ignored[..., 4:] = 255
    torch.testing.assert_close(dice(logits, ignored), plain)
    weight = torch.ones(1, 2, 6, dtype=torch.float64)
    weight[..., 4:] = 0
    torch.testing.assert_close(dice(logits, labels, weight), plain)
    assert dice(logits, labels) != plain


def test_monai_volumes_learn_from_both_scanners():
    losses = load("monai_volumes").main(steps=12, size=16)
    check(losses, 12)
    assert sum(losses[-4:]) < sum(losses[:4])


def test_two_classes_read_ids_and_find_the_rare_class():
    module = load("two_classes")
    found = module.main(steps=60, size=32, lr=1e-2)
    assert list(found) == ["wall", "crack"]
    assert found["crack"] > 50, found  # 12 % of the pixels: predicting walls everywhere gives 0


def test_two_classes_target_set_has_no_labels(tmp_path):
    module = load("two_classes")
    module.make_folder(tmp_path, 2, 32, shade=100)
    (image,) = module.Folder(tmp_path, labelled=False)[0]
    assert image.shape == (3, 32, 32)
    _, labels = module.Folder(tmp_path, labelled=True)[0]
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) == {0, 1, 255}


def test_vit_backbone_is_shared_and_stays_as_it_was():
    losses, student, teacher = load("vit_backbone").main(steps=2, size=64)
    check(losses, 2)
    averaged = dict(teacher.module.named_parameters())
    for name, parameter in student.named_parameters():
        shared = averaged[name].data_ptr() == parameter.data_ptr()
        assert shared == name.startswith("backbone."), name
        assert (parameter.grad is None) == shared, name
    assert not student.backbone.training
    assert student.head.training


def source_net(module: ModuleType) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, module.CLASSES, 1)
    ).eval()


def test_source_free_changes_normalisations_alone():
    module = load("source_free")
    net = source_net(module)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    target = torch.randn(4, 3, 32, 32) + 2
    adapted = module.adapt(net, target, steps=3)
    assert len(set(adapted.losses)) == 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    changed = {name for name, value in adapted.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(adapted.scores) == {-1, 0, 3}
    assert adapted.scores[adapted.step] == max(adapted.scores.values())
    assert module.score(adapted.net, target[:2]) == adapted.scores[adapted.step]


def test_source_free_loss_wants_decided_and_diverse_pixels():
    loss = load("source_free").information_loss
    one = torch.tensor([50.0, 0.0]).view(1, 2, 1).repeat(1, 1, 4)
    both = torch.cat([one[..., :2], one[..., 2:].flip(1)], 2)
    assert loss(both) < loss(one) - 0.6
    assert float(loss(torch.zeros(1, 2, 4))) == pytest.approx(0, abs=1e-6)


def test_accelerate_saves_teacher_and_selector_with_the_rest(tmp_path):
    from safetensors.torch import load_file

    module = load("accelerate_loop")
    check(module.main(steps=2, size=64, out=tmp_path, cpu=True), 2)
    teacher, select = (torch.load(tmp_path / f"custom_checkpoint_{i}.pkl", weights_only=True) for i in (0, 1))
    assert int(teacher["step"]) == 2, "one update a step of the optimiser, not one a batch"
    assert select["histogram"].sum() > 0
    student = load_file(tmp_path / "model.safetensors")
    for name, value in student.items():
        assert value.shape == teacher[f"module.{name}"].shape


def test_lightning_teacher_follows_and_is_saved(tmp_path):
    module = load("lightning_module").main(
        steps=4,
        size=64,
        accelerator="cpu",
        default_root_dir=tmp_path,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        max_epochs=-1,
    )
    assert int(module.teacher.step) == 4, "one update a step of the optimiser, not one a batch"
    assert any(name.startswith("teacher.module.") for name in module.state_dict())
    optimised = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert optimised == {id(p) for p in module.student.parameters()}


def test_every_script_is_run_here_and_on_the_page():
    tested = Path(__file__).read_text(encoding="utf-8")
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f'"{name}"' in tested, name
        assert f"integrations/{name}.py" in page, name
        source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert f"examples/integrations/{name}.py" in source.split('"""')[1], f"{name} does not say how to run it"
    assert set(re.findall(r"integrations/(\w+)\.py", page)) == set(SCRIPTS)
