"""Combinations of options: a few that hold every pair of choices, in place of all."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from itertools import combinations, product
from typing import Any

import pytest

from tests.conftest import BACKENDS, is_interpreted


def pairwise(choices: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few combinations; any two choices of different options meet in one of them."""
    names, draw = list(choices), random.Random(seed)
    places = {name: range(len(values)) for name, values in choices.items()}
    open_pairs = {
        (a, i, b, j) for a, b in combinations(names, 2) for i in places[a] for j in places[b]
    }

    def covered(case: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, case[a], b, case[b]) for a, b in combinations(names, 2)} & open_pairs

    cases = []
    while open_pairs:
        a, i, b, j = min(open_pairs)
        drawn = [{n: draw.choice(places[n]) for n in names} | {a: i, b: j} for _ in range(60)]
        best = max(drawn, key=lambda case: len(covered(case)))
        open_pairs -= covered(best)
        cases.append({name: choices[name][at] for name, at in best.items()})
    return cases


def paired(interpreted: Collection[Any] = (), /, **choices: Any) -> pytest.MarkDecorator:
    """Parametrizes a test by the combinations of `pairwise`; all others are `rare`.

    With `backend` among them that fixture takes its values from here. Where kernels are
    interpreted, combinations with none of `interpreted` are `rare`, if any are given.
    """
    axes = {name: list(values) for name, values in choices.items()}
    places = {name: list(range(len(values))) for name, values in axes.items()}
    common = {tuple(case.values()) for case in pairwise(places)}

    def is_rare(place: tuple[int, ...], row: tuple[Any, ...]) -> bool:
        by_interpreter = any(is_interpreted(value) for value in row if value in BACKENDS)
        left_out = interpreted and by_interpreter and not any(value in interpreted for value in row)
        return bool(left_out) or place not in common

    rows = zip(product(*places.values()), product(*axes.values()), strict=True)
    cases = [
        pytest.param(*row, marks=pytest.mark.rare if is_rare(place, row) else ())
        for place, row in rows
    ]
    return pytest.mark.parametrize(list(axes), cases, indirect=[n for n in axes if n == "backend"])


def slow(*cases: Any) -> list[Any]:
    """Cases of a parametrized test that `make quick` leaves out; a tuple has several arguments."""
    rows = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def over_backends(names: Iterable[str], interpreted: Collection[str]) -> pytest.MarkDecorator:
    """Every name with every backend; where kernels are interpreted, all but these are `rare`."""
    cases = [
        pytest.param(
            *(backend, name),
            marks=pytest.mark.rare if is_interpreted(backend) and name not in interpreted else (),
        )
        for backend, name in product(BACKENDS, names)
    ]
    return pytest.mark.parametrize(("backend", "name"), cases, indirect=["backend"])
