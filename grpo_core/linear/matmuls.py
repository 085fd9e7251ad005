"""The matrix products of a head, over some rows and some words; sums are float32 throughout.

A product is 2·n·v·D operations and there are three: logits = hidden @ lm_headᵀ, dhidden =
dlogits @ lm_head, dweight = dlogitsᵀ @ hidden. On a GPU operands of 16 bits stay as they are and
the result leaves in float32; on the CPU operands are made float32, a slice of the matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.linear.head import LinearHead

# of a converted slice of the matrix, or of logits on their way to another dtype
SLICE_BYTES = 2**25
# a product over fewer rows is summed in another order by MKL (measured: below 8 on two threads)
LEAST_ROWS = 16


@dataclass
class HeadGradients:
    """Sums of the gradients of a head's tensors, float32; None where none is wanted."""

    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    untouched: bool = True  # weight and lora_B are not even zeros yet

    @classmethod
    def of(
        cls, head: LinearHead, wanted: tuple[bool, ...], into: Tensor | None = None
    ) -> HeadGradients:
        """Room for those that are wanted; the rows of words that do not exist are zeros.

        The matrix's are added to `into`, if that is given.
        """

        def room(tensor: Tensor | None, want: bool) -> Tensor | None:
            if tensor is None or not want:
                return None
            zeros = torch.empty_like(
                tensor, dtype=torch.float32, memory_format=torch.contiguous_format
            )
            zeros[head.V if tensor.shape[0] == head.weight.shape[0] else 0 :] = 0
            return zeros

        pairs = list(zip(head.tensors, wanted, strict=True))
        weight = room(*pairs[0]) if into is None else into
        bias, lora_A, lora_B = (room(*pair) for pair in pairs[1:])
        found = cls(weight, bias, lora_A, lora_B, untouched=into is None)
        if found.bias is not None:
            found.bias.zero_()
        if found.lora_A is not None:
            found.lora_A.zero_()
        return found

    @property
    def beta(self) -> float:
        """What the sums so far count: 0 before the first chunk."""
        return 0.0 if self.untouched else 1.0

    def finished(self) -> list[Tensor | None]:
        """weight, bias, lora_A, lora_B."""
        if self.untouched:
            for tensor in (self.weight, self.lora_B):
                if tensor is not None:
                    tensor.zero_()
        return [self.weight, self.bias, self.lora_A, self.lora_B]


class HeadProducts:
    """A head's products in one precision.

    Attributes:
        compute: dtype of the operands as they enter a product.
    """

    def __init__(self, head: LinearHead, hidden: Tensor, autocast: torch.dtype | None) -> None:
        self.head = head
        self.V, self.D = head.V, head.D
        self.operand = autocast or torch.promote_types(hidden.dtype, head.weight.dtype)
        self.compute = self.operand if hidden.is_cuda else torch.float32
        self._converted = head.weight.dtype != self.compute

    def slices(self, rows: int, words: slice, logits_dtype: torch.dtype) -> Iterator[slice]:
        """`words` in one piece, or in slices where something has to be converted on the way."""
        step = self.V
        if self._converted or logits_dtype != self.compute:
            step = max(64, SLICE_BYTES // (4 * max(self.D, rows)))
        for start in range(words.start, words.stop, step):
            yield slice(start, min(start + step, words.stop))

    def operands(self, tensor: Tensor) -> Tensor:
        """A tensor as it enters a product."""
        return tensor.to(self.operand).to(self.compute)

    def logits(
        self,
        hidden: Tensor,
        out: Tensor,
        words: slice | None = None,
        heat: Tensor | None = None,
    ) -> Tensor:
        """Logits of rows `[n, D]`, over their temperatures `heat [n]`, into `out [n, words]`.

        `out` has room for `LEAST_ROWS` rows.
        """
        head, n = self.head, hidden.shape[0]
        words = words or slice(0, self.V)
        hidden = self.operands(hidden)
        if n < LEAST_ROWS:
            hidden = torch.cat([hidden, hidden.new_zeros(LEAST_ROWS - n, self.D)])
            out = out[:LEAST_ROWS]
        else:
            out = out[:n]
        low_rank = None
        if head.lora_A is not None:
            low_rank = self.operands(hidden @ self.operands(head.lora_A).t())
        for part in self.slices(n, words, out.dtype):
            home = out[:, part.start - words.start : part.stop - words.start]
            if head.bias is not None:
                home.copy_(head.bias[part].expand_as(home))
            beta = 0.0 if head.bias is None else head.scale
            weight = self.operands(head.weight[part])
            product(hidden, weight.t(), home, alpha=head.scale, beta=beta)
            if low_rank is not None:
                assert head.lora_B is not None
                up = self.operands(head.lora_B[part])
                product(low_rank, up.t(), home, alpha=head.scale * head.lora_scaling, beta=1.0)
        out = out[:n]
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out if heat is None else out.div_(heat[:, None])

    def through(
        self, dlogits: Tensor, logits: Tensor | None, heat: Tensor | None, still: Tensor
    ) -> None:
        """dlogits of what `logits` left -> of the product; uses up that, which a cap needs.

        `still` [n] bool are the rows without a gradient, which stay 0.
        """
        if heat is not None:
            # 0/0: nobody may have looked at a temperature
            dlogits.div_(torch.where(still, 1.0, heat)[:, None])
        if self.head.softcap is not None:
            assert logits is not None
            if heat is not None:
                logits.mul_(heat[:, None])
            # the gradient of a row with NaN is 0 already
            logits.nan_to_num_(nan=0.0).div_(self.head.softcap).square_().neg_().add_(1)
            dlogits.mul_(logits)

    def gradients(
        self,
        hidden: Tensor,
        dlogits: Tensor,
        dhidden: Tensor | None,
        sums: HeadGradients,
        still: Tensor,
        words: slice | None = None,
    ) -> None:
        """Adds to `sums`, and to `dhidden [n, D]` float32, what `dlogits [n, words]` brings.

        `sums` has room for `words`. Over all words, `dhidden` is overwritten instead. Rows of it
        without a gradient, `still` [n] bool, may become NaN where the head's tensors hold one.
        """
        head, scale = self.head, self.head.scale
        beta_hidden = 0.0 if words is None else 1.0
        words = words or slice(0, self.V)
        # 0·NaN: hidden states that are not finite have no gradient, and would spoil everyone's
        hidden = torch.nan_to_num(self.operands(hidden), nan=0.0, posinf=0.0, neginf=0.0)
        adapter = head.lora_A is not None and head.lora_B is not None
        low_scale = scale * head.lora_scaling
        dlow = low_rank = None
        if adapter:
            assert head.lora_A is not None
            down = self.operands(head.lora_A)
            low_rank = self.operands(hidden @ down.t())
            # as hidden
            low_rank = torch.nan_to_num(low_rank, nan=0.0, posinf=0.0, neginf=0.0)
            dlow = torch.zeros(hidden.shape[0], down.shape[0], device=hidden.device)
        for part in self.slices(dlogits.shape[0], words, dlogits.dtype):
            local = slice(part.start - words.start, part.stop - words.start)
            d = dlogits[:, local].to(self.compute)
            if dhidden is not None:
                weight = self.operands(head.weight[part])
                product(d, weight, dhidden, alpha=scale, beta=beta_hidden)
                beta_hidden = 1.0
            if sums.weight is not None:
                product(d.t(), hidden, sums.weight[local], alpha=scale, beta=sums.beta)
            if sums.bias is not None:
                sums.bias[local].add_(d.sum(0, dtype=torch.float32), alpha=scale)
            if adapter:
                assert head.lora_B is not None and dlow is not None and low_rank is not None
                product(d, self.operands(head.lora_B[part]), dlow, alpha=low_scale, beta=1.0)
                if sums.lora_B is not None:
                    home = sums.lora_B[local]
                    product(d.t(), low_rank, home, alpha=low_scale, beta=sums.beta)
        if adapter:
            assert dlow is not None
            dlow = dlow.masked_fill_(still[:, None], 0.0).to(self.compute)
            if dhidden is not None:
                product(dlow, down, dhidden, beta=1.0)
            if sums.lora_A is not None:
                product(dlow.t(), hidden, sums.lora_A, beta=1.0)
        sums.untouched = False


def product(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = beta·out + alpha·a @ b, summed in float32; with beta 0, what `out` held is ignored."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out)
    else:
        result = torch.mm(a, b).mul_(alpha)
        out.copy_(result.add_(out, alpha=beta) if beta else result)
