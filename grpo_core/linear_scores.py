"""Differentiable statistics of tokens, from hidden states: for a loss that is made elsewhere.

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H)) / T

| what is wanted                            | products of 2·n·V·D operations                    |
|-------------------------------------------|---------------------------------------------------|
| no gradient                               | 1                                                 |
| gradients, head frozen, of logp alone     | 2, both in the forward: dlogp only scales rows    |
| gradients, head frozen, of entropy, too   | 2, and 2 in the backward                          |
| gradients, head trained                   | 1, and 3 in the backward over rows that have some |

Where the loss is one of ours, `fused_linear_loss` does without making logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_core.arguments import check_logits, check_target
from grpo_core.backends import Backend, choose_backend
from grpo_core.kernels.records import RowStats, Slopes
from grpo_core.linear_door import autocast_dtype, dtype_of_logits, stand_in
from grpo_core.linear_head import HEAD_DTYPES, LinearHead, check_head, check_hidden
from grpo_core.linear_memory import ChunkBuffer, Sizes, buffer_bytes, choose_layout
from grpo_core.linear_plans import HiddenRows, dlogits_dtype, joined
from grpo_core.linear_products import HeadGradients, HeadProducts

FURTHER = ("log_sum_sq_probs", "mean_logits", "is_top1")
# of the temporaries that the further outputs take: a few rows at a time, in cache
BLOCK_BYTES = 2**22


class LinearScores(NamedTuple):
    """Of each of N rows, float32 `[N]`; what was not asked for is None."""

    logp: Tensor  # nats, differentiable
    entropy: Tensor  # nats, differentiable
    log_sum_sq_probs: Tensor | None  # log Σ_j p_j²
    mean_logits: Tensor | None  # of logits / T, over the vocabulary
    is_top1: Tensor | None  # bool, whether the target is the first of the largest logits


@dataclass(frozen=True)
class _Call:
    """Everything of a call but its differentiable tensors."""

    target: Tensor  # [N] int64
    temperature: float
    further: tuple[str, ...]
    step: int  # rows of a chunk
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias, lora_A, lora_B
    logits_dtype: torch.dtype
    autocast: torch.dtype | None
    kernels: ModuleType
    gathered: Callable[[], AbstractContextManager[object]]

    def chunks(self, n: int) -> list[slice]:
        """n rows, as many at a time as fit."""
        return [slice(i, min(i + self.step, n)) for i in range(0, n, self.step)]


def linear_scores(
    hidden: Tensor,
    lm_head: Tensor | LinearHead,
    target: Tensor,
    *,
    temperature: float = 1.0,
    further: Collection[str] = (),
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    gathered: Callable[[], AbstractContextManager[object]] = nullcontext,
    backend: Backend | None = None,
    validate: bool | None = None,
) -> LinearScores:
    """Log-probability and entropy of every target, differentiable, and more if it is asked for.

    Differentiated by `hidden` and the tensors of `lm_head` that require a gradient, through logp
    and entropy. Logits are never all there; they are made again in the backward, for rows whose
    gradient is not 0.

    Args:
        hidden: [N, D]; float32, bfloat16 or float16.
        lm_head: [V, D], or a `LinearHead`.
        target: [N] integers in [0, V).
        temperature: T > 0, the logits are divided by it.
        further: names out of log_sum_sq_probs, mean_logits and is_top1.
        memory_budget, logits_dtype, backend, validate: as in `fused_linear_loss`.
        gathered: a context that the backward enters to use the head, for weights that are spread
            over ranks outside of it.

    Returns:
        `LinearScores`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a backend asked for by name that cannot run here.
    """
    head = check_head("lm_head", lm_head, check_hidden("hidden", hidden))
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected [N, D], got {list(hidden.shape)}")
    unknown = [name for name in further if name not in FURTHER]
    if unknown:
        raise ValueError(f"further: expected names out of {FURTHER}, got {unknown[0]!r}")
    dtype = dtype_of_logits(logits_dtype)
    logits = stand_in(hidden, head.V)
    check_logits(logits, temperature, HEAD_DTYPES)
    check_target(logits, target, None, validate)
    device, tensors = hidden.device, (hidden, *head.tensors)
    autocast = autocast_dtype(hidden)
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in tensors
    )
    narrow = None
    if any(wanted):
        narrow = dlogits_dtype(dtype, HeadProducts(head, hidden, autocast).compute)
    row_bytes = buffer_bytes(head.V, dtype, narrow, apart=head.softcap is not None, ref=False)
    sizes = Sizes.of(target.numel(), head, hidden, wanted, row_bytes)
    call = _Call(
        target=target.long(),
        temperature=float(temperature),
        further=tuple(further),
        step=choose_layout(sizes, "fast", memory_budget, device).rows,
        wanted=wanted,
        logits_dtype=dtype,
        autocast=autocast,
        kernels=choose_backend(backend, hidden),
        gathered=gathered,
    )
    logp, entropy, *others = _Scores.apply(call, head, *tensors)
    found = dict(zip(call.further, others, strict=True))
    return LinearScores(logp, entropy, *(found.get(name) for name in FURTHER))


class _Scores(torch.autograd.Function):
    """Statistics in the forward; their gradients in the backward, or ahead of it."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, head: LinearHead, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        hidden, weight, *others = tensors
        assert hidden is not None and weight is not None
        # a row's gradient is dlogp times that of dlogp = 1, which the logits at hand give
        ahead = call.wanted == (True, False, False, False, False)
        with torch.autocast(hidden.device.type, enabled=False):
            walk = _Walk(call, head.of(weight, *others), hidden, None, gradient=ahead)
            stats, further = walk.read(ahead=ahead)
        ctx.call = call
        # the record without its tensors: those are saved where autograd looks after them
        ctx.head = head.of(torch.empty(head.weight.shape, device="meta"), None, None, None)
        ctx.save_for_backward(*tensors, stats.logp, stats.entropy, stats.state, walk.dhidden)
        ctx.mark_non_differentiable(*further)
        ctx.set_materialize_grads(False)
        return stats.logp, stats.entropy, *further

    @staticmethod
    def backward(
        ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_scores: its gradient cannot be differentiated")
        call: _Call = ctx.call
        *tensors, logp, entropy, state, ahead = ctx.saved_tensors
        hidden, weight, *others = tensors
        slopes = Slopes(
            torch.zeros_like(logp) if dlogp is None else dlogp.float().contiguous(),
            None if dentropy is None else dentropy.float().contiguous(),
            None,
        )
        if ahead is not None and dentropy is None:
            still = slopes.dlogp == 0
            scaled = (ahead * slopes.dlogp[:, None]).masked_fill_(still[:, None], 0.0)
            return None, None, scaled.to(hidden.dtype), None, None, None, None
        rows = slopes.any.nonzero().squeeze(1)
        some = slopes.at(rows)
        stats = RowStats(logp[rows], entropy[rows], None, state[:, rows].contiguous())
        with call.gathered(), torch.autocast(hidden.device.type, enabled=False):
            walk = _Walk(call, ctx.head.of(weight, *others), hidden, rows, gradient=True)
            sums = walk.push(some, stats)
        gradients: list[Tensor | None] = [None]
        if walk.dhidden is not None:
            gradients = [hidden.new_zeros(hidden.shape)]
            gradients[0][rows] = walk.dhidden.to(hidden.dtype)  # type: ignore[index]
        for tensor, total in zip(tensors[1:], sums, strict=True):
            gradients.append(None if total is None else total.to(tensor.dtype))
        return None, None, *gradients


class _Walk:
    """One walk over some rows, chunk by chunk, with the buffer it uses again."""

    def __init__(
        self,
        call: _Call,
        head: LinearHead,
        hidden: Tensor,
        rows: Tensor | None,
        *,
        gradient: bool,
    ) -> None:
        self.call, self.head = call, head
        self.n = call.target.numel() if rows is None else rows.numel()
        self.target = call.target if rows is None else call.target[rows]
        self.hidden = HiddenRows(hidden, rows)
        self.products = HeadProducts(head, hidden, call.autocast)
        device, room = hidden.device, min(call.step, max(self.n, 1))
        dtype = dlogits_dtype(call.logits_dtype, self.products.compute) if gradient else None
        self.buffer = ChunkBuffer(
            room,
            head.V,
            call.logits_dtype,
            dtype,
            device,
            apart=gradient and head.softcap is not None,
        )
        self.sums = HeadGradients.of(head, call.wanted[1:] if gradient else (False,) * 4)
        self.dhidden: Tensor | None = None
        if gradient and call.wanted[0]:
            self.dhidden = torch.empty(self.n, head.D, dtype=torch.float32, device=device)

    @torch.no_grad()
    def read(self, *, ahead: bool) -> tuple[RowStats, list[Tensor]]:
        """Statistics of every row and the further outputs; `ahead` leaves dlogp/dhidden behind."""
        parts, more = [], []
        for chunk in self.call.chunks(self.n) or [slice(0, 0)]:
            n = chunk.stop - chunk.start
            self.products.logits(self.hidden[chunk], self.buffer.logits)
            rows, target = self.buffer.rows(slice(0, n)), self.target[chunk]
            stats = self.call.kernels.row_stats(rows, target, self.call.temperature, None)
            parts.append(stats)
            more.append(self._further(self.buffer.logits[:n], target))
            if ahead:
                self._gradients(chunk, Slopes(torch.ones_like(stats.logp), None, None), stats)
        return joined(parts), [torch.cat(pieces) for pieces in zip(*more, strict=True)]

    @torch.no_grad()
    def push(self, slopes: Slopes, stats: RowStats) -> list[Tensor | None]:
        """The gradients of the head's tensors; that of the rows' hidden states stays here."""
        lift = None
        if self.products.compute == torch.float16 and self.n:
            # dlogits in float16 would underflow
            largest = torch.stack([s.abs().amax() for s in slopes if s is not None]).amax()
            lift = torch.exp2(torch.floor(-torch.log2(largest)))
            slopes = slopes.times(lift)
        for chunk in self.call.chunks(self.n):
            self.products.logits(self.hidden[chunk], self.buffer.logits)
            self._gradients(chunk, slopes.at(chunk), stats.at(chunk))
        sums = self.sums.finished()
        for tensor in (self.dhidden, *sums):
            if lift is not None and tensor is not None:
                tensor.div_(lift)
        return sums

    def _gradients(self, chunk: slice, slopes: Slopes, stats: RowStats) -> None:
        """dlogits of the chunk in the buffer, and the products with them."""
        n, target = chunk.stop - chunk.start, self.target[chunk]
        for place, dlogits in self.buffer.launches(n):
            self.call.kernels.row_dlogits(
                self.buffer.rows(place),
                target[place],
                self.call.temperature,
                slopes.at(place),
                stats.at(place),
                dlogits,
                None,
            )
        assert self.buffer.dlogits is not None
        dlogits = self.buffer.dlogits[:n]
        self.products.through(dlogits, self.buffer.logits[:n])
        dhidden = None if self.dhidden is None else self.dhidden[chunk]
        self.products.gradients(self.hidden[chunk], dlogits, dhidden, self.sums)

    def _further(self, logits: Tensor, target: Tensor) -> list[Tensor]:
        """The further outputs that are wanted, of the logits [n, V] of a chunk."""
        wanted = self.call.further
        if not wanted:
            return []
        step = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
        blocks = []
        for start in range(0, max(len(logits), 1), step):
            z = logits[start : start + step].float() / self.call.temperature
            found = {}
            if "is_top1" in wanted:
                # the first of the largest
                found["is_top1"] = z.argmax(1) == target[start : start + step]
            if "mean_logits" in wanted:
                found["mean_logits"] = z.mean(1)
            if "log_sum_sq_probs" in wanted:
                p = z.sub_(z.amax(1, keepdim=True)).exp_()
                total = p.sum(1)
                found["log_sum_sq_probs"] = p.square_().sum(1).log() - 2 * total.log()
            blocks.append([found[name] for name in wanted])
        return [torch.cat(pieces) for pieces in zip(*blocks, strict=True)]
