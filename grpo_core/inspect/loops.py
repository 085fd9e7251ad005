"""Counts what one iteration of a kernel's loops issues, loads and stores.

The machine code is cut into basic blocks; the loops are the natural loops of their graph. A loop
over the vocabulary has two paths: full tiles, nearly always taken, and the masked tile at an end of
the row or at the target. The counts are those of the *common path* from the head of the loop back
to the head:

- A masked load or store carries a predicate, `@P0 LDG`; full tiles are accessed without. The common
  path has the most bytes of unmasked accesses and, among equals, the fewest instructions.
- A block may end in a branch. An access with the predicate of this branch is unmasked on one way
  out of the block, and does not happen on the other.
- In a loop without unmasked accesses it is the path with the fewest instructions and any access.
- Instructions whose predicate is false are issued and counted. Those of an inner loop belong to the
  inner loop.

Bytes are per thread; they give the number of logits of an iteration.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from grpo_core.inspect.sass import Instruction

# bytes of the widest load of one thread
WIDE = 16


@dataclass(frozen=True)
class Loop:
    """One iteration of the common path; `waits` and `spills` count the whole loop."""

    opcodes: Counter[str]
    loads: tuple[int, ...]  # bytes of each
    stores: tuple[int, ...]
    special: int
    waits: int
    spills: int = 0

    @property
    def instructions(self) -> int:
        """Instructions issued per iteration."""
        return self.opcodes.total()

    @property
    def role(self) -> str:
        """The purpose of the loop, from what it reads, writes and computes."""
        if not self.stores:
            # a loop over the vocabulary computes exponentials, a sum of losses does not
            if not self.special:
                return "sum"
            # the few rows that are read again have narrow loads
            return "forward" if max(self.loads, default=0) >= WIDE else "again"
        if not self.loads:
            return "zeros"
        return "gradient" if self.special else "scale"


@dataclass
class Block:
    """A basic block: entered at its first instruction and left after its last."""

    labels: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def last(self) -> Instruction:
        """The last instruction, which may jump."""
        return self.instructions[-1] if self.instructions else Instruction("")

    def issued(self, jumps: bool) -> list[Instruction]:
        """The instructions if the block is left by its jump, or without.

        The value of the jump's predicate is then known: accesses with it are unmasked, or void.
        """
        last, guard = self.last, self.last.guard
        if not last.targets or not guard:
            return self.instructions
        # with a second predicate as an operand, not jumping does not determine the first
        holds = guard if jumps else "unknown" if "," in last.operands else _negated(guard)
        result: list[Instruction] = []
        for instruction in reversed(self.instructions):
            if instruction.guard == holds:
                instruction = replace(instruction, guard="")
            elif instruction.guard == _negated(holds):
                instruction = replace(instruction, loads=0, stores=0)
            result.append(instruction)
            # before this write the predicate had another value; operands begin with the results
            if guard.lstrip("!") in re.split(r"[,\s]+", instruction.operands)[:2]:
                holds = "unknown"
        return result[::-1]


def loops(code: Iterable[str | Instruction]) -> list[Loop]:
    """Every loop that touches global memory, in the order of the code."""
    blocks, successors = _graph(code)
    order = _order(successors)
    bodies = _natural_loops(successors, order)
    result = []
    for head, body in bodies.items():
        own = body.difference(*(b for h, b in bodies.items() if h in body and h != head))
        steps = {
            (block, after): blocks[block].issued(jumps=after != block + 1) if block in own else []
            for block in body
            for after in successors[block]
            if after in body
        }
        path = _common_path(head, steps, order)
        loads, stores = [i for i in path if i.loads], [i for i in path if i.stores]
        if not loads and not stores:
            continue
        # masked accesses only if there are no others
        loop = Loop(
            opcodes=Counter(i.opcode for i in path),
            loads=tuple(i.loads for i in [i for i in loads if not i.guard] or loads),
            stores=tuple(i.stores for i in [i for i in stores if not i.guard] or stores),
            special=sum(i.special for i in path),
            waits=sum(i.waits for block in own for i in blocks[block].instructions),
            spills=sum(i.spills for block in own for i in blocks[block].instructions),
        )
        result.append(loop)
    return result


def _negated(guard: str) -> str:
    """The opposite predicate."""
    return guard[1:] if guard.startswith("!") else f"!{guard}"


def _graph(code: Iterable[str | Instruction]) -> tuple[list[Block], list[list[int]]]:
    """(the code cut at labels and after jumps, the successors of each block)."""
    blocks = [Block()]
    for item in code:
        if isinstance(item, str):
            if blocks[-1].instructions:
                blocks.append(Block())
            blocks[-1].labels.append(item)
            continue
        blocks[-1].instructions.append(item)
        if item.targets or not item.falls_through:
            blocks.append(Block())
    at = {label: index for index, block in enumerate(blocks) for label in block.labels}
    successors = []
    for index, block in enumerate(blocks):
        after = [at[label] for label in block.last.targets if label in at]
        if block.last.falls_through and index + 1 < len(blocks):
            after.append(index + 1)
        successors.append(after)
    return blocks, successors


def _order(successors: list[list[int]]) -> list[int]:
    """The reachable blocks in reverse postorder."""
    finished: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, ahead = stack[-1]
        following = next((b for b in ahead if b not in seen), None)
        if following is None:
            finished.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return finished[::-1]


def _natural_loops(successors: list[list[int]], order: list[int]) -> dict[int, set[int]]:
    """Head -> body: the blocks from which a jump backwards to the head can be reached.

    In the code of a compiler such a head is the only entry of its loop.
    """
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            predecessors[after].append(block)
    place = {block: index for index, block in enumerate(order)}
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if place[head] > place[block]:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [block]
            while waiting:
                if (member := waiting.pop()) not in body:
                    body.add(member)
                    waiting += predecessors[member]
    return dict(sorted(bodies.items()))


def _common_path(
    head: int, steps: dict[tuple[int, int], list[Instruction]], order: list[int]
) -> list[Instruction]:
    """The path from the head back to it: most unmasked bytes, then fewest instructions."""
    place = {block: index for index, block in enumerate(order)}
    # (block, whether anything was accessed) -> (unmasked bytes, −instructions) of the best path
    reached: dict[tuple[int, bool], tuple[tuple[int, int], list[Instruction]]]
    reached = {(head, False): ((0, 0), [])}
    rounds: list[tuple[tuple[bool, int, int], list[Instruction]]] = [((False, 0, 0), [])]
    for (block, after), issued in sorted(steps.items(), key=lambda step: place[step[0][0]]):
        if after != head and place[after] <= place[block]:
            continue
        for accessed in (False, True):
            if (block, accessed) not in reached:
                continue
            (moved, minus), path = reached[block, accessed]
            moved += sum(i.loads + i.stores for i in issued if not i.guard)
            way = ((moved, minus - len(issued)), path + issued)
            arrival = (after, accessed or any(i.loads or i.stores for i in issued))
            if after == head:
                rounds.append(((arrival[1], *way[0]), way[1]))
            elif arrival not in reached or way[0] > reached[arrival][0]:
                reached[arrival] = way
    return max(rounds, key=lambda way: way[0])[1]
