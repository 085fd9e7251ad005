"""Rollouts against the model itself, asked one completion at a time, without padding or cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_core.rollout import Sampling, rollout
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


def test_the_models_own_sampling_defaults_are_ignored() -> None:
    plain, opinionated = micro_model(), micro_model()
    for name, value in {"top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0}.items():
        setattr(opinionated.generation_config, name, value)

    torch.manual_seed(3)
    expected = rollout(plain, PROMPTS, Sampling(8))
    torch.manual_seed(3)
    got = rollout(opinionated, PROMPTS, Sampling(8))

    assert torch.equal(got.completion, expected.completion)
    assert torch.equal(got.sampler_logp, expected.sampler_logp)


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
    with pytest.raises(ValueError, match=r"temperature: expected at least 0, got -1\.0"):
        Sampling(4, -1.0)
    endless = micro_model()
    endless.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"eos_token_id: expected a token id, got None"):
        rollout(endless, [[3]], Sampling(4))
