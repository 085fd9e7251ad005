"""What each way to read a row twice should reach: `python -m bench.second_reading [sm_90]`.

The one pass reads a row for its softmax and again for its gradient. Counted as one reading and one
writing it runs at a copy's speed if the second reading never goes to memory, at two thirds of that
if it always does. For every candidate of `launch.Tuning` this compiles the kernel and predicts,
without a GPU, where the second reading is served and which of four limits is met first:

- memory: what is read twice from there, at the speed of a copy;
- issue: the loops' instructions, on four schedulers;
- latency: a program waits for each step of loads; `programs` of them on a processor overlap;
- caches: what was used longest ago goes first, what was asked to be kept last. All programs are
  simulated, each somewhere in its row, in place. Two figures: a cautious one with half of the
  level-2 cache (lines read across its two halves may lie in both) and no level-1 cache, and a
  hopeful one with all of both.

Estimates, to compare with what `bench.tune` measures; other rules of replacement are not tried.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch

from grpo_core import RECIPES, fused_loss
from grpo_core.cli.options import Parser
from grpo_core.inspect.__main__ import BUDGETS, VOCABULARY, hottest
from grpo_core.inspect.compile_ahead import Compiled, as_if_on, examine
from grpo_core.kernels import launch
from grpo_core.kernels.launch import LOAD_BYTES, REGISTERS, TILES, Tuning

CANDIDATES = {
    "default": Tuning(8),
    "backwards": Tuning(8, backwards=True),
    "backwards, end kept": Tuning(8, registers=80, backwards=True, kept=64),
    "backwards, 2 programs": Tuning(16, backwards=True),
    "backwards, 1 program": Tuning(32, backwards=True),
    "22 % held, backwards": Tuning(8, registers=128, backwards=True, held=16),
    "43 % held, backwards": Tuning(16, registers=128, backwards=True, held=16),
    "65 % held": Tuning(8, registers=255, held=48),
    "65 % held, backwards": Tuning(8, registers=255, backwards=True, held=48),
}
# card -> (MB of the level-2 cache, KiB of a processor's level-1 cache and shared memory)
CACHES = {"sm_80": (40, 192), "sm_90": (50, 256), "sm_100": (126, 256)}
# of a processor: threads; of a program: KiB of shared memory that the driver takes
THREADS, RESERVED = 2048, 1
# estimates in µs: until a load from memory is there, on a busy card, or one from a cache; what ends
# the first reading
FROM_MEMORY, FROM_CACHE, COMBINE = 0.85, 0.45, 1.5
BLOCK = 4096
Rank = int  # 0: given up first, 1: as usual, 2: last


class Cache:
    """Blocks, the least recently used of the lowest rank replaced first."""

    def __init__(self, bytes_: float) -> None:
        self.blocks = int(bytes_ // BLOCK)
        self.ranks: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in range(3))

    def touch(self, block: int, rank: Rank, allocate: bool = True) -> bool:
        """Whether the block was there; it is afterwards, unless that would take `allocate`."""
        there = False
        for blocks in self.ranks:
            if block in blocks:
                del blocks[block]
                there = True
        if self.blocks and (there or allocate):
            self.ranks[rank][block] = None
        if sum(map(len, self.ranks)) > self.blocks:
            next(blocks for blocks in self.ranks if blocks).popitem(last=False)
        return there


@dataclass(frozen=True)
class Shares:
    """Where the second reading of a row is served; together 1."""

    registers: float
    level1: float
    level2: float
    memory: float


def simulate(
    tuning: Tuning, row_bytes: int, processors: int, programs: int, level1: float, level2: float
) -> Shares:
    """Many programs, each at its place of its row, a block of it at a time.

    Args:
        tuning: its `held`, `kept` and `backwards` are looked at.
        row_bytes: of a row.
        processors, programs: of the card, and on each processor at a time.
        level1, level2: bytes of a processor's level-1 cache, of the level-2 cache.
    """
    order = random.Random(0)
    blocks = -(-row_bytes // BLOCK)
    held = min(blocks - 1, tuning.held * tuning.warps * 32 * LOAD_BYTES // BLOCK)
    kept = blocks if tuning.kept is None else max(0, blocks - tuning.kept * 1024 // BLOCK)
    hints = tuning.kept is not None
    near = [Cache(level1) for _ in range(processors)]
    far = Cache(level2)
    # in the order of write_wide: what is held comes last, and the first block
    second = [*range(1 + held if held else 0, blocks)]
    if tuning.backwards:
        second.reverse()
    second += [*range(1, 1 + held), 0] if held else []
    everyone = [n for n in range(processors) for _ in range(programs)]
    at = [order.randrange(2 * blocks) for _ in everyone]
    row = [*range(len(everyone))]
    found = [0, 0, 0]
    rounds = 6 * blocks
    for step in range(rounds):
        for program in order.sample(range(len(everyone)), len(everyone)):
            own, place = near[everyone[program]], at[program]
            forward = place < blocks
            block = place if forward else second[place - blocks]
            name = row[program] * blocks + block
            if forward or not 1 <= block <= held:
                rank = 1 if not hints else 2 if forward and block >= kept else 0
                in_near = own.touch(name, rank)
                in_far = in_near or far.touch(name, rank)
                if not forward and step > rounds // 3:
                    found[0 if in_near else 1 if in_far else 2] += 1
            if not forward:
                own.touch(name, 0 if hints else 1, allocate=False)
                far.touch(name, 0 if hints else 1)
            at[program] = (place + 1) % (2 * blocks)
            if at[program] == 0:
                row[program] += len(everyone)
    again = 1 - held / blocks
    level1_share, level2_share, memory = (again * n / max(1, sum(found)) for n in found)
    return Shares(held / blocks, level1_share, level2_share, memory)


@dataclass(frozen=True)
class Prediction:
    """Of a candidate; TB/s are counted as one reading and one writing of the logits.

    Attributes:
        programs: on a processor at a time.
        shares: cautious and hopeful, see above.
        memory: TB/s that memory allows in both cases.
        issue, latency: TB/s that instructions and waiting allow.
    """

    programs: int
    shares: tuple[Shares, Shares]
    memory: tuple[float, float]
    issue: float
    latency: float

    @property
    def terabytes(self) -> tuple[float, float]:
        """Allowed by all, in both cases."""
        low, high = (min(memory, self.issue, self.latency) for memory in self.memory)
        return low, high


def predict(kernel: Compiled, tuning: Tuning) -> Prediction:
    """What should come of a compiled one pass on its card."""
    budget, (megabytes, kilobytes) = BUDGETS[kernel.card], CACHES[kernel.card]
    threads, V, size = 32 * tuning.warps, kernel.vocabulary, kernel.itemsize
    assert kernel.registers is not None and kernel.loops is not None
    shared = kernel.shared / 1024 + RESERVED
    programs = int(
        min(
            REGISTERS // (-(-kernel.registers // 8) * 8 * threads),
            THREADS // threads,
            kilobytes // shared,
        )
    )
    level1, level2 = 1024 * (kilobytes - programs * shared), 1e6 * megabytes
    shares = tuple(
        simulate(tuning, V * size, budget.processors, programs, *caches)
        for caches in ((0.0, level2 / 2), (level1, level2))
    )
    memory = tuple(2 / (2 + share.memory) * budget.terabytes for share in shares)
    costs = [loop.instructions / kernel.logits(loop) for loop in hottest(kernel.loops)[:2]]
    row, per_microsecond = 2 * V * size, 128e3 * budget.gigahertz
    computing = [V * cost / per_microsecond for cost in costs]
    steps = V * size / (threads * LOAD_BYTES * (tuning.tiles or TILES))
    again = steps * (1 - shares[0].registers)
    far = shares[0].memory / (1 - shares[0].registers)
    waiting = FROM_MEMORY * (again + 1) + COMBINE
    waiting += again * (far * FROM_MEMORY + (1 - far) * FROM_CACHE)
    on_all = row * budget.processors / 1e6
    return Prediction(
        programs,
        (shares[0], shares[1]),
        (memory[0], memory[1]),
        on_all / sum(computing),
        on_all * programs / (sum(computing) + waiting),
    )


def compile_one_pass(card: str, dtype: torch.dtype, V: int, tuning: Tuning) -> Compiled:
    """The one pass of tokens with a gradient, under an entry of the table."""
    key = (card, str(dtype).removeprefix("torch."), launch.tuning_bucket(V))
    logits = torch.zeros(4, V, dtype=dtype).requires_grad_()
    index, vector = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    with patch.dict(launch.TUNED, {key: tuning}), as_if_on(card) as launches:
        fused_loss(
            logits,
            index,
            objective=RECIPES["grpo"].replace(beta=0.0, kl=None),
            advantage=vector,
            sequence_id=index,
            old_logp=vector,
        )
    (found,) = (one for one in launches if one.kernel.__name__ == "_row_loss_kernel")
    return examine(card, "", dtype, V, found)


def table(card: str, dtype: torch.dtype, V: int) -> Iterator[str]:
    """Lines of Markdown, a candidate each."""
    yield "| candidate | regs, spills | instructions | programs | second reading | limits | TB/s |"
    yield "|---|---|---|---:|---|---|---|"
    for name, tuning in CANDIDATES.items():
        kernel = compile_one_pass(card, dtype, V, tuning)
        found = predict(kernel, tuning)
        costs = [f"{lp.instructions / kernel.logits(lp):.1f}" for lp in hottest(kernel.loops)[:2]]
        served = [f"{s.registers:.0%} {s.level1:.0%} {s.level2:.0%}" for s in found.shares]
        low, high = found.terabytes
        yield (
            f"| {name} | {kernel.registers}, {kernel.spills} | {' + '.join(costs)} | "
            f"{found.programs} | {served[0]}, {served[1]} | "
            f"{found.issue:.1f}, {found.latency:.1f} | {low:.2f} to {high:.2f} |"
        )


def _main() -> None:
    parser = Parser("bench.second_reading", description=__doc__.splitlines()[0])
    parser.add_argument("cards", nargs="*", default=["sm_90"], help=" ".join(CACHES))
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args()
    for card in given.cards:
        print(f"\n{card}: {given.dtype}, V = {given.vocabulary}\n")
        for line in table(card, getattr(torch, given.dtype), given.vocabulary):
            print(line, flush=True)


if __name__ == "__main__":
    _main()
