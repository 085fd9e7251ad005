"""The public functions where `torch.compile` traces them: plain Python around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.backends import Backend
from grpo_core.loss import operators
from grpo_core.loss.inputs import LOGIT_DTYPES, LossInputs, Measured, check_logits
from grpo_core.loss.operators import Outcome
from grpo_core.objective.objective import Objective
from grpo_core.objective.recipes import find_objective


def loss_in_graph(logits: Tensor, inputs: LossInputs, inplace: bool) -> tuple[Outcome, Measured]:
    """`fused_loss` where `torch.compile` traces it; arguments as there.

    Raises:
        NotImplementedError: inplace, of which a graph must know beforehand.
        ValueError: an objective that was made inside of the graph.
    """
    if inplace:
        raise NotImplementedError("inplace: expected False inside torch.compile, got True")
    spec = traceable(inputs.objective)
    check_logits(logits, inputs.temperature, LOGIT_DTYPES)
    given = dict(vars(inputs))
    normalizer, temperature = given["normalizer"], given.pop("temperature")
    divisor = normalizer if isinstance(normalizer, (int, float)) else None
    given |= {
        "logits": logits,
        "numbers": host_tensor(temperature, 1.0 if divisor is None else divisor, *spec.numbers),
        "objective": spec.key,
        "normalizer": normalizer if divisor is None else None,
        "divides": divisor is not None,
    }
    outcome = Outcome._make(operators.fused_loss(*(given[name] for name in operators.ARGUMENTS)))
    outcome = Outcome._make((outcome.loss, *(vector.detach() for vector in outcome[1:])))
    vectors = (outcome.unmasked, outcome.bad_target, outcome.advantage)
    return outcome, measured_in_graph(spec, *vectors, given)


def traceable(objective: str | Objective) -> Objective:
    """The objective, once a graph can name it.

    Raises:
        ValueError: it was made inside of the graph, or is none.
    """
    spec = find_objective(objective)
    if not spec.key:
        raise ValueError("objective: expected one made outside of torch.compile's graph")
    return spec


def measured_in_graph(
    spec: Objective, valid: Tensor, bad_target: Tensor, advantage: Tensor, given: dict[str, Any]
) -> Measured:
    """What the metrics need, from an operator's results and the arguments of the loss."""
    rewards, group_size, group_id = given["rewards"], given["group_size"], given["group_id"]
    whose = group_size if group_id is None else group_id

    def flat(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.detach().float().reshape(-1)

    return Measured(
        objective=spec,
        unmasked=valid,
        bad_target=bad_target,
        advantage=advantage,
        old_logp=flat(given["old_logp"]),
        sampler_logp=flat(given["sampler_logp"]),
        groups=None if rewards is None else (rewards.detach(), whose),
    )


def logp_in_graph(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    mask: Tensor | None,
    backend: Backend | None,
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    """`token_logp` where `torch.compile` traces it: (logp, entropy) `[N]`."""
    check_logits(logits, temperature, LOGIT_DTYPES)
    return operators.token_logp(logits, target, host_tensor(temperature), mask, backend, validate)


def host_tensor(*numbers: float) -> Tensor:
    """Numbers as float64 in host memory; a product is what torch keeps a number dynamic in."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in numbers])
