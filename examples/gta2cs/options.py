"""Options of a script: the fields of a dataclass, read from YAML files and the command line, with helpful `--help`."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import yaml
from jsonargparse import DefaultHelpFormatter, auto_cli, set_parsing_settings
from rich.console import Console
from rich.markup import escape

from gta2cs.interrupts import STATUS, heard, said_where

T = TypeVar("T")
STAGE = re.compile(r"recipe='(\w+)', steps=(\d+)")
POWER = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$")
FAULTS: tuple[type[Exception], ...] = (OSError, ValueError)  # what a user can mend


class HelpFormatter(DefaultHelpFormatter):
    """Shows defaults and types as people write them."""

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
        arguments: the arguments; by default those of the command line.
        flags: options that may be given without a value, such as "--evaluate".
        files: YAML files with values that replace the defaults.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = with_flags(arguments, flags)
    read: T = auto_cli(
        kind,
        args=arguments,
        as_positional=False,
        default_config_files=files or [],
        formatter_class=HelpFormatter,
        usage="%(prog)s [--option value ...]",  # a wrong option is said below it: not below a page of all of them
    )
    return read


def with_flags(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Give each of the flags the value "true" if it has none, and spell it as the field: `--dry-run` is `--dry_run`."""
    spelt = {flag.replace("_", "-"): flag for flag in flags}
    kept: list[str] = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        name, given, value = argument.partition("=")
        flag = spelt.get(name.replace("_", "-"))
        if flag is not None:
            alone = not given and following.lower() not in ("true", "false")
            argument = f"{flag}=true" if alone else f"{flag}{given}{value}"
        kept.append(argument)
    return kept


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as jsonargparse does, and not as a word."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", POWER, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """Read YAML as the configuration files are read."""
    return yaml.load(text, Loader=_Loader)


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with some values changed, each by its path, such as `stages.1.options.selector`."""
    config = copy.deepcopy(base)
    for path, value in changes.items():
        place: Any = config
        *parents, last = [int(part) if part.isdigit() else part for part in str(path).split(".")]
        try:
            for part in parents:
                place = place[part] if isinstance(part, int) else place.setdefault(part, {})
            if isinstance(last, int) and last >= len(place):
                raise IndexError
            place[last] = value
        except (IndexError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"Expected {path!r} to be a path in the configuration, but there is no such path."
            ) from None
    return config


def in_a_line(
    run: Callable[[], int | None],
    stopped: str,
    *,
    faults: tuple[type[Exception], ...] = FAULTS,
    words: Callable[[Exception], str] = str,
    quiet: bool = False,
) -> int:
    """Run a command. Errors of the user and interrupts are reported in one line, without a trace.

    Args:
        run: the command; its result, if any, is the exit status.
        stopped: message after Ctrl-C or SIGTERM, unless the KeyboardInterrupt has its own.
        faults: errors that the user can fix.
        words: function that returns the message of such an error, or "" if a trace is needed after all.
        quiet: whether to print nothing.
    """
    try:
        with heard(), said_where(lambda: stopped):
            return run() or 0
    except KeyboardInterrupt as stop:
        said, status = str(stop) or stopped, STATUS
    except faults as error:
        said, status = words(error), 2
        if not said:
            raise
    if not quiet:
        Console(stderr=True, soft_wrap=True).print(f"[red]{escape(said)}[/]", highlight=False)
    return status
