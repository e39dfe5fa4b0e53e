"""The page of the contract: which check holds which operation to what, counted from the registry.

After a change of the registry write it anew: `PYTHONPATH=.:tests python tests/contract/test_page.py`
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

import udakit
from contract import checks
from contract.registry import CHECKS, FAMILIES, OF_LARGE_MAPS, Operation, all_operations
from contract.wrong_options import WRONG

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"
COMMAND = "PYTHONPATH=.:tests python tests/contract/test_page.py"
SPOILT = ("logits", "probabilities", "features", "weight")


def _base(op: Operation) -> Any:
    return getattr(udakit, op.name.partition("[")[0], None)


def wrong_values(op: Operation) -> int:
    """Calls that must be refused: each option of the function and of its Modules, each wrong value."""
    call = checks.make(op).call()
    named = [checks._option_names(_base(op))] if inspect.isfunction(_base(op)) else []
    made = [m for m in checks._modules(op) if checks._constructor_options(op, m, call) is not None]
    named += [checks._option_names(m.__init__) for m in made]
    return sum(len(op.wrong.get(name, WRONG.get(name, ()))) for names in named for name in names)


def spaces(op: Operation) -> str:
    known = {"pixel": "1, 2, 3", "two": "2, others refused", "none": "no map"}
    return known.get(op.space, "1, 2, 3, own test")


def row(op: Operation) -> dict[str, str | int]:
    """What the checks with something to look at do with an entry; "" where there is nothing."""
    ex = checks.make(op)
    roles = set(ex.roles)
    tensors = [x for x in ex.leaves if isinstance(x, torch.Tensor)]
    masked = roles & {"labels", "valid"} and any(
        r in SPOILT and x.is_floating_point() for x, r in zip(ex.leaves, ex.roles, strict=True) if r is not None
    )
    cells: dict[str, str | int] = {
        "space": spaces(op),
        "subclass": "yes" if tensors else "",
        "one_channel": "refused" if roles & set(checks.SCORES) else "",
        "nan_outside": "yes" if masked else "",
        "wrong_options": wrong_values(op) or "",
    }
    return {check: "exempt" if check in op.exempt else cell for check, cell in cells.items()}


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def page() -> str:
    """The whole page."""
    operations = all_operations()
    rows = {op.name: row(op) for op in operations}
    counted = []
    for check in CHECKS:
        exempt = sum(check in op.exempt for op in operations)
        what = (getattr(checks, check).__doc__ or "").strip().splitlines()[0]
        counted.append([f"`{check}`", what, str(len(operations) - exempt), str(exempt)])
    columns = ["space", "subclass", "one_channel", "nan_outside", "wrong_options"]
    filled = {c: sum(r[c] not in ("", "exempt", "no map") for r in rows.values()) for c in columns}
    values = sum(int(r["wrong_options"]) for r in rows.values() if r["wrong_options"] not in ("", "exempt"))
    lines = []
    for family in FAMILIES:
        for op in __import__(f"contract.ops_{family}", fromlist=["OPERATIONS"]).OPERATIONS:
            lines.append([f"`{op.name}`", family, *(str(rows[op.name][c]) for c in columns)])
    exempt = [
        [f"`{op.name}`", f"`{check}`", why.replace("|", "\\|")]
        for op in operations
        for check, why in sorted(op.exempt.items())
    ]
    return (
        "\n\n".join(
            [
                "# The contract",
                "Every public operation passes the same checks. "
                f"The registry in `tests/contract/` has {len(operations)} entries, and each check runs over all.",
                "## What is checked",
                "The column *entries* counts those that are not exempt. "
                "A check that has nothing to look at in an entry skips it and says so.",
                table(["check", "what must hold", "entries", "exempt"], counted),
                "On the CPU, large maps take other code: blocks, or operations on bits. "
                f"Seven checks run over that code, too: {', '.join(f'`{check}`' for check in OF_LARGE_MAPS)}.",
                "## Nets, images and tensors of any kind",
                f"- **Dimensions**: {filled['space']} entries take maps. "
                "With one or three spatial axes they give what they give with two, or refuse them by name.\n"
                f"- **Subclasses of Tensor**: {filled['subclass']} entries pass them through, values and gradients.\n"
                f"- **One channel of logits or probabilities**: {filled['one_channel']} entries refuse it and name "
                "`binary_logits` or `binary_probabilities`.\n"
                f"- **NaN and infinities where nothing counts**: {filled['nan_outside']} entries have the same values "
                "and gradients as without them.\n"
                f"- **Wrong options**: {values} calls and constructors with one wrong value are refused by name. "
                "The last column counts them.",
                table(
                    ["entry", "family", "dimensions", "subclass", "one channel", "NaN outside", "wrong options"], lines
                ),
                "## What is exempt, and why",
                "A test fails when an exemption is not needed.",
                table(["entry", "check", "reason"], exempt),
                f"`{COMMAND}` writes this page.",
            ]
        )
        + "\n"
    )


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"docs/contract.md is not current: run `{COMMAND}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: written")
