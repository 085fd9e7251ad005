"""The loss of a micro-batch inside the model's forward, where DDP and FSDP have their hooks.

TRL's own forward for per-token outputs runs: backbone, gathered head, soft cap and scale are its.
Only at the hook, where it would ask for log-probabilities, `fused_linear_loss` makes loss and
gradients; the wrapper then puts that loss into the output.
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


class LossRequest:
    """What the loss of a padded micro-batch needs, and then its result.

    A plain object: FSDP rounds all floating-point tensors that it finds among a forward's
    arguments, in lists, mappings and dataclasses, and looks into nothing else.

    Args:
        objective: what is minimised.
        mask: [B, T] bool, the tokens of the loss; T the last positions of the model's input.
        normalizer: as in `fused_linear_loss`.
        vectors: [B, T] each, by their names there: advantage, old_logp, ref_logp, sampler_logp.
        memory_budget: bytes, as there.

    Attributes:
        out: what the loss was made of, once the forward has run.
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
        """[B, P + T], -100 outside of the mask."""
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
        """Stands at TRL's hook: loss and gradients of its rows; their logp and entropy, detached.

        The rows are all positions but each sequence's last, or those of the mask alone.
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
            # ids below the number of rows, whatever sequences are empty
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
            # TRL's metrics are of all tokens
            all_logp=True,
            **vectors,
        )
        return self.out.logp, self.out.entropy, None, None, None


def answer_requests(model: nn.Module) -> None:
    """Wraps the forward of a model, already given TRL's fused head, so that requests are answered.

    A forward with the keyword `grpo_core_request` returns TRL's output with our loss in it.
    """
    inner = model.forward

    # generate looks at the signature
    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        request: LossRequest | None = kwargs.pop(KEYWORD, None)
        if request is None:
            return inner(*args, **kwargs)
        with LogProbPatch(request.apply, known_hook()):
            output = inner(*args, fused_lm_head=True, **kwargs)
        if request.out is None:
            raise RuntimeError("forward: expected TRL's to ask for log-probabilities, it did not")
        output.loss = request.out.loss
        return output

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
