"""State of the newer parts over real processes against one process on the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import udakit
from distributed import run_ranks

pytestmark = pytest.mark.slow

PARTS = (slice(0, 3), slice(3, 4))  # unequal batches


def _run(rank: int, world_size: int, sync: bool) -> dict[str, Any]:
    part = PARTS[rank] if sync else slice(None)
    generator = torch.Generator().manual_seed(0)
    selector = udakit.AdaptiveThresholdSelector(3, 0.5, sync=sync)
    alignment = udakit.DistributionAlignment(3, 0.5, sync=sync)
    exact, decaying = udakit.ClassDistributions(3, 4), udakit.ClassDistributions(3, 4, 0.3)
    for _ in range(3):
        logits = 3 * torch.randn(4, 3, 5, 6, generator=generator)
        features = 10 + torch.randn(4, 4, 5, 6, generator=generator)
        labels = torch.randint(3, (4, 5, 6), generator=generator)
        labels[:3][labels[:3] == 2] = 255  # a class that the first rank never has
        valid = labels != 255
        selector(logits[part], valid=valid[part])
        alignment.update_source(labels[part])
        alignment(logits[part], valid=valid[part])
        for distributions in (exact, decaying):
            distributions.update(features[part], labels[part], sync=sync)
    return {
        f"{kind}.{name}": value
        for kind, module in (("selector", selector), ("alignment", alignment), ("exact", exact), ("decay", decaying))
        for name, value in module.state_dict().items()
    }


def test_two_ranks_hold_what_one_process_holds(tmp_path: Path) -> None:
    expected = _run(0, 1, sync=False)
    for found in run_ranks(_run, 2, True, tmp_path=tmp_path):
        for name, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            else:
                assert torch.equal(found[name], value), name
