"""LoRA by peft: the guide's block runs as it stands, little learns, and a teacher stores only that twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from test_docs import ROOT, blocks
from udakit import EMATeacher, cross_entropy

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
PAGE = ROOT / "docs" / "methods" / "vfm_uda.md"
CLASSES = 4


class Segmenter(nn.Module):
    """The guide's transformer with a head of one layer."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Conv2d(vit.embed_dim, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        grid = (images.shape[-2] // 16, images.shape[-1] // 16)
        logits = self.head(tokens.transpose(1, 2).unflatten(2, grid))
        return nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear")


def guide() -> nn.Module:
    """The transformer as the guide's blocks leave it, the one that needs peft included."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__page__"}
    found = 0
    for _, code, why in blocks(PAGE.read_text(encoding="utf-8")):
        assert why in (None, "needs peft")
        exec(compile(code, str(PAGE), "exec"), namespace)
        found += why is not None
    assert found == 1, "the guide has one block that needs peft"
    vit = namespace["vit"]
    assert isinstance(vit, nn.Module)
    return vit


def test_the_guide_adapts_small_matrices_and_shares_the_rest() -> None:
    student = Segmenter(guide()).train()
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in names)
    assert any("qkv" in name for name in names)
    count = {kind: sum(p.numel() for p in student.parameters() if p.requires_grad is kind) for kind in (True, False)}
    assert count[True] < 0.25 * count[False]

    teacher = EMATeacher(student, decay=0.5, share_frozen=True)
    own = {name: p.data_ptr() for name, p in student.named_parameters()}
    shared = {name for name, p in teacher.module.named_parameters() if p.data_ptr() == own[name]}
    assert shared == set(own) - names

    images, labels = torch.randn(2, 3, 32, 48), torch.randint(CLASSES, (2, 32, 48))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # B of LoRA starts at 0: A has a gradient from the second step on
        optimizer.zero_grad()
        cross_entropy(student(images), labels).backward()
        optimizer.step()
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names
    teacher.update(student, step=10)
    for name, p in teacher.module.named_parameters():
        expected = (before[name] + dict(student.named_parameters())[name]) / 2 if name in names else before[name]
        torch.testing.assert_close(p.detach(), expected.detach())
