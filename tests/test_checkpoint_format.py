"""Weights for an engine are those that a checkpoint would hold, adapters merged."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpo_core import with_fused_head
from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.weights import ModelWeights
from tests.engines import CopyEngine
from tests.micro import micro_model


def moe() -> Qwen3MoeForCausalLM:
    """Its experts are one weight in the model and many in the checkpoint."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **counts, **experts))


@pytest.mark.parametrize(
    "make",
    [
        micro_model,
        lambda: with_fused_head(micro_model()),
        lambda: micro_model(tie_word_embeddings=True),
        moe,
    ],
    ids=["plain", "fused head", "tied", "experts"],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_names_and_weights_are_those_of_save_pretrained(
    make: Any, loaded: bool, tmp_path: Path
) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = dict(ModelWeights(model))
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor)
    told = [(each.name, each.dtype, each.shape) for each in ModelWeights(model).describe()]
    assert told == [(name, t.dtype, tuple(t.shape)) for name, t in found.items()]
    if "experts" in "".join(found):
        assert "model.layers.1.mlp.experts.3.up_proj.weight" in found


def test_weights_can_be_had_in_another_dtype() -> None:
    weights = ModelWeights(micro_model()).to(torch.bfloat16)
    assert {each.dtype for each in weights.describe()} == {torch.bfloat16}
    assert sum(each.bytes for each in weights.describe()) == 2 * sum(
        p.numel() for p in micro_model().parameters()
    )
    state = micro_model().state_dict()
    for name, tensor in weights:
        assert torch.equal(tensor, state[name].bfloat16())


def adapted(model: Any = None, **changes: Any) -> Any:
    """Beneath an adapter whose B is not 0."""
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj", "lm_head"]}
    model = peft.get_peft_model(model or micro_model(), peft.LoraConfig(**settings | changes))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_is_merged_into_copies(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(ModelWeights(model))
    expected = deepcopy(model).merge_and_unload().state_dict()
    assert found.keys() == expected.keys() == micro_model().state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (found[name] - micro_model().state_dict()[name]).abs().max() > 1e-2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_adapters_that_cannot_be_merged_one_by_one_are_refused() -> None:
    for model, said in (
        (adapted(use_dora=True), "without DoRA"),
        (adapted(lora_bias=True), "without DoRA or bias"),
        (adapted(target_modules=["embed_tokens"]), "got Embedding at model.embed_tokens"),
        (adapted(micro_model(tie_word_embeddings=True)), "tied weight .*: .*lm_head"),
    ):
        with pytest.raises(ValueError, match=said):
            EngineSync(model, CopyEngine(micro_model()))
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="not merged, without DoRA"):
        dict(ModelWeights(merged))
    # the model itself needs no merging
    drawn = EngineSync(adapted(use_dora=True)).draw([[3, 4]], Sampling(2), 5)
    assert len(drawn.completions()) == 1
