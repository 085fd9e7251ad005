"""Log-probability and entropy of a row's target, from the sums of `online_softmax`.

The target is left out of the sum. With S = Σ_{j≠y} 2^(x_j − anchor) over the *other* logits and
z = log₂ S − (x_y − anchor), everything follows without cancellation, however confident the token:
logp = −softplus(z), 1 − p_y = sigmoid(z), and H = h(p_y) + (1 − p_y)·H_others with the binary
entropy h (all in base 2).

A row in which another token than the target is nearly certain is read again for its entropy alone.
"""

from .language import tl, triton
from .online_softmax import LN2, LOWEST, largest_other, sums_below
from .scalar_math import log1p

# nats of a row in which one token is nearly certain; the first reading is right to 1e-6 of a nat
SURE = tl.constexpr(0.125)


@triton.jit
def target_gap(row_ptr, target_col, scale, anchor, sum_others):
    """z = log₂ S − (x_y − anchor), how far the others are above the target; its rounding error."""
    target_logit = tl.load(row_ptr + target_col).to(tl.float32)
    far = sum_others < 0
    others = tl.log2(tl.abs(sum_others))
    target = tl.fma(target_logit, scale, -anchor)
    target = tl.where(far, (target_logit - anchor) * scale, target)
    z = others - target
    back = z - others
    error = tl.where(tl.abs(z) < float("inf"), (others - (z - back)) - (target + back), 0.0)
    # an infinite target would pass for a certain one
    return tl.where(target_logit == float("inf"), float("nan"), z), error


@triton.jit
def sigmoid2(z):
    """2ᶻ / (1 + 2ᶻ), each tail with full relative precision."""
    y = tl.exp2(-tl.abs(z))
    return tl.where(z > 0, 1.0, y) / (1 + y)


@triton.jit
def log_sides(z, error=0.0):
    """log p_y and log(1 − p_y), nats, each with full relative precision, from z + error."""
    softplus = log1p(tl.exp2(-tl.abs(z)))
    logp = -tl.fma(tl.maximum(z, 0.0), LN2, softplus + error * LN2 * sigmoid2(z))
    return logp, -tl.fma(tl.maximum(-z, 0.0), LN2, softplus)


@triton.jit
def token_statistics(
    row_ptr,
    V,
    target_col,
    scale,
    anchor,
    sum_others,
    moment_others,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(z, logp, entropy) of a token, nats."""
    z, error = target_gap(row_ptr, target_col, scale, anchor, sum_others)
    logp, log_others = log_sides(z, error)
    total = tl.abs(sum_others)
    entropy_others = (tl.log2(total) - moment_others / total) * LN2
    p_others, p_target = sigmoid2(z), sigmoid2(-z)
    # 0·log 0 = 0: a target or a remainder of probability 0 has no entropy
    entropy = tl.where(p_others > 0, p_others * (entropy_others - log_others), 0.0)
    entropy -= tl.where(p_target > 0, p_target * logp, 0.0)
    if is_sure(z, entropy):
        # log₂ S − Σ 2^c·c / S takes the logarithm of a sum that has rounded the others away
        _, _, below, moment_below = sums_below_sure(row_ptr, V, target_col, scale, THREADS, WIDTH)
        entropy = log1p(below) - LN2 * moment_below / (1 + below)
    return z, logp, entropy


@triton.jit
def is_sure(z, entropy):
    """Whether another token than the target is nearly certain."""
    return (z > 0) & (entropy < SURE)


@triton.jit
def sums_below_sure(row_ptr, V, target_col, scale, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """(x_w, w, Σ_{j≠w} 2^c, Σ_{j≠w} 2^c·c), c = (x_j − x_w)·scale, of the likeliest other column w.

    p_w = 1/(1 + Σ 2^c), H = log(1 + Σ 2^c) + (log p_w + H): nothing cancels in either part, since
    log p_w + H = −p_w·log 2·Σ 2^c·c.
    """
    largest, sure_col = largest_other(row_ptr, V, target_col, THREADS, WIDTH)
    below, moment, _, _ = sums_below(
        (row_ptr, None), V, target_col, sure_col, (largest, largest), scale, "reverse",
        THREADS, WIDTH,
    )  # fmt: skip
    target_logit = tl.load(row_ptr + target_col).to(tl.float32)
    centred = tl.maximum((target_logit - largest) * scale, LOWEST)
    power = tl.exp2(centred)
    return largest, sure_col, below + power, tl.fma(power, centred, moment)
