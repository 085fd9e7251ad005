"""The machine: what a figure was taken on, and the clock.

`python -m bench.machine` prints the device, the versions and the name of the folder under
bench/results/ as JSON.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from grpo_core.cli.options import Parser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def describe() -> dict[str, object]:
    """Everything a reader of a figure needs to know of the machine."""
    name, found = device_name(), versions()
    about: dict[str, object] = {
        "device": name,
        "gpu": DEVICE == "cuda",
        "folder": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "summary": ", ".join(f"{package} {v}" for package, v in found.items() if v),
        "versions": found,
    }
    if DEVICE == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": getattr(card, "L2_cache_size", None),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return about


def clock() -> float:
    """Seconds, once the device has finished all it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(call: Callable[[], object]) -> float:
    """Median of many calls on a GPU, each from a cold cache; without one a single call."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return float(1e-3 * do_bench(call, return_mode="median"))
    start = clock()
    call()
    return clock() - start


def ratio(
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int,
    prepare: Callable[[], object] = lambda: None,
) -> float:
    """Median over the rounds of time of `ours` over time of `other`, after one call of each."""
    found = []
    for _ in range(rounds + 1):
        seconds = []
        for call in (ours, other):
            prepare()
            start = clock()
            call()
            seconds.append(clock() - start)
        found.append(seconds[0] / seconds[1])
    return median(found[1:])


if __name__ == "__main__":
    Parser("bench.machine", description=__doc__.splitlines()[0]).parse_args()
    print(json.dumps(describe(), indent=1))
