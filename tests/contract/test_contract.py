"""Every check of `checks.py` over every operation of the registry, as test_<check>[operation]."""

from collections.abc import Callable

import pytest
import torch

from contract import checks
from contract.registry import CHECKS, PARTS, Operation, all_operations

every_operation = pytest.mark.parametrize("op", all_operations(), ids=lambda op: op.name)


def _test(check: str) -> Callable[[Operation], None]:
    @every_operation
    def test(op: Operation) -> None:
        if check in op.exempt:
            pytest.skip(f"exempt: {op.exempt[check]}")
        torch.manual_seed(0)
        getattr(checks, check)(op if check == "module" else checks.as_used(op))

    test.__name__ = f"test_{check}"
    test.__doc__ = getattr(checks, check).__doc__
    return test


for _check in CHECKS:
    globals()[f"test_{_check}"] = _test(_check)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in all_operations() if op.inductor], ids=lambda op: op.name)
def test_inductor(op: Operation) -> None:
    """The backend that users get by default, for a handful."""
    checks.compile(checks.as_used(op), backend="inductor")


@every_operation
def test_entry(op: Operation) -> None:
    """The entry itself: known exemptions with a reason, every tensor with a role."""
    known = {*CHECKS, *(f"{check}.{part}" for check, parts in PARTS.items() for part in parts)}
    assert not set(op.exempt) - known, f"unknown checks {set(op.exempt) - known}"
    assert all(len(reason.split()) >= 3 for reason in op.exempt.values()), "an exemption needs a reason"
    ex = checks.make(op)
    for i, (x, role) in enumerate(zip(ex.leaves, ex.roles, strict=True)):
        assert role is not None or not isinstance(x, torch.Tensor), f"tensor {i} has no role: Sample.tag(x, role)"


def test_exemptions(capsys: pytest.CaptureFixture[str]) -> None:
    """Print what is exempt and why, so that it can be read in one place."""
    lines = [f"{op.name}: {check}: {why}" for op in all_operations() for check, why in sorted(op.exempt.items())]
    with capsys.disabled():
        print(f"\n{len(lines)} exemptions from the contract:", *lines, sep="\n  ")
    assert all(line.split(": ", 2)[2].strip() for line in lines)
