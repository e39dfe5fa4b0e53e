"""The public names: each callable is proved by an entry of the registry, and none disappears unnoticed.

After a deliberate change write the list anew: `PYTHONPATH=.:tests python tests/contract/test_public_names.py`
"""

from __future__ import annotations

import inspect
import types
from pathlib import Path

import torch

import udakit
from contract.registry import all_operations

LIST = Path(__file__).parents[1] / "public_names.txt"
COMMAND = "PYTHONPATH=.:tests python tests/contract/test_public_names.py"


def public_callables() -> dict[str, object]:
    """Functions and classes; constants, tables and sub-packages are no operations."""
    found = {name: getattr(udakit, name) for name in udakit.__all__}
    return {name: x for name, x in found.items() if inspect.isclass(x) or inspect.isroutine(x)}


def test_names_exist_once() -> None:
    assert len(udakit.__all__) == len(set(udakit.__all__)), "a name is listed twice in udakit.__all__"
    for name in udakit.__all__:
        assert hasattr(udakit, name), f"udakit.{name} is listed, but is not there"


def test_packages_export_what_udakit_exports() -> None:
    """`from udakit import x` and `from udakit.<package> import x` give the same."""
    for package in vars(udakit).values():
        if isinstance(package, types.ModuleType) and not package.__name__.startswith("udakit._"):
            for name in getattr(package, "__all__", []):
                assert getattr(udakit, name, None) is getattr(package, name), f"{package.__name__}.{name}"


def test_every_public_callable_is_in_the_registry() -> None:
    covered = {name for op in all_operations() for name in (op.name.partition("[")[0], *op.covers)}
    missing = sorted(set(public_callables()) - covered)
    assert not missing, f"no entry of tests/contract/ops_*.py names or covers {missing}"


def test_every_entry_is_public() -> None:
    named = {name for op in all_operations() for name in (op.name.partition("[")[0], *op.covers)}
    assert not named - set(udakit.__all__), f"not in udakit.__all__: {sorted(named - set(udakit.__all__))}"


def test_every_loss_module_is_covered_by_its_function() -> None:
    """A Module that an entry only mentions in `covers` is checked by no one."""
    checked = {op.module.__name__ for op in all_operations() if op.module is not None}
    built = {name for op in all_operations() if op.build is not None or op.kind == "state" for name in op.covers}
    named = {op.name.partition("[")[0] for op in all_operations()}
    modules = {n for n, x in public_callables().items() if inspect.isclass(x) and issubclass(x, torch.nn.Module)}
    assert not modules - checked - built - named, (
        f"Modules without a check: {sorted(modules - checked - built - named)}"
    )


def test_no_public_name_changes_unnoticed() -> None:
    listed = set(LIST.read_text(encoding="utf-8").split())
    removed, added = sorted(listed - set(udakit.__all__)), sorted(set(udakit.__all__) - listed)
    assert not removed, f"public names are gone: {removed}. Keep them, or after a deprecation run `{COMMAND}`"
    assert not added, f"new public names: {added}. Run `{COMMAND}`"


if __name__ == "__main__":
    LIST.write_text("\n".join(sorted(udakit.__all__)) + "\n", encoding="utf-8")
    print(f"{LIST}: {len(udakit.__all__)} names")
