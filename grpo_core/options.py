"""Options of the commands: declared, checked, and compared with those of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.utils import logging

from grpo_core.objective import Objective
from grpo_core.recipes import RECIPES


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help})


def begin(
    kind: type, command: str, arguments: Sequence[str] | None
) -> tuple[HfArgumentParser, Any]:
    """A command's parser and options, `threads` among them; exits with the usage if one is wrong.

    Args:
        kind: the dataclass of the options.
        command: the module that is run.
        arguments: None for those of the process.
    """
    parser = HfArgumentParser(kind, prog=f"python -m {command}")  # type: ignore[arg-type]
    try:
        config = parser.parse_args_into_dataclasses(arguments)[0]
    except ValueError as error:
        parser.error(str(error))
    if config.threads:
        torch.set_num_threads(config.threads)
    logging.disable_progress_bar()
    return parser, config


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raises ValueError for one of these options that is smaller."""
    for name in names:
        if getattr(config, name) < least:
            wanted = f"at least {least}" if least else "0 or more"
            raise ValueError(f"{name}: expected {wanted}, got {getattr(config, name)}")


def check_warmup(config: Any) -> None:
    """Raises ValueError for a warm-up as long as the run: it teaches nothing and says nothing."""
    if not 0 <= config.warmup_steps < config.steps:
        raise ValueError(
            f"warmup_steps: expected 0 to {config.steps - 1}, got {config.warmup_steps}"
        )


def recipe_with_kl(name: str, beta: float) -> Objective:
    """A recipe with the KL term of this weight; k3 where it has none of its own.

    Raises:
        ValueError: there is no such recipe, or `beta` is no weight.
    """
    if name not in RECIPES:
        raise ValueError(f"objective: expected one of {list(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    return recipe.replace(beta=beta, kl=(recipe.kl or "k3") if beta > 0 else None)


def read_resumed(file: Path) -> Any:
    """What an interrupted run has left in `file`.

    Raises:
        ValueError: there is no such run.
    """
    if not file.exists():
        raise ValueError(f"resume: expected an interrupted run, found no {file}")
    return json.loads(file.read_text("utf-8"))


def check_unchanged(
    now: Mapping[str, Any], before: Mapping[str, Any], where: Path, free: Collection[str] = ()
) -> None:
    """Raises ValueError for an option that is not what it was in `where`, unless it is free."""
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            raise ValueError(f"{name}: expected {before.get(name)} as in {where}, got {value}")
