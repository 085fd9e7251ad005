"""TRL's GRPO step from the last hidden states on, four ways: memory and products, exactly.

    python -m bench.trl_head

| way    | what it is                                                                        |
|--------|-----------------------------------------------------------------------------------|
| logits | all logits, `selective_log_softmax` and entropy: what TRL did up to 1.14          |
| stock  | TRL's own function at its hook, under DAPO's loss                                 |
| safe   | `patch_log_probs()`, the same loss                                                |
| fast   | what `FusedGRPOTrainer` has made in the model's forward                           |

A step is forward and backward. Without a GPU TRL takes another path, which holds several tiles more
than that of a card. So where memory is looked at, it takes the path of a card with its kernels left
out: they allocate nothing, and what they would have written has no bearing on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trl.kernels import chunked_logprob
from trl.trainer import utils
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from bench.meter import peak_extra_bytes
from grpo_core import RECIPES, fused_linear_loss, linear_token_logp
from grpo_core.cli.options import Parser
from grpo_core.integrations.trl import patch_log_probs

WAYS = ("logits", "stock", "safe", "fast")
EPS_LOW, EPS_HIGH = 0.2, 0.28


def _addmm_flop(acc: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Operations of acc += a @ b."""
    return 2 * a[0] * a[1] * b[1]


# products that PyTorch's counter leaves out
IN_PLACE = {torch.ops.aten.addmm_: _addmm_flop}


class Figures(NamedTuple):
    """What a step takes."""

    way: str
    head: str  # trained or frozen
    peak: int  # bytes beyond the inputs, gradients included
    products: float  # of 2·n·V·D operations


class Step:
    """A micro-batch of `n` tokens, `V` words and hidden size `D`."""

    def __init__(
        self, n: int, V: int, D: int, device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        self.n, self.V, self.D, self.device = n, V, D, device
        self.looks_at_memory = False
        self.hidden, self.weight = normal(n, D).to(dtype), (normal(V, D) / D**0.5).to(dtype)
        self.target = torch.randint(0, V, (n,), generator=g, device=device)
        self.advantage = normal(n)
        # no token is clipped: those without a gradient would cost the safe way less
        logp = linear_token_logp(self.hidden, self.weight, self.target).logp
        self.old_logp = logp + 0.01 * normal(n)

    def loss(self, way: str, hidden: Tensor, weight: Tensor) -> Tensor:
        """The loss, ready for its backward."""
        if way == "fast":
            out = fused_linear_loss(
                hidden,
                weight,
                self.target,
                objective=RECIPES["dapo"],
                advantage=self.advantage,
                old_logp=self.old_logp,
                sequence_id=torch.zeros_like(self.target),
                all_logp=True,
            )
            return out.loss
        return self._dapo(self._logp(way, hidden, weight))

    def _logp(self, way: str, hidden: Tensor, weight: Tensor) -> Tensor:
        """Log-probabilities, with the entropy that every way logs."""
        if way == "logits":
            logits = hidden @ weight.t()
            logits = logits / 1.0
            logp = selective_log_softmax(logits[None], self.target[None])[0]
            with torch.no_grad():
                entropy_from_logits(logits)
            return logp
        function = utils._ChunkedLogProbFunction
        size, outputs = utils._CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs", "entropy")
        given = (hidden, weight, None, self.target, 1.0, size, None, 1.0, outputs)
        with self._as_on_a_card():
            return function.apply(*given)[0]

    def _dapo(self, logp: Tensor) -> Tensor:
        """Clip-higher, mean over tokens."""
        ratio = torch.exp(logp - self.old_logp)
        clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
        return -torch.min(ratio * self.advantage, clipped * self.advantage).mean()

    def gradients(self, way: str, trained: bool) -> tuple[Tensor, ...]:
        """(loss, dhidden, dweight or nothing) of a step."""
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(trained)
        wanted = (hidden, weight) if trained else (hidden,)
        if way == "safe":
            with patch_log_probs():
                loss = self.loss(way, hidden, weight)
        else:
            loss = self.loss(way, hidden, weight)
        with self._as_on_a_card():
            return loss.detach(), *torch.autograd.grad(loss, wanted)

    def _as_on_a_card(self) -> AbstractContextManager[object]:
        """Makes TRL hold what it does on a card, if that is looked at."""
        if not self.looks_at_memory or self.device != "cpu":
            return nullcontext()
        left_out = mock.MagicMock(name="kernel[grid]")
        changes: dict[str, object] = {
            "_use_triton": lambda device: True,
            "_forward_kernel": left_out,
            "_backward_kernel": left_out,
        }
        return mock.patch.multiple(chunked_logprob, create=True, **changes)

    def figures(self, way: str, trained: bool) -> Figures:
        """Peak and products of a step."""

        def call() -> object:
            return self.gradients(way, trained)

        # the first call allocates what later ones use again
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            call()
        products = counter.get_total_flops() / (2 * self.n * self.V * self.D)
        self.looks_at_memory = True
        peak = peak_extra_bytes(call, self.device)
        self.looks_at_memory = False
        return Figures(way, "trained" if trained else "frozen", peak, products)


def rows(figures: Callable[[str, bool], Figures]) -> Iterator[str]:
    """Lines of a table."""
    yield "| head | way | peak beyond the inputs, MiB | products of 2·n·V·D |"
    yield "|---|---|---:|---:|"
    for trained in (True, False):
        for way in WAYS:
            found = figures(way, trained)
            peak = found.peak / 2**20
            yield f"| {found.head} | {way} | {peak:,.0f} | {found.products:.3g} |"


def main() -> None:
    """Prints the table."""
    parser = Parser("bench.trl_head", description=__doc__.splitlines()[0])
    for name, default in (("n", 1024), ("V", 65_536), ("D", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    step = Step(given.n, given.V, given.D, given.device, getattr(torch, given.dtype))
    print(f"n = {given.n:,}, V = {given.V:,}, D = {given.D:,}, {given.dtype}, {given.device}\n")
    for line in rows(step.figures):
        print(line, flush=True)


if __name__ == "__main__":
    main()
