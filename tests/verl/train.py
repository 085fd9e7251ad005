"""Short trainings in verl's own FSDP2 engine, with its own loss around the policy term.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.verl.train DIRECTORY

DIRECTORY/runs.json lists the trainings, by their options; DIRECTORY/results.json is what came out:
for each, the metrics of every step and all parameters at the end. Only rank 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"
# as a user's workers load it; with the platform of this machine
os.environ["VERL_USE_EXTERNAL_MODULES"] = "tests.verl.cpu_platform,grpo_core.integrations.verl"

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
)
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from grpo_core.integrations.verl import patch_log_probs
from grpo_core.runs.demo.decimals import build_tokenizer

B, PROMPT, RESPONSE, V = 8, 3, 6, 61
PRECISIONS = {
    "float32": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    "bfloat16": {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
}


def save_model(path: Path, *, tied: bool) -> None:
    """A Llama and a tokenizer, where verl loads them from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)


def build_engine(path: Path, run: dict[str, Any]) -> FSDPEngineWithLMHead:
    """verl's engine, with or without a fused head."""
    fused = run["head"] != "logits"
    shared = {"use_remove_padding": run["packed"], "use_fused_kernels": fused}
    engine = FSDPEngineWithLMHead(
        model_config=HFModelConfig(
            path=str(path),
            fused_kernel_options={"impl_backend": run["head"]},
            override_config={"attn_implementation": "eager"},
            enable_gradient_checkpointing=run["checkpointing"],
            lora_rank=run["lora_rank"],
            **shared,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            mixed_precision=PRECISIONS[run["dtype"]],
            dtype=run["dtype"],
            use_torch_compile=False,
            **shared,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def batch(step: int, run: dict[str, Any]) -> TensorDict:
    """This rank's share of the same B sequences, for any number of ranks; lengths differ."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(1, V, (B, PROMPT + RESPONSE), generator=draw)
    present = torch.ones_like(ids)
    present[1, -2:] = 0
    present[2, 0] = 0
    present[5, -4:] = 0
    mask = present[:, PROMPT:].clone()

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(B, RESPONSE, generator=draw)

    fields = {
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "input_ids": ids,
        "attention_mask": present,
        "response_mask": mask,
        "position_ids": (present.cumsum(-1) - 1).clamp(min=0),
        "old_log_probs": -4.1 + noise(0.1),
        "ref_log_prob": -4.0 + noise(0.1),
        "advantages": noise(1.0),
    }
    if run["weights"]:
        fields["rollout_is_weights"] = noise(0.5).exp()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = {name: value[rank::ranks].contiguous() for name, value in fields.items()}
    data = left_right_2_no_padding(TensorDict(mine, batch_size=B // ranks))
    tu.assign_non_tensor_data(data, "use_remove_padding", run["packed"])
    tu.assign_non_tensor_data(data, "use_fused_kernels", run["head"] != "logits")
    tu.assign_non_tensor_data(data, "calculate_entropy", True)
    tu.assign_non_tensor_data(data, "temperature", 0.9)
    tu.assign_non_tensor_data(data, "micro_batch_size_per_gpu", 2)
    tu.assign_non_tensor_data(data, "global_batch_size", B)
    tu.assign_non_tensor_data(data, "use_dynamic_bsz", False)
    return data


def number(value: Any) -> float:
    """A metric as verl's trainer reduces it over micro-batches."""
    if hasattr(value, "aggregate"):
        return float(value.aggregate())
    return float(value) if isinstance(value, (int, float)) else float(sum(value) / len(value))


def train(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Metrics of three updates, and the parameters after them."""
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        entropy_coeff=0.05,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        policy_loss=PolicyLossConfig(loss_mode=run["loss_mode"], dro_beta=0.1),
        **run["actor"],
    )
    # of an adapter's first weights
    torch.manual_seed(0)
    engine = build_engine(path, run)
    metrics = []
    with engine.train_mode():
        for step in range(3):
            found = engine.train_batch(batch(step, run), partial(ppo_loss, config))["metrics"]
            metrics.append({name: number(value) for name, value in found.items()})
    parameters = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).flatten().tolist()
        for name, p in engine.module.named_parameters()
    }
    return {"metrics": metrics, "parameters": parameters}


def main() -> None:
    """All trainings that are asked for, one after the other."""
    directory = Path(sys.argv[1])
    runs = json.loads((directory / "runs.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results, forward = [], LlamaForCausalLM.forward
    for run in runs:
        # verl replaces that of the class, for good
        LlamaForCausalLM.forward = forward
        path = directory / f"tied {run['tied']}"
        if dist.get_rank() == 0 and not path.exists():
            save_model(path, tied=run["tied"])
        dist.barrier()
        if run["ours"]:
            with patch_log_probs():
                results.append(train(path, run))
        else:
            results.append(train(path, run))
    if dist.get_rank() == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
