"""Packed rows against loops over single, unpadded sequences."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_core.trainer.batch import Batch, check_output_matrix, pack
from grpo_core.trainer.rollout import Rollout, Sampling, rollout
from tests.micro import VOCABULARY, micro_model

PROMPTS = [[5], [3, 9, 4, 11, 6], [8, 2], [12, 12, 12]]
ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, 0.0])


def draw() -> tuple[PreTrainedModel, Rollout]:
    model = micro_model()
    model.generation_config.eos_token_id = [1, 9, 10, 11]
    torch.manual_seed(1)
    drawn = rollout(model, PROMPTS, Sampling(9))
    assert len({len(ids) for ids in drawn.completions()}) > 1  # lengths differ
    return model, drawn


def test_rows_are_the_completion_tokens_and_nothing_else() -> None:
    _, drawn = draw()

    batch = pack(drawn, ADVANTAGE)

    completions = drawn.completions()
    flat = [(row, token) for row, ids in enumerate(completions) for token in ids]
    assert batch.rows.sequence.tolist() == [row for row, _ in flat]
    assert batch.rows.target.tolist() == [token for _, token in flat]
    assert batch.advantage.tolist() == [ADVANTAGE[row].item() for row, _ in flat]
    logp = [drawn.sampler_logp[row, : len(ids)] for row, ids in enumerate(completions)]
    assert torch.equal(batch.sampler_logp, torch.cat(logp))


def test_logits_are_those_of_each_sequence_alone() -> None:
    model, drawn = draw()

    logits = pack(drawn, ADVANTAGE).rows.logits(model)

    expected = []
    for prompt, ids in zip(PROMPTS, drawn.completions(), strict=True):
        alone = model(input_ids=torch.tensor([prompt + ids])).logits[0]
        expected.append(alone[len(prompt) - 1 : -1])
    assert logits.shape == (sum(map(len, drawn.completions())), VOCABULARY)
    # float32, padded and unpadded
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        # Positions are learnt vectors here, so that left padding would show.
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=32, eos_token_id=1
            )
        ),
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=16,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                eos_token_id=1,
            )
        ),
    ],
    ids=["gpt2", "qwen3"],
)
def test_logits_and_sampler_agree_on_other_architectures(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    check_output_matrix(model.eval())
    drawn = rollout(model, PROMPTS, Sampling(9))

    logits = pack(drawn, ADVANTAGE).rows.logits(model)

    start = 0
    for row, (prompt, ids) in enumerate(zip(PROMPTS, drawn.completions(), strict=True)):
        alone = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[start : start + len(ids)], alone, rtol=0, atol=1e-4)
        logp = alone.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(drawn.sampler_logp[row, : len(ids)], logp, rtol=0, atol=1e-4)
        start += len(ids)


def test_a_selection_has_whole_sequences() -> None:
    model, drawn = draw()
    whole = pack(drawn, ADVANTAGE)
    numbered = Batch(whole.rows, whole.advantage, torch.arange(len(whole.advantage)).float())

    first, second = map(numbered.select, torch.tensor([[3, 0], [2, 1]]))

    lengths = [len(ids) for ids in drawn.completions()]
    starts = [sum(lengths[:row]) for row in range(4)]
    places = {row: list(range(starts[row], starts[row] + lengths[row])) for row in range(4)}
    assert first.sampler_logp.tolist() == places[0] + places[3]
    assert second.sampler_logp.tolist() == places[1] + places[2]
    assert first.rows.sequence.tolist() == [0] * lengths[0] + [1] * lengths[3]
    assert torch.equal(
        first.rows.logits(model), whole.rows.logits(model)[first.sampler_logp.long()]
    )


@pytest.mark.parametrize(
    ("architecture", "configuration", "changes"),
    [
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 1.0, "head_dim": 16}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    ],
)
def test_models_that_bend_their_logits_are_refused(
    architecture: type, configuration: type, changes: dict[str, float]
) -> None:
    torch.manual_seed(0)
    model = architecture(
        configuration(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
            **changes,
        )
    )
    with pytest.raises(ValueError, match="scaled or capped afterwards"):
        check_output_matrix(model)
    check_output_matrix(micro_model())
