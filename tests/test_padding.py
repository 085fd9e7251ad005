"""Sequences end to end: the hidden states, updates and refusals of padded ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grpo_core import RECIPES
from grpo_core.trainer import batch as module
from grpo_core.trainer.baselines.ppo import CriticConfig, PPOTrainer
from grpo_core.trainer.batch import is_padding_free, pack, separates_sequences
from grpo_core.trainer.rollout import Sampling, rollout
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

CONFIG = TrainerConfig(
    steps=3,
    warmup_steps=0,
    prompts_per_step=4,
    group_size=4,
    learning_rate=3e-3,
    sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
)


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, state_size=4)
    )


def qwen() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=16, **sizes, **heads))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_those_of_padded_sequences(attention: str) -> None:
    model = micro_model()
    model.set_attn_implementation(attention)
    drawn = rollout(micro_model(), [(3, 4), (2, 3, 4, 5, 6), (9,)] * 2, Sampling(MAX_NEW_TOKENS))
    padded = pack(drawn, torch.zeros(6)).rows
    rows = replace(padded, padding_free=True)
    inputs = rows.inputs
    assert inputs["input_ids"].shape == (1, int(padded.attention.sum()))
    assert "attention_mask" not in inputs
    with torch.no_grad():
        torch.testing.assert_close(rows.hidden(model), padded.hidden(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["fused", "logits", "naive"])
def test_updates_are_those_of_padded_sequences(loss: Any) -> None:
    """Rewards, gradient norms and KL, also in microbatches, which are others."""
    found = []
    for wish, tokens in (("never", 0), ("always", 0), ("always", 40)):
        config = replace(CONFIG, loss=loss, padding_free=wish, tokens_per_microbatch=tokens)
        trainer = Trainer(micro_model(), draw_problems, share_of_sevens, config)
        assert trainer.padding_free == (wish == "always")
        found.append(trainer.train())
    for other in found[1:]:
        for name in ("reward", "grad_norm", "kl", "entropy", "tokens"):
            ours, theirs = ([step[name] for step in run[1:]] for run in (other, found[0]))
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6), name


def test_a_microbatch_counts_what_the_model_is_given() -> None:
    prompts = [(3,) * n for n in (1, 2, 3, 9, 10, 12)]
    drawn = rollout(micro_model(), prompts, Sampling(MAX_NEW_TOKENS))
    batch = pack(drawn, torch.zeros(6), padding_free=True)
    longest = int(batch.rows.attention.sum(1).max())
    parts = batch.microbatches(2 * longest)
    counts = [part.rows.inputs["input_ids"].numel() for part in parts]
    assert sum(counts) == int(batch.rows.attention.sum())
    assert max(counts) <= 2 * longest
    padded = replace(batch, rows=replace(batch.rows, padding_free=False)).microbatches(2 * longest)
    assert len(parts) <= len(padded)


def test_ppo_learns_the_same_from_them() -> None:
    found = []
    for wish in ("never", "always"):
        config = replace(CONFIG, padding_free=wish, objective=RECIPES["ppo"])
        trainer = PPOTrainer(
            micro_model(), draw_problems, share_of_sevens, config, critic=CriticConfig()
        )
        found.append([step["reward"] for step in trainer.train()[1:]])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_model_with_a_running_state_is_refused() -> None:
    """By the trial; unless nobody insists."""
    assert separates_sequences(qwen()) and not separates_sequences(mamba())
    with pytest.raises(ValueError, match=r"^padding_free: expected a model that keeps concat"):
        is_padding_free(mamba(), "always")
    with pytest.MonkeyPatch.context() as patch:
        model = mamba()
        patch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        assert not is_padding_free(model, "auto")


def test_auto_looks_at_the_attention() -> None:
    """The names are those of transformers; what the attention computes is the trial's to say."""
    model = qwen()
    assert not is_padding_free(model, "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "separates_sequences", lambda model: True)
        for name in ("flash_attention_2", "kernels-community/flash-attn3", "flex_attention"):
            patch.setattr(model.config, "_attn_implementation_internal", name)
            assert is_padding_free(model, "auto")
            assert not is_padding_free(model, "never")
    with pytest.raises(ValueError, match=r"^padding_free: expected one of .*, got 'yes'"):
        replace(CONFIG, padding_free="yes")
