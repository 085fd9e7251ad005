"""Rows of logits: statistics of a target, the loss of its token, the gradient of every logit.

A row is read block by block: each is loaded, its largest logit found, and its powers are summed
relative to the largest logit so far. The sums of the blocks are added in float64. The target is
left out, as in `kernels/token_statistics.py`: with S = Σ_{j≠y} 2^c over the others and
z = log S − log of the target's power, logp = −softplus(z) and 1 − p_y = sigmoid(z) have all their
digits however confident the token. The gradient is written while the row is still in the cache:

    dL/dx_j = (dlogp·(δ_{j,y} − p_j) − dentropy·p_j·(log p_j + H) + dkl·p_j·(log p_j/q_j − KL)) / T

or with another divergence than the reverse KL, see `kernels/exact_kl.py`.

A row is computed by one thread in the order of its columns, so its bits depend neither on the
batch nor on the number of threads nor on where the row lies.

`loss_rows`, `stats_rows` and `gradient_rows` are the three kernels; a place of rows is
(rows per batch, stride of batches, stride of rows). An array of length 0 stands for None.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from grpo_core.backends.cpu.compiler import BLOCK, claim, compile_kernel, compiled, sources
from grpo_core.backends.cpu.vectors import (
    LEAST,
    LN2,
    call_formula,
    clear,
    load,
    load_others,
    prefetch,
    scale_powers,
    store,
    sum_gaps,
    sum_mixtures,
    sum_powers,
    weigh_differences,
    weigh_gaps,
    weigh_mixtures,
    weigh_powers,
    widen,
)

# nats of a row in which another token than the target is nearly certain, as in the Triton kernels
SURE = 0.125


@compiled
def row_slice(n, place, V):
    """Where the logits of row n are."""
    rows_per_batch, batch_stride, row_stride = place
    start = (n // rows_per_batch) * batch_stride + (n % rows_per_batch) * row_stride
    return slice(start, start + V)


@compiled
def rebase(old, new, scale, total, moment):
    """(Σ 2^c, Σ 2^c·c) relative to a larger anchor."""
    if total == 0:
        return total, moment
    shift = (np.float64(old) - np.float64(new)) * scale
    factor = 2.0**shift
    return factor * total, factor * (moment + shift * total)


@compiled
def read_sums(row, ref_row, target, scale, interpolation, blocks):
    """(anchor, Σ 2^c, Σ 2^c·c) without the target, (anchor, Σ 2^c) of π_ref, Σ 2^c·(c − c_ref).

    An anchor is the largest logit of the other columns. For the forward KL the last sum is
    Σ 2^c_ref·(c_ref − c), for a mixture and without a reference 0.
    """
    block, ref_block, V, step = blocks[0], blocks[1], len(row), np.float32(scale)
    anchor, total, moment = LEAST, 0.0, 0.0
    ref_anchor, ref_total, gap = LEAST, 0.0, 0.0
    for first in range(0, V, BLOCK):
        count = min(BLOCK, V - first)
        if ref_row is None:
            # in halves: a core waits for few cache lines at a time
            prefetch(row, first + count, count // 2)
        top = load_others(row, first, count, target - first, block)
        if ref_row is None:
            prefetch(row, first + count + count // 2, count // 2)
        else:
            ref_top = load_others(ref_row, first, count, target - first, ref_block)
            if not ref_top <= ref_anchor:
                shift = (np.float64(ref_anchor) - np.float64(ref_top)) * scale
                if interpolation == 0:
                    _, gap = rebase(ref_anchor, ref_top, scale, ref_total, gap)
                else:
                    gap -= shift * total if total > 0 else 0.0
                ref_total *= 2.0**shift
                ref_anchor = ref_top
        if not top <= anchor:
            if ref_row is not None and interpolation == 0:
                shift = (np.float64(anchor) - np.float64(top)) * scale
                gap -= shift * ref_total if ref_total > 0 else 0.0
            elif ref_row is not None:
                _, gap = rebase(anchor, top, scale, total, gap)
            total, moment = rebase(anchor, top, scale, total, moment)
            anchor = top
        powers, moments = sum_powers(block, count, anchor, step)
        total += powers
        moment += moments
        if ref_row is not None:
            if interpolation == 1:
                gap += sum_gaps(block, ref_block, count, anchor, ref_anchor, step)
            elif interpolation == 0:
                gap += sum_gaps(ref_block, block, count, ref_anchor, anchor, step)
            else:
                gap = 0.0
            ref_total += sum_powers(ref_block, count, ref_anchor, step)[0]
    return anchor, total, moment, ref_anchor, ref_total, gap


@compiled
def mixture_numbers(of_token, ref_of_token, total, ref_total, interpolation):
    """(p per 2^c, q per 2^c_ref, log₂ of the second over the first, β) of the other columns."""
    # a total of 0 has no powers
    share = of_token[3] / total if total > 0 else 0.0
    ref_share = ref_of_token[3] / ref_total if ref_total > 0 else 0.0
    shift = ref_of_token[1] - of_token[1] - (math.log(ref_total) - math.log(total))
    return (
        np.float32(share),
        np.float32(ref_share),
        np.float32(shift / LN2),
        np.float32(interpolation),
    )


@compiled
def target_to_mixture(logp, ref_logp, beta):
    """(log p/m, log q/m), nats, m = (1 − β)·p + β·q: exact for likely and impossible targets."""
    gap = ref_logp - logp
    if logp == -np.inf:
        gap = np.inf
    if ref_logp == -np.inf:
        gap = -np.inf
    weight = 1 - beta if gap > 0 else beta
    missing = -weight * math.expm1(-abs(gap))
    if missing < 0.5:
        log_m = math.log1p(-missing)
    else:
        log_m = math.log((1 - weight) + weight * math.exp(-abs(gap)))
    return -log_m - max(gap, 0.0), min(gap, 0.0) - log_m


@compiled
def read_mixture(row, ref_row, target, scale, anchors, numbers, blocks):
    """The sums of `sum_mixtures` over the other columns."""
    block, ref_block, V = blocks[0], blocks[1], len(row)
    both, of_policy = 0.0, 0.0
    for first in range(0, V, BLOCK):
        count = min(BLOCK, V - first)
        load_others(row, first, count, target - first, block)
        load_others(ref_row, first, count, target - first, ref_block)
        sums = sum_mixtures(block, ref_block, count, anchors, np.float32(scale), numbers)
        both += sums[0]
        of_policy += sums[1]
    return both, of_policy


@compiled
def sides(z):
    """(log p, log(1 − p), p, 1 − p) with p = 1/(1 + eᶻ), each with full relative precision."""
    power = math.exp(-abs(z))
    softplus = math.log1p(power)
    larger, smaller = 1 / (1 + power), power / (1 + power)
    if z > 0:
        return -z - softplus, -softplus, smaller, larger
    return -softplus, z - softplus, larger, smaller


@compiled
def target_gap(row, target, scale, anchor, log_total):
    """z = log Σ_{j≠y} exp(x_j/T) − x_y/T, nats; NaN for an infinite target logit."""
    logit = np.float64(widen(row[target]))
    if logit == np.inf:
        return np.nan
    return log_total - (logit - np.float64(anchor)) * (scale * LN2)


@compiled
def read_below_sure(row, target, scale, anchor, block):
    """(w, Σ_{j≠w} 2^c, Σ_{j≠w} 2^c·c) of the likeliest other column w, c relative to it.

    p_w = 1/(1 + Σ 2^c) and H = log(1 + Σ 2^c) + (log p_w + H), where nothing cancels:
    log p_w + H = −p_w·log 2·Σ 2^c·c.
    """
    sure, total, moment, V = -1, 0.0, 0.0, len(row)
    for first in range(0, V, BLOCK):
        count = min(BLOCK, V - first)
        load(row, first, count, block)
        if sure < 0:
            for j in range(count):
                if block[j] == anchor and first + j != target:
                    sure = first + j
                    block[j] = -np.inf
                    break
        powers, moments = sum_powers(block, count, anchor, np.float32(scale))
        total += powers
        moment += moments
    return sure, total, moment


@compiled
def entropy_of(of_token, total, log_total, moment):
    """Entropy of a row, nats: h(p_y) + (1 − p_y)·H_others, from `sides`."""
    logp, log_others, p_target, p_others = of_token
    # not 0, or NaN
    entropy = 0.0
    if p_others != 0:
        entropy += p_others * (log_total - LN2 * moment / total - log_others)
    if p_target != 0:
        entropy -= p_target * logp
    return entropy


@compiled
def exact_kl_of(of_token, ref_of_token, total, log_ratio, gap):
    """KL(π ‖ π_ref) of a row over the whole vocabulary, nats; `log_ratio` = log S/S_ref."""
    logp, log_others, p_target, p_others = of_token
    ref_logp, ref_log_others, _, _ = ref_of_token
    kl = 0.0
    if p_others != 0:
        kl_others = LN2 * gap / total - log_ratio
        # where the reference knows no other token, inf − inf
        if ref_log_others == -np.inf:
            kl_others = np.inf
        kl += p_others * (log_others - max(ref_log_others, LEAST) + kl_others)
    if p_target != 0:
        kl += p_target * (logp - ref_logp)
    return kl


@compiled
def read_statistics(row, ref_row, target, scale, interpolation, blocks):
    """(logp, KL, entropy, anchor, S, anchor and S of the reference, of_kl) of a row, float32.

    `of_kl` is the KL, or KL(π ‖ m) of a mixture without the target's part.
    """
    kl, of_kl = 0.0, 0.0
    anchor, total, moment, ref_anchor, ref_total, gap = read_sums(
        row, ref_row, target, scale, interpolation, blocks
    )
    log_total = math.log(total)
    z = target_gap(row, target, scale, anchor, log_total)
    of_token = sides(z)
    entropy = entropy_of(of_token, total, log_total, moment)
    if z > 0 and entropy < SURE:
        # log S has rounded away all but the likeliest token
        _, below, moment = read_below_sure(row, target, scale, anchor, blocks[0])
        entropy = math.log1p(below) - LN2 * moment / (1 + below)
    if ref_row is not None:
        ref_log_total = math.log(ref_total)
        ref_z = target_gap(ref_row, target, scale, ref_anchor, ref_log_total)
        ref_of_token = sides(ref_z)
        if interpolation == 1:
            kl = exact_kl_of(of_token, ref_of_token, total, log_total - ref_log_total, gap)
        elif interpolation == 0:
            kl = exact_kl_of(ref_of_token, of_token, ref_total, ref_log_total - log_total, gap)
        else:
            numbers = mixture_numbers(of_token, ref_of_token, total, ref_total, interpolation)
            anchors = (anchor, ref_anchor)
            kl, of_kl = read_mixture(row, ref_row, target, scale, anchors, numbers, blocks)
            kl, of_kl = LN2 * kl, LN2 * of_kl
            to_p, to_q = target_to_mixture(of_token[0], ref_of_token[0], interpolation)
            # not 0, or NaN
            if of_token[2] != 0:
                kl += (1 - interpolation) * of_token[2] * to_p
            if ref_of_token[2] != 0:
                kl += interpolation * ref_of_token[2] * to_q
        if interpolation == 0 or interpolation == 1:
            of_kl = kl
    return (
        np.float32(of_token[0]),
        np.float32(kl),
        np.float32(entropy),
        anchor,
        np.float32(total),
        ref_anchor,
        np.float32(ref_total),
        np.float32(of_kl),
    )


@compiled
def weigh(block, ref_block, count, anchors, scale, factors, numbers):
    """Replaces each logit by its gradient; `numbers` = `mixture_numbers`, of which β counts."""
    _, _, shift, beta = numbers
    if beta == 1:
        weigh_gaps(block, ref_block, count, anchors, scale, factors)
    elif beta == 0:
        weigh_differences(block, ref_block, count, anchors, scale, factors)
    else:
        weigh_mixtures(block, ref_block, count, anchors, scale, factors, shift, beta)


@compiled
def write_gradient(row, ref_row, out, target, scale, interpolation, found, row_gradients, blocks):
    """dL/dlogits of a row, which may lie over the row.

    `found` is what `read_statistics` returns, without logp and KL; `row_gradients` = dL by (logp,
    entropy, exact KL).
    """
    entropy32, anchor, total, ref_anchor, ref_total, of_kl32 = found
    entropy, of_kl = np.float64(entropy32), np.float64(of_kl32)
    dlogp, dentropy, dkl = row_gradients
    block, ref_block, V = blocks[0], blocks[1], len(row)
    inverse, step = scale * LN2, np.float32(scale)
    log_total = math.log(np.float64(total))
    z = target_gap(row, target, scale, anchor, log_total)
    logp, log_share, p_target, share = sides(z)
    forward = ref_row is not None and interpolation == 0
    if total == 0 or (share == 0 and not forward):
        # a certain target has no gradient, even where a forbidden token has an infinite KL
        clear(out)
        return
    weight = inverse * share / np.float64(total)
    at_target, factor, log_factor, gap_factor = inverse * dlogp * share, -dlogp * weight, 0.0, 0.0
    of_entropy, sure, at_sure = 0.0, -1, 0.0
    one = np.float32(1.0)
    numbers = (one, one, np.float32(0.0), np.float32(interpolation))
    if dentropy != 0:
        if p_target > 0:
            at_target -= inverse * dentropy * p_target * (logp + entropy)
        of_entropy = -dentropy * weight * (log_share - log_total + entropy)
        log_factor = -dentropy * weight * LN2
        if z > 0 and entropy < SURE:
            sure, below, moment = read_below_sure(row, target, scale, anchor, block)
            at_sure = inverse * dentropy * LN2 * moment / (1 + below) ** 2
    # a KL that has no part in the gradient may be infinite or NaN
    if ref_row is not None and dkl != 0:
        ref_log_total = math.log(np.float64(ref_total))
        ref_z = target_gap(ref_row, target, scale, ref_anchor, ref_log_total)
        ref_logp, ref_log_share, ref_p_target, ref_share = sides(ref_z)
        if interpolation == 0:
            # of likely targets the small difference of what they leave to the others
            likely = min(p_target, ref_p_target) > 0.5
            at_target += inverse * dkl * (ref_share - share if likely else p_target - ref_p_target)
            factor += dkl * weight
            if ref_total > 0:
                gap_factor = inverse * dkl * (ref_share / np.float64(ref_total))
        elif interpolation != 1:
            dkl *= 1 - interpolation
            numbers = mixture_numbers(
                (logp, log_share, p_target, share),
                (ref_logp, ref_log_share, ref_p_target, ref_share),
                np.float64(total), np.float64(ref_total), interpolation,
            )  # fmt: skip
            to_p, _ = target_to_mixture(logp, ref_logp, interpolation)
            of_target = p_target * to_p if p_target > 0 else 0.0
            at_target += inverse * dkl * (of_target * share - p_target * of_kl)
            factor -= dkl * weight * (of_target + of_kl)
            gap_factor = dkl * weight * LN2
        else:
            if p_target > 0:
                at_target += inverse * dkl * p_target * (logp - ref_logp - of_kl)
            gap = log_share - ref_log_share - log_total + ref_log_total
            factor += dkl * weight * (gap - of_kl)
            gap_factor = dkl * weight * LN2
        if sure >= 0 and interpolation == 1:
            ref_logit = np.float64(widen(ref_row[sure]))
            at_sure -= gap_factor * (ref_logit - np.float64(ref_anchor)) * scale
        elif sure >= 0:
            load(row, sure, 1, block)
            load(ref_row, sure, 1, ref_block)
            weigh(
                block, ref_block, 1, (anchor, ref_anchor), step,
                (np.float32(0.0), np.float32(0.0), np.float32(gap_factor)), numbers,
            )  # fmt: skip
            at_sure += block[0]
    at_sure += factor
    factor += of_entropy
    for first in range(0, V, BLOCK):
        count = min(BLOCK, V - first)
        load(row, first, count, block)
        if ref_row is not None and dkl != 0:
            load(ref_row, first, count, ref_block)
            weigh(
                block, ref_block, count, (anchor, ref_anchor), step,
                (np.float32(factor), np.float32(log_factor), np.float32(gap_factor)), numbers,
            )  # fmt: skip
        elif dentropy != 0:
            weigh_powers(block, count, anchor, step, np.float32(factor), np.float32(log_factor))
        else:
            scale_powers(block, count, anchor, step, np.float32(factor))
        if first <= target < first + count:
            block[target - first] = np.float32(at_target)
        if first <= sure < first + count:
            block[sure - first] = np.float32(at_sure)
        store(block, count, out, first)


@compiled
def token_loss(
    logp, log_ratio, advantage, weight, factor, ref_logp, kl, entropy, entropy_weight,
    surrogate, parameters, kl_estimator, kl_times_ratio, beta,
):  # fmt: skip
    """(loss, dloss/dlogp, KL, whether all of it is finite) of a token, times its weight.

    `surrogate` and `kl_estimator` are addresses, see `formulas`; the estimate replaces `kl` unless
    its address is 0.
    """
    # Numba cannot unpack a tuple into another
    numbers = (logp, log_ratio, advantage) + parameters  # noqa: RUF005
    loss, dlogp, dlog_ratio = call_formula(surrogate, numbers)
    loss, dlogp, dlog_ratio = factor * loss, factor * dlogp, factor * dlog_ratio
    dkl, dkl_ratio = 0.0, 0.0
    if kl_estimator != 0:
        kl, dkl, _ = call_formula(kl_estimator, (logp, ref_logp))
        if kl_times_ratio:
            ratio = math.exp(log_ratio)
            kl, dkl, dkl_ratio = ratio * kl, ratio * dkl, ratio * kl
    # with beta 0 the KL is only measured: an infinite one must not spoil the loss
    if beta != 0:
        loss += beta * kl
        dlogp += beta * dkl
        dlog_ratio += beta * dkl_ratio
    loss = weight * loss - entropy_weight * entropy
    dlogp, dlog_ratio = weight * dlogp, weight * dlog_ratio
    usable = True
    for value in (loss, dlogp, dlog_ratio, logp, log_ratio, math.exp(log_ratio)):
        usable = usable and math.isfinite(np.float32(value))
    if not usable:
        loss, dlogp, dlog_ratio = 0.0, 0.0, 0.0
    return loss, dlogp + dlog_ratio, kl, usable


@compiled
def loss_rows(
    logits, place, ref_logits, ref_place, V, scale, interpolation, dlogits, out_place,
    target, weight, advantage, old_logp, ref_logp, factor, entropy_weight, vectors, dropped,
    surrogate, parameters, kl_estimator, kl_times_ratio, beta, blocks, counter, grain,
):  # fmt: skip
    """One pass: statistics, the loss of the token and, where asked for, the gradient of the row.

    `vectors` [11, N] receives logp, entropy, ratio, KL, loss, dlogp and the state.
    """
    N = len(target)
    first = claim(counter, grain)
    while first < N:
        for n in range(first, min(first + grain, N)):
            row, ref_row = logits[row_slice(n, place, V)], ref_logits
            if ref_logits is not None:
                ref_row = ref_logits[row_slice(n, ref_place, V)]
            out, y, moves = dlogits[row_slice(n, out_place, V)], target[n], False
            if weight[n] != 0 and 0 <= y < V:
                found = read_statistics(row, ref_row, y, scale, interpolation, blocks)
                logp, kl, entropy = np.float64(found[0]), np.float64(found[1]), np.float64(found[2])
                log_ratio = logp - (np.float64(old_logp[n]) if len(old_logp) > 0 else logp)
                bonus = np.float64(entropy_weight[n]) if len(entropy_weight) > 0 else 0.0
                loss, dlogp, kl, usable = token_loss(
                    logp, log_ratio, np.float64(advantage[n]), np.float64(weight[n]),
                    np.float64(factor[n]) if len(factor) > 0 else 1.0,
                    np.float64(ref_logp[n]) if len(ref_logp) > 0 else 0.0,
                    kl, entropy, bonus,
                    surrogate, parameters, kl_estimator, kl_times_ratio, beta,
                )  # fmt: skip
                vectors[0, n], vectors[1, n], vectors[2, n] = logp, entropy, math.exp(log_ratio)
                vectors[3, n], vectors[4, n], vectors[5, n] = kl, loss, dlogp
                vectors[6, n], vectors[7, n] = found[3], -found[4]
                vectors[8, n], vectors[9, n], vectors[10, n] = found[5], -found[6], found[7]
                dropped[n] = not usable
                dkl = np.float32(beta) * weight[n] if ref_row is not None else 0.0
                row_gradients = (np.float64(np.float32(dlogp)), -bonus, dkl)
                moves = usable and (dlogp != 0 or bonus != 0 or dkl != 0)
                if moves and len(dlogits) > 0:
                    write_gradient(
                        row, ref_row, out, y, scale, interpolation, found[2:], row_gradients, blocks
                    )
            if len(dlogits) > 0 and not moves:
                clear(out)
        first = claim(counter, grain)


@compiled
def stats_rows(
    logits, place, ref_logits, ref_place, V, scale, interpolation, target, vectors,
    blocks, counter, grain,
):  # fmt: skip
    """Statistics of every row: `vectors` [8, N] receives logp, entropy, KL and the state."""
    N = len(target)
    first = claim(counter, grain)
    while first < N:
        for n in range(first, min(first + grain, N)):
            if 0 <= target[n] < V:
                row, ref_row = logits[row_slice(n, place, V)], ref_logits
                if ref_logits is not None:
                    ref_row = ref_logits[row_slice(n, ref_place, V)]
                found = read_statistics(row, ref_row, target[n], scale, interpolation, blocks)
                vectors[0, n], vectors[1, n], vectors[2, n] = found[0], found[2], found[1]
                vectors[3, n], vectors[4, n] = found[3], -found[4]
                vectors[5, n], vectors[6, n], vectors[7, n] = found[5], -found[6], found[7]
        first = claim(counter, grain)


@compiled
def gradient_rows(
    logits, place, ref_logits, ref_place, V, scale, interpolation, dlogits, out_place,
    target, dlogp, dentropy, dkl, entropy, state, blocks, counter, grain,
):  # fmt: skip
    """The gradient of every row from its statistics; rows without one become 0."""
    N = len(target)
    first = claim(counter, grain)
    while first < N:
        for n in range(first, min(first + grain, N)):
            row, ref_row = logits[row_slice(n, place, V)], ref_logits
            if ref_logits is not None:
                ref_row = ref_logits[row_slice(n, ref_place, V)]
            out, y = dlogits[row_slice(n, out_place, V)], target[n]
            row_gradients = (
                np.float64(dlogp[n]),
                np.float64(dentropy[n]) if len(dentropy) > 0 else 0.0,
                np.float64(dkl[n]) if len(dkl) > 0 else 0.0,
            )
            if 0 <= y < V and (
                row_gradients[0] != 0 or row_gradients[1] != 0 or row_gradients[2] != 0
            ):
                found = (
                    entropy[n], state[0, n], -state[1, n], state[2, n], -state[3, n], state[4, n]
                )  # fmt: skip
                write_gradient(
                    row, ref_row, out, y, scale, interpolation, found, row_gradients, blocks
                )
            else:
                clear(out)
        first = claim(counter, grain)


class Kernels(NamedTuple):
    """The three kernels, each a function of its arguments and what `run` adds."""

    loss: Callable
    stats: Callable
    gradient: Callable


@cache
def kernels() -> Kernels:
    """The kernels with the cache of Numba, whose key holds what this folder's files hold."""
    digest = sources()

    def loss(*arguments):
        digest  # noqa: B018
        loss_rows(*arguments)

    def stats(*arguments):
        digest  # noqa: B018
        stats_rows(*arguments)

    def gradient(*arguments):
        digest  # noqa: B018
        gradient_rows(*arguments)

    return Kernels(*(compile_kernel(kernel) for kernel in (loss, stats, gradient)))
