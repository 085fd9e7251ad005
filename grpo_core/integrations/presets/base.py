"""What the presets share: the preset, the rules of options, and the means of metrics."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_core.loss.outputs import LossOutput
from grpo_core.objective.objective import Objective
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.validation import is_number

Options = TypeVar("Options")
# characters of a printed line
LINE = 90


@dataclass(frozen=True)
class Preset:
    """The loss of a framework as arguments of `fused_loss`; print it to read them.

    Attributes:
        objective: the argument `objective`.
        arguments: name of an argument of `fused_loss` -> a description of its value.
    """

    objective: Objective
    arguments: dict[str, str]

    def __str__(self) -> str:
        surrogate, factor = self.objective.surrogate, self.objective.factor
        numbers = ", ".join(f"{value:g}" for value in surrogate.args)
        rows = {"surrogate": f"{surrogate.function.__name__}({numbers})"}
        rows["aggregation"] = self.objective.aggregation
        # the factor has rows of its own
        rows |= _changed(self.objective, Objective(surrogate, factor=factor))
        rows |= {f"factor.{k}": v for k, v in _changed(factor, PolicyFactor()).items()}
        return "\n".join(["objective", *_columns(rows), "arguments", *_columns(self.arguments)])


def _changed(record: Any, default: Any) -> dict[str, str]:
    """Fields of a dataclass that differ from another instance, as text."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.compare}
    return {
        name: value if isinstance(value, str) else repr(value)
        for name, value in values.items()
        if value != getattr(default, name)
    }


def _columns(rows: Mapping[str, str]) -> list[str]:
    """Lines of two columns: a name and its wrapped text."""
    width = max(map(len, rows)) + 4
    lines = []
    for name, text in rows.items():
        first = f"  {name}".ljust(width)
        lines += textwrap.wrap(
            text, LINE, initial_indent=first, subsequent_indent=" " * width, break_on_hyphens=False
        )
    return lines


# the expected values of an option: their description in errors, and the test
Rule = tuple[str, Callable[[Any], bool]]


def one_of(choices: Collection[object]) -> Rule:
    """One of the choices."""
    # of a tuple, since a wrong value may have no hash
    allowed = tuple(choices)
    return f"one of {allowed}", lambda value: value in allowed


def number(text: str, fits: Callable[[float], bool]) -> Rule:
    """A finite number for which `fits` is true."""
    return text, lambda value: is_number(value) and math.isfinite(value) and fits(value)


def at_least(bound: float) -> Rule:
    """A finite number >= bound."""
    return number(f"a number >= {bound:g}", lambda value: value >= bound)


def above(bound: float) -> Rule:
    """A finite number > bound."""
    return number(f"a number > {bound:g}", lambda value: value > bound)


NUMBER = number("a number", lambda value: True)
NOT_NEGATIVE, POSITIVE = at_least(0), above(0)
SHARE = number("a number >= 0 and <= 1", lambda value: 0 <= value <= 1)
COUNT = number("an int >= 1", lambda value: isinstance(value, int) and value >= 1)


def check(name: str, value: object, rule: Rule, *, optional: bool = False) -> None:
    """Raises ValueError for a value that breaks the rule; None is allowed if `optional`."""
    expected, fits = rule
    if not (optional and value is None) and not fits(value):
        raise ValueError(f"{name}: expected {expected}{' or None' * optional}, got {value!r}")


def option(default: Any, rule: Rule) -> Any:
    """A dataclass field with a rule for `check_options`."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def check_options(options: Any) -> None:
    """Raises ValueError for an option that breaks its rule, or a flag that is not a bool."""
    for field in dataclasses.fields(options):
        rule = field.metadata.get("rule")
        if isinstance(field.default, bool):
            rule = one_of((True, False))
        if rule is not None:
            optional = str(field.type).endswith("None")
            check(field.name, getattr(options, field.name), rule, optional=optional)


def read_options(
    kind: type[Options], owner: str, given: Mapping[str, Any], instead: Mapping[str, str]
) -> Options:
    """Makes an instance of the dataclass `kind` from options by name.

    Args:
        owner: whose options they are, for the messages.
        instead: unsupported options, and what to do instead.

    Raises:
        ValueError: an unknown option, or a value that breaks its rule.
        NotImplementedError: an unsupported option that is switched on.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name, value in given.items():
        if name in instead and value:
            raise NotImplementedError(f"{name}: not part of the loss here; {instead[name]}")
        if name not in known and name not in instead:
            want = f"an option of {owner}, one of {', '.join(known)}"
            raise ValueError(f"{name}: expected {want}; got {name}={value!r}")
    return kind(**{name: value for name, value in given.items() if name in known})


def padded_mask(name: str, mask: Tensor) -> Tensor:
    """Returns a mask [B, T] as bool; raises ValueError for another shape."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: expected a tensor [B, T], got {got}")
    return mask != 0


class TokenMeans:
    """The vectors of a `LossOutput` as [N], and means over its tokens or its sequences."""

    def __init__(self, out: LossOutput) -> None:
        self.valid, self.advantage = out._valid & ~out._dropped, out._tokens.advantage
        self.tokens = dataclasses.replace(out._tokens, valid=self.valid)
        vectors = (out.logp, out.entropy, out.ratio, out.kl)
        self.logp, self.entropy, self.ratio, self.kl = (v.reshape(-1) for v in vectors)
        # a masked token has ratio 0 in the output
        self.ratio = torch.where(self.valid, self.ratio, 1.0)
        old_logp = self.tokens.old_logp
        self.log_ratio = self.logp - (self.logp if old_logp is None else old_logp)
        self.is_padded = out.logp.ndim == 2

    def mean(self, vector: Tensor, over: Tensor | None = None) -> Tensor:
        """0-dim mean over the valid tokens, or over the tokens of a mask; 0 if there are none."""
        over = self.valid if over is None else over
        vector = vector.to(self.logp.dtype)
        return torch.where(over, vector, 0.0).sum() / over.sum().clamp(min=1)

    def by_sequence(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """([S] mean of each sequence, [S] bool whether it has a valid token).

        A sequence without valid tokens has the mean over its masked tokens, or NaN.
        """
        sequence, zeros = self.tokens.sequence, self.logp.new_zeros(self.tokens.sequences)
        length = zeros.scatter_add(0, sequence, self.valid.to(zeros.dtype))
        counts = (self.valid | (length == 0)[sequence]).to(zeros.dtype)
        total = zeros.scatter_add(0, sequence, counts * vector.to(zeros.dtype))
        return total / zeros.scatter_add(0, sequence, counts), length > 0

    def mean_by_sequence(self, vector: Tensor) -> Tensor:
        """0-dim mean over the means of sequences; an empty row of a padded batch is a sequence."""
        means, present = self.by_sequence(vector)
        present = present | self.is_padded
        return torch.where(present, means, 0.0).sum() / present.sum().clamp(min=1)
