"""Compiles the kernels for GPUs that are not present: `python -m grpo_core.inspect`.

Prints registers, spills and shared memory and, for every loop over the vocabulary, the width of
loads and stores and the cost of one logit: instructions, operations of the special-function units
(MUFU), and both as a share of what the GPU can issue while the logits arrive at its full memory
bandwidth. A loop far below 100 % can be limited by memory; one above cannot. AMD GPUs have no loops
here: their compiled kernels are checked for spills only. `loops` says how a loop is counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grpo_core.cli.command import exit_on_interrupt, interruptible
from grpo_core.cli.options import Parser, check_package, new_file, vocabulary
from grpo_core.inspect.loops import WIDE, Loop

if TYPE_CHECKING:
    from grpo_core.inspect.compile_ahead import Compiled

# The name of a card, and the instructions per thread that it can issue while a byte arrives from
# its memory: processors · 128 lanes · GHz / bandwidth of a copy in GB/s. The bandwidth was measured
# on the H100 (0.9 of its 3.35 TB/s); the others are taken to reach the same share. Reading bfloat16
# logits (2 bytes), an H100 has 19.8 instructions per logit, a B200 10.0, an A100 21.3.
BUDGETS = {
    "sm_80": ("A100", 108 * 128 * 1.41 / 1830),
    "sm_90": ("H100", 132 * 128 * 1.755 / 3000),
    "sm_100": ("B200", 148 * 128 * 1.85 / 7000),
}
SPECIAL = 1 / 8  # special-function lanes for each of the 128
CARDS = (*BUDGETS, "gfx942")
DTYPES = ("bfloat16", "float16", "float32")
# Qwen 2.5 and 3
VOCABULARY = 151_936

# 256 threads of 128 registers are half of an SM: two programs run side by side
MOST_REGISTERS = 128
# Most instructions per two bytes of logits read (a bfloat16 logit, half a float32 logit), at any
# vocabulary: what the kernels have reached on every card and version in docs/versions.md.
LIMITS = {
    "forward": 6.8,
    "forward, exact KL": 8.1,
    "forward, forward KL": 8.1,
    "forward, Jensen-Shannon": 5.5,
    "gradient": 5.6,
    "gradient, entropy": 7.6,
    "gradient, exact KL": 6.7,
    "gradient, exact KL, entropy": 7.7,
    "gradient, forward KL": 7.2,
    # a logarithm of 12 multiply-adds to a pair of logits
    "gradient, Jensen-Shannon": 22.5,
}
# the loops over the vocabulary of each kernel that reads a row
LOOPS = {"row_stats": ["forward"], "row_loss": ["forward", "gradient"], "row_dlogits": ["gradient"]}
# Registers that may be spilled, none within a loop: for sm_120 the assembler stores a few values of
# two rows from their first reading to their second.
LEEWAY = {"sm_120": 4}


@interruptible
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    parser = Parser(
        "grpo_core.inspect",
        description="Compiles every kernel without a GPU; prints what the machine code needs.",
    )
    parser.add_argument(
        "cards", nargs="*", help=f"sm_NUMBER or gfxNAME; default: {' '.join(CARDS)}"
    )
    add = parser.add_argument
    add("--dtype", action="append", choices=DTYPES, help="dtype of the logits; may be repeated")
    add(
        "--vocabulary",
        action="append",
        type=vocabulary,
        metavar="V",
        help="its size; may be repeated",
    )
    add("--all", action="store_true", help="every surrogate and every KL estimator")
    add("--json", type=new_file, metavar="FILE", help="also write all figures to FILE")
    add("--gate", action="store_true", help="exit with 1 and a list if a limit is exceeded")
    options = parser.parse_args(arguments)
    cards = options.cards or CARDS
    try:
        check_package("inspect", "triton")
        with exit_on_interrupt():
            import torch

            from grpo_core.inspect.compile_ahead import compile_kernels, must_compile, target
        must_compile()
        for card in cards:
            target(card)
    except (ModuleNotFoundError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    kernels: list[Compiled] = []
    for card in cards:
        for dtype in options.dtype or ["bfloat16"]:
            for V in options.vocabulary or [VOCABULARY]:
                compiled = list(compile_kernels(card, getattr(torch, dtype), V, options.all))
                kernels += compiled
                print("\n".join(kernel_table(compiled)), end="\n\n", flush=True)
    if options.json:
        records = []
        for kernel in kernels:
            costs = [vars(loop) | figures(kernel, loop) for loop in kernel.loops or []]
            records.append({**vars(kernel), "name": kernel.name, "loops": costs})
        options.json.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    if not options.gate:
        return 0
    broken = list(exceeded(kernels))
    print("\n".join(broken) or "no limit is exceeded")
    return 1 if broken else 0


def figures(kernel: Compiled, loop: Loop) -> dict[str, Any]:
    """The cost of one logit; the shares of the budget are None on a card without one.

    The budget is that of the bytes read or, in a loop without loads, of the bytes written.
    """
    logits, moved = kernel.logits(loop), sum(loop.loads or loop.stores)
    _, budget = BUDGETS.get(kernel.card, ("", None))
    return {
        "role": loop.role,
        "logits": logits,
        "instructions": loop.instructions,
        "instructions_per_logit": loop.instructions / logits,
        "special_per_logit": loop.special / logits,
        "issue_share": budget and loop.instructions / (budget * moved),
        "special_share": budget and loop.special / (budget * SPECIAL * moved),
    }


def exceeded(kernels: Iterable[Compiled]) -> Iterator[str]:
    """A line for every limit that is exceeded or cannot be checked."""
    for kernel in kernels:
        where = f"{kernel.card} {kernel.dtype} V={kernel.vocabulary} {kernel.name}"
        spills = LEEWAY.get(kernel.card, 0)
        if (kernel.spills or 0) > spills or any(loop.spills for loop in kernel.loops or []):
            yield f"{where}: {kernel.spills} registers spilled"
        if not kernel.card.startswith("sm_"):
            continue
        if kernel.registers is None or kernel.spills is None or kernel.loops is None:
            yield f"{where}: not all could be measured, a tool is missing"
        if kernel.registers and kernel.registers > MOST_REGISTERS:
            yield f"{where}: {kernel.registers} registers, more than {MOST_REGISTERS}"
        for loop in kernel.loops or []:
            if loop.waits:
                yield f"{where}: {loop.waits} barriers or shuffles in the {loop.role} loop"
        hot = [loop for loop in hottest(kernel.loops or []) if loop.role in ("forward", "gradient")]
        expected = LOOPS[kernel.kernel] if kernel.rows_read and kernel.loops is not None else []
        for role in set(expected).difference(loop.role for loop in hot):
            if (role, kernel.variant) != ("gradient", "no gradient"):
                yield f"{where}: no {role} loop was found"
        for loop in hot:
            if min(loop.loads) < WIDE:
                yield f"{where}: the {loop.role} loop loads {min(loop.loads)} bytes at a time"
            if min(loop.stores, default=WIDE) < WIDE:
                yield f"{where}: the {loop.role} loop stores {min(loop.stores)} bytes at a time"
            count = 2 * loop.instructions / sum(loop.loads)
            if count > (most := limit(kernel, loop)):
                yield f"{where}: {count:.2f} instructions in the {loop.role} loop, limit {most}"


def limit(kernel: Compiled, loop: Loop) -> float:
    """Most instructions per two bytes of logits."""
    kinds = ("exact KL", "forward KL", "Jensen-Shannon")
    parts = kinds if loop.role == "forward" else (*kinds, "entropy")
    name = ", ".join([loop.role, *(part for part in parts if part in kernel.variant)])
    return LIMITS[name]


def hottest(loops: Iterable[Loop]) -> list[Loop]:
    """The loop of each role that moves most bytes per iteration; the others handle remainders.

    Among equals that with the fewest instructions: a loop over remainders may be unrolled.
    """
    ascending = sorted(loops, key=lambda x: (sum(x.loads) + sum(x.stores), -x.instructions))
    of_role = {loop.role: loop for loop in ascending}
    return [of_role[role] for role in ("forward", "gradient", "scale", "zeros") if role in of_role]


def kernel_table(kernels: Sequence[Compiled]) -> Iterator[str]:
    """Lines of at most 100 columns for one card, dtype and vocabulary."""
    first = kernels[0]
    name, budget = BUDGETS.get(first.card, ("", None))
    layout = ", ".join(f"{name} {value}" for name, value in first.constants.items())
    yield f"{first.card}{f' ({name})' * bool(name)}: {first.dtype}, V = {first.vocabulary}"
    yield f"layout: {layout}, {first.warps} warps"
    if budget:
        issued = budget * first.itemsize
        special = issued * SPECIAL
        yield f"budget, reading: {issued:.1f} instructions and {special:.2f} MUFU per logit"
    yield ""
    yield f"{'':59}bytes each     per logit    of budget"
    row = "{:30}{:>4} {:>6} {:>6}  {:8} {}".format
    yield row("kernel", "regs", "spills", "shared", "loop", "load store  instr  MUFU issue  MUFU")
    order = list(dict.fromkeys(kernel.kernel for kernel in kernels))
    for kernel in sorted(kernels, key=lambda kernel: order.index(kernel.kernel)):
        sizes = (kernel.registers, kernel.spills, kernel.shared)
        head = [kernel.name, *("?" if size is None else str(size) for size in sizes)]
        hot = hottest(kernel.loops or [])
        if not hot:
            yield row(*head, "?" if kernel.loops is None else "", "").rstrip()
        for loop in hot:
            yield row(*head, loop.role, _columns(kernel, loop)).rstrip()
            head = [""] * 4
    if any(kernel.registers is None or kernel.loops is None for kernel in kernels):
        yield "?: cuobjdump (registers, spills) or nvdisasm (loops) was not found"


def _columns(kernel: Compiled, loop: Loop) -> str:
    """The columns of a loop."""
    load, store = (str(min(accesses, default="")) for accesses in (loop.loads, loop.stores))
    cost = figures(kernel, loop)
    text = f"{load:>4} {store:>5} {cost['instructions_per_logit']:6.2f}"
    text += f" {cost['special_per_logit']:5.2f}"
    if cost["issue_share"] is not None:
        text += f" {cost['issue_share']:5.0%} {cost['special_share']:5.0%}"
    return text


if __name__ == "__main__":
    sys.exit(main())
