"""Options of a script: the fields of a dataclass, from YAML files and the command line, with `--help` that explains."""

from __future__ import annotations

import re
import sys
from typing import Any, TypeVar

from jsonargparse import DefaultHelpFormatter, auto_cli, set_parsing_settings

T = TypeVar("T")
STAGE = re.compile(r"recipe='(\w+)', steps=(\d+)")


class HelpFormatter(DefaultHelpFormatter):
    """Defaults and types as people write them, not as Python prints them."""

    def _expand_help(self, action: Any) -> str:
        text = re.sub(r"<class '(\w+\.)*(\w+)'>", r"\2", super()._expand_help(action))
        if "Namespace(" in text:
            stages = ", then ".join(f"{recipe} for {steps} steps" for recipe, steps in STAGE.findall(text))
            text = re.sub(r"default: .*\)$", f"default: {stages})", text, flags=re.DOTALL)
        return re.sub(r"default: null\)$", "default: none)", text)


def read_options(
    kind: type[T], arguments: list[str] | None = None, *, flags: tuple[str, ...] = (), files: list[str] | None = None
) -> T:
    """Fill the dataclass `kind` from the command line.

    Args:
        kind: a dataclass; the docstring under each field is its help.
        arguments: those of the command line by default.
        flags: options that may stand without a value, such as "--evaluate".
        files: YAML files whose values replace the defaults.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [f"{a}=true" if a in flags else a for a in arguments]
    read: T = auto_cli(
        kind, args=arguments, as_positional=False, default_config_files=files or [], formatter_class=HelpFormatter
    )
    return read
