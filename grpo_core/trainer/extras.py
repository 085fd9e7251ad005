"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from types import ModuleType


def extra(module: str, why: str, package: str) -> ModuleType:
    """The module, or a ModuleNotFoundError that says why it is needed and how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"{why}: pip install {package}", name=missing.name) from missing
