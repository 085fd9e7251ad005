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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from bench.batch import FROZEN, TRAINED, Batch, Outcome, Recipe, Terms
from bench.contenders import Contender, hidden_ours, hidden_trl, policy_loss
from bench.machine import DEVICE
from bench.meter import Meter, one_thread, peak_extra_bytes
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


def _patched(hidden: Tensor, lm_head: Tensor, batch: Batch, recipe: Recipe) -> Terms:
    """Our function at TRL's hook."""
    with patch_log_probs():
        return hidden_trl(hidden, lm_head, batch, recipe)


WAYS = {
    "logits": _all_logits,
    "stock": hidden_trl,
    "safe": _patched,
    "fast": partial(hidden_ours, all_logp=True),
}


def draw(n: int, V: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
    """A micro-batch of `n` tokens, `V` vocabulary entries and hidden size `D`."""
    drawn, place = Batch.draw(n, V, dtype, device, D), torch.arange(n, device=device)
    # no token is clipped and no advantage is 0: such a token would cost the safe way less
    logp = linear_token_logp(*drawn.inputs, drawn.token).logp + 0.01 * place.sin()
    return Batch(drawn.inputs, drawn.token[:, None], logp[:, None], (place + 1.0).cos())


def step(way: str, batch: Batch, trained: bool) -> Callable[[], Outcome]:
    """Forward and backward of a way."""
    return Contender(way, WAYS[way]).call(batch, TRAINED if trained else FROZEN)


def figures(way: str, batch: Batch, trained: bool) -> tuple[int, float]:
    """Peak bytes beyond the inputs, gradients included, and products of 2·n·V·D operations."""
    call, (hidden, lm_head) = step(way, batch, trained), batch.inputs
    # the first call allocates what later ones use again
    with Meter() as meter, one_thread():
        call()
    with nullcontext() if hidden.is_cuda else _as_on_a_gpu():
        peak = peak_extra_bytes(call, hidden.device.type)
    return peak, meter.products / (2 * len(hidden) * lm_head.numel())


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
    batch = draw(given.n, given.V, given.D, given.device, getattr(torch, given.dtype))
    print(f"n = {given.n:,}, V = {given.V:,}, D = {given.D:,}, {given.dtype}, {given.device}\n")
    print("| head | way | peak beyond the inputs, MiB | products of 2·n·V·D |")
    print("|---|---|---:|---:|")
    for head in ("trained", "frozen"):
        for way in WAYS:
            peak, products = figures(way, batch, head == "trained")
            print(f"| {head} | {way} | {peak / 2**20:,.0f} | {products:.3g} |", flush=True)


if __name__ == "__main__":
    main()
