"""What is published: the exact files of the wheel and of the source archive, and what an index shows of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import udakit

pytest.importorskip("hatchling", reason="hatchling is not installed: pip install hatchling")
from packaging.metadata import Metadata  # comes with hatchling

ROOT = Path(__file__).resolve().parent.parent
NAME = f"udakit-{udakit.__version__}"
LEFT_ALONE = shutil.ignore_patterns(
    ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "runs", "build", "dist", "site"
)
# What lies about in a checkout that has been worked in, and must not be published.
DECOYS = (
    "udakit/__pycache__/a.cpython-311.pyc",
    "udakit/losses/__pycache__/b.pyc",
    "tests/.pytest_cache/c",
    "examples/gta2cs/__pycache__/d.pyc",
    "examples/runs/e.pt",
    "runs/toy/last.pt",
    "docs/.hypothesis/f",
    "site/index.html",
    "udakit.egg-info/PKG-INFO",
    "notes.txt",
)

pytestmark = pytest.mark.slow


def included() -> list[str]:
    """The files and folders that pyproject.toml lists for the source archive."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is published, and beside it what is not."""
    root = tmp_path_factory.mktemp("packaging") / "checkout"
    root.mkdir()
    for name in (*included(), "pyproject.toml", ".gitignore"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=LEFT_ALONE)
        else:
            shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def built(checkout) -> tuple[set[str], Path]:
    """The files before the decoys, and the folder of both archives: built by hatchling alone, without an index."""
    files = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    for name in DECOYS:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("not ours to publish")
    out = checkout.parent / "archives"
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]
    return files, out


@pytest.fixture(scope="module")
def metadata(built) -> Metadata:
    """What the wheel says of itself; names and versions are checked on the way."""
    with zipfile.ZipFile(built[1] / f"{NAME}-py3-none-any.whl") as wheel:
        return Metadata.from_email(wheel.read(f"{NAME}.dist-info/METADATA"), validate=True)


def test_wheel_is_the_package_and_nothing_else(built):
    files, out = built
    modules = {name for name in files if name.startswith("udakit/") and name.endswith(".py")}
    assert len(modules) > 30
    notes = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    with zipfile.ZipFile(out / f"{NAME}-py3-none-any.whl") as wheel:
        assert wheel.testzip() is None
        assert set(wheel.namelist()) == modules | {"udakit/py.typed"} | notes
        for name in modules:
            assert wheel.read(name) == (ROOT / name).read_bytes(), name


def test_source_archive_is_what_pyproject_lists(built):
    files, out = built
    with tarfile.open(out / f"{NAME}.tar.gz") as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    assert {member.name for member in members} == {f"{NAME}/{name}" for name in (*files, "PKG-INFO")}
    assert not any(re.search(r"cache|\.pyc|/runs/|\.pt$|\.hypothesis", member.name) for member in members)


def test_wheel_of_the_source_archive_is_the_same(built, tmp_path):
    _, out = built
    with tarfile.open(out / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path / NAME, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        {item.filename: item.CRC for item in zipfile.ZipFile(folder / f"{NAME}-py3-none-any.whl").infolist()}
        for folder in (out, tmp_path / "out")
    )
    assert first == second


def test_metadata(metadata):
    assert str(metadata.version) == udakit.__version__
    assert str(metadata.requires_python) == ">=3.11"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    needed = [r for r in metadata.requires_dist if r.marker is None or "extra" not in str(r.marker)]
    assert sorted(r.name for r in needed) == ["einops", "jaxtyping", "kornia", "numpy", "torch"]
    assert all(str(r.specifier).startswith(">=") for r in needed), "a bound from above keeps users from updating"
    assert set(metadata.provides_extra) == {"bench", "docs", "examples", "export", "lora", "monai", "test", "track"}


def test_long_description_is_the_readme(metadata):
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata.description.startswith("# udakit\n")
    assert len(re.findall(r"^```", metadata.description, re.MULTILINE)) % 2 == 0, "a block of code is not closed"


def test_readme_as_html(metadata):
    """Rendered, where a renderer is installed: the title, the picture and each block of code are there."""
    markdown = pytest.importorskip("markdown", reason="the docs extra is not installed")
    html = markdown.markdown(metadata.description, extensions=["fenced_code", "tables"])
    assert "<h1>udakit</h1>" in html
    assert html.count("<pre><code") == metadata.description.count("\n```") // 2
    assert html.count("<img") == metadata.description.count("![")
    assert "```" not in html
