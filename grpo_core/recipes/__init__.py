"""The published methods as objectives: RECIPES, the functions that make their surrogates.

Read `methods` first; `catalogue` says the same in words. Both are imported when they are needed, so
that `python -m grpo_core.recipes --help` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_core.recipes.methods import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return getattr(import_module("grpo_core.recipes.methods"), name)
