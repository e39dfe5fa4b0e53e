"""One central hypothesis profile, one thread, and the root of the optional real data."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "udakit", deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("udakit")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder that holds `camvid/` and `carla/`, from the environment variable UDAKIT_DATA."""
    root = os.environ.get("UDAKIT_DATA")
    if not root:
        pytest.skip("UDAKIT_DATA is not set: the real-data tests need a folder with camvid/ and carla/")
    if not (Path(root) / "camvid").is_dir():
        pytest.skip(f"UDAKIT_DATA={root} has no folder camvid/")
    return Path(root)


@pytest.fixture(scope="session", autouse=True)
def scenes_are_drawn_once() -> Iterator[None]:
    """Each scene of the built-in pair, which many runs load. Tests of `render` itself hold the plain function."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):  # `.ci/matrix` has the tests of the parts without the examples
            from gta2cs import toy

            draw = functools.lru_cache(maxsize=2048)(toy.render)  # up to 100 KB each
            patch.setattr(toy, "render", lambda *arguments: tuple(array.copy() for array in draw(*arguments)))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lists that tests record as properties "... the contract": also where workers ran them."""
    for report in terminalreporter.getreports("passed"):
        for title, lines in report.user_properties:
            if title.endswith("the contract"):
                terminalreporter.section(f"{len(lines)} {title}")
                terminalreporter.write_line("\n".join(lines))
