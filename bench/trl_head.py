"""TRL's GRPO step from the last hidden states on, four ways: memory and products, exactly.

    python -m bench.trl_head

| way    | what it is                                                                        |
|--------|-----------------------------------------------------------------------------------|
| logits | all logits, `selective_log_softmax` and entropy: what TRL did up to 1.14          |
| stock  | TRL's own function at its hook, under DAPO's loss                                 |
| safe   | `patch_log_probs()`, the same loss                                                |
| fast   | what `FusedGRPOTrainer` has made in the model's forward                           |

A step is forward and backward. Without a GPU, TRL takes another path, which holds several tiles
more than its path on a GPU. So where memory is counted, it takes the path of a GPU without its
kernels: they allocate nothing, and memory does not depend on what they would have written.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.trainer import utils
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from bench.batch import FROZEN, TRAINED, Batch, Recipe, Terms
from bench.contenders import Contender, hidden_ours, policy_loss
from bench.machine import DEVICE
from bench.meter import ProductMeter, one_thread, peak_extra_bytes
from grpo_core import linear_token_logp
from grpo_core.cli.options import Parser
from grpo_core.integrations.trl import patch_log_probs


def _all_logits(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """Every way logs the entropy; TRL divides by the temperature."""
    logits = (hidden @ lm_head.t()) / 1.0
    logp = selective_log_softmax(logits[None], batch.target[None])[0]
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return policy_loss(logp, batch, recipe), logp, entropy


def _at_hook(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """Whatever function is at TRL's hook."""
    size, outputs = utils._CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs", "entropy")
    given = (hidden, lm_head, None, batch.target, 1.0, size, None, 1.0, outputs)
    logp, entropy, *_ = utils._ChunkedLogProbFunction.apply(*given)
    return policy_loss(logp, batch, recipe), logp, entropy


def _patched(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """Our function at TRL's hook."""
    with patch_log_probs():
        return _at_hook(hidden, lm_head, batch, recipe)


WAYS = {
    "logits": _all_logits,
    "stock": _at_hook,
    "safe": _patched,
    "fast": partial(hidden_ours, all_logp=True),
}


class Figures(NamedTuple):
    """What a step takes."""

    peak: int  # bytes beyond the inputs, gradients included
    products: float  # of 2·n·V·D operations


class Step:
    """A micro-batch of `n` tokens, `V` vocabulary entries and hidden size `D`."""

    def __init__(
        self, n: int, V: int, D: int, device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.product = device, 2 * n * V * D
        drawn = Batch.draw(n, V, dtype, device, D)
        place = torch.arange(n, device=device)
        # no token is clipped and no advantage is 0: such a token would cost the safe way less
        logp = linear_token_logp(*drawn.inputs, drawn.token).logp + 0.01 * place.sin()
        advantage = (place + 1.0).cos()
        self.batch = Batch.with_old(drawn.inputs, drawn.token[:, None], logp[:, None], advantage)

    def gradients(self, way: str, trained: bool) -> tuple[Tensor, ...]:
        """(loss, dhidden, dweight or nothing) of a step."""
        case = TRAINED if trained else FROZEN
        outcome = Contender(way, WAYS[way]).call(self.batch, case)()
        assert outcome.loss is not None
        return outcome.loss, *outcome.gradients

    def figures(self, way: str, trained: bool) -> Figures:
        """Peak and products of a step."""
        call = partial(self.gradients, way, trained)
        # the first call allocates what later ones use again
        with ProductMeter() as meter, one_thread():
            call()
        with _as_on_a_gpu() if self.device == "cpu" else nullcontext():
            return Figures(peak_extra_bytes(call, self.device), meter.operations / self.product)


def _as_on_a_gpu() -> AbstractContextManager[object]:
    """Makes TRL hold on a CPU what it holds on a GPU."""
    kernel: Any = mock.MagicMock(name="kernel[grid]")
    changes = {"_forward_kernel": kernel, "_backward_kernel": kernel}
    return mock.patch.multiple(
        chunked_logprob, create=True, _use_triton=lambda device: True, **changes
    )


def main() -> None:
    """Prints the table."""
    parser = Parser("bench.trl_head", description=__doc__.splitlines()[0])
    for name, default in (("n", 1024), ("V", 65_536), ("D", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    step = Step(given.n, given.V, given.D, given.device, getattr(torch, given.dtype))
    print(f"n = {given.n:,}, V = {given.V:,}, D = {given.D:,}, {given.dtype}, {given.device}\n")
    print("| head | way | peak beyond the inputs, MiB | products of 2·n·V·D |")
    print("|---|---|---:|---:|")
    for head in ("trained", "frozen"):
        for way in WAYS:
            peak, products = step.figures(way, head == "trained")
            print(f"| {head} | {way} | {peak / 2**20:,.0f} | {products:.3g} |", flush=True)


if __name__ == "__main__":
    main()
