"""What the site adds to Markdown: formulas as MathML, which browsers draw without a script, and examples as code."""

from __future__ import annotations

import re
from html import unescape

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def on_page_content(html: str, **_: object) -> str:
    """Called by mkdocs with each page, after Markdown."""
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, formula = match.groups()
    mathml = convert(unescape(formula), display="block" if bracket == "[" else "inline")
    return f'<{tag} class="formula">{mathml}</{tag}>'


class RunnableExamples(griffe.Extension):
    """Griffe takes only "Examples:" for doctests; ours have one example and say "Example:"."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called by griffe with each object."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)
