"""Rollouts against the model itself, asked one completion at a time, without padding or cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, WatermarkingConfig

from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.generation import check_context, ignored_fields, positions_of
from grpo_core.trainer.rollout import Sampling, rollout
from tests.micro import EOS, PAD, VOCABULARY, micro_model

PROMPTS = [[5], [3, 9, 4, 11, 6], [8, 2], [12, 12, 12]]


def logits_after(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """The model's logits before each completion token, from one plain forward pass, [T, V]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logp_is_the_models(temperature: float) -> None:
    model = micro_model()
    torch.manual_seed(1)

    drawn = rollout(model, PROMPTS * 8, Sampling(12, temperature))

    for row, completion in enumerate(drawn.completions()):
        logits = logits_after(model, PROMPTS[row % 4], completion) / temperature
        expected = logits.log_softmax(-1)[range(len(completion)), completion]
        got = drawn.sampler_logp[row, : len(completion)]
        # float32, key-value cache against one full forward
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert (drawn.sampler_logp[row, len(completion) :] == 0).all()


def test_greedy_completions_do_not_depend_on_padding() -> None:
    model = micro_model()

    together = rollout(model, PROMPTS, Sampling(10, temperature=0)).completions()

    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert completion == logits_after(model, prompt, completion).argmax(-1).tolist()


@pytest.mark.parametrize("pad", [PAD, EOS, None])
def test_a_completion_ends_with_its_first_end_token(pad: int | None) -> None:
    model = micro_model()
    model.generation_config.pad_token_id = pad
    torch.manual_seed(0)

    drawn = rollout(model, PROMPTS * 16, Sampling(12))

    lengths = []
    for row, ids in enumerate(drawn.completion.tolist()):
        length = ids.index(EOS) + 1 if EOS in ids else len(ids)
        lengths.append(length)
        assert drawn.completion_mask[row].tolist() == [place < length for place in range(len(ids))]
        assert drawn.completions()[row] == ids[:length]
        assert bool(drawn.truncated[row]) == (EOS not in ids)
    # Both kinds occur, so that the lines above have tested both.
    assert min(lengths) < 12 and drawn.truncated.any() and not drawn.truncated.all()


def test_several_end_tokens() -> None:
    model = micro_model()
    model.generation_config.eos_token_id = [EOS, 9, 10]
    torch.manual_seed(0)

    drawn = rollout(model, PROMPTS * 16, Sampling(12))

    ends = {completion[-1] for completion in drawn.completions()}
    assert {EOS, 9, 10} <= ends
    assert all(not {EOS, 9, 10} & set(ids[:-1]) for ids in drawn.completions())


# values that change a rollout where they are heeded; of fields that are not named, 2
BENDING = {
    "min_p": 0.3,
    "top_h": 0.3,
    "top_p": 0.3,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.5,
    "temperature": 0.3,
    "max_time": 1e-9,
    "stop_strings": ["7"],
    "do_sample": False,
    "use_cache": False,
    "cache_implementation": "quantized",
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "bad_words_ids": [[7], [3, 4]],
    "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": [3, 7, 9],
    "begin_suppress_tokens": [3, 7, 9],
    "sequence_bias": [[[7], 20.0]],
    "watermarking_config": WatermarkingConfig(bias=20.0, context_width=1),
    "token_healing": True,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "force_words_ids": [[7]],
    "constraints": ["7"],
    "speculation_type": "dspark",
    "an_entry_of_its_own": 2,
}
TOKENS = {"eos_token_id", "pad_token_id", "bos_token_id"}
KNOWN = {name for name in vars(GenerationConfig()) if name[0] != "_"}
FIELDS = sorted((KNOWN | set(BENDING)) - TOKENS)


def opinionated(*names: str) -> LlamaForCausalLM:
    """A model whose generation config has these fields."""
    model = micro_model()
    for name in names:
        setattr(model.generation_config, name, BENDING.get(name, 2))
    return model


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_of_a_generation_config_changes_a_rollout(name: str) -> None:
    plain, model = micro_model(), opinionated(name)
    torch.manual_seed(3)
    expected = rollout(plain, PROMPTS * 4, Sampling(4))
    torch.manual_seed(3)
    got = rollout(model, PROMPTS * 4, Sampling(4))

    assert torch.equal(got.completion, expected.completion)
    assert torch.equal(got.sampler_logp, expected.sampler_logp)
    # it goes into the files of the trained model as it was
    assert getattr(model.generation_config, name) == BENDING.get(name, 2)


def test_nor_one_that_is_greedy() -> None:
    expected = rollout(micro_model(), PROMPTS, Sampling(12, 0.0))
    got = rollout(opinionated(*FIELDS), PROMPTS, Sampling(12, 0.0))
    assert torch.equal(got.completion, expected.completion)
    assert torch.equal(got.sampler_logp, expected.sampler_logp)


def test_a_generation_config_is_ignored_around_an_adapter() -> None:
    """The adapter's is another than that of the model beneath it."""
    peft = pytest.importorskip("peft")
    drawn = []
    for field in ({}, {"suppress_tokens": [3, 7, 9]}):
        torch.manual_seed(2)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(micro_model(), settings)
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, **field)
        torch.manual_seed(3)
        drawn.append(rollout(model, PROMPTS * 4, Sampling(8)).completion)
    assert torch.equal(*drawn)
    assert model.generation_config.suppress_tokens == [3, 7, 9]


def test_fields_that_are_ignored_are_named() -> None:
    model = opinionated("min_p")
    model.generation_config.update(top_k=20, top_p=1.0, do_sample=True, bos_token_id=5)
    assert ignored_fields(model) == ["min_p", "top_k"]
    assert ignored_fields(micro_model()) == []
    with pytest.warns(UserWarning, match="rollouts ignore min_p, top_k of the model's gen"):
        rollouts = EngineSync(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollouts.draw(PROMPTS, Sampling(2), 0)
        EngineSync(micro_model())


def test_a_rollout_that_does_not_fit_is_refused() -> None:
    """59 + 6 of 64; one token less fits."""
    sampling = Sampling(6)
    engines = rollout, lambda model, *given: EngineSync(model).draw(*given, 0)
    for draw in engines:
        draw(micro_model(), [[3], [3] * 58], sampling)
        expected = r"longest_prompt \+ max_new_tokens: expected at most 64 tokens.* 59 \+ 6 = 65"
        with pytest.raises(ValueError, match=expected):
            draw(micro_model(), [[3], [3] * 59], sampling)


STRETCHED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LAYERS = {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}


@pytest.mark.parametrize(
    ("family", "changes", "positions"),
    [
        ("Qwen2", {}, 32768),
        ("Qwen2", {"rope_parameters": STRETCHED}, 131072),
        ("Qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 65536),
        # the factor is in its positions already
        ("Qwen3", {"max_position_embeddings": 131072, "rope_parameters": STRETCHED}, 131072),
        ("Gemma3Text", {"max_position_embeddings": 4096, "rope_parameters": LAYERS}, 8192),
        ("GPT2", {"n_positions": 77}, 77),
        ("Mpt", {"max_seq_len": 99}, 99),
        ("Gemma3", {"text_config": {"max_position_embeddings": 512}}, 512),
        ("Bloom", {}, None),
        ("Mamba", {}, None),
    ],
)
def test_positions_of_models(family: str, changes: dict[str, Any], positions: int | None) -> None:
    config = getattr(transformers, f"{family}Config")(**changes)
    assert positions_of(config) == positions
    check_context(config, 10, (positions or 10**9) - 10)
    if positions is not None:
        with pytest.raises(ValueError, match=f"expected at most {positions} tokens"):
            check_context(config, 11, positions - 10)


def test_frequencies_follow_the_distribution() -> None:
    model = micro_model()
    torch.manual_seed(5)

    drawn = rollout(model, [[3, 4]] * 20_000, Sampling(1))

    expected = logits_after(model, [3, 4], [0])[0].softmax(-1)
    counted = drawn.completion.flatten().bincount(minlength=VOCABULARY) / 20_000
    # four standard deviations of a share near 0.5
    torch.testing.assert_close(counted, expected, rtol=0, atol=0.015)


def test_dropout_is_off_while_sampling_and_back_on_after() -> None:
    model = micro_model(attention_dropout=0.5).train()

    first = rollout(model, PROMPTS, Sampling(8, temperature=0))
    second = rollout(model, PROMPTS, Sampling(8, temperature=0))

    assert torch.equal(first.sampler_logp, second.sampler_logp)
    assert model.training


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="prompts: expected at least one, none of them empty"):
        rollout(micro_model(), [[3], []], Sampling(4))
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        Sampling(0)
    with pytest.raises(ValueError, match=r"temperature: expected 0 or more, got -1\.0"):
        Sampling(4, -1.0)
    endless = micro_model()
    for none in (None, []):
        endless.generation_config.eos_token_id = none
        for draw in (lambda model: rollout(model, [[3]], Sampling(4)), EngineSync):
            with pytest.raises(ValueError, match=r"eos_token_id: expected a token id, got "):
                draw(endless)
