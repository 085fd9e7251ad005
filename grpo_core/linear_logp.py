"""Log-probability and entropy from hidden states, differentiable: for losses that are not ours.

A trainer that keeps its own loss asks for logp and entropy of every target and sends both gradients
back later. The logits of all tokens exist in neither direction: chunks of rows go through the
product and the row kernel, and once more in the backward, followed by the gradient products.

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H)) / T

One product of 2·n·V·D operations forward; backward two with a frozen head and three with a trained
one, for those of the rows that a gradient comes back to (the lean plan: one more). Where the loss
is one of ours, `fused_linear_loss` knows it beforehand and needs one product less.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grpo_core.arguments import Tokens, check_logits, check_target, present
from grpo_core.backends import Backend, choose_backend
from grpo_core.fused_loss import TokenLogp
from grpo_core.kernels.records import RowStats, Slopes
from grpo_core.linear_door import autocast_dtype, stand_in
from grpo_core.linear_head import HEAD_DTYPES, LinearHead, check_head, check_hidden
from grpo_core.linear_lean import LeanSweep
from grpo_core.linear_memory import Plan, Sizes, buffer_bytes, choose_layout
from grpo_core.linear_plans import LinearCall, Sweep, dlogits_dtype
from grpo_core.linear_products import HeadProducts
from grpo_core.linear_rows import scored_rows
from grpo_core.recipes import RECIPES

# of a chunk: rounding logits to 16 bits costs up to 0.05 nats
LOGITS = torch.float32


@dataclass(frozen=True)
class ScoreCall:
    """Everything of a call but its differentiable tensors."""

    target: Tensor  # [N] int64
    valid: Tensor  # [N] bool
    temperature: float
    plan: Plan | None
    memory_budget: int | None
    autocast: torch.dtype | None
    kernels: ModuleType


def linear_logp(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    plan: Plan | None = None,
    memory_budget: int | None = None,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> TokenLogp:
    """Log-probability and entropy of every target, differentiable, without the logits.

    Both can be used in any loss, together or alone, any number of times; a second backward through
    the same outputs (retain_graph) makes the chunks again and is right; a gradient of the gradient
    (create_graph) is refused. Bit for bit the values of `linear_token_logp`.

    A row whose log-probability is not finite shows so, and passes no gradient on.

    Args:
        hidden: [B, T, D], or packed [N, D]; float32, bfloat16 or float16, also as a view.
        lm_head: [V, D], or a `LinearHead` with bias, soft cap, scale, padding or an adapter.
        target: [B, T] or [N] integers, already shifted; -100 means masked.
        temperature: T > 0, the logits are divided by it.
        mask: shaped like target, 0 means masked.
        plan: of the backward: "fast" holds a float32 sum of a narrower head's gradient, "lean"
            does not and takes one product more. None means fast, unless it would not fit.
        memory_budget: bytes to hold beyond inputs and returned gradients, as far as that is
            possible. None means about 1 GiB of logits on a GPU, 64 MiB on a CPU.
        backend, validate: as in `fused_loss`.

    Returns:
        `TokenLogp`: logp and entropy, nats, shaped like target, float32, 0 where masked.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.
    """
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    kernels = choose_backend(backend, hidden)
    logits = stand_in(hidden, head.V)
    check_logits(logits, temperature, HEAD_DTYPES)
    check_target(logits, target, mask, validate)
    flat = target.reshape(-1).long()
    call = ScoreCall(
        target=flat,
        valid=present(target, mask) & (flat >= 0) & (flat < head.V),
        temperature=float(temperature),
        plan=plan,
        memory_budget=memory_budget,
        autocast=autocast_dtype(hidden),
        kernels=kernels,
    )
    logp, entropy = LinearLogp.apply(call, head, hidden, *head.tensors)
    return TokenLogp(logp.view(target.shape), entropy.view(target.shape))


class LinearLogp(torch.autograd.Function):
    """(logp, entropy) `[N]` forward; the chunks once more, with their gradients, backward."""

    @staticmethod
    def forward(
        ctx: Any, call: ScoreCall, head: LinearHead, hidden: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, *others = tensors
        assert weight is not None
        ctx.call = call
        # the record without its tensors: those are saved where autograd looks after them
        ctx.head = head.of(torch.empty(weight.shape, device="meta"), None, None, None)
        ctx.save_for_backward(hidden, *tensors)
        ctx.set_materialize_grads(False)
        return scored_rows(
            hidden,
            head.of(weight, *others),
            call.target,
            call.valid,
            temperature=call.temperature,
            heat=None,
            plan=call.plan,
            memory_budget=call.memory_budget,
            dtype=LOGITS,
            autocast=call.autocast,
            kernels=call.kernels,
        )

    @staticmethod
    def backward(
        ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logp: its gradient cannot be differentiated (create_graph)")
        hidden, weight, *others = ctx.saved_tensors
        head, wanted = ctx.head.of(weight, *others), ctx.needs_input_grad[2:]
        if dlogp is None:
            if dentropy is None:
                return (None,) * len(ctx.needs_input_grad)
            dlogp = torch.zeros_like(dentropy)
        slopes = Slopes(dlogp, dentropy, None)
        with torch.autocast(hidden.device.type, enabled=False):
            return None, None, *_gradients(ctx.call, head, hidden, slopes, wanted)


def _gradients(
    call: ScoreCall, head: LinearHead, hidden: Tensor, slopes: Slopes, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of hidden and the head's tensors, shaped and typed like them."""
    rows = (call.valid & slopes.any).nonzero().squeeze(1)
    some = slopes.at(rows)
    is_all = rows.numel() == call.valid.numel()
    linear = _linear_call(call, head, hidden, rows, is_all, some, wanted)
    kind = LeanLogpSweep if linear.layout.plan == "lean" else LogpSweep
    dhidden, *rest = kind(hidden, head, linear, some)().gradients
    if dhidden is not None:
        dhidden = dhidden.to(hidden.dtype)
        if not is_all:
            full = dhidden.new_zeros(call.valid.numel(), head.D)
            full[rows] = dhidden
            dhidden = full
        dhidden = dhidden.view(hidden.shape)
    pairs = zip(rest, head.tensors, strict=True)
    return [dhidden, *(None if d is None or x is None else d.to(x.dtype) for d, x in pairs)]


def _linear_call(
    call: ScoreCall,
    head: LinearHead,
    hidden: Tensor,
    rows: Tensor,
    is_all: bool,
    slopes: Slopes,
    wanted: tuple[bool, ...],
) -> LinearCall:
    """The sweep over the rows that a gradient comes back to."""
    products = HeadProducts(head, hidden, call.autocast)
    row_bytes = buffer_bytes(
        head.V,
        LOGITS,
        dlogits_dtype(LOGITS, products.compute),
        apart=head.softcap is not None,
        ref=False,
    )
    sizes = Sizes.of(rows.numel(), head, hidden, wanted, row_bytes)
    # where products are of 16 bits, the weight says how far dlogits are to be lifted
    weight = slopes.dlogp.abs()
    if slopes.dentropy is not None:
        weight = torch.maximum(weight, slopes.dentropy.abs())
    there = torch.ones_like(weight, dtype=torch.bool)
    tokens = Tokens(
        objective=RECIPES["gpg"],  # of tokens alone; no term of it is ever evaluated
        target=call.target[rows],
        weight=weight,
        advantage=torch.zeros_like(weight),
        valid=there,
        given=there,
        bad_target=~there,
        sequence_id=None,
        sequences=1,
        width=None,
        normalizer=None,
    )
    return LinearCall(
        tokens=tokens,
        rows=None if is_all else rows,
        lengths=None,
        layout=choose_layout(sizes, call.plan, call.memory_budget, hidden.device),
        wanted=wanted,
        logits_dtype=LOGITS,
        autocast=call.autocast,
        temperature=call.temperature,
        kernels=call.kernels,
        reference=None,
    )


def _of_finite(slopes: Slopes, stats: RowStats) -> Slopes:
    """The slopes with 0 where the log-probability is not finite."""
    bad = ~stats.logp.isfinite()
    return Slopes._make(None if slope is None else slope.masked_fill(bad, 0.0) for slope in slopes)


class LogpSweep(Sweep):
    """A walk over the rows whose slopes are given."""

    def __init__(self, hidden: Tensor, head: LinearHead, call: LinearCall, slopes: Slopes) -> None:
        super().__init__(hidden, head, call)
        self.slopes = slopes

    def _segment(self, chunks: list[slice]) -> None:
        """Logits, statistics, gradients of a chunk; tokens alone come one chunk at a time."""
        (chunk,) = chunks
        self._make_logits(chunk)
        stats = self._read(chunk)
        slopes = _of_finite(self.slopes.at(chunk), stats)
        slopes = slopes if self.lift is None else slopes.times(self.lift)
        self._write_dlogits(self.tokens.target[chunk], slopes, stats)
        self._push(chunk)


class LeanLogpSweep(LeanSweep):
    """The same, slices of the vocabulary at a time."""

    def __init__(self, hidden: Tensor, head: LinearHead, call: LinearCall, slopes: Slopes) -> None:
        super().__init__(hidden, head, call)
        self.slopes = slopes

    def _finish(self, place: slice, stats: RowStats) -> tuple[Tokens, Slopes]:
        """The rows and their slopes."""
        return self.call.tokens, _of_finite(self.slopes, stats)
