"""No line of the library may make a GPU wait for the CPU, draw from a hidden generator, or stop `torch.compile`.

Fake tensors let `.cpu()` and `.to("cpu")` pass, and a branch that the example does not take is never run: this reads
the source instead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import udakit

ROOT = Path(udakit.__file__).parent

METHODS = {"cuda", "cpu", "item", "tolist", "numpy", "nonzero", "unique", "unique_consecutive", "masked_select"}
METHODS |= {"argwhere", "bincount", "data_ptr", "is_nonzero"}
TORCH = {"nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "bincount", "equal", "manual_seed"}
TORCH |= {"is_nonzero", "allclose", "histc"}

# Reading files and counting classes happen before training, on the CPU. (file, function) -> why.
ALLOWED: dict[tuple[str, str], str] = {
    ("mixing/images.py", "check_images"): "looks at the values because it is asked to, to name their range",
    ("mixing/masks.py", "_filled"): "reads where boxes lie on the CPU only, where nobody waits for them",
    ("labels/ids.py", "check_labels"): "looks at the values because it is asked to, to name the wrong ids",
    ("teachers/_sharing.py", "_make_own"): "compares a checkpoint with what is shared, when it is loaded",
    ("resolution/detail.py", "first_cells"): "reads the places of crops on the CPU only, where nobody waits for them",
    ("sampling/counts.py", "count_classes"): "counts label files before training, on the CPU",
    ("sampling/rare_classes.py", "_check_counts"): "looks at counts on the CPU only, where nobody waits for them",
    ("sampling/rare_classes.py", "RareClassSampler.__init__"): "turns a table of counts on the CPU into lists, once",
    ("sampling/rare_classes.py", "RareClassSampler.draw"): "draws indices of images for a loader, on the CPU",
}


def forbidden(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, enclosing function, what) of every forbidden use."""

    def walk(node: ast.AST, where: str) -> Iterator[tuple[int, str, str]]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}".lstrip(".")
        what = _what(node)
        if what:
            yield getattr(node, "lineno", 0), where, what
        for child in ast.iter_child_nodes(node):
            yield from walk(child, where)

    yield from walk(ast.parse(source), "")


def _what(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import) and any(a.name.split(".")[0] == "random" for a in node.names):
        return "import random"
    if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
        return f"from {node.module}"
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"):
        return ast.unparse(node)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and isinstance(node.args[1], ast.BinOp):
        return "isinstance() with a union, which torch.compile of torch 2.5 does not take: a tuple"
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    owner, name = ast.unparse(node.func.value), node.func.attr
    if owner in ("torch", "torch.random", "torch.cuda"):
        return f"{owner}.{name}()" if name in TORCH else None
    if name == "_replace":
        return "._replace(), which torch.compile of torch 2.5 does not take"
    if owner not in ("np", "numpy") and name in METHODS:
        return f".{name}()"
    values = [*node.args, *(k.value for k in node.keywords)]
    if name in ("to", "type", "pin_memory") and any(
        isinstance(v, ast.Constant) and isinstance(v.value, str) and v.value.split(":")[0] in ("cpu", "cuda")
        for v in values
    ):
        return f".{name}({ast.unparse(values[0])})"
    return None


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_forbidden_call(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = [
        f"udakit/{name}:{line} in {where}: {what}"
        for line, where, what in forbidden(path.read_text(encoding="utf-8"))
        if (name, where) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def test_the_allow_list_is_needed() -> None:
    """An entry for a function that is gone, or clean by now, must go too."""
    used = {
        (path.relative_to(ROOT).as_posix(), where)
        for path in ROOT.rglob("*.py")
        for _, where, _ in forbidden(path.read_text(encoding="utf-8"))
    }
    assert set(ALLOWED) <= used, f"not needed: {set(ALLOWED) - used}"
    assert all(len(reason.split()) >= 3 for reason in ALLOWED.values())


@pytest.mark.parametrize(
    "line",
    [
        "x.cuda()", "x.cpu()", "x.sum().item()", "x.tolist()", "x.numpy()", "x.nonzero()", "torch.nonzero(x)",
        "torch.unique(x)", "x.masked_select(m)", "import random", "from random import choice", "np.random.rand()",
        "x.to('cpu')", "x.to(device='cuda:0')", "torch.manual_seed(0)", "torch.equal(x, y)",
        "isinstance(x, int | float)", "x._replace(a=1)",
    ],
)  # fmt: skip
def test_the_reader_sees(line: str) -> None:
    assert list(forbidden(f"def f(x):\n    {line}\n")), line


@pytest.mark.parametrize(
    "line", ["x.to(y)", "x.to(torch.float32)", "np.unique(x)", "torch.where(x > 0, x, 0)", "isinstance(x, (int, str))"]
)
def test_the_reader_passes(line: str) -> None:
    assert not list(forbidden(f"def f(x):\n    {line}\n")), line
