"""Loops over one block of a row, each of which LLVM turns into vector instructions.

A block holds `BLOCK` float32 numbers and stays in the first-level cache. Rows are converted while
they are loaded into a block and rounded while they are stored from one, so all arithmetic is in
float32 whatever the dtype. A loop reads one array and writes another, or sums: no two of its arrays
overlap, also where a gradient is written over its logits.

bfloat16 comes as uint16 and float16 as int16, the words of their bits: NumPy has no bfloat16.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from grpo_core.backends.cpu.compiler import compiled

# a step of a vectorised loop: 4 vectors of 16 lanes
STEP = 64
# below every logit of float32, finite so that a row of −inf gives no NaN
LEAST = np.float32(np.finfo(np.float32).min)
# 2^c is 0 from here on
LOWEST = np.float32(-127.0)
LOG2E, LN2 = 1 / math.log(2), math.log(2)

FLOAT, INT, HALF, WORD = ir.FloatType(), ir.IntType(32), ir.HalfType(), ir.IntType(16)
POINTER, TWO_FLOATS = ir.IntType(8).as_pointer(), ir.FunctionType(FLOAT, [FLOAT, FLOAT])


@intrinsic
def bits_of(typing, number):
    """The 32 bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, _, args: builder.bitcast(
        args[0], INT
    )


@intrinsic
def float_of(typing, bits):
    """The float32 with the 32 bits of an int32."""
    return types.float32(types.int32), lambda context, builder, _, args: builder.bitcast(
        args[0], FLOAT
    )


@intrinsic
def half_to_float(typing, word):
    """The float32 that is equal to a float16."""
    return types.float32(types.int16), lambda context, builder, _, args: builder.fpext(
        builder.bitcast(args[0], HALF), FLOAT
    )


@intrinsic
def float_to_half(typing, number):
    """The float16 nearest to a float32, a tie to even."""
    return types.int16(types.float32), lambda context, builder, _, args: builder.bitcast(
        builder.fptrunc(args[0], HALF), WORD
    )


@intrinsic
def larger(typing, a, b):
    """The larger of two float32, NaN if either is: unlike `max`, LLVM vectorises it."""

    def generate(context, builder, signature, args):
        function = builder.module.declare_intrinsic("llvm.maximum", [FLOAT], TWO_FLOATS)
        return builder.call(function, args, fastmath=("nsz",))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def widest(typing):
    """Compiles the function that calls it once, apart from its callers, for the widest vectors.

    LLVM takes 8 of 16 lanes of AVX-512 unless a function asks for all, and may compile a loop
    differently in each function that it is inlined into, which would change the bits of a sum.
    """

    def generate(context, builder, signature, args):
        attributes = builder.function.attributes
        attributes.add("noinline")
        # llvmlite's own set admits only attributes without a value
        set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch_address(typing, array, index):
    """Starts to load the cache line of an element, which may lie behind the array's end."""

    def generate(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), POINTER)
        kind = ir.FunctionType(ir.VoidType(), [POINTER, INT, INT, INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", [POINTER], kind)
        # to be read, wanted in the second-level cache, data
        builder.call(function, [address, INT(0), INT(2), INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def call_formula(typing, address, numbers):
    """Calls the C function at an address with float64 numbers; returns its three results."""

    def generate(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        results = cgutils.alloca_once(builder, ir.DoubleType(), size=3)
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values] + [results.type])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [*values, results])
        found = [builder.load(builder.gep(results, [INT(nth)])) for nth in range(3)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float64, 3)(types.int64, numbers), generate


def widen(number):
    """The float32 that is equal to an element of a row."""


@overload(widen, inline="always")
def _widen(number):
    if number == types.uint16:
        return lambda number: float_of(np.int32(number) << np.int32(16))
    return (
        (lambda number: half_to_float(number)) if number == types.int16 else lambda number: number
    )


def narrow(number, like):
    """The element of a row nearest to a float32, a tie to even; `like` is any element."""


@overload(narrow, inline="always")
def _narrow(number, like):
    if like == types.uint16:

        def to_bfloat16(number, like):
            bits = bits_of(number)
            half = np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
            return np.uint16((bits + half) >> np.int32(16))

        return to_bfloat16
    if like == types.int16:
        return lambda number, like: float_to_half(number)
    return lambda number, like: number


@compiled
def whole(count):
    """`count` in whole steps of the loops, so that none has a rest to compute one by one."""
    return (count + STEP - 1) & -STEP


@compiled
def load(row, start, count, block):
    """Converts `count` logits of a row into a block, the rest of its last step into −inf."""
    widest()
    # an unsigned index does not count from the end, which LLVM could not vectorise
    start = np.uint64(start)
    for j in range(np.uint64(count)):
        block[j] = widen(row[start + j])
    for j in range(count, whole(count)):
        block[j] = -np.inf


@compiled
def load_others(row, start, count, target, block):
    """Loads a block, the target in it as −inf; returns the largest of the others.

    The largest is NaN if any is, and at least `LEAST`.
    """
    widest()
    start, target, found = np.uint64(start), np.uint64(target), LEAST
    for j in range(np.uint64(count)):
        logit = widen(row[start + j])
        logit = np.float32(-np.inf) if j == target else logit
        block[j] = logit
        found = larger(found, logit)
    for j in range(count, whole(count)):
        block[j] = -np.inf
    return found


@compiled
def store(block, count, row, start):
    """Rounds `count` numbers of a block into the logits of a row from `start` on."""
    widest()
    start = np.uint64(start)
    for j in range(np.uint64(count)):
        row[start + j] = narrow(block[j], row[start])


@compiled
def clear(row):
    """Makes all logits of a row 0."""
    widest()
    for j in range(np.uint64(len(row))):
        row[j] = 0


@compiled
def prefetch(row, start, count):
    """Starts to load `count` elements, a cache line of 64 bytes at a time."""
    for index in range(start, start + count, 64 // row.itemsize):
        prefetch_address(row, index)


# 1.5·2²³ + 127: added to c, it leaves the exponent field of 2^round(c) in the lowest bits
ROUND, EXPONENT = np.float32(1.5 * 2**23 + 127), np.int32(23)
# minimax polynomial of 2^f on |f| ≤ 1/2, the constant fixed to 1; relative error 2e-9
P1, P2, P3, P4, P5, P6 = (
    np.float32(p)
    for p in (0.693147203, 0.240226479, 0.0555033247, 0.00961843736, 0.00133988745, 0.000153533620)
)


@compiled(fastmath={"contract"})
def exp2(c):
    """2^c of a float32 in [−127, 1] to one unit in the last place; 0 below −126.5, NaN for NaN."""
    shifted = c + ROUND
    f = c - (shifted - ROUND)
    power = P6
    power = power * f + P5
    power = power * f + P4
    power = power * f + P3
    power = power * f + P2
    power = power * f + P1
    power = power * f + np.float32(1.0)
    return power * float_of(bits_of(shifted) << EXPONENT)


@compiled
def distance(logit, anchor, scale):
    """(logit − anchor)·scale; never contracted, so equal rows have equal distances."""
    return (logit - anchor) * scale


@compiled
def centre(logit, anchor, scale):
    """The distance c, at least `LOWEST`; NaN for NaN."""
    c = distance(logit, anchor, scale)
    return LOWEST if c < LOWEST else c


@compiled(fastmath={"reassoc", "contract"})
def sum_powers(block, count, anchor, scale):
    """(Σ 2^c, Σ 2^c·c) of a block."""
    widest()
    powers = moments = np.float32(0.0)
    for j in range(whole(count)):
        c = centre(block[j], anchor, scale)
        power = exp2(c)
        powers += power
        moments += power * c
    return powers, moments


@compiled(fastmath={"reassoc", "contract"})
def sum_gaps(block, ref_block, count, anchor, ref_anchor, scale):
    """Σ 2^c·(c − c_ref) of a block; inf where the reference forbids what the policy does not."""
    widest()
    gaps = np.float32(0.0)
    for j in range(whole(count)):
        c = centre(block[j], anchor, scale)
        power = exp2(c)
        # below `LOWEST` a distance counts in full
        gap = c - distance(ref_block[j], ref_anchor, scale)
        gaps += power * gap if power > 0 else np.float32(0.0)
    return gaps


# 2/ln 2 over 1, 3, 5, 7, 9: of log₂ m = 2·artanh(s)/ln 2, |s| ≤ 0.172
A1, A3, A5, A7, A9 = (np.float32(2 * LOG2E / n) for n in (1, 3, 5, 7, 9))
ROOT_OF_HALF = np.float32(math.sqrt(0.5))


@compiled(fastmath={"contract"})
def log2(y):
    """log₂ of a normal float32 above 0; exactly 0 for 1."""
    exponent = (bits_of(y) - bits_of(ROOT_OF_HALF)) >> EXPONENT
    mantissa = float_of(bits_of(y) - (exponent << EXPONENT))
    s = (mantissa - np.float32(1.0)) / (mantissa + np.float32(1.0))
    square = s * s
    series = A9
    series = series * square + A7
    series = series * square + A5
    series = series * square + A3
    series = series * square + A1
    return np.float32(exponent) + s * series


@compiled
def log_to_mixture(power, ref_power, gap, beta):
    """(log₂ p/m, log₂ q/m), m = (1 − β)·p + β·q, gap = log₂ q/p; a power of 0 is a p or q of 0."""
    gap = gap if power > 0 else np.float32(np.inf)
    gap = gap if ref_power > 0 else np.float32(-np.inf)
    above = gap if gap > 0 else np.float32(0.0)
    below = gap if gap < 0 else np.float32(0.0)
    # what is not finite stays out of exp2
    distant = below - above
    smaller = exp2(LOWEST if distant < LOWEST else distant)
    weight = np.float32(1.0) - beta if gap > 0 else beta
    rest = beta if gap > 0 else np.float32(1.0) - beta
    log_m = log2(rest + weight * smaller)
    return -log_m - above, below - log_m


@compiled(fastmath={"reassoc", "contract"})
def sum_mixtures(block, ref_block, count, anchors, scale, numbers):
    """(Σ (1 − β)·p·log₂ p/m + β·q·log₂ q/m, Σ p·log₂ p/m) of a block.

    `numbers` = (p per 2^c, q per 2^c_ref, log₂ of the second over the first, β).
    """
    widest()
    (anchor, ref_anchor), (share, ref_share, shift, beta) = anchors, numbers
    both = of_policy = np.float32(0.0)
    for j in range(whole(count)):
        power = exp2(centre(block[j], anchor, scale))
        ref_power = exp2(centre(ref_block[j], ref_anchor, scale))
        gap = distance(ref_block[j], ref_anchor, scale) - distance(block[j], anchor, scale)
        to_p, to_q = log_to_mixture(power, ref_power, gap + shift, beta)
        of_p = power * share * to_p if power > 0 else np.float32(0.0)
        of_q = ref_power * ref_share * to_q if ref_power > 0 else np.float32(0.0)
        of_policy += of_p
        both += (np.float32(1.0) - beta) * of_p + beta * of_q
    return both, of_policy


@compiled(fastmath={"contract"})
def scale_powers(block, count, anchor, scale, factor):
    """Replaces each logit by factor·2^c."""
    widest()
    for j in range(whole(count)):
        block[j] = exp2(centre(block[j], anchor, scale)) * factor


@compiled(fastmath={"contract"})
def weigh_powers(block, count, anchor, scale, factor, log_factor):
    """Replaces each logit by (factor + log_factor·c)·2^c."""
    widest()
    for j in range(whole(count)):
        c = centre(block[j], anchor, scale)
        block[j] = exp2(c) * (factor + log_factor * c)


@compiled(fastmath={"contract"})
def weigh_gaps(block, ref_block, count, anchors, scale, factors):
    """Replaces each logit by (factor + log_factor·c + gap_factor·(c − c_ref))·2^c.

    With a gap_factor of 0 a token that the reference forbids counts like any other.
    """
    widest()
    (anchor, ref_anchor), (factor, log_factor, gap_factor) = anchors, factors
    for j in range(whole(count)):
        c = centre(block[j], anchor, scale)
        power = exp2(c)
        gap = c - distance(ref_block[j], ref_anchor, scale)
        slope = factor + log_factor * c
        if gap_factor != 0:
            slope += gap_factor * gap
        block[j] = power * slope if power > 0 else np.float32(0.0)


@compiled
def weigh_differences(block, ref_block, count, anchors, scale, factors):
    """Replaces each logit by (factor + log_factor·c)·2^c − ref_factor·2^c_ref.

    Never contracted, so the difference of equal rows is exactly 0.
    """
    widest()
    (anchor, ref_anchor), (factor, log_factor, ref_factor) = anchors, factors
    for j in range(whole(count)):
        c = centre(block[j], anchor, scale)
        ref_power = exp2(centre(ref_block[j], ref_anchor, scale))
        block[j] = exp2(c) * (factor + log_factor * c) - ref_power * ref_factor


@compiled(fastmath={"contract"})
def weigh_mixtures(block, ref_block, count, anchors, scale, factors, shift, beta):
    """Replaces each logit by (factor + log_factor·c + gap_factor·log₂ p/m)·2^c."""
    widest()
    (anchor, ref_anchor), (factor, log_factor, gap_factor) = anchors, factors
    for j in range(whole(count)):
        c = centre(block[j], anchor, scale)
        power, ref_power = exp2(c), exp2(centre(ref_block[j], ref_anchor, scale))
        gap = distance(ref_block[j], ref_anchor, scale) - distance(block[j], anchor, scale)
        to_p, _ = log_to_mixture(power, ref_power, gap + shift, beta)
        slope = factor + log_factor * c + gap_factor * to_p
        block[j] = power * slope if power > 0 else np.float32(0.0)
