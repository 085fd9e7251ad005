"""What a preset is, and what the presets of all frameworks share: reading options, and means."""

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
    """A framework's loss as one of ours; print it to see how to call `fused_loss`.

    Attributes:
        objective: what to give as `objective`.
        arguments: the other arguments of `fused_loss` that matter, and what to give, in words.
    """

    objective: Objective
    arguments: dict[str, str]

    def __str__(self) -> str:
        surrogate = self.objective.surrogate
        numbers = ", ".join(f"{value:g}" for value in surrogate.args)
        chosen = {
            "surrogate": f"{surrogate.function.__name__}({numbers})",
            "aggregation": self.objective.aggregation,
            **_chosen(self.objective),
        }
        chosen.pop("factor", None)
        chosen |= {f"factor.{k}": v for k, v in _chosen(self.objective.factor).items()}
        return "\n".join(["objective", *_columns(chosen), "arguments", *_columns(self.arguments)])


def _chosen(record: Any) -> dict[str, str]:
    """What of a dataclass is not at its default, as text; what has no default is left out."""
    found = {}
    for field in dataclasses.fields(record):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(record, field.name)
        if default is not dataclasses.MISSING and value != default:
            found[field.name] = value if isinstance(value, str) else repr(value)
    return found


def _columns(table: Mapping[str, str]) -> list[str]:
    """Lines of a name and its text, which is wrapped beside it."""
    width = max(map(len, table)) + 4
    lines = []
    for name, text in table.items():
        first = f"  {name}".ljust(width)
        lines += textwrap.wrap(
            text, LINE, initial_indent=first, subsequent_indent=" " * width, break_on_hyphens=False
        )
    return lines


def read_options(
    kind: type[Options], whose: str, given: Mapping[str, Any], instead: Mapping[str, str]
) -> Options:
    """An instance of the dataclass of options.

    Args:
        kind: a dataclass with a field for every option that concerns the loss.
        whose: what they belong to, for the messages.
        given: options by name.
        instead: options that are out of scope, and what to do instead.

    Raises:
        ValueError: an unknown option, or a value that it cannot have.
        NotImplementedError: an option that is out of scope, unless it is switched off.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name, value in given.items():
        if name in instead and value:
            raise NotImplementedError(f"{name}: not part of the loss here; {instead[name]}")
        if name not in known and name not in instead:
            raise ValueError(
                f"{name}: expected an option of {whose}, one of {', '.join(known)}; "
                f"got {name}={value!r}"
            )
    return kind(**{name: value for name, value in given.items() if name in known})


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
    above: bool = False,
    optional: bool = False,
) -> None:
    """Raises ValueError unless `value` is finite and in [low, high], or (low, high] if `above`."""
    if optional and value is None:
        return
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        want = f"a number {'>' if above else '>='} {low:g}" if low > -math.inf else "a number"
        want += f" and <= {high:g}" if high < math.inf else ""
        raise ValueError(f"{name}: expected {want}{' or None' if optional else ''}, got {value!r}")


def whole(name: str, value: object, *, optional: bool = False) -> None:
    """Raises ValueError unless `value` is an int >= 1."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        want = "an int >= 1 or None" if optional else "an int >= 1"
        raise ValueError(f"{name}: expected {want}, got {value!r}")


def padded(name: str, mask: Tensor) -> Tensor:
    """The mask [B, T] as bool; raises ValueError for any other shape."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: expected a tensor [B, T], got {got}")
    return mask != 0


class Tally:
    """The vectors of an output as `[N]`, and their means over its tokens or its sequences."""

    def __init__(self, out: LossOutput) -> None:
        self.valid, self.advantage = out._valid & ~out._dropped, out._tokens.advantage
        if not isinstance(out._tokens, Tokens):
            raise NotImplementedError("metrics: of a loss in a compiled graph, use out.metrics")
        self.tokens = dataclasses.replace(out._tokens, valid=self.valid)
        vectors = (out.logp, out.entropy, out.ratio, out.kl)
        self.logp, self.entropy, self.ratio, self.kl = (v.reshape(-1) for v in vectors)
        old_logp = self.tokens.old_logp
        # masked tokens have not moved
        self.ratio = torch.where(self.valid, self.ratio, 1.0)
        self.log_ratio = self.logp - (self.logp if old_logp is None else old_logp)
        self.is_padded = out.logp.ndim == 2

    def mean(self, vector: Tensor, of: Tensor | None = None) -> Tensor:
        """0-dim mean over the tokens, or over some of them; 0 without any."""
        of = self.valid if of is None else of
        vector = vector.to(self.logp.dtype)
        return torch.where(of, vector, 0.0).sum() / of.sum().clamp(min=1)

    def by_sequence(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """([S] mean over the tokens of each sequence, [S] bool whether it has some).

        Without any it is the mean over its masked tokens, NaN if there is none of these either.
        """
        where, zeros = self.tokens.sequence, self.logp.new_zeros(self.tokens.sequences)
        length = zeros.scatter_add(0, where, self.valid.to(zeros.dtype))
        counts = (self.valid | (length == 0)[where]).to(zeros.dtype)
        total = zeros.scatter_add(0, where, counts * vector.to(zeros.dtype))
        return total / zeros.scatter_add(0, where, counts), length > 0

    def mean_by_sequence(self, vector: Tensor) -> Tensor:
        """0-dim mean over the sequences; a row of a padded batch is one even without a token."""
        means, present = self.by_sequence(vector)
        present = present | self.is_padded
        return torch.where(present, means, 0.0).sum() / present.sum().clamp(min=1)
