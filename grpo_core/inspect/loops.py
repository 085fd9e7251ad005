"""Reads the loops of a kernel out of its machine code: what one iteration issues, loads, stores.

The text of `nvdisasm -c` (SASS) or of the amdgcn assembly is cut into basic blocks; loops are the
natural loops of the graph of these blocks. A loop over the vocabulary has two ways through: whole
tiles, nearly always taken, and the masked tile at an end of the row or at the target. So the
instructions between a label and the jump back to it are not what an iteration costs. Counted is
what the *common path* issues, from the head of the loop back to the head:

- Masks leave traces. In SASS a masked load or store carries a predicate, `@P0 LDG`; in amdgcn it
  stands where the execution mask is narrowed, after `saveexec`. Whole tiles are read and written
  by accesses without either. The common path is the one with the most bytes of such certain
  accesses and, among these, with the fewest instructions.
- An access under the predicate of the branch that ends its block is certain on the one way out of
  the block, and does not happen on the other.
- In a loop without certain accesses it is the path of the fewest instructions that has any access.
- Jumps over code for which no thread is left (execz), or for a warp out of step (BRA.DIV), are not
  taken.
- Instructions whose predicate is false take their turn all the same, and are counted. Those of an
  inner loop belong to the inner loop.

Bytes are those of one thread; they tell how many logits an iteration handles.
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
    """One iteration of a loop's common path; of the whole loop only `waits`."""

    opcodes: Counter[str]
    loads: tuple[int, ...]  # bytes of each
    stores: tuple[int, ...]
    special: int
    waits: int

    @property
    def instructions(self) -> int:
        """How many an iteration issues."""
        return self.opcodes.total()

    @property
    def role(self) -> str:
        """What the loop is for, by what it reads, writes and computes."""
        if not self.stores:
            # what reads a vocabulary raises two to its logits; the sum of the losses does not
            if not self.special:
                return "sum"
            # the few rows that are read again are read narrowly
            return "forward" if max(self.loads, default=0) >= WIDE else "again"
        if not self.loads:
            return "zeros"
        return "gradient" if self.special else "scale"


@dataclass
class Block:
    """Instructions that are entered at the first and left behind the last."""

    labels: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)

    def may(self, jump: bool) -> bool:
        """Whether it is commonly left by its jump, or else without."""
        return not self.instructions or self.instructions[-1].expected in (None, jump)

    def issued(self, jumps: bool) -> list[Instruction]:
        """Its instructions when it is left by its jump, or when it is not.

        The predicate of the jump is known then: accesses under it are certain, or void.
        """
        last = self.instructions[-1] if self.instructions else Instruction("")
        if not last.targets or not last.guard:
            return self.instructions
        guard = last.guard
        # with a second predicate among its operands, not jumping says nothing of the first
        holds = guard if jumps else "unknown" if "," in last.operands else _negated(guard)
        result: list[Instruction] = []
        for instruction in reversed(self.instructions):
            if instruction.guard == holds:
                instruction = replace(instruction, guard="")
            elif instruction.guard == _negated(holds):
                instruction = replace(instruction, loads=0, stores=0)
            result.append(instruction)
            # further up the predicate may have had another value; results are written first
            if guard.lstrip("!") in re.split(r"[,\s]+", instruction.operands)[:2]:
                holds = "unknown"
        return result[::-1]


def loops(code: Iterable[str | Instruction]) -> list[Loop]:
    """Every loop that touches global memory, in the order of the code."""
    blocks = _blocks(code)
    successors = _successors(blocks)
    order = _order(successors)
    bodies = _natural_loops(successors, order)
    found = []
    for head, body in bodies.items():
        own = body.difference(*(b for h, b in bodies.items() if h in body and h != head))
        steps = {
            (block, after): blocks[block].issued(jumps=after != block + 1) if block in own else []
            for block in body
            for after in successors[block]
            if after in body and blocks[block].may(jump=after != block + 1)
        }
        path = _common_path(head, steps, order)
        waits = sum(i.waits for block in own for i in blocks[block].instructions)
        loop = _counted(path, waits)
        if loop.loads or loop.stores:
            found.append(loop)
    return found


def _negated(guard: str) -> str:
    """The opposite predicate."""
    return guard[1:] if guard.startswith("!") else f"!{guard}"


def _blocks(code: Iterable[str | Instruction]) -> list[Block]:
    """Cuts at labels and behind jumps."""
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
    return blocks


def _successors(blocks: list[Block]) -> list[list[int]]:
    """Where each block may lead."""
    at = {label: index for index, block in enumerate(blocks) for label in block.labels}
    result = []
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else Instruction("")
        after = [at[label] for label in last.targets if label in at]
        if last.falls_through and index + 1 < len(blocks):
            after.append(index + 1)
        result.append(after)
    return result


def _order(successors: list[list[int]]) -> list[int]:
    """Blocks that can be reached, each before those it leads to but by jumping back."""
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
    """Head -> body: all that leads back to a head through which it must have come."""
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            predecessors[after].append(block)
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            above = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            changed |= above != dominators[block]
            dominators[block] = above
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if head not in dominators[block]:
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
    """What is issued from the head back to it: most certain bytes, then fewest instructions."""
    place = {block: index for index, block in enumerate(order)}
    # (block, whether anything was accessed) -> (certain bytes, −instructions), the best way there
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


def _counted(path: list[Instruction], waits: int) -> Loop:
    """The figures of a path; masked accesses only where there are no others."""
    loads = [i for i in path if i.loads]
    stores = [i for i in path if i.stores]
    return Loop(
        opcodes=Counter(i.opcode for i in path),
        loads=tuple(i.loads for i in [i for i in loads if not i.guard] or loads),
        stores=tuple(i.stores for i in [i for i in stores if not i.guard] or stores),
        special=sum(i.special for i in path),
        waits=waits,
    )
