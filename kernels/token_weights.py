"""The door on the device: of every token whether it counts, its weight, and its advantage.

One program walks over the tokens twice, first to count them and then to weigh them; in between lie
the divisors, which one program need not ask another for. Reads target and mask, about 10 bytes per
token, and writes about 20: nothing beside a row of the vocabulary. Counts are integers, so atomic
additions give the same bits in any order.

    weight_n = valid_n / (|o_i| · divisor), with |o_i| for sequence means only
    divisor = normalizer, or this call's tokens, or its sequences with a token · width
"""

import torch

from .language import tl, triton
from .launch import TOKENS_BLOCK, TOKENS_WARPS, launch
from .records import GivenTokens, LaidTokens, Spans


@triton.jit
def sequence_of(at, sequence_ptr, T, N, mask):
    """Whose token each is: neighbours of T, or as given, brought into [0, N)."""
    if sequence_ptr is None:
        return (at // T).to(tl.int64)
    else:
        given = tl.load(sequence_ptr + at, mask=mask, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(given, 0), N - 1)


@triton.jit
def read_token(
    at,
    target_ptr,
    mask_ptr,
    sequence_ptr,
    N,
    T,
    V,
    S,
    target_batch_stride,
    target_stride,
    mask_batch_stride,
    mask_stride,
    IGNORE: tl.constexpr,
):
    """(target, valid, bad_target, sequence) of some tokens."""
    inside = at < N
    batch, place = (at // T).to(tl.int64), (at % T).to(tl.int64)
    where = target_ptr + batch * target_batch_stride + place * target_stride
    target = tl.load(where, mask=inside, other=IGNORE).to(tl.int64)
    valid = inside & (target != IGNORE)
    if mask_ptr is not None:
        where = mask_ptr + batch * mask_batch_stride + place * mask_stride
        valid = valid & (tl.load(where, mask=inside, other=0) != 0)
    bad = valid & ((target < 0) | (target >= V))
    valid = valid & (bad == 0)
    sequence = sequence_of(at, sequence_ptr, T, N, inside)
    if sequence_ptr is not None:
        given = tl.load(sequence_ptr + at, mask=inside, other=0)
        valid = valid & (given >= 0) & (given < S) & (given < N)
    return tl.where(valid, target, IGNORE), valid, bad, sequence


@triton.jit(
    do_not_specialize=[
        "N",
        "T",
        "V",
        "S",
        "width",
        "target_batch_stride",
        "target_stride",
        "mask_batch_stride",
        "mask_stride",
    ],
    # scalars of a row: their alignment, which changes with N, must not recompile
    do_not_specialize_on_alignment=[
        "target_ptr",
        "mask_ptr",
        "sequence_ptr",
        "given_advantage_ptr",
        "normalizer_ptr",
        "target_out_ptr",
        "valid_ptr",
        "bad_target_ptr",
        "weight_ptr",
        "entropy_weight_ptr",
        "advantage_ptr",
        "length_ptr",
        "first_ptr",
        "last_ptr",
        "ticket_ptr",
    ],
)
def _token_weights_kernel(
    target_ptr,
    mask_ptr,
    sequence_ptr,
    given_advantage_ptr,
    normalizer_ptr,
    target_out_ptr,
    valid_ptr,
    bad_target_ptr,
    weight_ptr,
    entropy_weight_ptr,
    advantage_ptr,
    length_ptr,
    first_ptr,
    last_ptr,
    ticket_ptr,
    N,
    T,
    V,
    S,
    width,
    target_batch_stride: tl.int64,
    target_stride: tl.int64,
    mask_batch_stride: tl.int64,
    mask_stride: tl.int64,
    normalizer,
    entropy_coef,
    IGNORE: tl.constexpr,
    DIVISOR: tl.constexpr,
    OF_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    # as many sequences as there may be ids
    sequences = N // T
    if sequence_ptr is not None:
        sequences = N
    for start in range(0, sequences, BLOCK):
        at = start + lane
        if length_ptr is not None:
            tl.store(length_ptr + at, lane * 0, mask=at < sequences)
        if first_ptr is not None:
            tl.store(first_ptr + at, lane * 0 + N, mask=at < sequences)
            tl.store(last_ptr + at, lane * 0 - 1, mask=at < sequences)
    tl.store(ticket_ptr, 0)
    tl.debug_barrier()

    tokens = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        at = start + lane
        target, valid, bad, sequence = read_token(
            at,
            target_ptr,
            mask_ptr,
            sequence_ptr,
            N,
            T,
            V,
            S,
            target_batch_stride,
            target_stride,
            mask_batch_stride,
            mask_stride,
            IGNORE,
        )
        tokens += valid.to(tl.int32)
        if length_ptr is not None:
            tl.atomic_add(length_ptr + sequence, lane * 0 + 1, mask=valid)
        if first_ptr is not None:
            tl.atomic_min(first_ptr + sequence, at, mask=at < N)
            tl.atomic_max(last_ptr + sequence, at, mask=at < N)
    tl.debug_barrier()

    divisor = normalizer
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr).to(tl.float32)
    if DIVISOR == "tokens":
        divisor = tl.maximum(tl.sum(tokens, 0), 1).to(tl.float32)
    if DIVISOR == "sequences":
        present = tl.zeros([BLOCK], tl.int32)
        for start in range(0, sequences, BLOCK):
            at = start + lane
            # past the first cache, which atomic additions do not go through
            length = tl.load(length_ptr + at, mask=at < sequences, other=0, cache_modifier=".cg")
            present += (length > 0).to(tl.int32)
        divisor = tl.maximum(tl.sum(present, 0).to(tl.int64) * width, 1).to(tl.float32)

    for start in range(0, N, BLOCK):
        at = start + lane
        inside = at < N
        target, valid, bad, sequence = read_token(
            at,
            target_ptr,
            mask_ptr,
            sequence_ptr,
            N,
            T,
            V,
            S,
            target_batch_stride,
            target_stride,
            mask_batch_stride,
            mask_stride,
            IGNORE,
        )
        weight = valid.to(tl.float32)
        if OF_SEQUENCES:
            length = tl.load(length_ptr + sequence, mask=inside, other=1, cache_modifier=".cg")
            weight = tl.div_rn(weight, tl.maximum(length, 1).to(tl.float32))
        weight = tl.div_rn(weight, weight * 0 + divisor)
        tl.store(target_out_ptr + at, target, mask=inside)
        tl.store(valid_ptr + at, valid, mask=inside)
        tl.store(bad_target_ptr + at, bad, mask=inside)
        tl.store(weight_ptr + at, weight, mask=inside)
        if entropy_weight_ptr is not None:
            tl.store(entropy_weight_ptr + at, entropy_coef * weight, mask=inside)
        if given_advantage_ptr is not None:
            known = inside & (sequence < S)
            advantage = tl.load(given_advantage_ptr + sequence, mask=known, other=0.0)
            tl.store(advantage_ptr + at, advantage.to(tl.float32), mask=inside)


def lay_out(given: GivenTokens) -> LaidTokens:
    """Everything a loss needs to know of its tokens, from what a caller gave; see `weights`.

    Args:
        given: targets, mask, sequences and advantages, and how they are weighed.
    """
    target, mask, per_sequence = given.target, given.mask, given.advantage_of_sequence
    if target.dtype not in (torch.int32, torch.int64):
        target = target.long()
    N, device = target.numel(), target.device
    packed = target.ndim == 1
    T = max(N, 1) if packed else max(target.shape[1], 1)
    steps = [
        (0, tensor.stride(-1)) if packed else tensor.stride()
        for tensor in (target, mask if mask is not None else target)
    ]
    floats = torch.empty(1 + 2, N, dtype=torch.float32, device=device)
    flags = torch.empty(2, N, dtype=torch.bool, device=device)
    room = torch.empty(3 * given.sequences + 1, dtype=torch.int32, device=device)
    length, first, last = room[:-1].view(3, given.sequences)
    normalizer, divisor, width = _divisor(given)
    on_device = isinstance(normalizer, torch.Tensor) and normalizer.device == device
    of_sequences = given.aggregation == "sequence_mean"
    counts = of_sequences or divisor == "sequences"
    spans = Spans(first, last) if packed and given.wants_spans else None
    laid = LaidTokens(
        target=torch.empty(N, dtype=torch.int64, device=device),
        valid=flags[0],
        bad_target=flags[1],
        weight=floats[0],
        entropy_weight=floats[1] if given.entropy_coef else None,
        advantage=floats[2] if per_sequence else given.advantage,
        spans=spans,
        ticket=room[-1],
    )
    launch(
        _token_weights_kernel,
        1,
        on=target,
        strided=("target_ptr", "mask_ptr"),
        target_ptr=target,
        mask_ptr=mask,
        sequence_ptr=given.sequence_id,
        given_advantage_ptr=given.advantage if per_sequence else None,
        normalizer_ptr=normalizer if on_device else None,
        target_out_ptr=laid.target,
        valid_ptr=laid.valid,
        bad_target_ptr=laid.bad_target,
        weight_ptr=laid.weight,
        entropy_weight_ptr=laid.entropy_weight,
        advantage_ptr=laid.advantage if per_sequence else None,
        length_ptr=length if counts else None,
        first_ptr=None if spans is None else spans.first,
        last_ptr=None if spans is None else spans.last,
        ticket_ptr=laid.ticket,
        N=N,
        T=T,
        V=given.V,
        S=given.advantage.numel() if per_sequence else given.sequences,
        width=width,
        target_batch_stride=steps[0][0],
        target_stride=steps[0][1],
        mask_batch_stride=steps[1][0],
        mask_stride=steps[1][1],
        normalizer=1.0 if normalizer is None or on_device else float(normalizer),
        entropy_coef=float(given.entropy_coef),
        IGNORE=given.ignore,
        DIVISOR=divisor,
        OF_SEQUENCES=of_sequences,
        BLOCK=TOKENS_BLOCK,
        num_warps=TOKENS_WARPS,
    )
    return laid


def _divisor(given: GivenTokens) -> tuple[torch.Tensor | float | None, str, int]:
    """(normalizer, what is counted in its absence, times what)."""
    if given.normalizer is not None:
        return given.normalizer, "given", 1
    if given.aggregation == "token_sum":
        return 1.0, "given", 1
    if given.aggregation == "token_mean":
        return None, "tokens", 1
    width = given.target.shape[-1] if given.aggregation == "constant_length" else 1
    return None, "sequences", width
