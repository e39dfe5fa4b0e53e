"""`python -m udakit` prints versions, devices, and where to find the documentation and examples."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import udakit

PACKAGES = ("numpy", "kornia", "einops", "jaxtyping")


def describe() -> str:
    """Return one line each for versions, devices, documentation and examples."""
    devices = [f"cpu, {torch.get_num_threads()} threads"]
    devices += [f"cuda:{i}, {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    lines = {
        "udakit": f"{udakit.__version__}, {len(udakit.__all__)} public names, in {Path(udakit.__file__).parent}",
        "torch": torch.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(f"{name} {installed(name)}" for name in PACKAGES),
        "devices": "; ".join(devices),
        **places(Path(udakit.__file__).resolve().parents[1]),
    }
    return "\n".join(f"{name + ':':<15}{text}" for name, text in lines.items())


def installed(name: str) -> str:
    """Return the version of a package, or "is missing"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "is missing"


def places(root: Path) -> dict[str, str]:
    """Return where to find the documentation and the examples, which are not in the wheel."""
    if (root / "mkdocs.yml").is_file():
        return {
            "documentation": f'{root / "docs"} (pip install -e ".[docs]" && mkdocs serve)',
            "examples": f"{root / 'examples'} (start with integrations/smp_net.py)",
        }
    missing = "in a checkout or the source archive of udakit, not in the wheel"
    return {"documentation": f"{missing}; every docstring has an example", "examples": missing}


if __name__ == "__main__":
    print(describe())
