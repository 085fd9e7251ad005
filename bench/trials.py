"""One layout of the row kernels on one vocabulary: whether it is right, then its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.errors import TritonError

from grpo_core import RECIPES, triton_backend
from grpo_core.kernels import launch
from grpo_core.kernels.launch import Tuning
from grpo_core.kernels.records import Rows, Slopes, Terms, TokenVectors

# of a thread: the most there are, and what the one pass needs beside the tiles it holds
MOST_REGISTERS, WORKING_REGISTERS = 255, 56
Key = tuple[str, str, int]
Timer = Callable[[Callable[[], object], Tuning], float]


@dataclass(frozen=True)
class Trial:
    """One layout on one vocabulary: seconds of each plan, or why not; `nbytes` of its logits."""

    key: Key
    V: int
    tuning: Tuning
    seconds: dict[str, float]
    nbytes: int
    failure: str = ""

    @property
    def terabytes(self) -> float:
        """TB/s of the one pass, counted as one reading and one writing."""
        return 2e-12 * self.nbytes / self.seconds["one pass"]

    @property
    def total(self) -> float:
        """Seconds of all plans."""
        return float("inf") if self.failure else sum(self.seconds.values())


class Plans:
    """The three plans over the same rows, and what each leaves behind."""

    def __init__(self, rows: int, V: int, dtype: torch.dtype, device: str) -> None:
        self.logits = torch.empty(rows, V, dtype=dtype, device=device)
        for row in self.logits:
            row.copy_(2 * torch.randn(V, device=device))
        self.V, self.target = V, torch.randint(V, (rows,), device=device)
        self.key = launch.tuning_key(self.logits.device, dtype, V)
        self.dlogits = torch.empty_like(self.logits)
        # every row counts and has a gradient
        weight = torch.full((rows,), 1 / rows, device=device)
        self.tokens = TokenVectors(self.target, weight, advantage=weight * rows)
        surrogate = RECIPES["dapo"].surrogate
        self.terms = Terms(surrogate.function, surrogate.args, None, False, 0.0)
        self.stats = triton_backend.row_stats(Rows.of(self.logits), self.target, 1.0)
        self.calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "statistics": self._statistics,
            "one pass": self._one_pass,
            "gradient": self._gradient,
        }

    def _statistics(self) -> tuple[Tensor, ...]:
        stats = triton_backend.row_stats(Rows.of(self.logits), self.target, 1.0)
        return stats.logp, stats.entropy

    def _one_pass(self) -> tuple[Tensor, ...]:
        rows = Rows.of(self.logits)
        found = triton_backend.row_loss(rows, self.tokens, 1.0, self.terms, self.dlogits)
        return found.logp, found.loss, found.dlogp, self.dlogits

    def _gradient(self) -> tuple[Tensor, ...]:
        slopes = Slopes(self.tokens.weight, None, None)
        rows = Rows.of(self.logits)
        triton_backend.row_dlogits(rows, self.target, 1.0, slopes, self.stats, self.dlogits)
        return (self.dlogits,)


@contextmanager
def tuned(key: Key, tuning: Tuning | None) -> Iterator[None]:
    """The kernels with another entry of the table; None for the default."""
    kept = launch.TUNED.pop(key, None)
    if tuning is not None:
        launch.TUNED[key] = tuning
    try:
        yield
    finally:
        launch.TUNED.pop(key, None)
        if kept is not None:
            launch.TUNED[key] = kept


def try_out(plans: Plans, tuning: Tuning, timer: Timer) -> Trial:
    """Checks a layout against the default one, then times it."""
    seconds: dict[str, float] = {}
    trial = Trial(plans.key, plans.V, tuning, seconds, plans.logits.nbytes)
    default, logp = launch.untuned(plans.V), None
    for name, call in plans.calls.items():
        with tuned(plans.key, None):
            expected = [tensor.clone() for tensor in call()]
        with tuned(plans.key, tuning):
            plans.dlogits.fill_(float("nan"))
            try:
                found = call()
            # too many registers, too much shared memory, a compiler that gives up
            except (TritonError, RuntimeError) as failure:
                why = f"{type(failure).__name__}: {' '.join(str(failure).split())[:100]}"
                return replace(trial, failure=why)
            same = torch.equal if tuning.warps == default.warps else _equal_to_rounding
            if not all(map(same, found, expected)):
                return replace(trial, failure=f"{name}: another result")
            if name != "gradient":
                logp = found[0] if logp is None else logp
                if not torch.equal(logp, found[0]):
                    return replace(trial, failure=f"{name}: logp of other bits")
            seconds[name] = timer(call, tuning)
    return trial


def fits(tuning: Tuning) -> bool:
    """Whether the tiles that a program would hold leave it registers to work with."""
    each = launch.REGISTERS // (32 * tuning.warps)
    most = min(MOST_REGISTERS, each, tuning.registers or MOST_REGISTERS)
    # four registers to a tile
    return not tuning.held or 4 * tuning.held + WORKING_REGISTERS <= most


def _equal_to_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than another order of summation makes them."""
    relative = 1e-5 + 2 * torch.finfo(expected.dtype).eps
    absolute = 1e-5 * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=relative, atol=absolute)
