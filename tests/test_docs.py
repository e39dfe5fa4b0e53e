"""The Python blocks of the README and of every page of the documentation run, in order, as a reader would paste them.

The blocks of a page share one namespace. A block that cannot run here says so in the line above its fence:
`<!-- not run: needs the Cityscapes folder -->`.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+?) -->\s*\n)?^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> list[tuple[int, str, str | None]]:
    """(line, code, reason not to run) of every Python block of a page."""
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].splitlines()) + "\n"
        found.append((text[: match.start("code")].count("\n"), code, match["why"]))
    return found


def execute(page: str, text: str) -> int:
    """Run the blocks of a page in one namespace; return how many."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    todo = [(line, code) for line, code, why in blocks(text) if why is None]
    for line, code in todo:
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, namespace, page, page, line)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
            assert runner.run(test, clear_globs=False).failed == 0, f"{page}:{line + 1}: the output is another"
            namespace.update(test.globs)
        else:
            # Empty lines in front make a traceback name the page's own lines.
            exec(compile("\n" * line + code, page, "exec"), namespace)
    return len(todo)


@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    if not blocks(text):
        pytest.skip("no Python block")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        execute(str(page), text)


def test_the_readme_has_the_two_commands() -> None:
    """`.ci/run` takes the second block of the README as its test command."""
    commands = re.findall(r"^```(?:sh|bash)\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert commands[0].rstrip().endswith("python examples/train_gta2cs.py")
    assert commands[1].rstrip().endswith("pytest")


def test_a_broken_block_is_seen() -> None:
    with pytest.raises(ZeroDivisionError):
        execute("page", "text\n\n```python\na = 1\n```\n\n```python\na / 0\n```\n")
    assert execute("page", "<!-- not run: needs a card -->\n```python\n1 / 0\n```\n") == 0


def test_the_core_of_every_integration_is_shown() -> None:
    """The page shows each script from where its teacher is made to where it is updated."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    scripts = sorted((ROOT / "examples" / "integrations").glob("*.py"))
    assert sorted(m["path"] for m in hooks.CORE.finditer(page)) == [p.relative_to(ROOT).as_posix() for p in scripts]
    for script in scripts:
        core = hooks.core(script.read_text(encoding="utf-8"))
        assert "EMATeacher(" in core or "norm_parameters(" in core, script
        last = core.splitlines()[-1].lstrip()
        assert last.startswith(("teacher.update(", "self.teacher.update(", "restore(")), script
        assert not core.startswith(" "), script


def test_a_repository_in_pyproject_is_linked() -> None:
    """One line there gives the header's link and "edit this page" on every page of docs/."""
    pages = pytest.importorskip("mkdocs.structure.pages", reason="mkdocs is not installed: pip install -e '.[docs]'")
    from mkdocs.config.base import load_config
    from mkdocs.structure.files import File

    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    config = load_config(str(ROOT / "mkdocs.yml"), plugins=[])
    hooks.link_repository(config, None)
    assert not config.repo_url
    hooks.link_repository(config, "https://example.org/some/kit/")
    assert (config.repo_url, config.repo_name) == ("https://example.org/some/kit", "some/kit")
    assert "content.action.edit" in config.theme["features"]
    file = File("families/losses.md", str(ROOT / "docs"), str(ROOT / "site"), use_directory_urls=True)
    page = pages.Page(None, file, config)
    assert page.edit_url == "https://example.org/some/kit/edit/main/docs/families/losses.md"


def test_every_table_of_options_has_a_line_an_option() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for match in hooks.OPTIONS.finditer(page):
        assert len(hooks.option_table(ROOT / match["path"], match["name"]).splitlines()) > 2, match["name"]
    table = hooks.option_table(ROOT / "examples" / "gta2cs" / "config.py", "NetConfig")
    assert "| `take` | `Literal['all', 'encoder', 'some']` | `'all'` | What to load" in table


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small(picture):
    assert picture.stat().st_size <= 200_000, "a picture has at most 200 kB (CONTRIBUTING.md)"
