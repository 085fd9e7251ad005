"""The loss of a micro-batch inside the model's forward, so that the hooks of DDP and FSDP run.

TRL's forward for per-token outputs runs the backbone and gathers the head. At the hook where TRL
computes log-probabilities, `fused_linear_loss` computes loss and gradients instead. The wrapped
forward puts the loss into the output.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from grpo_core.integrations.trl_hook import LogProbPatch, known_hook
from grpo_core.linear.head import LinearHead
from grpo_core.linear.loss import fused_linear_loss
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.objective.objective import Objective

KEYWORD = "grpo_core_request"


class TrlLossRequest:
    """The arguments of the loss of a padded micro-batch, and its result.

    Not a dataclass: FSDP casts the floating-point tensors in lists, mappings and dataclasses among
    the arguments of a forward.

    Args:
        objective: what is minimised.
        mask: [B, T] bool, the tokens of the loss: the last T positions of the model's input.
        normalizer, memory_budget: as in `fused_linear_loss`.
        vectors: its arguments of shape [B, T]: advantage, old_logp, ref_logp, sampler_logp.

    Attributes:
        out: the result; None before the forward.
    """

    def __init__(
        self,
        objective: Objective,
        mask: Tensor,
        normalizer: Tensor | float,
        vectors: dict[str, Tensor],
        memory_budget: int | None = None,
    ) -> None:
        self.objective, self.mask, self.normalizer = objective, mask, normalizer
        self.vectors, self.memory_budget = vectors, memory_budget
        self.out: LossOutput | None = None

    def labels(self, input_ids: Tensor) -> Tensor:
        """Returns [B, P + T] labels, -100 outside the mask."""
        labels = torch.full_like(input_ids, -100)
        T = self.mask.shape[1]
        labels[:, -T:] = torch.where(self.mask, input_ids[:, -T:], -100)
        return labels

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Replaces TRL's function: computes the loss; returns logp and entropy without gradients.

        The rows are all positions except the last of each sequence, or those of the mask.
        """
        B, T = self.mask.shape
        n, device = hidden.shape[0], hidden.device
        before = max(n // B - T, 0)
        is_padded = n == B * (before + T)
        mask = self.mask.to(device)
        if not is_padded and n != int(mask.sum()):
            raise RuntimeError(f"hidden: expected {B} sequences or {int(mask.sum())} rows, got {n}")

        def rows(vector: Tensor) -> Tensor:
            vector = vector.to(device)
            if is_padded:
                return nn.functional.pad(vector, (before, 0)).reshape(-1)
            return vector[mask]

        vectors: dict[str, Any] = {name: rows(vector) for name, vector in self.vectors.items()}
        sequence = rows(torch.arange(B, device=device)[:, None].expand(B, T))
        if is_padded:
            sequence = torch.arange(n, device=device) // (before + T)
        else:
            # consecutive ids, since sequences may be empty
            new = nn.functional.pad(sequence[1:] != sequence[:-1], (1, 0))
            sequence = new[:n].cumsum(0)
        self.out = fused_linear_loss(
            hidden,
            LinearHead(weight, bias, final_logit_softcapping, logit_scale),
            targets,
            objective=self.objective,
            mask=rows(mask) if is_padded else None,
            sequence_id=sequence,
            normalizer=self.normalizer,
            temperature=temperature,
            memory_budget=self.memory_budget,
            # TRL's metrics include masked tokens
            all_logp=True,
            **vectors,
        )
        return self.out.logp, self.out.entropy, None, None, None


def add_fused_loss(model: nn.Module) -> None:
    """Wraps the forward of a model that has TRL's fused head.

    With the keyword `grpo_core_request` the forward returns TRL's output with the fused loss.
    """
    # unbound, so that a copy of the model calls its own forward
    inner = model.forward.__func__  # type: ignore[attr-defined]

    # `generate` reads the signature
    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        request: TrlLossRequest | None = kwargs.pop(KEYWORD, None)
        if request is None:
            return inner(self, *args, **kwargs)
        with LogProbPatch(request.apply, known_hook()):
            output = inner(self, *args, fused_lm_head=True, **kwargs)
        if request.out is None:
            raise RuntimeError("forward: expected TRL's forward to compute log-probabilities")
        output.loss = request.out.loss
        return output

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
