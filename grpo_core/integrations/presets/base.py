"""What the presets share: a preset, its options and their limits, and the means of its metrics."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_core.loss.fused_loss import LossOutput
from grpo_core.loss.inputs import Tokens
from grpo_core.objective.objective import Objective

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
        surrogate = self.objective.surrogate
        numbers = ", ".join(f"{value:g}" for value in surrogate.args)
        changed = {
            "surrogate": f"{surrogate.function.__name__}({numbers})",
            "aggregation": self.objective.aggregation,
            **_changed(self.objective),
        }
        changed.pop("factor", None)
        changed |= {f"factor.{k}": v for k, v in _changed(self.objective.factor).items()}
        return "\n".join(["objective", *_columns(changed), "arguments", *_columns(self.arguments)])


def _changed(record: Any) -> dict[str, str]:
    """Fields of a dataclass that differ from their defaults, as text."""
    changed = {}
    for field in dataclasses.fields(record):
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        value = getattr(record, field.name)
        if default is not dataclasses.MISSING and value != default:
            changed[field.name] = value if isinstance(value, str) else repr(value)
    return changed


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


def option(
    default: Any,
    choices: Collection[object] | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
    whole: bool = False,
    optional: bool = False,
) -> Any:
    """A dataclass field with the limits that `check_options` applies.

    Args:
        choices: allowed values, or else a number:
        low, high: inclusive bounds.
        above: an exclusive lower bound.
        whole: an int >= 1.
        optional: whether None is allowed.
    """
    limits = {"low": low, "high": high, "above": above, "whole": whole, "optional": optional}
    metadata = {"choices": choices} if choices is not None else limits
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Raises ValueError for an option outside its limits, or a flag that is not True or False."""
    for field in dataclasses.fields(options):
        name, value, limits = field.name, getattr(options, field.name), dict(field.metadata)
        if isinstance(field.default, bool):
            limits = {"choices": (True, False)}
        if "choices" in limits:
            choice(name, value, limits["choices"])
        elif limits:
            number(name, value, **limits)


def choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Raises ValueError unless `value` is a finite number within the limits of `option`."""
    if optional and value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if whole:
        expected = "an int >= 1"
        fits = is_number and isinstance(value, int) and value >= 1
    else:
        expected = "a number"
        if above is not None:
            expected += f" > {above:g}"
        elif low > -math.inf:
            expected += f" >= {low:g}"
        expected += f" and <= {high:g}" if high < math.inf else ""
        fits = is_number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]
        fits = fits and (above is None or value > above)  # type: ignore[operator]
    if not fits:
        raise ValueError(f"{name}: expected {expected}{' or None' * optional}, got {value!r}")


def read_options(
    kind: type[Options], owner: str, given: Mapping[str, Any], instead: Mapping[str, str]
) -> Options:
    """Makes an instance of the dataclass `kind` from options by name.

    Args:
        owner: whose options they are, for the messages.
        instead: unsupported options, and what to do instead.

    Raises:
        ValueError: an unknown option, or a value outside its limits.
        NotImplementedError: an unsupported option that is switched on.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name, value in given.items():
        if name in instead and value:
            raise NotImplementedError(f"{name}: not part of the loss here; {instead[name]}")
        if name not in known and name not in instead:
            raise ValueError(
                f"{name}: expected an option of {owner}, one of {', '.join(known)}; "
                f"got {name}={value!r}"
            )
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
        if not isinstance(out._tokens, Tokens):
            raise NotImplementedError("metrics: of a loss in a compiled graph, use out.metrics")
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
