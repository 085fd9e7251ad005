"""The table of methods: complete, the same wherever it is shown, true of the objectives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_core import RECIPES, preset
from grpo_core.objective.catalogue import (
    FORMULAS,
    ORIGINS,
    advantage,
    as_markdown,
    as_text,
    formula,
)
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


@pytest.mark.parametrize("option", [[], ["--frameworks"], ["--markdown"]])
def test_the_terminal_shows_it_without_a_word_on_stderr(option: list[str]) -> None:
    command = [sys.executable, "-W", "error", "-m", "grpo_core.recipes", *option]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    expected = as_markdown() if option == ["--markdown"] else as_text(frameworks=bool(option))
    assert printed.stdout == expected + "\n"
    assert printed.stderr == ""


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("framework", ["trl", "verl"])
def test_the_options_of_a_framework_are_the_recipe(name: str, framework: str) -> None:
    """What the table calls the same makes the same objective, but for the ε beside a std."""
    options = getattr(ORIGINS[name], framework)
    if options is None:
        pytest.skip("the framework has no such method")
    theirs, ours = preset(framework, **options).objective, RECIPES[name]
    same = ("surrogate", "kl", "beta", "ratio_level", "kl_times_ratio", "token_clip", "aggregation")
    for field in (*same, "factor"):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert advantage(theirs) == advantage(ours)


def test_a_formula_holds_the_objectives_numbers() -> None:
    """Another bound, another text."""
    assert formula(RECIPES["dapo"]) == "−min(r·A, clip(r, 1−0.2, 1+0.28)·A)"
    assert "min(r, 4)" in formula(RECIPES["intellect2"])
    assert "d ≤ 0.4" in formula(RECIPES["gmpo"])
