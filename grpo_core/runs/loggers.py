"""Where a run's figures go beside metrics.jsonl: TensorBoard, trackio or wandb, by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_core.cli.options import check_package
from grpo_core.trainer.monitor import Logger, Metrics

PACKAGES = ("tensorboard", "trackio", "wandb")


def open_logger(name: str, directory: Path, config: Mapping[str, Any]) -> Logger:
    """A function that takes each step's record.

    Args:
        name: tensorboard, trackio or wandb.
        directory: of the run; its name is the run's.
        config: the options, as those two show them.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: the package is not installed; says how to get it.
    """
    if name not in PACKAGES:
        raise ValueError(f"log: expected one of {list(PACKAGES)}, got {name!r}")
    if name == "tensorboard":
        _package(name, name)
        writer = _package(name, "torch.utils.tensorboard").SummaryWriter(str(directory / name))

        def write(record: Metrics) -> None:
            for figure, value in flat(record).items():
                writer.add_scalar(figure, value, record["step"])
            writer.flush()

        return write
    package = _package(name, name)
    settings = {"dir": str(directory)} if name == "wandb" else {}
    package.init(project="grpo_core", name=directory.name, config=dict(config), **settings)

    def log(record: Metrics) -> None:
        package.log(flat(record), step=record["step"])

    return log


def flat(record: Metrics, prefix: str = "") -> dict[str, float]:
    """The numbers of a record, those inside another under "outer/inner"."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flat(dict(value), f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            numbers[f"{prefix}{name}"] = float(value)
    return numbers


def _package(name: str, module: str) -> ModuleType:
    """The module of a package."""
    check_package("log", module, name)
    return import_module(module)
