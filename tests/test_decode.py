"""Rollouts by fewer rows are those of `generate` alone, token for token and bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_core import with_fused_head
from grpo_core.trainer import rollout as module
from grpo_core.trainer.decode import MIN_ROWS, ROOM, SHARE_LEFT, BufferedLayer, fewer_rows
from grpo_core.trainer.rollout import Rollout, Sampling, rollout

ENDS = [2, 3, 4, 5]
# widths are multiples of 64: the last elements of others are rounded otherwise by SiLU
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": ENDS,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"head_dim": 16, "sliding_window": 8},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
    "Mamba": {"state_size": 4},
    "RecurrentGemma": {"lru_width": 64, "num_hidden_layers": 3, "attention_window_size": 8},
}
# six prompts of 1 to 12 tokens, eight completions each
PROMPTS = [[7] * 3, [9, 8, 7, 11, 12], [20], [30] * 12, [40, 41, 42, 43], [50, 51]] * 8


def small(family: str = "Llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def with_adapter(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings)


@contextmanager
def nothing(*_: Any) -> Iterator[None]:
    """The context that leaves `generate` as it is."""
    yield


def drawn(model: PreTrainedModel, sampling: Sampling, seed: int) -> tuple[Rollout, float]:
    """A rollout, and the next number of the generator."""
    torch.manual_seed(seed)
    found = rollout(model, PROMPTS, sampling)
    return found, float(torch.rand(1))


def by_generate(
    patch: pytest.MonkeyPatch, model: PreTrainedModel, sampling: Sampling, seed: int
) -> tuple[Rollout, float]:
    """The same by `generate` alone."""
    with patch.context() as without:
        without.setattr(module, "fewer_rows", nothing)
        return drawn(model, sampling, seed)


@pytest.mark.parametrize("family", [*FAMILIES, "adapter"])
def test_completions_are_those_of_generate(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(small()) if family == "adapter" else small(family)
    expected, number = by_generate(monkeypatch, model, Sampling(24), 1)
    got, next_number = drawn(model, Sampling(24), 1)
    assert torch.equal(got.completion, expected.completion)
    assert torch.equal(got.completion_mask, expected.completion_mask)
    # products of experts, with fewer tokens than MIN_ROWS, and of a low rank round otherwise
    torch.testing.assert_close(got.sampler_logp, expected.sampler_logp, rtol=0, atol=1e-5)
    assert number == next_number


@pytest.mark.parametrize(
    "sampling",
    [Sampling(24), Sampling(24, 0.7, top_p=0.8), Sampling(24, 0.0)],
    ids=["plain", "filtered", "greedy"],
)
def test_bits_are_those_of_generate(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_fused_head(small())
    for seed in range(3):
        expected, number = by_generate(monkeypatch, model, sampling, seed)
        got, next_number = drawn(model, sampling, seed)
        for name, value in vars(expected).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(got, name), value), name
        if expected.kept is not None:
            assert got.kept is not None
            assert torch.equal(got.kept.ids, expected.kept.ids)
        assert number == next_number


def computed_tokens(model: PreTrainedModel, sampling: Sampling) -> tuple[Rollout, list[int]]:
    """A rollout, and the tokens that every forward reads."""
    counts: list[int] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    found, _ = drawn(model, sampling, 1)
    handle.remove()
    return found, counts


@pytest.mark.parametrize("wrapped", ["fused head", "adapter"])
def test_prompts_are_read_once_and_finished_completions_leave(wrapped: str) -> None:
    model = with_adapter(small()) if wrapped == "adapter" else with_fused_head(small())
    found, counts = computed_tokens(model, Sampling(24))
    assert counts[0] == 6 * 12
    left = found.completion_mask.sum(0).tolist()
    ended = torch.isin(found.completion, torch.tensor(ENDS)) & found.completion_mask
    writing = [n - int(end) for n, end in zip(left, ended.sum(0), strict=True)]
    for count, unfinished in zip(counts[1:], writing, strict=False):
        assert unfinished <= count and MIN_ROWS <= count <= 48
        assert count == 48 or max(unfinished, MIN_ROWS) > SHARE_LEFT * count
    assert counts[-1] < 24 and sum(counts[1:]) < 0.75 * 48 * 23


@pytest.mark.parametrize("family", ["Mamba", "bfloat16"])
def test_what_is_not_known_is_left_to_generate(family: str) -> None:
    model = small().bfloat16() if family == "bfloat16" else small(family)
    _, counts = computed_tokens(model, Sampling(24))
    assert set(counts[1:]) == {48} and counts[0] == 48 * 12


def test_no_hook_is_left_behind() -> None:
    model = small()
    with pytest.raises(OSError, match="half way"), fewer_rows(model, PROMPTS, ENDS):
        assert model._forward_pre_hooks and model._forward_hooks
        raise OSError("half way")
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_buffer_holds_what_concatenation_makes() -> None:
    """Past the end of its room, with rows removed, and keys that are wider than values."""
    torch.manual_seed(0)
    plain = DynamicCache()
    plain.update(torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 6), 0)
    buffered = DynamicCache()
    buffered.layers = [BufferedLayer(plain.layers[0])]
    places = set()
    for step in range(2 * ROOM):
        if step == ROOM // 2:
            for cache in (plain, buffered):
                cache.reorder_cache(torch.tensor([3, 1]))
        rows = plain.layers[0].keys.shape[0]
        new = torch.randn(rows, 2, 1, 8), torch.randn(rows, 2, 1, 6)
        expected, got = plain.update(*new, 0), buffered.update(*new, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert buffered.get_seq_length() == plain.get_seq_length()
        places.add(got[0].data_ptr())
    assert isinstance(plain.layers[0], DynamicLayer)
    # a buffer at the start, one after the rows left, two more when one was full
    assert len(places) <= 4
