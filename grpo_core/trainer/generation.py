"""A model as a sampler: end tokens, positions, and a generation config that samples the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

# values of the generation fields that leave the distribution unchanged
NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
}


def special_tokens(model: PreTrainedModel) -> tuple[int, list[int]]:
    """The padding token, by default the first end token, and the end tokens."""
    config = model.generation_config
    end = config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())
    if not ends:
        raise ValueError(f"model.generation_config.eos_token_id: expected a token id, got {end}")
    pad = config.pad_token_id
    return (ends[0] if pad is None else pad), ends


def check_context(
    config: PretrainedConfig,
    prompt: int,
    completion: int,
    names: str = "longest_prompt + max_new_tokens",
) -> None:
    """Raises ValueError if a model has too few positions for so many tokens.

    Args:
        names: the options that limit prompt and completion, for the message.
    """
    positions = positions_of(config)
    if positions is not None and prompt + completion > positions:
        raise ValueError(
            f"{names}: expected at most {positions} tokens, the positions of the model, got "
            f"{prompt} + {completion} = {prompt + completion}"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """Positions of a model, with a scaled rotary embedding; None without a limit (Bloom, Mamba)."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")
    known = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    if not known or known[0] < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # one entry for all layers, or one per kind of layer
    ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    scaled = [
        int(each["factor"] * (each.get("original_max_position_embeddings") or known[0]))
        for each in ropes
        if each.get("factor")
    ]
    return max(known[0], *scaled, 0)


@contextmanager
def plain_generation(
    model: PreTrainedModel, max_new_tokens: int, *, sample: bool
) -> Iterator[GenerationConfig]:
    """Context in which `generate` samples the policy itself; yields the config to call it with.

    Temperature and filters come as processors of logits, see `rollout`. The model's own config must
    be replaced as well: `generate` takes from it what its argument leaves out. A peft model and the
    model inside it may both have one.
    """
    pad, ends = special_tokens(model)
    how: dict[str, Any] = {"do_sample": False}
    if sample:
        how = {"do_sample": True, "temperature": 1.0, **NEUTRAL}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, **how
    )
    holders: list[Any] = [m for m in model.modules() if "generation_config" in vars(m)]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield config
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


def ignored_fields(model: PreTrainedModel) -> list[str]:
    """Fields of the model's generation config that are set and have no effect on rollouts."""
    used = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    neutral = {**NEUTRAL, "do_sample": True, "temperature": 1.0, "use_cache": True}
    return sorted(
        name
        for name, value in vars(model.generation_config).items()
        if name not in used
        and not name.startswith("_")
        and value not in (None, False, neutral.get(name))
    )


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Context with dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
