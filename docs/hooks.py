"""What the site adds to Markdown.

Formulas become MathML, which browsers draw without a script. Links to files of the checkout (`../examples/predict.py`)
lead to pages with their source. `<!-- core: examples/integrations/smp_net.py -->` shows the heart of a script, folded.
`<!-- options: examples/gta2cs/config.py Config -->` becomes a table of the fields of a dataclass.
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
import tomllib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
ARG = re.compile(r"\\arg(?![a-z])")  # latex2mathml prints it as it stands
UNBROKEN = re.compile(r"(?<=[\d>]) ± (?=\d)|(?<=\d) %(?=\W)")  # a number stays on the line of its spread or unit
COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
SOURCE = re.compile(r"\]\((?:\.\./)+((?:examples|benchmarks|tests|\.ci)/[\w./-]+|Dockerfile|CONTRIBUTING\.md)\)")
OPTIONS = re.compile(r"^<!-- options: (?P<path>\S+) (?P<name>\S+) -->$", re.MULTILINE)
CORE = re.compile(r"^<!-- core: (?P<path>\S+)(?P<open> open)? -->$", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".ipynb": "json"}


def on_config(config: MkDocsConfig) -> None:
    """Show the version beside the name and, where pyproject.toml has it, the repository with "edit this page"."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "udakit" / "__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    config.site_name = f"{config.site_name} {version[1]}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    link_repository(config, project.get("urls", {}).get("Repository"))


def link_repository(config: MkDocsConfig, url: str | None) -> None:
    """Set all that the theme needs for a link in the header and a pencil on each page."""
    if url:
        config.repo_url, config.repo_name = url.rstrip("/"), "/".join(url.rstrip("/").split("/")[-2:])
        config.edit_uri = "edit/main/docs/"
        config.theme["features"] = [*config.theme["features"], "content.action.edit"]


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add a page for every file of the checkout that a page links."""
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({match[1] for page in pages for match in SOURCE.finditer(page)}):
        files.append(File.generated(config, page_of(path), content=source_page(path)))


def page_of(path: str) -> str:
    """Name of the page that shows a file of the checkout."""
    return f"source/{path.lstrip('.')}.md"


def source_page(path: str) -> str:
    """Markdown of a page that shows one file of the checkout."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n````{language}\n{text}````\n"


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Lead links to the pages above, and show cores."""
    folder = posixpath.dirname(page.file.src_uri)
    markdown = SOURCE.sub(lambda m: f"]({posixpath.relpath(page_of(m[1]), folder or '.')})", markdown)
    markdown = OPTIONS.sub(lambda m: option_table(ROOT / m["path"], m["name"]), markdown)
    return CORE.sub(lambda m: folded(m["path"], is_open=m["open"] is not None), markdown)


def folded(path: str, *, is_open: bool) -> str:
    """Return the core of a script as a block that folds."""
    code = textwrap.indent(f"```python\n{core((ROOT / path).read_text(encoding='utf-8'))}\n```", "    ")
    return f'???{"+" * is_open} example "The core of it"\n\n{code}\n'


def core(source: str) -> str:
    """Return the lines of a script from where its teacher is made to where it is updated.

    Without a teacher: from where it says what learns to where that is restored.
    """
    lines = source.splitlines()
    calls = {ast.unparse(n.func): n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)}
    first = next(calls[name] for name in ("EMATeacher", "norm_parameters") if name in calls).lineno - 1
    update = next(call for name, call in calls.items() if name.endswith(("teacher.update", "restore")))
    while lines[first - 1].lstrip().startswith("#"):  # the comment above belongs to it
        first -= 1
    body = lines[first : update.end_lineno]
    while indent(lines[first]) > min(indent(line) for line in body if line):  # and so does the method it stands in
        first -= 1
    return textwrap.dedent("\n".join(lines[first : update.end_lineno]))


def option_table(path: Path, name: str) -> str:
    """Return a table of a dataclass's fields; what explains one stands below it, or behind it as a comment."""
    source = path.read_text(encoding="utf-8")
    lines, node = source.splitlines(), ast.parse(source)
    body: list[ast.stmt] = node.body
    for part in name.split("."):
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == part).body
    rows = []
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or "Config" in ast.unparse(statement.annotation):
            continue
        default = "" if statement.value is None else ast.unparse(statement.value)
        default = re.sub(r"field\(default_factory=(?:lambda: )?(.+)\)", r"\1", default)
        default = {"list": "[]", "dict": "{}"}.get(default, default)
        text = lines[(statement.end_lineno or 0) - 1].partition("  # ")[2]
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            text = " ".join(str(below.value.value).split())
        names = (ast.unparse(statement.target), ast.unparse(statement.annotation), default)
        rows.append("| " + " | ".join([*(f"`{name}`" for name in names), text.replace("|", "\\|")]) + " |")
    return "\n".join(["| option | type | default | |", "|---|---|---|---|", *rows])


def indent(line: str) -> int:
    """Columns before the first character."""
    return len(line) - len(line.lstrip())


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page, after Markdown."""
    html = UNBROKEN.sub(lambda m: m[0].replace(" ", "\u00a0"), html)
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, formula = match.groups()
    latex = ARG.sub(r"\\operatorname{arg}", unescape(formula))
    mathml = convert(latex, display="block" if bracket == "[" else "inline")
    if unknown := COMMAND.findall(mathml):
        raise ValueError(f"Expected LaTeX that latex2mathml knows, but got {', '.join(unknown)} in {formula}")
    return f'<{tag} class="formula">{mathml}</{tag}>'


class Reference(griffe.Extension):
    """What the API pages change about the code that they show."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe takes only "Examples:" for doctests; ours have one example and say "Example:"."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Spell names of types out: a signature shows the values that `Reduction` stands for."""
        choices = {
            a.canonical_path: a.value for a in attributes(pkg) if str(a.value).startswith(("Literal[", "Callable["))
        }
        for function in functions(pkg):
            for parameter in function.parameters:
                annotation = parameter.annotation
                if isinstance(annotation, griffe.ExprName) and annotation.canonical_path in choices:
                    parameter.annotation = choices[annotation.canonical_path]


def attributes(part: griffe.Object) -> Iterator[griffe.Attribute]:
    """Attributes of a module and of the modules in it."""
    yield from part.attributes.values()
    for module in part.modules.values():
        if not module.is_alias:
            yield from attributes(module)


def functions(part: griffe.Object) -> Iterator[griffe.Function]:
    """Functions and methods of a module or class and of what is in it."""
    yield from (function for function in part.functions.values() if not function.is_alias)
    for inner in (*part.modules.values(), *part.classes.values()):
        if not inner.is_alias:
            yield from functions(inner)
