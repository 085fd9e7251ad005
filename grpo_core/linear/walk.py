"""One walk over rows of hidden states: the logits of a chunk, what is read of them, and gradients.

A chunk is some rows x all words. Its logits are made in a buffer that every chunk uses again, their
gradient takes their place, and the products with it follow at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.kernels.records import Rows, RowStats, Slopes
from grpo_core.linear.call import HiddenRows, Pass
from grpo_core.linear.head import LinearHead
from grpo_core.linear.matmuls import HeadGradients, HeadProducts
from grpo_core.linear.memory import ChunkBuffer, dlogits_dtype


class Policy:
    """What makes logits: some rows of hidden states, and a head."""

    def __init__(self, hidden: Tensor, head: LinearHead, call: Pass) -> None:
        self.call = call
        self.hidden = HiddenRows(hidden, call.rows)
        self.products = HeadProducts(head, hidden, call.autocast)

    def logits(self, chunk: slice, out: Tensor) -> None:
        """The logits of a chunk into the first rows of `out`."""
        self.products.logits(self.hidden[chunk], out, heat=self.call.heat_of(chunk))


class Walk:
    """The buffers, and the sums of gradients so far.

    Attributes:
        sums, dhidden: of what the call wants, float32; times `lift`, if that is not None. The lean
            plan has no sums, see `linear_lean`.
    """

    def __init__(self, hidden: Tensor, head: LinearHead, call: Pass) -> None:
        self.call, self.head = call, head
        self.policy = Policy(hidden, head, call)
        self.reference = None if call.reference is None else Policy(*call.reference, call)
        compute, is_lean = self.policy.products.compute, call.layout.plan == "lean"
        trains = any(call.wanted) and not is_lean
        # what gradients of logits are in before they enter a product
        self.narrowest = compute if is_lean else dlogits_dtype(call.logits_dtype, compute)
        self.buffer = ChunkBuffer(
            min(call.layout.rows, max(call.n, 1)),
            head.V,
            call.logits_dtype,
            self.narrowest if trains else None,
            hidden.device,
            apart=trains and head.softcap is not None,
        )
        self.ref_buffer: ChunkBuffer | None = None
        if call.reference is not None:
            rows = self.buffer.logits.shape[0]
            self.ref_buffer = ChunkBuffer(rows, head.V, call.logits_dtype, None, hidden.device)
        self.lift: Tensor | None = None
        self.sums = HeadGradients(None, None, None, None)
        if trains:
            self.sums = HeadGradients.of(head, call.wanted[1:], call.into)
        self.dhidden: Tensor | None = None
        if call.wanted[0]:
            # slices of the vocabulary add to it, chunks overwrite it
            room = torch.zeros if is_lean else torch.empty
            self.dhidden = room(call.n, head.D, dtype=torch.float32, device=hidden.device)
        # [n] bool: rows without a gradient
        self.still = torch.zeros(call.n, dtype=torch.bool, device=hidden.device)

    def lift_by(self, weight: Tensor) -> None:
        """Lifts dlogits of float16, which would underflow, by about the inverse of the weights."""
        if self.narrowest == torch.float16:
            largest = torch.cat([weight, weight.new_tensor([1e-30])]).amax()
            self.lift = torch.exp2(torch.floor(-torch.log2(largest)))

    def lifted(self, slopes: Slopes) -> Slopes:
        """Times the lift."""
        return slopes if self.lift is None else slopes.times(self.lift)

    def make_logits(self, chunk: slice) -> None:
        """The logits of a chunk, and those of its reference, into the buffers."""
        self.policy.logits(chunk, self.buffer.logits)
        if self.reference is not None and self.ref_buffer is not None:
            self.reference.logits(chunk, self.ref_buffer.logits)

    def ref_rows(self, place: slice) -> Rows | None:
        """The reference's logits of some rows of the chunk in the buffers."""
        return None if self.ref_buffer is None else self.ref_buffer.rows(place)

    def read(self, chunk: slice) -> RowStats:
        """Statistics of the chunk in the buffers."""
        here = slice(0, chunk.stop - chunk.start)
        target, T = self.call.target[chunk], self.call.temperature
        return self.call.kernels.row_stats(self.buffer.rows(here), target, T, self.ref_rows(here))

    def at_target(self, chunk: slice, buffer: ChunkBuffer) -> Tensor:
        """`[n]` float32: the logits at the targets, of the chunk in a buffer."""
        logits = buffer.logits[: chunk.stop - chunk.start]
        return logits.gather(1, self.call.target[chunk, None]).squeeze(1).float()

    def differentiate(self, chunk: slice, target: Tensor, slopes: Slopes, stats: RowStats) -> None:
        """The gradient of the chunk in the buffers, from its rows' vectors, and the products."""
        for place, dlogits in self.buffer.launches(target.numel()):
            self.call.kernels.row_dlogits(
                self.buffer.rows(place),
                target[place],
                self.call.temperature,
                slopes.at(place),
                stats.at(place),
                dlogits,
                self.ref_rows(place),
            )
        self.push(chunk, slopes)

    def push(self, chunk: slice, slopes: Slopes) -> None:
        """The products with the gradient of the chunk, made of `slopes`, which is in the buffer."""
        n, products = chunk.stop - chunk.start, self.policy.products
        assert self.buffer.dlogits is not None
        dlogits = self.buffer.dlogits[:n]
        still = self.still[chunk] = ~slopes.any
        products.through(dlogits, self.buffer.logits[:n], self.call.heat_of(chunk), still)
        dhidden = None if self.dhidden is None else self.dhidden[chunk]
        products.gradients(self.policy.hidden[chunk], dlogits, dhidden, self.sums, still)

    def gradients(self) -> list[Tensor | None]:
        """Of hidden `[n, D]` and the head's tensors, once every chunk has been there."""
        return self.finished([self.dhidden, *self.sums.finished()])

    def finished(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Over the lift, in place; rows of hidden states without a gradient become 0."""
        if self.dhidden is not None:
            # 0·NaN of a head that is not finite
            self.dhidden.masked_fill_(self.still[:, None], 0.0)
        for gradient in gradients:
            if self.lift is not None and gradient is not None:
                gradient.div_(self.lift)
        return gradients
