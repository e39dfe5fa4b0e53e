"""Rank several runs and their nets without target labels, on one HTML page.

    python examples/compare_runs.py runs/a runs/b                        # ranks them, writes runs_compared.html
    python examples/compare_runs.py --sweep sweep.yaml --config examples/configs/dacs_toy.yaml --out runs/sweep

A sweep is a YAML list of settings. Each is a mapping of changes to the configuration, in which a number is an index of
a list, and `name`, if given, is the folder of the run. Finished settings are not run again.

    - {name: plain}
    - {name: quantile, stages.1.options.selector: class_quantile, stages.1.options.share: 0.6}
    - {name: slower, stages.1.lr: 0.00003}

If there are target labels, the page also says how good the choice without them was.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gta2cs.interrupts import NOTHING_TORN, end_with, leave_at_once

if __name__ == "__main__":
    leave_at_once(NOTHING_TORN)  # as early as possible

import argparse
import json
import tempfile
from collections.abc import Sequence
from typing import Any

from gta2cs.threads import considerate_threads

considerate_threads()  # before torch is imported

import yaml
from rich.console import Console
from rich.markup import escape

from gta2cs import html, report
from gta2cs.comparison import Comparison, number, title, where
from gta2cs.config import check_same_run
from gta2cs.histories import as_written, read_run
from gta2cs.label_free import DEFAULT, DIRECTIONS
from gta2cs.lists import read_text
from gta2cs.options import changed, in_a_line, read_yaml

console = Console(soft_wrap=True)


def write_page(comparison: Comparison, path: Path) -> None:
    """One HTML file with everything inside."""
    with tempfile.TemporaryDirectory() as folder:
        comparison.draw(Path(folder))
        report.write_text(path, html.render(comparison.text(), Path(folder)))


# --------------------------------------------------------------------------------------------------------------------
# Sweeps


def read_file(path: Path) -> Any:
    """Read a YAML file; what is wrong with it is an error that names it."""
    try:
        return read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {path} to be YAML, but it cannot be read: {error}") from None


def settings_of(sweep: Path, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Folder -> configuration, of every setting of a sweep; a wrong key is an error before anything runs."""
    listed = read_file(sweep)
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise ValueError(f"Expected {sweep} to be a list of settings, each a mapping of changes, but it is not.")
    found: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(listed):
        name = str(entry.get("name", f"setting{index + 1}"))
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"Expected `name` in {sweep} to be the name of a folder in `out`, but got {name!r}.")
        if name in found:
            raise ValueError(f"Expected the settings of {sweep} to have different names, but {name!r} occurs twice.")
        if "out" in entry:
            raise ValueError(f"Expected settings of {sweep} without `out`; `name` is the folder of a run in --out.")
        found[name] = changed(base, {key: value for key, value in entry.items() if key != "name"})
    return found


def check_finished(folder: Path, config: Any) -> None:
    """Refuse a setting that has changed since its run was finished: the page would give the old run its name."""
    path = folder / "history.json"
    if path.is_file():
        with as_written(path):
            saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        try:
            check_same_run(saved, config, max(len(saved["stages"]), len(config.stages)), folder)
        except ValueError as error:
            raise ValueError(f"{error} Here that is another `name`.") from None


def sweep(options: argparse.Namespace) -> list[Path]:
    """Run every setting that is not finished. Returns the folders of all finished runs."""
    import train_gta2cs

    settings = settings_of(options.sweep, read_file(options.config))
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in settings.items():  # all of them, before the first one trains
            file = Path(folder) / f"{name}.yaml"
            report.write_text(file, yaml.safe_dump(config, sort_keys=False))
            which = f"This is the setting {name!r} of {options.sweep}; nothing was run."
            try:
                runs[name] = train_gta2cs.parse(["--config", str(file), f"--out={options.out / name}", "--resume"])
                train_gta2cs.check_stages(runs[name])
                check_finished(options.out / name, runs[name])
            except ValueError as error:
                raise ValueError(f"{error} {which}") from None
            except SystemExit:  # the parser has said what is wrong
                Console(stderr=True, soft_wrap=True).print(which, markup=False)
                raise
    for name, config in settings.items():
        report.write_text(options.out / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))
    done = []
    for name, run in runs.items():
        folder = options.out / name
        if not (folder / "history.json").is_file():
            console.rule(escape(name))
            try:
                train_gta2cs.main(run)
            except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
                console.print(f"[yellow]{escape(name)} is left out: {escape(str(error))}[/]")
                continue
        done.append(folder)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep, if any, and compare. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--score", default=DEFAULT, help="what ranks them; --score=-NAME turns it round")
    parser.add_argument(
        "--page", type=Path, help="the page; default: runs_compared.html, or in the folder of the sweep"
    )
    parser.add_argument("--sweep", type=Path, help="a YAML list of settings to run first")
    parser.add_argument("--config", type=Path, help="what the sweep changes; default: dacs_toy.yaml")
    parser.add_argument("--out", type=Path, help="where the sweep's runs go; default: runs/sweep")
    options = parser.parse_args(arguments)
    if not options.sweep and (options.config or options.out):
        parser.error("--config and --out are about the runs of a --sweep; the page of others goes to --page")
    options.config = options.config or Path(__file__).parent / "configs" / "dacs_toy.yaml"
    options.out = options.out or Path("runs/sweep")
    again = " The same command goes on with the sweep." if options.sweep else ""
    return in_a_line(lambda: compare(options), f"{NOTHING_TORN}{again}")


def compare(options: argparse.Namespace) -> None:
    """Run the remaining settings of a sweep, rank all runs, and write the page."""
    if options.score.removeprefix("-") not in DIRECTIONS:
        raise ValueError(
            f"Expected `score` to be one of {[*DIRECTIONS]}, also with a minus before it, but got {options.score!r}."
        )
    folders = [*options.runs, *(sweep(options) if options.sweep else [])]
    if not folders:
        raise ValueError("Expected folders of runs, or --sweep with a setting that ran, but got none.")
    comparison = Comparison([read_run(folder) for folder in folders], options.score)
    page = options.page or (options.out / "compared.html" if options.sweep else Path("runs_compared.html"))
    write_page(comparison, page)
    net = comparison.best(comparison.runs[0])
    for place, run in enumerate(comparison.runs, 1):
        best = comparison.best(run)
        value = number(run.as_trained(best)["scores"].get(comparison.score), 3)
        console.print(f"{place}. {escape(run.name)}: {title(best)}, {comparison.score.replace('_', ' ')} {value}")
    for line in (*comparison.doubts(), *comparison.stopped(), *comparison.other_choices()):
        console.print(line.replace("\\", "").replace("`", ""), markup=False)
    winner = comparison.runs[0]
    statistics = comparison.with_its_statistics(winner, net)
    found = f"Use the {title(net)}, in {winner.folder}. {statistics}{where(winner, net)} Page: {page}"
    console.print(found.replace("`", ""), markup=False)


if __name__ == "__main__":
    end_with(main())
