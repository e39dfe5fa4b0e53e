"""What holds for the form of the code, beyond what ruff and mypy check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [file for folder in ("udakit", "examples", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
LONGEST = 60  # lines of a function, its signature included and its docstring not


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, less those of the docstring."""
    whole = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return whole
    docstring = function.body[0]
    return whole - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def long_functions(source: str) -> dict[str, int]:
    """Name -> lines, of the functions and methods that are too long."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {function.name: lines for function in functions if (lines := lines_of(function)) > LONGEST}


def test_no_function_is_too_long() -> None:
    assert len(FILES) > 200, "the folders were not found"
    found = {str(file.relative_to(ROOT)): long_functions(file.read_text(encoding="utf-8")) for file in FILES}
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize(("docstring", "lines", "too_long"), [(0, 59, False), (0, 60, True), (30, 59, False)])
def test_lines_are_counted_without_the_docstring(docstring: int, lines: int, too_long: bool) -> None:
    text = '    """Words.\n' + "\n" * (docstring - 2) + '    """\n' if docstring else ""
    source = f"class A:\n  def f(self):\n{text}" + "    x = 1\n" * lines
    assert (long_functions(source) == {"f": lines + 1}) is too_long


def test_the_package_names_no_file_that_pip_does_not_install() -> None:
    named = re.compile(r"\b(?:docs|examples|benchmarks|tests)/")
    library = [file for file in FILES if file.is_relative_to(ROOT / "udakit")]
    assert not [file.name for file in library if named.search(file.read_text(encoding="utf-8"))]
