"""Reading a row of logits: what `row_stats` and `row_loss` have in common."""

from .exact_kl import exact_kl, mixture_kl
from .language import tl, triton
from .online_softmax import row_softmax
from .token_statistics import target_gap, token_statistics


@triton.jit
def read_row(
    row_ptr,
    ref_ptr,
    V,
    target_col,
    scale,
    beta,
    DIVERGENCE: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """(logp, entropy, exact KL, (anchor, sum_others, z), the same three of the reference), nats.

    After the three of the reference comes what the gradient needs of the KL: the KL itself, or a
    mixture's `of_policy`. Without a reference, `ref_ptr` None, its part and the KL are 0. `beta` is
    the interpolation of a mixture.
    """
    anchor, sum_others, moment_others, ref_anchor, ref_sum, cross = row_softmax(
        row_ptr, ref_ptr, V, target_col, scale, DIVERGENCE, THREADS, WIDTH, TILES
    )
    z, logp, entropy = token_statistics(
        row_ptr, V, target_col, scale, anchor, sum_others, moment_others, THREADS, WIDTH
    )
    kl = 0.0
    ref_state = (0.0, 0.0, 0.0, 0.0)
    if ref_ptr is not None:
        ref_z, _ = target_gap(ref_ptr, target_col, scale, ref_anchor, ref_sum)
        if DIVERGENCE == "reverse":
            kl = exact_kl(z, sum_others, ref_z, ref_sum, cross)
            of_kl = kl
        elif DIVERGENCE == "forward":
            kl = exact_kl(ref_z, ref_sum, z, sum_others, cross)
            # a reference with NaN has no probability above 0
            kl = tl.where(ref_z == ref_z, kl, ref_z)
            of_kl = kl
        else:
            state, of_reference = (anchor, sum_others, z), (ref_anchor, ref_sum, ref_z)
            kl, of_kl = mixture_kl(
                row_ptr, ref_ptr, V, target_col, scale, state, of_reference, beta, THREADS, WIDTH
            )
        ref_state = (ref_anchor, ref_sum, ref_z, of_kl)
    return logp, entropy, kl, (anchor, sum_others, z), ref_state
