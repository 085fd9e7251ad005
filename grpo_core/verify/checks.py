"""The checks: losses and gradients, confident tokens relative to their size, and equal bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.loss.fused_loss import fused_loss, token_logp
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import RECIPES
from grpo_core.verify.accuracy import (
    Comparison,
    Result,
    compare_confident,
    compare_losses,
    exact_tokens,
)
from grpo_core.verify.inputs import (
    CASES,
    LARGEST_MARGIN,
    OBJECTIVES,
    Batch,
    Case,
    Sizes,
    draw_batch,
    one_per_plan,
    set_margins,
)

# a mixed-precision trainer scales a float16 loss, so that small gradients do not underflow
FLOAT16_LOSS_SCALE = 2.0**16


class Check(NamedTuple):
    """A comparison, and where it was made.

    Attributes:
        part: losses, confident (tokens) or bits.
        recipe: of the loss; "" for other parts.
        case: of the rows.
        comparison: with float64. Of equal bits the quantity is the claim, the error the number
            of values that differ, the baseline that of all.
    """

    part: str
    recipe: str
    dtype: torch.dtype
    case: str
    V: int
    comparison: Comparison

    @property
    def ok(self) -> bool:
        """Whether the error is allowed."""
        return self.comparison.ok

    def as_json(self) -> dict[str, Any]:
        """All fields in one dictionary."""
        fields = self._asdict() | {"dtype": str(self.dtype), "ok": self.ok}
        return fields | fields.pop("comparison")._asdict()


def verify(setup: Setup, recipes: list[str], dtypes: list[torch.dtype]) -> Iterator[Check]:
    """Runs all checks.

    Args:
        setup: backend, device and sizes.
        recipes: names in `inputs.OBJECTIVES`.
        dtypes: of the logits.
    """
    for dtype in dtypes:
        for V in setup.sizes.vocabularies:
            for case in CASES:
                all_recipes = setup.sizes.vocabularies[0] == V and not case.on_policy
                names = recipes if all_recipes else one_per_plan(recipes)
                yield from check_losses(setup, case, dtype, V, names)
            yield from check_confident(setup, dtype, V)
            yield from check_bits(setup, dtype, V)


@dataclass(frozen=True)
class Setup:
    """The kernels, where they run, and the sizes of the inputs."""

    backend: Backend | None
    device: str
    sizes: Sizes

    def run(self, batch: Batch, name: str, **changes: Any) -> Result:
        """The loss of the kernels, and the gradient of the whole buffer."""
        objective = OBJECTIVES[name]
        given = batch.needed(objective) | {"inplace": batch.case.inplace, "backend": self.backend}
        return _run(fused_loss, batch, batch.buffer, objective, given | changes)


def check_losses(
    setup: Setup, case: Case, dtype: torch.dtype, V: int, names: list[str]
) -> Iterator[Check]:
    """Compares every objective on a batch with the reference in float64."""
    batch = draw_batch(case, dtype, V, setup.sizes, setup.device)
    for name in names:
        objective = OBJECTIVES[name]
        given = batch.needed(objective)
        honest = _run(reference_loss, batch, batch.buffer, objective, given)
        exact = _run(reference_loss, batch, batch.buffer.double(), objective, given)
        ours, longest = setup.run(batch, name), setup.sizes.tokens
        for one in compare_losses(objective, longest, ours, honest, exact):
            yield Check("losses", name, dtype, str(case), V, one)


def check_confident(setup: Setup, dtype: torch.dtype, V: int) -> Iterator[Check]:
    """Checks relative errors of logp, entropy and the gradient of −logp, margins up to 30 nats."""
    generator = torch.Generator().manual_seed(V)
    N = setup.sizes.sequences * setup.sizes.tokens
    target = torch.randint(V, (N,), generator=generator)
    logits = 2 * torch.randn(N, V, generator=generator)
    logits = set_margins(logits, target, torch.linspace(0, LARGEST_MARGIN, N))
    logits, target = logits.to(setup.device, dtype), target.to(setup.device)
    given: dict[str, Any] = {
        "target": target,
        "advantage": torch.ones(N, device=setup.device),
        "sequence_id": torch.arange(N, device=setup.device),
    }
    batch = Batch(Case("confident", "packed"), logits, given)
    honest = _run(reference_loss, batch, logits, RECIPES["gpg"], given)
    ours = _run(fused_loss, batch, logits, RECIPES["gpg"], given | {"backend": setup.backend})
    exact, unit = exact_tokens(logits, target), loss_scale(dtype) / N
    for name, truth, size in (
        ("logp", exact.logp, 1.0),
        ("entropy", exact.entropy, 1.0),
        ("dlogits", -exact.slope * unit, unit),
    ):
        values = ours.quantity(name), honest.quantity(name)
        comparison = compare_confident(name, *values, truth, size)
        where = f"0 to {LARGEST_MARGIN:g} nats"
        yield Check("confident", "", dtype, where, V, comparison)


def check_bits(setup: Setup, dtype: torch.dtype, V: int) -> Iterator[Check]:
    """Checks that a row has the same bits in every plan, batch, view and run."""
    case = Case("ordinary", "view")
    batch = draw_batch(case, dtype, V, setup.sizes, setup.device)
    for claim, ours, same in _pairs(setup, batch):
        different, numbers = int((ours != same).sum()), ours.numel()
        comparison = Comparison(claim, different, numbers, math.inf if different else 0.0)
        yield Check("bits", "", dtype, str(case), V, comparison)


def _pairs(setup: Setup, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(claim, numbers, numbers that must be equal)."""
    view, given = batch.logits(batch.buffer), batch.arguments
    target, T = given["target"], given["temperature"]

    def statistics(logits: Tensor, target: Tensor) -> Tensor:
        return torch.stack(token_logp(logits, target, temperature=T, backend=setup.backend), -1)

    def of_loss(result: Result) -> Tensor:
        return torch.stack((result.out.logp, result.out.entropy), -1)

    unmasked = {"mask": None}
    stats = statistics(view, target)
    one_pass = setup.run(batch, "dapo", **unmasked)
    yield "token_logp is the one pass", stats, of_loss(one_pass)
    yield "token_logp is the two phases", stats, of_loss(setup.run(batch, "gspo", **unmasked))
    again = setup.run(batch, "dapo", **unmasked)
    yield "a second run is the first", again.dlogits, one_pass.dlogits

    rows, targets = view.reshape(-1, view.shape[-1]), target.flatten()
    packed = statistics(rows, targets)
    yield "packed rows are the view", packed.view_as(stats), stats
    alone = [statistics(rows[n : n + 1], targets[n : n + 1]) for n in range(len(targets))]
    yield "a row alone is that of a batch", torch.cat(alone), packed

    inplace = setup.run(batch, "dapo", inplace=True, **unmasked)
    yield "in place is into a buffer", inplace.dlogits, one_pass.dlogits
    buffer = batch.buffer.clone().requires_grad_() * 1.0
    fused_loss(
        batch.logits(buffer),
        objective="dapo",
        inplace=True,
        backend=setup.backend,
        **batch.needed(RECIPES["dapo"]),
    ).loss.backward()
    yield "nothing is written beside a view", buffer.detach()[:, -1], batch.buffer[:, -1]

    policy = {"old_logp": stats[..., 0], "ref_logp": stats[..., 0]}
    out = setup.run(batch, "grpo", **unmasked, **policy).out
    valid = (target >= 0).float()
    yield "on policy, the ratio is 1", out.ratio, valid
    yield "on policy, the KL is 0", out.kl, torch.zeros_like(out.kl)

    with_nan = batch.buffer.clone()
    with_nan[0, 0, 0] = torch.nan
    healthy = one_pass.dlogits.clone()
    healthy[0, 0] = 0
    dropped = setup.run(replace(batch, buffer=with_nan), "dapo", **unmasked)
    yield "a NaN affects only its own row", dropped.dlogits, healthy


def loss_scale(dtype: torch.dtype) -> float:
    """The factor that a trainer applies to the loss before the backward."""
    return FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0


def _run(
    loss: Callable, batch: Batch, buffer: Tensor, objective: Objective, given: dict[str, Any]
) -> Result:
    """The loss over a buffer, and its gradient."""
    leaf = buffer.clone().requires_grad_()
    # a leaf cannot be overwritten
    logits = batch.logits(leaf * 1.0 if given.get("inplace") else leaf)
    out = loss(logits, objective=objective, **given)
    (dlogits,) = torch.autograd.grad(loss_scale(batch.buffer.dtype) * out.loss, leaf)
    return Result(out, dlogits)
