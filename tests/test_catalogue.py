"""The table of methods: complete, the same wherever it is shown, true of the objectives."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_core import RECIPES, preset
from grpo_core.objective.catalogue import (
    FORMULAS,
    ORIGINS,
    as_markdown,
    as_text,
    formula,
)
from tests.combinations import slow
from tests.test_formulas import SURROGATES

ROOT = Path(__file__).parent.parent


def test_every_recipe_has_an_origin_and_every_surrogate_a_formula() -> None:
    assert ORIGINS.keys() == RECIPES.keys()
    assert FORMULAS.keys() == {name for name, _ in SURROGATES}


def test_the_documentation_shows_the_table() -> None:
    """docs/objectives.md holds what `python -m grpo_core.recipes --markdown` prints."""
    text = (ROOT / "docs/objectives.md").read_text()
    start, end = "recipes --markdown -->\n", "\n<!-- end -->"
    shown = text[text.index(start) + len(start) : text.index(end)]
    assert shown == as_markdown(), "run python -m grpo_core.recipes --markdown, paste it there"


@pytest.mark.parametrize("option", [["--frameworks"], *slow([], ["--markdown"])])
def test_the_terminal_shows_it_without_a_word_on_stderr(option: list[str]) -> None:
    command = [sys.executable, "-W", "error", "-m", "grpo_core.recipes", *option]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    expected = as_markdown() if option == ["--markdown"] else as_text(frameworks=bool(option))
    assert printed.stdout == expected + "\n"
    assert printed.stderr == ""


def read(options: str) -> dict[str, Any]:
    """Options as a command line has them, with the types of YAML."""
    return {name: yaml.safe_load(text) for name, text in re.findall(r"(\w+)=([^,]+)", options)}


@pytest.mark.parametrize("name", RECIPES)
def test_the_options_of_a_framework_are_the_recipe(name: str) -> None:
    """They give the recipe itself, but for the framework's ε beside a standard deviation."""
    recipe, origin = RECIPES[name], ORIGINS[name]
    if origin.trl:
        assert preset("trl", **read(origin.trl)).objective == recipe
    if origin.verl:
        found = preset("verl", **read(origin.verl)).objective
        of_verl = dataclasses.replace(found.advantage, epsilon=recipe.advantage.epsilon)
        assert found.replace(advantage=of_verl) == recipe


def test_a_formula_holds_the_objectives_numbers() -> None:
    """Another bound, another text."""
    assert formula(RECIPES["dapo"]) == "−min(r·A, clip(r, 1−0.2, 1+0.28)·A)"
    assert "min(r, 4)" in formula(RECIPES["intellect2"])
    assert "d ≤ 0.4" in formula(RECIPES["gmpo"])
