"""What a figure was taken on: device, versions, and which packages are there.

`python -m bench.machine` prints it as JSON; `--folder` prints the name under bench/results/.
"""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from grpo_core.cli.options import Parser

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "liger-kernel", "trl")
PACKAGES += ("transformers", "hypothesis", "matplotlib")


def versions() -> dict[str, str | None]:
    """Of Python and of every package that matters; None where it is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device_name() -> str:
    """The GPU's name, or the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def describe() -> dict[str, object]:
    """Everything a reader of a figure needs to know of the machine."""
    about: dict[str, object] = {"device": device_name(), "versions": versions()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        about |= {
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": getattr(card, "L2_cache_size", None),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return about


def folder() -> str:
    """The device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


if __name__ == "__main__":
    parser = Parser("bench.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", action="store_true", help="the name under bench/results/")
    print(folder() if parser.parse_args().folder else json.dumps(describe(), indent=1))
