"""The input of every contender, and what a contender returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_core import token_logp

Direction = Literal["forward", "forward + backward"]
# one pass over the logits, and two: the ratio of a sequence waits for all of its tokens
Recipe = Literal["dapo", "gspo"]
# one token in a hundred is clipped
TOKEN_SPREAD = 0.1
# of GSPO's bounds, 3e-4 and 4e-4: far inside, and far outside for one sequence in eight
SEQUENCE_INSIDE, SEQUENCE_OUTSIDE, EVERY = 1e-4, 1e-3, 8
# rows of a sequence, the last of which predicts nothing and is masked
SEQUENCE_ROWS = 128
MASKED = -100


def dtype_name(dtype: torch.dtype) -> str:
    """float32 rather than torch.float32."""
    return str(dtype).removeprefix("torch.")


class Padded(NamedTuple):
    """The same as trainers of whole sequences hold it, without what is masked."""

    target: Tensor  # [B, T - 1] int64
    old_logp: Tensor  # [B, T - 1] float32, nats
    mask: Tensor  # [B, T - 1] int32
    advantage: Tensor  # [B] float32


@dataclass(frozen=True, eq=False)
class Batch:
    """N rows of V logits in B sequences of T, and what a policy update knows of each.

    The last row of a sequence is masked, as where logits are given whole and targets shifted.
    """

    logits: Tensor  # [N, V]
    pristine: Tensor  # [N, V], the logits again, for contenders that overwrite them
    target: Tensor  # [N] int64, MASKED in the last row of a sequence
    word: Tensor  # [N] int64, the same, and some word where masked
    mask: Tensor  # [N] float32
    valid: Tensor  # [N] bool
    old_logp: Tensor  # [N] float32, nats
    advantage: Tensor  # [N] float32, the same throughout a sequence
    sequence_id: Tensor  # [N] int64
    padded: Padded
    B: int
    T: int

    @classmethod
    def draw(cls, N: int, V: int, dtype: torch.dtype, device: str) -> Batch:
        """A batch of random logits and advantages, slightly off policy."""
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.empty(N, V, dtype=dtype, device=device)
        for row in logits:
            row.copy_(torch.randn(V, generator=generator, device=device) * 2)
        words = torch.randint(V, (N,), generator=generator, device=device)
        return cls.of(words, token_logp(logits, words).logp, logits, generator)

    @classmethod
    def of(cls, words: Tensor, logp: Tensor, logits: Tensor, generator: torch.Generator) -> Batch:
        """A batch of given words [N] of known log-probability, in sequences of one length."""
        N, device = len(words), words.device
        T = SEQUENCE_ROWS if N % SEQUENCE_ROWS == 0 else N
        B = N // T
        normal = partial(torch.randn, generator=generator, device=device)
        target = words.view(B, T).clone()
        target[:, -1] = MASKED
        drift = TOKEN_SPREAD * normal(B, T)
        drift -= drift[:, :-1].mean(1, keepdim=True)
        nth = torch.arange(B, device=device)
        drift += torch.where(nth % EVERY == EVERY - 1, SEQUENCE_OUTSIDE, SEQUENCE_INSIDE)[:, None]
        valid, word = target != MASKED, target.clamp(min=0)
        old_logp = (logp.view(B, T) - drift) * valid
        advantage = normal(B)
        return cls(
            logits=logits,
            pristine=logits.clone(),
            target=target.flatten(),
            word=word.flatten(),
            mask=valid.float().flatten(),
            valid=valid.flatten(),
            old_logp=old_logp.flatten(),
            advantage=advantage[:, None].expand(B, T).flatten(),
            sequence_id=torch.arange(N, device=device) // T,
            padded=Padded(
                target[:, :-1].contiguous(),
                old_logp[:, :-1].contiguous(),
                valid[:, :-1].int(),
                advantage,
            ),
            B=B,
            T=T,
        )

    @property
    def scored(self) -> int:
        """Tokens that count."""
        return self.B * (self.T - 1)


class Outcome(NamedTuple):
    """What a contender computed; None for what it does not return."""

    loss: Tensor  # 0-dim
    logp: Tensor | None  # [N] nats, of any value where masked
    entropy: Tensor | None  # [N] nats, likewise
    dlogits: Tensor | None  # [N, V]; None in the forward direction


Terms = tuple[Tensor, Tensor | None, Tensor | None]  # loss, logp, entropy
Loss = Callable[[Tensor, Batch, Recipe], Terms]
