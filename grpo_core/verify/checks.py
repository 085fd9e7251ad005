"""The comparisons: losses and gradients, confident tokens by their own size, and equal bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    LARGEST_MARGIN,
    OBJECTIVES,
    Batch,
    Case,
    Sizes,
    draw_batch,
    set_margins,
)

# what a mixed-precision trainer scales a float16 loss by, so that small gradients are numbers
FLOAT16_LOSS_SCALE = 2.0**16


class Found(NamedTuple):
    """A comparison, and where it was made."""

    recipe: str
    dtype: torch.dtype
    case: str
    V: int
    comparison: Comparison


class Bits(NamedTuple):
    """A claim of equal bits, and how many numbers differ all the same."""

    claim: str
    dtype: torch.dtype
    V: int
    numbers: int
    different: int

    @property
    def ok(self) -> bool:
        """Whether the claim holds."""
        return self.different == 0


@dataclass(frozen=True)
class Place:
    """Where and on what is verified."""

    backend: Backend
    device: str
    sizes: Sizes

    def run(self, batch: Batch, objective: str | Objective, **changes: Any) -> Result:
        """Ours: the loss, and the gradient of the whole buffer."""
        given = batch.needed(RECIPES[objective] if isinstance(objective, str) else objective)
        given = given | {"inplace": batch.case.inplace, "backend": self.backend} | changes
        return _run(fused_loss, batch, batch.buffer, objective, given)


def check_losses(
    place: Place, case: Case, dtype: torch.dtype, V: int, names: list[str]
) -> list[Found]:
    """Every objective of a batch against the reference in float64, beside that in float32."""
    batch = draw_batch(case, dtype, V, place.sizes, place.device)
    found = []
    for name in names:
        objective = OBJECTIVES[name]
        given = batch.needed(objective)
        honest = _run(reference_loss, batch, batch.buffer, objective, given)
        exact = _run(reference_loss, batch, batch.buffer.double(), objective, given)
        ours, longest = place.run(batch, objective), place.sizes.tokens
        compared = compare_losses(objective, longest, ours, honest, exact)
        found += [Found(name, dtype, str(case), V, comparison) for comparison in compared]
    return found


def check_confident(place: Place, dtype: torch.dtype, V: int) -> list[Found]:
    """Margins up to 30 nats: logp, entropy and gradient of −logp, each relative to its own size."""
    generator = torch.Generator().manual_seed(V)
    N = place.sizes.sequences * place.sizes.tokens
    target = torch.randint(V, (N,), generator=generator)
    logits = 2 * torch.randn(N, V, generator=generator)
    logits = set_margins(logits, target, torch.linspace(0, LARGEST_MARGIN, N))
    logits, target = logits.to(place.device, dtype), target.to(place.device)
    given: dict[str, Any] = {
        "objective": RECIPES["gpg"],
        "advantage": torch.ones(N, device=place.device),
        "sequence_id": torch.arange(N, device=place.device),
    }

    def run(loss: Callable, **options: Any) -> dict[str, Tensor]:
        leaf = logits.clone().requires_grad_()
        out = loss(leaf, target, **given, **options)
        (loss_scale(dtype) * out.loss).backward()
        return {"logp": out.logp, "entropy": out.entropy, "dlogits": leaf.grad}

    exact = exact_tokens(logits, target)
    ours, honest = run(fused_loss, backend=place.backend), run(reference_loss)
    unit = loss_scale(dtype) / N
    where = f"0 to {LARGEST_MARGIN:g} nats"
    return [
        Found("", dtype, where, V, compare_confident(name, ours[name], honest[name], truth, size))
        for name, truth, size in (
            ("logp", exact.logp, 1.0),
            ("entropy", exact.entropy, 1.0),
            ("dlogits", -exact.slope * unit, unit),
        )
    ]


def check_bits(place: Place, dtype: torch.dtype, V: int) -> list[Bits]:
    """A row has the same bits in every plan, batch, view and run."""
    batch = draw_batch(Case("ordinary", "view"), dtype, V, place.sizes, place.device)
    return [
        Bits(claim, dtype, V, ours.numel(), int((ours != same).sum()))
        for claim, ours, same in _pairs(place, batch)
    ]


def _pairs(place: Place, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(claim, numbers, those that must be the same)."""
    view, given = batch.logits(batch.buffer), batch.arguments
    target, T = given["target"], given["temperature"]

    def statistics(logits: Tensor, target: Tensor) -> Tensor:
        found = token_logp(logits, target, temperature=T, backend=place.backend)
        return torch.stack(found, -1)

    def of_loss(result: Result) -> Tensor:
        return torch.stack((result.out.logp, result.out.entropy), -1)

    everyone = {"mask": None}
    stats = statistics(view, target)
    one_pass = place.run(batch, "dapo", **everyone)
    yield "token_logp is the one pass", stats, of_loss(one_pass)
    yield "token_logp is the two phases", stats, of_loss(place.run(batch, "gspo", **everyone))
    again = place.run(batch, "dapo", **everyone)
    yield "a second run is the first", again.dlogits, one_pass.dlogits

    rows, words = view.reshape(-1, view.shape[-1]), target.flatten()
    packed = statistics(rows, words)
    yield "packed rows are the view", packed.view_as(stats), stats
    alone = [statistics(rows[n : n + 1], words[n : n + 1]) for n in range(len(words))]
    yield "a row alone is that of a batch", torch.cat(alone), packed

    inplace = place.run(batch, "dapo", inplace=True, **everyone)
    yield "in place is into a buffer", inplace.dlogits, one_pass.dlogits
    buffer = batch.buffer.clone().requires_grad_() * 1.0
    fused_loss(
        batch.logits(buffer),
        objective="dapo",
        inplace=True,
        backend=place.backend,
        **batch.needed(RECIPES["dapo"]),
    ).loss.backward()
    yield "nothing is written beside a view", buffer.detach()[:, -1], batch.buffer[:, -1]

    policy = {"old_logp": stats[..., 0], "ref_logp": stats[..., 0]}
    out = place.run(batch, "grpo", **everyone, **policy).out
    valid = (target >= 0).float()
    yield "on policy, the ratio is 1", out.ratio, valid
    yield "on policy, the KL is 0", out.kl, torch.zeros_like(out.kl)

    spoilt = batch.buffer.clone()
    spoilt[0, 0, 0] = torch.nan
    healthy = one_pass.dlogits.clone()
    healthy[0, 0] = 0
    dropped = _run(
        fused_loss,
        batch,
        spoilt,
        RECIPES["dapo"],
        batch.needed(RECIPES["dapo"]) | everyone | {"backend": place.backend},
    )
    yield "a NaN spoils its own row alone", dropped.dlogits, healthy


def loss_scale(dtype: torch.dtype) -> float:
    """What a trainer multiplies the loss by before the backward."""
    return FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0


def _run(
    loss: Callable, batch: Batch, buffer: Tensor, objective: str | Objective, given: dict[str, Any]
) -> Result:
    """The loss over a buffer, and its gradient."""
    leaf = buffer.clone().requires_grad_()
    # in place, a leaf must not lose its values
    logits = batch.logits(leaf * 1.0 if given.get("inplace") else leaf)
    out = loss(logits, objective=objective, **given)
    (dlogits,) = torch.autograd.grad(loss_scale(batch.buffer.dtype) * out.loss, leaf)
    return Result(out, dlogits)
