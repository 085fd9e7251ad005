"""The CPU kernels beside what they cannot beat and what they should: ratios, taken in one run.

`python -m bench.cpu [--rows N] [--rounds N]`. Every round times all contenders of a line one after
the other, so that neighbours on the machine meet them all; a figure is the median over the rounds
of the ratio within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.batch import CASES, TRAINED, Batch, Case, dtype_name
from bench.bench_loss import Products
from bench.contenders import contenders
from bench.machine import clock, device_name
from grpo_core import token_logp
from grpo_core.cli.options import Parser

ONE_PASS, TWO_PHASES, FORWARD = CASES
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = 151_936
# vocabulary and rows of further batches: Llama 2, SmolLM2, a byte-pair toy, the demo task
SIZES = ((32_000, 512), (49_152, 256), (2_048, 64), (2_048, 4_096), (27, 600), (27, 65_536))
HIDDEN_SHAPE = (1_024, 32_000, 512)

Call = Callable[[], object]


def ratio(ours: Call, other: Call, rounds: int, prepare: Call | None = None) -> float:
    """Median of time of `ours` over time of `other`, after one call of each."""
    found = []
    for nth in range(rounds + 1):
        seconds = []
        for call in (ours, other):
            if prepare is not None:
                prepare()
            start = clock()
            call()
            seconds.append(clock() - start)
        if nth:
            found.append(seconds[0] / seconds[1])
    return statistics.median(found)


def calls(batch: Batch, case: Case) -> dict[str, Call]:
    """The contenders of a case by their names."""
    return {one.name: one.call(batch, case) for one in contenders("cpu", case)}


def forward(batch: Batch) -> Call:
    """Log-probability and entropy of every token."""
    return partial(token_logp, batch.logits, batch.target)


def against_the_machine(rows: int, dtype: torch.dtype, rounds: int) -> Iterator[tuple[str, float]]:
    """At the vocabulary of Qwen: plain reading, copying into warm memory, torch.compile."""
    batch = Batch.draw(rows, VOCABULARY, dtype, "cpu")
    warm: Tensor = batch.pristine.clone()
    yield "forward / a plain read (sum)", ratio(forward(batch), batch.logits.sum, rounds)
    in_place = calls(batch, ONE_PASS)["ours-cpu-inplace"]
    copy = partial(warm.copy_, batch.pristine)
    found = ratio(in_place, copy, rounds, prepare=batch.restore)
    yield "forward + backward in place / a warm copy_", found
    del warm
    batch.restore()
    ours = calls(batch, ONE_PASS)
    yield (
        "forward + backward / torch.compile of naive",
        ratio(ours["ours-cpu"], ours["compiled"], rounds),
    )
    two = calls(batch, TWO_PHASES)["ours-cpu"]
    yield "two phases / one pass, forward + backward", ratio(two, ours["ours-cpu"], rounds)
    compiled = calls(batch, FORWARD)["compiled"]
    yield "forward / torch.compile of naive", ratio(forward(batch), compiled, rounds)


def against_naive(V: int, N: int, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Ratios to naive PyTorch of forward, and of forward + backward, at another size."""
    batch = Batch.draw(N, V, dtype, "cpu")
    ours, plain = calls(batch, ONE_PASS), calls(batch, FORWARD)["naive"]
    return (
        ratio(forward(batch), plain, rounds),
        ratio(ours["ours-cpu"], ours["naive"], rounds),
    )


def against_products(rounds: int) -> float:
    """From hidden states, over the bare products into memory that is already in use."""
    N, V, D = HIDDEN_SHAPE
    batch = Batch.draw(N, V, torch.float32, "cpu", D)
    fast = calls(batch, TRAINED)["ours-fast"]
    return ratio(fast, Products(batch, TRAINED), rounds)


def main() -> None:
    """Prints the ratios; below 1 ours is faster."""
    parser = Parser("bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="at the large vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    size = f"{given.rows:,} x {VOCABULARY:,}"
    print(f"{size:<46}" + "".join(f"{dtype_name(dtype):>10}" for dtype in DTYPES))
    lines = (against_the_machine(given.rows, dtype, given.rounds) for dtype in DTYPES)
    for pair in zip(*lines, strict=True):
        print(f"{pair[0][0]:<46}" + "".join(f"{value:10.2f}" for _, value in pair), flush=True)
    print("\nover naive PyTorch: forward, forward + backward")
    for V, N in SIZES:
        figures = [against_naive(V, N, dtype, given.rounds) for dtype in DTYPES]
        text = "".join(f"{f'{one:.2f} {both:.2f}':>14}" for one, both in figures)
        print(f"{f'{N:,} x {V:,}':<38}{text}", flush=True)
    N, V, D = HIDDEN_SHAPE
    print(f"\nfrom hidden states, {N:,} x {V:,} x {D}, float32, over the bare products")
    print(f"{'forward + backward, trained head':<46}{against_products(given.rounds):10.2f}")


if __name__ == "__main__":
    main()
