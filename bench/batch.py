"""The inputs of every contender, the cases, and what a contender returns."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_core import linear_token_logp, token_logp

Recipe = Literal["dapo", "gspo"]
# of old log-probabilities around the new ones: one token in a hundred is clipped
TOKEN_SPREAD = 0.1
# GSPO's bounds are 3e-4 and 4e-4: most sequences are far inside, one in eight is far outside
SEQUENCE_INSIDE, SEQUENCE_OUTSIDE, EVERY = 1e-4, 1e-3, 8
# rows of a sequence, the last of which predicts nothing and is masked
SEQUENCE_ROWS = 128
MASKED = -100
# standard deviation of the logits, as of a trained model's
SPREAD = 2.0


class Case(NamedTuple):
    """What is asked for: a loss from logits or hidden states, and gradients of some inputs."""

    name: str
    recipe: Recipe
    from_hidden: bool
    # inputs that get a gradient, in their order: logits; hidden states, output matrix
    gradients: int
    # the least work: readings and writings of the logits; matrix products of 2·N·V·D operations
    floor: int


# in the order of importance; a sequence's ratio waits for all of its tokens: two phases
CASES = (
    Case("one pass (dapo), forward + backward", "dapo", False, 1, 2),
    Case("two phases (gspo), forward + backward", "gspo", False, 1, 3),
    Case("one pass (dapo), forward", "dapo", False, 0, 1),
)
TRAINED, FROZEN, LOGP = HIDDEN_CASES = (
    Case("trained head", "dapo", True, 2, 3),
    Case("frozen head", "dapo", True, 1, 2),
    Case("logp", "dapo", True, 0, 1),
)


class Batch:
    """N rows of V logits, or of hidden states and an output matrix, in B sequences of T.

    The last row of a sequence is masked, as where logits are given whole and targets shifted.

    Args:
        inputs: logits [N, V]; or hidden states [N, D] and output matrix [V, D].
        target: [B, T] int64, MASKED in the last row of a sequence.
        old_logp: [B, T] float32, nats.
        advantage: [B] float32.
    """

    def __init__(
        self, inputs: tuple[Tensor, ...], target: Tensor, old_logp: Tensor, advantage: Tensor
    ) -> None:
        self.B, self.T = B, T = target.shape
        valid = target != MASKED
        old_logp = old_logp * valid
        self.inputs = inputs
        # the first input again, for contenders that overwrite it
        self.pristine = inputs[0] if len(inputs) > 1 else inputs[0].clone()
        self.target = target.flatten()  # [N]
        self.token = target.clamp(min=0).flatten()  # [N], any token where masked
        self.mask, self.valid = valid.float().flatten(), valid.flatten()  # [N]
        self.old_logp = old_logp.flatten()  # [N]
        self.advantage = advantage[:, None].expand(B, T).flatten()  # [N]
        self.sequence_id = torch.arange(B * T, device=target.device) // T  # [N]
        # target, old_logp and mask [B, T - 1] without the masked rows and advantage [B], as
        # trainers of whole sequences hold them
        self.padded = (
            target[:, :-1].contiguous(),
            old_logp[:, :-1].contiguous(),
            valid[:, :-1].int(),
            advantage,
        )
        self.scored = int(valid.sum())

    @classmethod
    def draw(cls, N: int, V: int, dtype: torch.dtype, device: str, D: int = 0) -> Batch:
        """A batch of random logits and advantages, slightly off policy; hidden states if D > 0."""
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        if D:
            head_spread = SPREAD * D**-0.5
            inputs = normal(N, D).to(dtype), (normal(V, D) * head_spread).to(dtype)
        else:
            inputs = (torch.empty(N, V, dtype=dtype, device=device),)
            for row in inputs[0]:
                row.copy_(normal(V) * SPREAD)
        token = torch.randint(V, (N,), generator=generator, device=device)
        logp = (linear_token_logp if D else token_logp)(*inputs, token).logp
        T = SEQUENCE_ROWS if N % SEQUENCE_ROWS == 0 else N
        B = N // T
        target = token.view(B, T).clone()
        target[:, -1] = MASKED
        drift = TOKEN_SPREAD * normal(B, T)
        drift -= drift[:, :-1].mean(1, keepdim=True)
        nth = torch.arange(B, device=device)
        drift += torch.where(nth % EVERY == EVERY - 1, SEQUENCE_OUTSIDE, SEQUENCE_INSIDE)[:, None]
        return cls(inputs, target, logp.view(B, T) - drift, normal(B))

    def restore(self) -> None:
        """Undoes what a contender wrote over the logits."""
        if self.pristine is not self.inputs[0]:
            self.inputs[0].copy_(self.pristine)


class Outcome(NamedTuple):
    """What a contender computed; None for what it does not return."""

    loss: Tensor | None  # 0-dim
    logp: Tensor | None  # [N] nats, of any value where masked
    entropy: Tensor | None  # [N] nats, likewise
    gradients: tuple[Tensor, ...]  # of the first inputs, as many as the case asks for


Terms = tuple[Tensor | None, Tensor | None, Tensor | None]  # loss, logp, entropy
