"""The loss from hidden states: its input, and the ways to it.

`products` is no contender but the floor: the bare matrix products, into memory already in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import paths, peers
from bench.batch import Batch
from grpo_core import RECIPES, fused_linear_loss, linear_token_logp

# what is asked for: log-probabilities; or the loss, with dhidden, and with dweight, too
Case = Literal["logp", "frozen head", "trained head"]
CASES: tuple[Case, ...] = ("trained head", "frozen head", "logp")
# matrix products of 2·N·V·D operations that it takes
PRODUCTS: dict[Case, int] = {"trained head": 3, "frozen head": 2, "logp": 1}
# logits of this spread, as a trained model's
SPREAD = 2.0


class HiddenOutcome(NamedTuple):
    """What a contender computed; None for what it does not return."""

    loss: Tensor | None  # 0-dim
    logp: Tensor | None  # [N] nats, of any value where masked
    dhidden: Tensor | None  # [N, D]
    dweight: Tensor | None  # [V, D]


@dataclass(frozen=True, eq=False)
class HiddenBatch:
    """N hidden states in sequences of T, an output matrix, and what a policy update knows of each.

    The last row of a sequence is masked, as where hidden states are given whole.
    """

    hidden: Tensor  # [N, D]
    lm_head: Tensor  # [V, D]
    tokens: Batch  # targets, masks and the like; its logits are empty

    @classmethod
    def draw(cls, N: int, V: int, D: int, dtype: torch.dtype, device: str) -> HiddenBatch:
        """A batch of random states and advantages, slightly off policy."""
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(N, D, generator=generator, device=device).to(dtype)
        lm_head = torch.randn(V, D, generator=generator, device=device)
        lm_head = (lm_head * SPREAD * D**-0.5).to(dtype)
        words = torch.randint(V, (N,), generator=generator, device=device)
        logp = linear_token_logp(hidden, lm_head, words).logp
        tokens = Batch.of(words, logp, torch.empty(N, 0, device=device), generator)
        return cls(hidden, lm_head, tokens)

    def leaves(self, trains: bool) -> tuple[Tensor, Tensor]:
        """Hidden states and matrix that ask for a gradient."""
        return self.hidden.detach().requires_grad_(), self.lm_head.detach().requires_grad_(trains)


Path = Callable[[Tensor, Tensor, HiddenBatch], tuple[Tensor, Tensor | None]]


def naive(hidden: Tensor, lm_head: Tensor, batch: HiddenBatch) -> tuple[Tensor, Tensor | None]:
    """All logits, then the loss of `paths.naive`."""
    loss, logp, _ = paths.naive(hidden @ lm_head.t(), batch.tokens, "dapo")
    return loss, logp


def liger(hidden: Tensor, lm_head: Tensor, batch: HiddenBatch) -> tuple[Tensor, Tensor | None]:
    """Liger's fused head; compiled, as its default is, where that is not by way of C++."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    tokens = batch.tokens
    eps_low, eps_high, _ = RECIPES["dapo"].surrogate.args
    target, old_logp, mask, advantage = tokens.padded
    loss, _ = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=hidden.is_cuda,
        use_ref_model=False,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        loss_type="dapo",
    )(
        hidden.view(tokens.B, tokens.T, -1)[:, :-1],
        lm_head,
        target,
        mask,
        advantage,
        old_per_token_logps=old_logp,
    )
    return loss, None


def trl(hidden: Tensor, lm_head: Tensor, batch: HiddenBatch) -> tuple[Tensor, Tensor | None]:
    """TRL's head for log-probability and entropy, of the rows that count, then its loss."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    tokens = batch.tokens
    found, *_ = ChunkedLogProbFunction.apply(
        hidden[tokens.valid],
        lm_head,
        None,
        tokens.word[tokens.valid],
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("entropy",),
    )
    logp = found.new_zeros(len(hidden)).masked_scatter(tokens.valid, found)
    return peers.policy_loss(logp, tokens, "dapo"), logp


def torch_op(hidden: Tensor, lm_head: Tensor, batch: HiddenBatch) -> tuple[Tensor, Tensor | None]:
    """torch's own chunked cross entropy, a value per token, then the loss in PyTorch."""
    tokens = batch.tokens
    options = torch.nn.LinearCrossEntropyOptions()
    target = tokens.word.masked_fill(~tokens.valid, -100)
    found = F.linear_cross_entropy(hidden, lm_head, target, reduction="none", options=options)
    return peers.policy_loss(-found, tokens, "dapo"), -found


def ours(
    hidden: Tensor, lm_head: Tensor, batch: HiddenBatch, **options: object
) -> tuple[Tensor, Tensor | None]:
    """The loss by `fused_linear_loss`."""
    tokens = batch.tokens
    out = fused_linear_loss(
        hidden,
        lm_head,
        tokens.target,
        objective="dapo",
        advantage=tokens.advantage,
        old_logp=tokens.old_logp,
        sequence_id=tokens.sequence_id,
        **options,  # type: ignore[arg-type]
    )
    return out.loss, out.logp


@dataclass(frozen=True)
class HiddenContender:
    """A named way from hidden states to the loss, or to log-probabilities alone."""

    name: str
    path: Path
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def call(self, batch: HiddenBatch, case: Case) -> Callable[[], HiddenOutcome]:
        """The function to be timed."""
        if case == "logp":
            return partial(_logp, self.path, batch)
        return partial(_gradients, self.path, batch, case == "trained head")


def _gradients(path: Path, batch: HiddenBatch, trains: bool) -> HiddenOutcome:
    """Loss and gradients."""
    leaves = batch.leaves(trains)
    loss, logp = path(*leaves, batch)
    dhidden, *rest = torch.autograd.grad(loss, leaves if trains else leaves[:1])
    logp = None if logp is None else logp.detach()
    return HiddenOutcome(loss.detach(), logp, dhidden, rest[0] if rest else None)


@torch.no_grad()
def _logp(path: Path, batch: HiddenBatch) -> HiddenOutcome:
    """Log-probabilities of the tokens that count."""
    return HiddenOutcome(None, path(batch.hidden, batch.lm_head, batch)[1], None, None)


def _our_logp(hidden: Tensor, lm_head: Tensor, batch: HiddenBatch) -> tuple[Tensor, Tensor]:
    """By `linear_token_logp`; the loss is not wanted."""
    found = linear_token_logp(hidden, lm_head, batch.tokens.target)
    return found.logp.sum(), found.logp


def contenders(case: Case) -> list[HiddenContender]:
    """Everything that can be run here."""
    found = [HiddenContender("naive", naive)]
    # since torch 2.13; float32 only: in bfloat16 its gradients are off by 4 to 10 % of their norm
    if hasattr(F, "linear_cross_entropy"):
        found.append(HiddenContender("torch", torch_op, (torch.float32,)))
    if find_spec("liger_kernel") and case != "logp":
        found.append(HiddenContender("liger", liger))
    if find_spec("trl"):
        found.append(HiddenContender("trl", trl))
    if case == "logp":
        return [*found, HiddenContender("ours", _our_logp)]
    if case == "frozen head":
        return [*found, HiddenContender("ours", ours)]
    lean = HiddenContender("ours-lean", partial(ours, plan="lean"))
    return [*found, HiddenContender("ours-fast", partial(ours, plan="fast")), lean]


class Floor:
    """The bare products of a case, on every row that counts, into memory already in use."""

    def __init__(self, batch: HiddenBatch, case: Case) -> None:
        self.count = PRODUCTS[case]
        self.hidden = batch.hidden[batch.tokens.valid]
        self.lm_head = batch.lm_head
        self.logits = self.hidden.new_empty(len(self.hidden), len(self.lm_head))
        self.dhidden = torch.empty_like(self.hidden)
        self.dweight = torch.empty_like(self.lm_head)

    def __call__(self) -> None:
        """One, two or three products; the logits stand for their gradient."""
        torch.mm(self.hidden, self.lm_head.t(), out=self.logits)
        if self.count > 1:
            torch.mm(self.logits, self.lm_head, out=self.dhidden)
        if self.count > 2:
            torch.mm(self.logits.t(), self.hidden, out=self.dweight)
