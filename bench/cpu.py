"""The CPU kernels beside what they cannot beat and what they should: ratios, taken in one run.

`python -m bench.cpu [--rows N] [--rounds N]`. Every round times all contenders of a line one after
the other, so that neighbours on the machine meet them all; a figure is the median over the rounds
of the ratio within a round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.batch import CASES, TRAINED, Batch, Case
from bench.bench_loss import products
from bench.contenders import contenders
from bench.machine import device_name, ratio
from grpo_core import token_logp
from grpo_core.cli.options import Parser
from grpo_core.verify.report import dtype_name

ONE_PASS, TWO_PHASES, FORWARD = CASES
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = 151_936
# vocabulary and rows of further batches: Llama 2, SmolLM2, a byte-pair toy, the demo task
SIZES = ((32_000, 512), (49_152, 256), (2_048, 64), (2_048, 4_096), (27, 600), (27, 65_536))
HIDDEN_SHAPE = (1_024, 32_000, 512)


def calls(batch: Batch, case: Case) -> dict[str, Callable[[], object]]:
    """The contenders of a case by their names."""
    return {one.name: one.call(batch, case) for one in contenders("cpu", case)}


def against_the_machine(rows: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """At the vocabulary of Qwen: plain reading, copying into warm memory, torch.compile."""
    batch = Batch.draw(rows, VOCABULARY, dtype, "cpu")
    forward, both = partial(token_logp, batch.inputs[0], batch.target), calls(batch, ONE_PASS)
    found = {"forward / a plain read (sum)": ratio(forward, batch.inputs[0].sum, rounds)}
    copy = partial(batch.pristine.clone().copy_, batch.pristine)
    in_place = ratio(both["ours-cpu-inplace"], copy, rounds, prepare=batch.restore)
    found["forward + backward in place / a warm copy_"] = in_place
    batch.restore()
    for name, ours, other in (
        ("forward + backward / torch.compile of naive", both["ours-cpu"], both["compiled"]),
        (
            "two phases / one pass, forward + backward",
            calls(batch, TWO_PHASES)["ours-cpu"],
            both["ours-cpu"],
        ),
        ("forward / torch.compile of naive", forward, calls(batch, FORWARD)["compiled"]),
    ):
        found[name] = ratio(ours, other, rounds)
    return found


def against_naive(V: int, N: int, dtype: torch.dtype, rounds: int) -> str:
    """Ratios to naive PyTorch of forward, and of forward + backward, at another size."""
    batch = Batch.draw(N, V, dtype, "cpu")
    both, plain = calls(batch, ONE_PASS), calls(batch, FORWARD)["naive"]
    forward = ratio(partial(token_logp, batch.inputs[0], batch.target), plain, rounds)
    return f"{forward:.2f} {ratio(both['ours-cpu'], both['naive'], rounds):.2f}"


def main() -> None:
    """Prints the ratios; below 1 ours is faster."""
    parser = Parser("bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="at the large vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    size = f"{given.rows:,} x {VOCABULARY:,}"
    print(f"{size:<46}" + "".join(f"{dtype_name(dtype):>10}" for dtype in DTYPES))
    columns = [against_the_machine(given.rows, dtype, given.rounds) for dtype in DTYPES]
    for name in columns[0]:
        print(f"{name:<46}" + "".join(f"{column[name]:10.2f}" for column in columns))
    print("\nover naive PyTorch: forward, forward + backward")
    for V, N in SIZES:
        text = "".join(f"{against_naive(V, N, dtype, given.rounds):>14}" for dtype in DTYPES)
        print(f"{f'{N:,} x {V:,}':<38}{text}", flush=True)
    N, V, D = HIDDEN_SHAPE
    # over the bare products into memory that is already in use
    batch = Batch.draw(N, V, torch.float32, "cpu", D)
    fast = ratio(calls(batch, TRAINED)["ours-fast"], products(batch, TRAINED), given.rounds)
    print(f"\nfrom hidden states, {N:,} x {V:,} x {D}, float32, over the bare products")
    print(f"{'forward + backward, trained head':<46}{fast:10.2f}")


if __name__ == "__main__":
    main()
