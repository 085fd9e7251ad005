"""TRL: our log-probabilities at its hook, or our whole loss in its GRPO trainer.

    from grpo_core.integrations.trl import FusedGRPOTrainer, patch_log_probs

| level | change                                      | loss        | products of 2·n·V·D  |
|-------|---------------------------------------------|-------------|----------------------|
| safe  | `patch_log_probs()`                         | TRL's       | 4, frozen head 2     |
| fast  | `FusedGRPOTrainer` for TRL's `GRPOTrainer`  | ours, equal | 3, frozen head 2     |

Stock TRL takes 4, with a frozen head 3. docs/integrations.md says what is supported.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from grpo_core.integrations.trl_forward import KEYWORD, LossRequest, answer_requests
from grpo_core.integrations.trl_hook import (
    INSTALL,
    LogProbPatch,
    known_hook,
    patch_log_probs,
    trl_utils,
)
from grpo_core.integrations.trl_options import INPUTS, SUPPORTED, preset_of, refused
from grpo_core.loss.fused_loss import LossOutput
from grpo_core.loss.inputs import Tokens

trl_utils()  # says how to install TRL where it is missing

from trl import GRPOTrainer  # noqa: E402

__all__ = ["SUPPORTED", "FusedGRPOTrainer", "LogProbPatch", "patch_log_probs"]

# the two losses differ by the order of their sums, relative to the size of what is summed
ROUNDING = 1e-3


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with loss and gradients made in one go in the model's forward.

    Same arguments, same results, same logged metrics: TRL's own code computes these, from our
    log-probabilities. With an option that is not in `SUPPORTED`, or a value of one that cannot be
    had, a warning names it and the loss is TRL's over `patch_log_probs`.

    Attributes:
        memory_budget: bytes for logits and sums, as in `fused_linear_loss`; may be set.

    Raises:
        RuntimeError: a TRL without the hook in GRPO's forward, or another loss than ours.
    """

    memory_budget: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if known_hook().outputs != 5:
            raise RuntimeError(f"trl: expected TRL 1.15 or 1.16 for FusedGRPOTrainer; {INSTALL}")
        self._warned: set[str] = set()
        self._answer: tuple[Tensor, Tensor, Tensor | None] | None = None
        super().__init__(*args, **kwargs)
        whole: Any = self.model
        answer_requests(whole.get_base_model() if hasattr(whole, "get_base_model") else whole)
        self._is_fast()

    @property
    def _trains(self) -> bool:
        """TRL looks there, too."""
        whole: Any = self.model
        return whole.training

    def _is_fast(self) -> bool:
        """Whether the options allow the fast level; says so, once for each that does not."""
        reason = refused(self)
        if reason is not None:
            self._say(*reason)
        return reason is None

    def _say(self, name: str, why: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"FusedGRPOTrainer: {name}: {why}; the loss is TRL's, over our log-probabilities",
                stacklevel=2,
            )

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._answer is not None:
            return self._answer
        with patch_log_probs(memory_budget=self.memory_budget):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        for name in sorted(inputs.keys() - INPUTS):
            self._say(name, "an input that is not known here")
        request = None
        if self._is_fast() and inputs.keys() <= INPUTS:
            request = self._request(inputs)
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
        self._answer = _answered(output, request, aux_loss)
        try:
            theirs = super()._compute_loss(model, inputs)
        finally:
            self._answer = None
        assert request.out is not None
        if self.off_policy_mask_threshold is None:
            _compare(loss.detach(), theirs.detach(), request.out)
        return loss

    def _request(self, inputs: dict[str, Any]) -> LossRequest | None:
        """What the forward is to make of a micro-batch; None if only TRL's own code can."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        preset = preset_of(self, training=self._trains)
        advantage = inputs["advantages"].float()
        advantage = advantage[:, None] if advantage.ndim == 1 else advantage
        vectors = {
            ours: inputs[name].float()
            for ours, name in (
                ("old_logp", "old_per_token_logps"),
                ("ref_logp", "ref_per_token_logps"),
            )
            if name in inputs and (ours == "old_logp" or self.beta)
        }
        factor = preset.objective.factor
        sampler_logp = inputs.get("sampling_per_token_logps")
        if self.off_policy_mask_threshold is not None:
            before = vectors.get("old_logp") if sampler_logp is None else sampler_logp
            if before is None:
                # no distance at all
                advantage = advantage * ((advantage >= 0) | (self.off_policy_mask_threshold >= 0))
                factor = dataclasses.replace(factor, off_policy_delta=math.inf)
            elif bool((before.isnan() & mask).any()):
                self._say("sampling_per_token_logps", "NaN beside an off_policy_mask_threshold")
                return None
            else:
                vectors["sampler_logp"] = before.float()
        if factor.sampler is not None and self.loss_type == "vespo":
            assert sampler_logp is not None
            # where vLLM has none, TRL's ratio is 1
            known = torch.where(sampler_logp.isnan(), vectors["old_logp"], sampler_logp)
            vectors["sampler_logp"] = known.float()
        elif factor.sampler is not None:
            # every other surrogate is proportional to the advantage, and the ratio is not negative
            advantage = advantage * inputs["importance_sampling_ratio"].float()
            factor = dataclasses.replace(factor, sampler=None)
        normalizer = preset.normalizer(
            mask,
            num_items_in_batch=inputs.get("num_items_in_batch"),
            num_processes=self.accelerator.num_processes,
        )
        vectors["advantage"] = advantage.expand(mask.shape)
        objective = preset.objective.replace(factor=factor)
        return LossRequest(objective, mask, normalizer, vectors, self.memory_budget)


def _answered(
    output: Any, request: LossRequest, aux_loss: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, entropy, aux_loss) for TRL's metrics; tokens outside of the mask have not moved."""
    T = request.mask.shape[1]
    logp, entropy = output.log_probs[:, -T:].detach(), output.entropy[:, -T:].detach()
    before = request.vectors.get("old_logp", request.vectors.get("ref_logp"))
    if before is not None:
        logp = torch.where(request.mask, logp, before)
    return logp, entropy, None if aux_loss is None else aux_loss.detach()


def _compare(ours: Tensor, theirs: Tensor, out: LossOutput) -> None:
    """Raises RuntimeError if TRL's own loss of the same log-probabilities is another than ours."""
    tokens = out._tokens
    assert isinstance(tokens, Tokens)
    logp, ratio, kl, factor, entropy = (
        vector.reshape(-1) for vector in (out.logp, out.ratio, out.kl, out.factor, out.entropy)
    )
    terms = tokens.advantage.abs() * factor * ratio.clamp(min=1) * (1 + logp.abs())
    size = (tokens.weight * (terms + tokens.objective.beta * kl.abs())).sum() + ours.abs()
    if tokens.entropy_weight is not None:
        size = size + (tokens.entropy_weight.abs() * entropy).sum()
    differs = (ours - theirs).abs() > ROUNDING * size
    # a term that is not finite is left out here, and spoils TRL's
    if bool(differs & theirs.isfinite() & ~out._dropped.any()):
        raise RuntimeError(
            f"FusedGRPOTrainer: expected TRL's loss of this batch, {theirs.item()}, got "
            f"{ours.item()}; this TRL, or a subclass, has another loss: use GRPOTrainer and "
            "patch_log_probs()"
        )
