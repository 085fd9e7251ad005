"""The lean plan: no float32 sum of the size of lm_head; one product more than the fast plan.

First the statistics of every row, in small chunks; then, a slice of the vocabulary at a time, its
logits once more for all rows, their gradient, and both gradient products. dweight of the slice is
complete then and rounded at once. The softmax is found again from the anchor M and the sum S
that the first reading left behind, see `online_softmax`; logp itself is rounded too coarsely:

    lse = M·log 2 + log(S + exp(x_y/T − M·log 2)),  p_j = exp(x_j/T − lse),  1 − p_y = −expm1(logp)
    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_core.kernels.records import RowStats, Slopes
from grpo_core.linear.call import Swept, joined
from grpo_core.linear.matmuls import LEAST_ROWS, HeadGradients
from grpo_core.linear.plans import Sweep
from grpo_core.linear.walk import Policy, Walk


class LeanSweep(Sweep):
    """Statistics of all rows, then slices of the vocabulary."""

    def __call__(self) -> Swept:
        call = self.call
        parts, x, ref_x, ref_logp = [], [], [], []
        for chunk in call.chunks:
            parts.append(self._stats([chunk]))
            x.append(self.at_target(chunk, self.buffer))
            if self.ref_buffer is not None:
                here = self.ref_buffer.rows(slice(0, chunk.stop - chunk.start))
                target, T = call.target[chunk], call.temperature
                ref_logp.append(call.kernels.row_stats(here, target, T).logp)
                ref_x.append(self.at_target(chunk, self.ref_buffer))
        stats = joined(parts or [self._stats([])])
        tokens, slopes = self._finish(slice(0, call.n), stats)
        self.lift_by(tokens.weight)
        del self.buffer, self.ref_buffer
        empty = stats.logp.new_empty(0)
        words = Words(
            tokens.target,
            call.temperature,
            self.lifted(slopes),
            stats,
            log_sum_exp(stats, torch.cat([empty, *x]), call.temperature),
            None if self.reference is None else torch.cat([empty, *ref_logp]),
            None if self.reference is None else torch.cat([empty, *ref_x]),
        )
        return Swept(self.result, self.factor, self.valid, sliced_gradients(self, words))


def log_sum_exp(stats: RowStats, at_target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """lse of rows whose statistics are known, and their logits at the targets.

    As two addends `[n]` float64, of which the first may be so large that the second is lost in it.
    """
    peak, rest = stats.state[0].double(), stats.state[1].double()
    # unscaled where S is negative
    peak = torch.where(rest < 0, peak / temperature, peak * math.log(2))
    rest = rest.abs()
    return peak, torch.log(rest + torch.exp(at_target.double() / temperature - peak))


def sliced_gradients(walk: Walk, rows: Words) -> list[Tensor | None]:
    """Of hidden `[n, D]` and the head's tensors, a slice of the vocabulary at a time."""
    V, width = walk.head.V, walk.call.layout.width
    walk.still = rows.still
    room = _room(walk)
    for start in range(0, V, width):
        _slice(walk, slice(start, min(start + width, V)), rows, room)
    return walk.finished([walk.dhidden, *room])


def _room(walk: Walk) -> list[Tensor | None]:
    """The head's gradients, zeros; rounded slice by slice unless a loss scale is to come."""
    room: list[Tensor | None] = []
    for tensor, want in zip(walk.head.tensors, walk.call.wanted[1:], strict=True):
        if tensor is None or not want:
            room.append(None)
            continue
        whole = tensor is walk.head.lora_A or tensor.dtype == torch.float16
        dtype = torch.float32 if whole else tensor.dtype
        room.append(torch.zeros(tensor.shape, dtype=dtype, device=tensor.device))
    return room


def _slice(walk: Walk, words: slice, rows: Words, gradients: list[Tensor | None]) -> None:
    """The gradients that a slice of the vocabulary brings."""
    call, policy, device = walk.call, walk.policy, rows.target.device
    width = words.stop - words.start

    def room(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros(width, *tensor.shape[1:], device=device)

    weight, bias, lora_A, lora_B = gradients
    sums = HeadGradients(room(weight), room(bias), lora_A, room(lora_B))
    step = call.layout.slice_rows
    for start in range(0, call.n, step):
        chunk = slice(start, min(start + step, call.n))
        logits = _logits(policy, chunk, words)
        ref = None
        if walk.reference is not None and rows.slopes.dkl is not None:
            ref = _logits(walk.reference, chunk, words)
        before = None if walk.head.softcap is None else logits.clone()
        dlogits = rows.dlogits(chunk, words, logits, ref)
        still = rows.still[chunk]
        policy.products.through(dlogits, before, call.heat_of(chunk), still)
        dhidden = None if walk.dhidden is None else walk.dhidden[chunk]
        dlogits = dlogits.to(policy.products.compute)
        policy.products.gradients(policy.hidden[chunk], dlogits, dhidden, sums, still, words)
    for home, found in zip(gradients, (sums.weight, sums.bias, None, sums.lora_B), strict=True):
        if home is not None and found is not None:
            home[words] = found


def _logits(policy: Policy, chunk: slice, words: slice) -> Tensor:
    """Logits of some rows and words, rounded as the first pass rounded them, float32."""
    hidden, call = policy.hidden[chunk], policy.call
    rows, width = max(hidden.shape[0], LEAST_ROWS), words.stop - words.start
    out = torch.empty(rows, width, dtype=call.logits_dtype, device=hidden.device)
    return policy.products.logits(hidden, out, words, call.heat_of(chunk)).float()


class Words:
    """The gradient of some words' logits, from what is known of each row."""

    def __init__(
        self,
        target: Tensor,
        temperature: float,
        slopes: Slopes,
        stats: RowStats,
        lse: tuple[Tensor, Tensor],
        ref_logp: Tensor | None = None,
        ref_at_target: Tensor | None = None,
    ) -> None:
        self.target, self.temperature, self.slopes, self.stats = target, temperature, slopes, stats
        self.still = ~slopes.any
        # near T·lse the logits that matter lose nothing by the subtraction
        self.centre = ((lse[0] + lse[1]) * temperature).float()
        # what rounding took away goes into every log p, and into the coefficient of every p
        rounding = (self.centre.double() / temperature - lse[0]) - lse[1]
        self.entropy = (stats.entropy + rounding).float()
        self.correction = torch.exp(rounding).float()
        self.ref_lse = None
        if ref_logp is not None and ref_at_target is not None:
            self.ref_lse = ref_at_target / temperature - ref_logp
        self.at_target = self._at_target(ref_logp)

    def _at_target(self, ref_logp: Tensor | None) -> Tensor:
        """dL/dx_y times T of every row, float32 `[n]`."""
        dlogp, dentropy, dkl = self.slopes
        logp = self.stats.logp.double()
        value = -dlogp.double() * torch.expm1(logp)
        possible = logp > -torch.inf
        if dentropy is not None:
            term = dentropy.double() * logp.exp() * (logp + self.stats.entropy)
            value = value - torch.where(possible, term, 0.0)
        if dkl is not None:
            assert ref_logp is not None and self.stats.kl is not None
            term = dkl.double() * logp.exp() * (logp - ref_logp - self.stats.kl)
            value = value + torch.where(possible, term, 0.0)
        return value.float()

    def dlogits(
        self, chunk: slice, words: slice, logits: Tensor, ref_logits: Tensor | None
    ) -> Tensor:
        """dL by the logits `[n, words]` of some rows, over them; uses up `ref_logits`."""
        T = self.temperature
        dlogp, dentropy, dkl = self.slopes.at(chunk)
        correction = self.correction[chunk]
        log_p = logits.sub_(self.centre[chunk, None])
        log_p = log_p if T == 1 else log_p.div_(T)
        if dentropy is None and dkl is None:
            dlogits = log_p.exp_().mul_((-dlogp * correction)[:, None])
        else:
            factor = -dlogp[:, None].expand_as(log_p)
            if dentropy is not None:
                slope = (log_p + self.entropy[chunk, None]).mul_(-dentropy[:, None])
                factor = slope.add_(factor)
            if dkl is not None:
                assert ref_logits is not None and self.ref_lse is not None
                assert self.stats.kl is not None
                log_q = ref_logits.div_(T).sub_(self.ref_lse[chunk, None])
                slope = log_q.neg_().add_(log_p).sub_(self.stats.kl[chunk, None])
                factor = slope.mul_(dkl[:, None]).add_(factor)
            p = log_p.exp_().mul_(correction[:, None])
            # 0·(−inf): a forbidden word has no gradient
            dlogits = factor.mul_(p).masked_fill_(~(p > 0), 0.0)
        target = self.target[chunk]
        mine = ((target >= words.start) & (target < words.stop)).nonzero().squeeze(1)
        dlogits[mine, target[mine] - words.start] = self.at_target[chunk][mine]
        dlogits.index_fill_(0, self.still[chunk].nonzero().squeeze(1), 0.0)
        return dlogits if T == 1 else dlogits.div_(T)
