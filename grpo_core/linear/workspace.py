"""What all chunks of a call share: its arguments, buffers, products and sums of gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_core.backends.kept import Kept
from grpo_core.backends.sharded import ShardedBackend, Shards, sum_over_shards
from grpo_core.backends.wrapper import Kernels, kernels_at
from grpo_core.kernels.records import RowGradients, Rows, RowStats
from grpo_core.linear.head import LinearHead
from grpo_core.linear.matmuls import LEAST_ROWS, HeadProducts, Plan, choose_layout
from grpo_core.loss.compile import register_record
from grpo_core.loss.row_inputs import LOGIT_DTYPES, RowInputs
from grpo_core.loss.tokens import Tokens

# of hidden states [n, D], and of the head's weight, bias, lora_A and lora_B
Gradients = list[Tensor | None]


@register_record
@dataclass(frozen=True)
class LinearOptions:
    """How a function of hidden states computes, as the caller gave it; see `fused_linear_loss`."""

    plan: Plan | None = None
    memory_budget: int | None = None
    logits_dtype: torch.dtype | None = None
    reduce_dhidden: bool = True


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """The arguments of a call over n rows of hidden states, without its differentiable tensors."""

    target: Tensor  # [n] int64
    rows: Tensor | None = None  # [n] int64, places among all N rows; None for all in order
    temperature: float
    options: LinearOptions
    autocast: torch.dtype | None  # of products under torch.autocast; None outside of it
    kernels: Kernels
    wanted: tuple[bool, ...] = (False,) * 5  # which `Gradients`
    reference: tuple[Tensor, LinearHead] | None = None  # states and head, for the exact KL
    tokens: Tokens | None = None  # of the n rows, for a loss
    lengths: tuple[int, ...] | None = None  # of sequences in order; None if they do not matter

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        inputs: RowInputs,
        options: LinearOptions,
        shards: Shards | None,
        target: Tensor,
        kept: Kept | None,
        **others: Any,
    ) -> LinearCall:
        """The call over all rows of `hidden`; `others` are fields."""
        dtype, topk = options.logits_dtype, getattr(inputs, "ref_topk", None)
        if dtype is not None and dtype not in LOGIT_DTYPES:
            raise ValueError(f"logits_dtype: expected one of {LOGIT_DTYPES} or None, got {dtype!r}")
        kernels = inputs.kernels(hidden, target, kept, shards, options.reduce_dhidden)
        for what, given in (("a group", shards), ("ref_topk", topk)):
            if given is not None and options.plan == "lean":
                raise NotImplementedError(f"plan: expected 'fast' or None with {what}, got 'lean'")
        if shards is not None or topk is not None:
            options = replace(options, plan=options.plan or "fast")
        device = hidden.device.type
        return cls(
            target=target,
            temperature=float(inputs.temperature),
            options=options,
            autocast=torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else None,
            kernels=kernels,
            **others,
        )

    @property
    def logits_dtype(self) -> torch.dtype:
        """Of a chunk's logits."""
        return self.options.logits_dtype or torch.float32

    def at(self, some: Tensor) -> LinearCall:
        """The call over some of its rows, [k] int64."""
        tokens = None if self.tokens is None else self.tokens.select(some)
        rows = some if self.rows is None else self.rows[some]
        kernels = kernels_at(self.kernels, some)
        return replace(self, target=self.target[some], rows=rows, tokens=tokens, kernels=kernels)


class Workspace:
    """What all chunks share: products, buffers, and the sums of gradients so far.

    Attributes:
        chunks: slices of the rows, as many rows as fit in each; at least one, which may be empty.
        logits: [rows, V], of the current chunk; `ref_logits` of its reference, for the exact KL.
        dlogits: their gradient, in the same memory unless its dtype is narrower or a soft cap needs
            the logits; None in the lean plan, which computes it by slices of the vocabulary.
        dhidden: [n, D] float32.
        sums: gradients of the head's tensors, float32.
        zero: [n] bool, rows without a gradient.
        scale: 0-dim, the factor of dlogits and sums that avoids underflow; None means 1.
    """

    def __init__(self, hidden: Tensor, head: LinearHead, call: LinearCall) -> None:
        self.call, self.head, self.differentiates = call, head, any(call.wanted)
        self.products = HeadProducts(head, hidden, call.rows, call.autocast)
        self.reference = None
        if call.reference is not None:
            states, ref_head = call.reference
            self.reference = HeadProducts(ref_head, states, call.rows, call.autocast)
        n, dtype, compute = len(call.target), call.logits_dtype, self.products.compute
        # products take the narrower of the two
        narrow = compute if compute.itemsize < dtype.itemsize else dtype
        apart = self.differentiates and (narrow != dtype or head.softcap is not None)
        row_bytes = head.V * dtype.itemsize * (1 if self.reference is None else 2)
        row_bytes += head.V * narrow.itemsize if apart else 0
        plan, memory_budget = call.options.plan, call.options.memory_budget
        self.layout = choose_layout(
            n, head, call.wanted, row_bytes, plan, memory_budget, hidden.device
        )
        if isinstance(call.kernels, ShardedBackend):
            # a chunk is a collective
            each = call.kernels.shards.gather(
                torch.tensor([[self.layout.rows]], device=hidden.device)
            )
            self.layout = replace(self.layout, rows=int(each.amin()))
        self.lean = self.differentiates and self.layout.plan == "lean"
        self.dlogits_dtype = compute if self.lean else narrow
        step = self.layout.rows
        self.chunks = [slice(i, min(i + step, n)) for i in range(0, max(n, 1), step)]

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden.device)

        rows = max(min(step, n), LEAST_ROWS)
        self.logits = empty(rows, head.V, dtype=dtype)
        self.ref_logits = None if self.reference is None else empty(rows, head.V, dtype=dtype)
        self.dlogits = None
        if self.differentiates and not self.lean:
            self.dlogits = empty(rows, head.V, dtype=narrow) if apart else self.logits
        # the first chunk overwrites dhidden and the rows [0, V) of two sums
        self.dhidden = empty(n, head.D) if call.wanted[0] else None
        self.sums: Gradients = [None] * 4
        for k, tensor in enumerate(() if self.lean else head.tensors):
            if tensor is not None and call.wanted[k + 1]:
                total = self.sums[k] = empty(*tensor.shape)
                overwritten = tensor is head.weight or tensor is head.lora_B
                total[head.V if overwritten else 0 :] = 0
        self.first = True
        self.scale: Tensor | None = None
        self.zero = torch.zeros(n, dtype=torch.bool, device=hidden.device)

    def choose_loss_scale(self, weight: Tensor) -> Tensor | None:
        """Sets and returns `scale`: about 1 / weight in float16, where dlogits would underflow."""
        if self.differentiates and self.dlogits_dtype == torch.float16:
            largest = torch.cat([weight, weight.new_tensor([1e-30])]).amax()
            self.scale = torch.exp2(torch.floor(-torch.log2(largest)))
        return self.scale

    def scaled(self, row_gradients: RowGradients) -> RowGradients:
        """The gradients multiplied by `scale`."""
        return row_gradients if self.scale is None else row_gradients.times(self.scale)

    def make_logits(self, chunk: slice) -> Rows:
        """Computes the logits of a chunk, and of its reference, in the buffers."""
        self.products.logits(chunk, self.logits)
        if self.reference is not None and self.ref_logits is not None:
            self.reference.logits(chunk, self.ref_logits)
        return self.rows_of(chunk)

    def rows_of(self, chunk: slice) -> Rows:
        """The chunk in the buffers, as kernels take it."""
        n, ref, T, tokens = (
            chunk.stop - chunk.start,
            self.ref_logits,
            self.call.temperature,
            self.call.tokens,
        )
        if ref is None or tokens is None:
            return Rows(self.logits[:n], T)
        return Rows(self.logits[:n], T, ref[:n], tokens.objective.interpolation)

    def dlogits_of(self, chunk: slice) -> Tensor | None:
        """Where the gradient of the chunk in the buffers goes; None if there is none."""
        return None if self.dlogits is None else self.dlogits[: chunk.stop - chunk.start]

    def kernels_of(self, chunk: slice) -> Any:
        """The row functions for a chunk."""
        return kernels_at(self.call.kernels, chunk)

    def read_statistics(self, chunk: slice) -> RowStats:
        """Computes the logits of a chunk and reads their statistics."""
        rows = self.make_logits(chunk)
        return self.kernels_of(chunk).row_stats(rows, self.call.target[chunk])

    def differentiate(
        self, chunk: slice, target: Tensor, row_gradients: RowGradients, stats: RowStats
    ) -> None:
        """Computes dlogits of the chunk in the buffers and adds its gradients."""
        rows, dlogits = self.rows_of(chunk), self.dlogits_of(chunk)
        self.kernels_of(chunk).row_dlogits(rows, target, row_gradients, stats, dlogits)
        self.add_gradients(chunk, row_gradients)

    def add_gradients(self, chunk: slice, row_gradients: RowGradients) -> None:
        """Adds the gradients of a chunk, whose dlogits are in the buffer, by matrix products."""
        dlogits = self.dlogits_of(chunk)
        if dlogits is None:
            return
        zero = self.zero[chunk] = ~row_gradients.any
        self.products.through_softcap(dlogits, self.logits[: len(dlogits)])
        dhidden = None if self.dhidden is None else self.dhidden[chunk]
        self.products.add_gradients(chunk, dlogits, zero, dhidden, self.sums, first=self.first)
        self.first = False

    def free_buffers(self) -> None:
        """Frees the buffers, after the last chunk."""
        self.logits, self.ref_logits, self.dlogits = torch.empty(0), None, None

    def gradients(self, hidden: Tensor, *, round_float16: bool = True) -> Gradients:
        """The gradients of all chunks, divided by `scale`, in the dtypes of their tensors.

        Frees the buffers and the sums. With `round_float16=False` the gradients of float16 tensors
        stay float32.
        """
        if self.dhidden is not None:
            # 0·NaN of a head that is not finite
            self.dhidden.masked_fill_(self.zero[:, None], 0.0)
        self.free_buffers()
        sum_over_shards(self.call.kernels, self.dhidden, self.sums[2])
        sums, self.dhidden, self.sums = [self.dhidden, *self.sums], None, []
        gradients: Gradients = []
        for k, tensor in enumerate((hidden, *self.head.tensors)):
            gradient, sums[k] = sums[k], None
            if gradient is not None and tensor is not None:
                if self.scale is not None:
                    gradient.div_(self.scale)
                if round_float16 or tensor.dtype != torch.float16:
                    gradient = gradient.to(tensor.dtype)
            gradients.append(gradient)
        if gradients[0] is not None:
            gradients[0] = scatter_rows(gradients[0], self.call.rows, hidden)
        return gradients


def scatter_rows(dhidden: Tensor, rows: Tensor | None, hidden: Tensor) -> Tensor:
    """Gradients [n, D] of some rows, shaped as all hidden states, 0 elsewhere."""
    if rows is None:
        return dhidden.view(hidden.shape)
    full = dhidden.new_zeros(hidden.shape)
    full.view(-1, hidden.shape[-1])[rows] = dhidden
    return full
