"""TRL with log-probabilities from hidden states, or with the fused loss in its GRPO trainer.

    from grpo_core.integrations.trl import FusedGRPOTrainer, patch_log_probs

| level | change                                      | loss           | products of 2·n·V·D  |
|-------|---------------------------------------------|----------------|----------------------|
| safe  | `patch_log_probs()`                         | TRL's          | 4, frozen head 2     |
| fast  | `FusedGRPOTrainer` for TRL's `GRPOTrainer`  | equal to TRL's | 3, frozen head 2     |

TRL itself takes 4, with a frozen head 3. docs/integrations.md lists what is supported.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.trl_hook import (
    INSTALL,
    LogProbPatch,
    known_hook,
    patch_log_probs,
    trl_utils,
)
from grpo_core.integrations.trl_loss import (
    KEYWORD,
    SUPPORTED,
    TrlLossRequest,
    add_fused_loss,
    preset_of,
    unsupported_option,
)
from grpo_core.loss.outputs import LossOutput

trl_utils()  # raises with an install command if TRL is missing

from trl import GRPOTrainer  # noqa: E402

__all__ = ["SUPPORTED", "FusedGRPOTrainer", "LogProbPatch", "patch_log_probs"]

# entries of a micro-batch that the fast level reads
_INPUTS = """
    prompt_ids prompt_mask completion_ids completion_mask tool_mask advantages num_items_in_batch
    old_per_token_logps ref_per_token_logps importance_sampling_ratio sampling_per_token_logps
"""
INPUTS = frozenset(_INPUTS.split())
# largest difference of the two losses by rounding, relative to the sum of absolute terms
ROUNDING = 1e-3


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` that computes loss and gradients in the model's forward.

    Arguments, results and logged metrics are TRL's; TRL's code computes the metrics. If an option
    or its value is not supported (see `SUPPORTED`), a warning names it and TRL computes the loss
    with `patch_log_probs`.

    Attributes:
        memory_budget: bytes for logits and sums, as in `fused_linear_loss`; may be set.

    Raises:
        RuntimeError: a TRL whose GRPO trainer does not use the hook, or has another loss.
    """

    memory_budget: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if known_hook().unserved:
            raise RuntimeError(f"trl: expected TRL 1.15 or 1.16 for FusedGRPOTrainer; {INSTALL}")
        self._warned: set[str] = set()
        self._token_outputs: tuple[Tensor, Tensor, Tensor | None] | None = None
        super().__init__(*args, **kwargs)
        model: Any = self.model
        add_fused_loss(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self._is_fast()

    @property
    def _trains(self) -> bool:
        """Whether TRL trains; TRL reads the same attribute."""
        model: Any = self.model
        return model.training

    def _is_fast(self) -> bool:
        """Whether the options allow the fast level; warns once for each unsupported option."""
        reason = unsupported_option(self)
        if reason is not None:
            self._warn(reason)
        return reason is None

    def _warn(self, reason: str) -> None:
        name = reason.partition(":")[0]
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"FusedGRPOTrainer: {reason}; TRL computes the loss, with patch_log_probs",
                stacklevel=2,
            )

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._token_outputs is not None:
            return self._token_outputs
        with patch_log_probs(memory_budget=self.memory_budget):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        unknown = sorted(inputs.keys() - INPUTS)
        for name in unknown:
            self._warn(f"{name}: an unknown input")
        request = self._request(inputs) if self._is_fast() and not unknown else None
        if request is None:
            return super()._compute_loss(model, inputs)
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=request.labels(input_ids),
                **router,
                **{KEYWORD: request},
            )
        loss, aux_loss = output.loss, output.aux_loss if self.aux_loss_enabled else None
        if aux_loss is not None:
            window = self.current_gradient_accumulation_steps if self._trains else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / window
        self._token_outputs = _token_outputs(output, request, aux_loss)
        try:
            theirs = super()._compute_loss(model, inputs)
        finally:
            self._token_outputs = None
        assert request.out is not None
        if self.off_policy_mask_threshold is None:
            _compare(loss.detach(), theirs.detach(), request.out)
        return loss

    def _request(self, inputs: dict[str, Any]) -> TrlLossRequest | None:
        """The request for a micro-batch; None if only TRL's code can compute its loss."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        preset = preset_of(self, training=self._trains)
        factor, advantage = preset.objective.factor, inputs["advantages"].float()
        advantage = advantage[:, None] if advantage.ndim == 1 else advantage
        vectors = {}
        if "old_per_token_logps" in inputs:
            vectors["old_logp"] = inputs["old_per_token_logps"].float()
        if "ref_per_token_logps" in inputs and self.beta:
            vectors["ref_logp"] = inputs["ref_per_token_logps"].float()
        sampler_logp = inputs.get("sampling_per_token_logps")
        if self.off_policy_mask_threshold is not None:
            before = vectors.get("old_logp") if sampler_logp is None else sampler_logp
            if before is None:
                # the policy is its own old policy, at distance 0
                advantage = advantage * ((advantage >= 0) | (self.off_policy_mask_threshold >= 0))
                factor = dataclasses.replace(factor, off_policy_delta=math.inf)
            elif bool((before.isnan() & mask).any()):
                self._warn("sampling_per_token_logps: NaN beside an off_policy_mask_threshold")
                return None
            else:
                vectors["sampler_logp"] = before.float()
        if factor.sampler is not None and self.loss_type == "vespo":
            assert sampler_logp is not None
            # without vLLM's log-probability the ratio in TRL is 1
            known = torch.where(sampler_logp.isnan(), vectors["old_logp"], sampler_logp)
            vectors["sampler_logp"] = known.float()
        elif factor.sampler is not None:
            # the other surrogates are proportional to the advantage, and the ratio is not negative
            advantage = advantage * inputs["importance_sampling_ratio"].float()
            factor = dataclasses.replace(factor, sampler=None)
        normalizer = preset.normalizer(
            mask,
            num_items_in_batch=inputs.get("num_items_in_batch"),
            num_processes=self.accelerator.num_processes,
        )
        vectors["advantage"] = advantage.expand(mask.shape)
        objective = preset.objective.replace(factor=factor)
        return TrlLossRequest(objective, mask, normalizer, vectors, self.memory_budget)


def _token_outputs(
    output: Any, request: TrlLossRequest, aux_loss: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, entropy, aux_loss) for TRL's metrics; masked tokens have the ratio 1."""
    T = request.mask.shape[1]
    logp, entropy = output.log_probs[:, -T:].detach(), output.entropy[:, -T:].detach()
    before = request.vectors.get("old_logp", request.vectors.get("ref_logp"))
    if before is not None:
        logp = torch.where(request.mask, logp, before)
    return logp, entropy, None if aux_loss is None else aux_loss.detach()


def _compare(ours: Tensor, theirs: Tensor, out: LossOutput) -> None:
    """Raises RuntimeError if TRL's loss of the same log-probabilities differs."""
    # the loss is of packed rows
    tokens = out._tokens
    terms = tokens.advantage.abs() * out.factor * out.ratio.clamp(min=1) * (1 + out.logp.abs())
    size = (tokens.weight * (terms + tokens.objective.beta * out.kl.abs())).sum() + ours.abs()
    if tokens.entropy_weight is not None:
        size = size + (tokens.entropy_weight.abs() * out.entropy).sum()
    differs = (ours - theirs).abs() > ROUNDING * size
    # a term that is not finite is left out here, and makes TRL's loss NaN
    if bool(differs & theirs.isfinite() & ~out._dropped.any()):
        raise RuntimeError(
            f"FusedGRPOTrainer: expected TRL's loss of this batch, {theirs.item()}, got "
            f"{ours.item()}; this TRL, or a subclass, has another loss: use GRPOTrainer with "
            "patch_log_probs()"
        )
