"""The lean plan: no float32 accumulator as large as lm_head, one product more than the fast plan.

The first phase reads the statistics of every row, in small chunks. The second goes over slices of
the vocabulary: logits of all rows, their gradient, and both gradient products. After a slice its
part of dweight is complete and is rounded to the parameter's dtype. The softmax is recomputed from
the anchor M and the sum S of the first phase, see `online_softmax`, because logp is rounded too
coarsely:

    lse = M·log 2 + log(S + exp(x_y/T − M·log 2)),  p_j = exp(x_j/T − lse),  1 − p_y = −expm1(logp)
    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T

The last term is another with another divergence than the reverse KL, see `exact_kl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.backends.kept import KeptRows
from grpo_core.backends.pytorch import log_to_mixture, natural_sums, weigh
from grpo_core.kernels.records import RowGradients, Rows, RowStats
from grpo_core.linear.chunks import LossRows, read_chunks
from grpo_core.linear.matmuls import LEAST_ROWS, HeadProducts
from grpo_core.linear.workspace import Workspace
from grpo_core.loss.autograd import loss_of_statistics
from grpo_core.loss.tokens import Tokens


def loss_over_slices(work: Workspace, tokens: Tokens) -> LossRows:
    """Loss and gradients of every row: statistics of all rows, then slices of the vocabulary."""
    call, T = work.call, work.call.temperature

    def at_targets(chunk: slice) -> list[Tensor]:
        """Logits at the targets; of the reference also logp."""
        target, ref_logits = call.target[chunk], work.rows_of(chunk).ref_logits
        vectors = [gather_target_logits(work.logits, target)]
        if ref_logits is not None:
            ref_logp = work.kernels_of(chunk).row_stats(Rows(ref_logits, T), target).logp
            vectors += [gather_target_logits(ref_logits, target), ref_logp]
        return vectors

    stats, (target_logit, *of_reference) = read_chunks(work, extra_vectors=at_targets)
    result, complete = loss_of_statistics(stats, tokens, call.kernels)
    work.choose_loss_scale(complete.largest_weight)
    row_gradients = work.scaled(complete.gradients(result))
    vectors, kind = (target_logit, *of_reference), tokens.objective.interpolation
    softmax = SoftmaxRows(complete.target, T, row_gradients, stats, *vectors, interpolation=kind)
    add_gradients_of_slices(work, softmax)
    return LossRows.of(result, complete)


def gather_target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """`[n]` float32: the logits at the targets, of the first n rows."""
    return logits[: len(target)].gather(1, target[:, None]).squeeze(1).float()


def add_gradients_of_slices(work: Workspace, softmax: SoftmaxRows) -> None:
    """Adds the gradients of all rows to `work`; frees the buffers of the first phase."""
    work.free_buffers()
    work.zero, V, width = softmax.zero, work.head.V, work.layout.width
    if work.dhidden is not None:
        work.dhidden.zero_()
    for k, tensor in enumerate(work.head.tensors):
        if tensor is not None and work.call.wanted[k + 1]:
            # rounded slice by slice, unless all slices add to it or a loss scale follows
            whole = tensor is work.head.lora_A or tensor.dtype == torch.float16
            dtype = torch.float32 if whole else tensor.dtype
            work.sums[k] = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    for start in range(0, V, width):
        _add_slice(work, softmax, slice(start, min(start + width, V)))


def _add_slice(work: Workspace, softmax: SoftmaxRows, columns: slice) -> None:
    """Adds the gradients of a slice of the vocabulary."""
    products, device = work.products, softmax.target.device
    sums: list[Tensor | None] = []
    for total in work.sums:
        shape = None if total is None else (columns.stop - columns.start, *total.shape[1:])
        sums.append(None if shape is None else torch.zeros(shape, device=device))
    # the only one to which every slice adds
    sums[2] = work.sums[2]
    step, n = work.layout.slice_rows, len(softmax.target)
    for start in range(0, n, step):
        chunk = slice(start, min(start + step, n))
        logits, ref_logits = _logits(work, products, chunk, columns), None
        if work.reference is not None and softmax.row_gradients.dkl is not None:
            ref_logits = _logits(work, work.reference, chunk, columns)
        before = None if work.head.softcap is None else logits.clone()
        dlogits = softmax.dlogits(chunk, columns, logits, ref_logits)
        kernels = work.kernels_of(chunk)
        if isinstance(kernels, KeptRows):
            kernels.zero_others(dlogits, columns)
        products.through_softcap(dlogits, before)
        dhidden = None if work.dhidden is None else work.dhidden[chunk]
        dlogits, zero = dlogits.to(products.compute), softmax.zero[chunk]
        products.add_gradients(
            chunk, dlogits, zero, dhidden, sums, first=start == 0, columns=columns
        )
    for total, part in zip(work.sums, sums, strict=True):
        if total is not None and part is not None and part is not total:
            total[columns] = part


def _logits(work: Workspace, products: HeadProducts, chunk: slice, columns: slice) -> Tensor:
    """Logits of some rows and columns in float32, rounded as in the first phase."""
    rows = max(chunk.stop - chunk.start, LEAST_ROWS)
    shape, dtype = (rows, columns.stop - columns.start), work.call.logits_dtype
    out = torch.empty(shape, dtype=dtype, device=work.zero.device)
    return products.logits(chunk, out, columns).float()


class SoftmaxRows:
    """The softmax of n rows, and the gradient of their logits.

    Args:
        target: [n] int64.
        row_gradients, stats: of the rows.
        target_logit, ref_target_logit: [n] float32, the logits at the targets.
        ref_logp: [n] float32, of the reference, for the exact KL.
        interpolation: of the exact KL.
    """

    def __init__(
        self,
        target: Tensor,
        temperature: float,
        row_gradients: RowGradients,
        stats: RowStats,
        target_logit: Tensor,
        ref_target_logit: Tensor | None = None,
        ref_logp: Tensor | None = None,
        *,
        interpolation: float = 1.0,
    ) -> None:
        T = self.temperature = temperature
        self.target, self.row_gradients, self.kl = target, row_gradients, stats.kl
        self.zero = ~row_gradients.any
        # the log-sum-exp is the sum of two numbers, of which the first may be far larger
        anchor, others = natural_sums(stats.state, T)
        log_sum = torch.log(others + torch.exp(target_logit.double() / T - anchor))
        # logits near T·lse, which have the large p, are subtracted without rounding
        self.centre = ((anchor + log_sum) * T).float()
        # the rounding error is added to every log p, and multiplies every p
        rounding = (self.centre.double() / T - anchor) - log_sum
        self.entropy = (stats.entropy + rounding).float()
        self.correction = torch.exp(rounding).float()
        self.ref_lse = None
        if ref_logp is not None and ref_target_logit is not None:
            self.ref_lse = ref_target_logit / T - ref_logp
        self.interpolation = interpolation
        if ref_logp is not None and 0 < interpolation < 1:
            # KL(p ‖ m), of the target and of the others
            to_mixture = log_to_mixture(stats.logp, ref_logp, interpolation)
            self.kl = weigh(stats.logp, to_mixture) + stats.state[-1]
        if row_gradients.dkl is not None and self.ref_lse is not None and self.kl is not None:
            # a KL that has no part in the gradient may be infinite or NaN
            self.without_kl = row_gradients.dkl == 0
            self.kl, self.ref_lse = (
                x.masked_fill(self.without_kl, 0.0) for x in (self.kl, self.ref_lse)
            )
        self.target_gradient = _gradient_at_target(row_gradients, stats, ref_logp, interpolation)

    def dlogits(
        self, chunk: slice, columns: slice, logits: Tensor, ref_logits: Tensor | None
    ) -> Tensor:
        """dL/dx `[n, columns]` of some rows; overwrites the logits and `ref_logits`."""
        T = self.temperature
        dlogp, dentropy, dkl = self.row_gradients.at(chunk)
        correction = self.correction[chunk]
        log_p = logits.sub_(self.centre[chunk, None])
        log_p = log_p if T == 1 else log_p.div_(T)
        if dentropy is None and dkl is None:
            dlogits = log_p.exp_().mul_((-dlogp * correction)[:, None])
        else:
            factor = -dlogp[:, None].expand_as(log_p)
            if dentropy is not None:
                term = (log_p + self.entropy[chunk, None]).mul_(-dentropy[:, None])
                factor = term.add_(factor)
            if dkl is not None:
                assert ref_logits is not None and self.ref_lse is not None and self.kl is not None
                log_q, beta = ref_logits.div_(T).sub_(self.ref_lse[chunk, None]), self.interpolation
                log_q.masked_fill_(self.without_kl[chunk, None], 0.0)
                if beta == 1:
                    term = log_q.neg_().add_(log_p).sub_(self.kl[chunk, None])
                    factor = term.mul_(dkl[:, None]).add_(factor)
                elif beta == 0:
                    factor = factor + dkl[:, None]
                else:
                    # log p/m; beyond e^80 of q/p there is next to no p
                    term = log_q.sub_(log_p).clamp_(max=80).expm1_().mul_(beta).log1p_().neg_()
                    term = term.sub_(self.kl[chunk, None]).mul_((1 - beta) * dkl[:, None])
                    factor = term.add_(factor)
            p = log_p.exp_().mul_(correction[:, None])
            # 0·(−inf): an entry of probability 0 has no gradient
            dlogits = factor.mul_(p).masked_fill_(~(p > 0), 0.0)
            if dkl is not None and self.interpolation == 0:
                # p − q
                dlogits.sub_(log_q.exp_().mul_(dkl[:, None]))
        target = self.target[chunk]
        here = ((target >= columns.start) & (target < columns.stop)).nonzero().squeeze(1)
        dlogits[here, target[here] - columns.start] = self.target_gradient[chunk][here]
        dlogits.index_fill_(0, self.zero[chunk].nonzero().squeeze(1), 0.0)
        return dlogits if T == 1 else dlogits.div_(T)


def _gradient_at_target(
    row_gradients: RowGradients, stats: RowStats, ref_logp: Tensor | None, beta: float
) -> Tensor:
    """dL/dx_y times T of every row, float32 `[n]`."""
    logp, p = stats.logp.double(), stats.logp.double().exp()
    value = -row_gradients.dlogp.double() * torch.expm1(logp)
    possible = logp > -torch.inf
    if row_gradients.dentropy is not None:
        term = row_gradients.dentropy.double() * p * (logp + stats.entropy)
        value = value - torch.where(possible, term, 0.0)
    if row_gradients.dkl is not None:
        assert ref_logp is not None and stats.kl is not None
        if beta == 1:
            term = p * (logp - ref_logp - stats.kl)
        elif beta == 0:
            # p − q
            term = torch.expm1(logp) - torch.expm1(ref_logp.double())
        else:
            of_target = weigh(logp, log_to_mixture(logp, ref_logp.double(), beta))
            term = (1 - beta) * (-of_target * torch.expm1(logp) - p * stats.state[-1])
        possible = possible & (row_gradients.dkl != 0)
        value = value + torch.where(possible, row_gradients.dkl.double() * term, 0.0)
    return value.float()
