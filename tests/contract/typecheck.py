"""Run every example of the registry with the annotations of `udakit` checked at run time, shapes included.

A program of its own (`python tests/contract/typecheck.py`), since the import hook breaks `torch.compile` and pre-empts
the library's own error messages: no other test may see it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of `function`; an int is a float, as PEP 484 has it."""
    from beartype import BeartypeConf, beartype
    from beartype.roar import BeartypeDecorHintPep673Exception

    try:
        return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    except BeartypeDecorHintPep673Exception:  # `-> Self` on a single method is beyond beartype
        return function


def main() -> int:
    import jaxtyping

    import contract.typecheck  # noqa: F401  the hook looks the name up, and does not import it

    with jaxtyping.install_import_hook("udakit", "contract.typecheck.typechecker"):
        import torch

        from contract import checks
        from contract.registry import all_operations

        failed = 0
        for op in all_operations():
            for sample in ({}, {"n": 1}, {"dtype": torch.float16}):
                try:
                    checks.run(checks.make(op, **sample))
                except Exception as error:
                    failed += 1
                    print(f"{op.name}, {sample or 'default sample'}: {type(error).__name__}: {error}\n")
                    break
        print(f"{failed} of {len(all_operations())} operations disagree with their annotations")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
