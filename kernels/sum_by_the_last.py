"""The sum of what every program has written, by the program that ends last.

Programs count themselves on an integer, the ticket; who draws the last number knows that all the
others have written, and sums in an order that does not depend on who it is. So a sum costs no
launch of its own and has the same bits every time. The ticket is 0 again afterwards.
"""

import torch

from .language import tl, triton


@triton.jit
def sum_by_the_last(vector_ptr, total_ptr, ticket_ptr, N, programs, BLOCK: tl.constexpr):
    """Σ of `[N]` float32 into `total_ptr`, once `programs` programs have come here."""
    # every thread's part is written before the program counts itself
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, N, BLOCK):
            at = first + tl.arange(0, BLOCK)
            # from where all processors see the same
            total += tl.load(vector_ptr + at, mask=at < N, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr, tl.sum(total, 0))
        tl.store(ticket_ptr, 0)


def new_ticket(on: torch.Tensor) -> torch.Tensor:
    """A ticket nobody has drawn from, beside the tensor `on`."""
    return torch.zeros((), dtype=torch.int32, device=on.device)
