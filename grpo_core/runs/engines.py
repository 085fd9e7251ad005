"""The engine that a run's options ask for."""

from __future__ import annotations

from transformers import PreTrainedModel

from grpo_core.runs.run_config import RunConfig
from grpo_core.trainer.distributed import world
from grpo_core.trainer.engine import Engine
from grpo_core.trainer.vllm.engine import VllmEngine
from grpo_core.trainer.vllm.server import VllmServer


def make_engine(config: RunConfig, model: PreTrainedModel) -> Engine | None:
    """What writes the completions; None for the model itself.

    Raises:
        ModuleNotFoundError: vLLM is needed and not there.
        ValueError, ConnectionError: it cannot be had as asked for.
    """
    if config.rollout == "transformers":
        return None
    if config.rollout == "vllm-server":
        return VllmServer(config.rollout_url, model)
    if world() > 1:
        raise ValueError(
            f"rollout: expected transformers or vllm-server on {world()} processes, got 'vllm'"
        )
    longest = config.longest_prompt + config.max_new_tokens if config.longest_prompt else None
    return VllmEngine(
        config.model,
        model,
        memory=config.rollout_memory,
        longest=longest,
        sleep=config.rollout_sleep,
    )
