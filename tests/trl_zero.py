"""DeepSpeed on two processes, on the CPU: `python -m tests.trl_zero`, where deepspeed is installed.

Stock TRL, `patch_log_probs` and `FusedGRPOTrainer`, ZeRO 2 and 3, heads of their own and tied, full
and LoRA: two losses each, in the second of which one rank has no token; then all gradients,
gathered. Under ZeRO 3 no rank holds the head outside of TRL's context.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

CLOSE = 2e-5


def on_rank(rank: int, port: int, homes: Path, stage: int, lora: bool) -> None:
    """One of two processes: compares the three ways."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": "2",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    from trl import GRPOTrainer

    import tests.trl_training as tiny
    from grpo_core.integrations.trl import FusedGRPOTrainer, patch_log_probs

    # only one rank may write a model once there are several
    tiny.home = lambda name="qwen2": homes / name
    for model in ("qwen2", "tied"):
        found = [
            both_losses(kind, patch, rank, homes, stage, lora, model)
            for kind, patch in (
                (GRPOTrainer, contextlib.nullcontext),
                (GRPOTrainer, patch_log_probs),
                (FusedGRPOTrainer, contextlib.nullcontext),
            )
        ]
        for name, ours in zip(("safe", "fast"), found[1:], strict=True):
            gap = max(apart(mine, theirs) for mine, theirs in zip(ours, found[0], strict=True))
            if rank == 0:
                what = f"ZeRO {stage}, {'LoRA' if lora else 'full'}, {model}, {name}"
                print(f"{what}: losses and gradients apart by {gap:.1e} of the largest", flush=True)
            assert gap <= CLOSE


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest of all gradients."""
    largest = max(float(g.abs().max()) for n, g in theirs.items())
    assert largest > 1e-4
    return max(float((ours[n] - g).abs().max()) for n, g in theirs.items()) / largest


def both_losses(
    kind: Any, patch: Any, rank: int, output: Path, stage: int, lora: bool, model: str
) -> list[dict[str, torch.Tensor]]:
    """The loss and all gathered gradients, by name, of two batches."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from tests.trl_training import Batch, make_trainer, micro_batch

    adapter = None
    if lora:
        from peft import LoraConfig

        torch.manual_seed(5)
        adapter = LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
    unset_hf_deepspeed_config()
    options: dict[str, Any] = {"beta": 0.04, "entropy_coef": 0.01}
    trainer = make_trainer(kind, output, model=model, peft=adapter, **options)
    empty = Batch(lengths=(0, 0, 0, 0) if rank else (5, 3, 1, 5), seed=rank)
    batches = [micro_batch(trainer, b) for b in (Batch(seed=rank, tools=True), empty)]
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 8,
    }
    # TRL asks it, as long as it lives, whether to gather
    kept = HfDeepSpeedConfig(config)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=trainer.model, config=config, optimizer=torch.optim.SGD(trained, lr=1e-3)
    )
    assert (stage == 3) == all(p.numel() == 0 for p in trainer.model.parameters())
    found = []
    for batch in batches:
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        with patch():
            loss = trainer._compute_loss(engine, dict(batch))
        engine.backward(loss)
        found.append(
            {"loss": loss.detach()}
            | {
                name: deepspeed.utils.safe_get_full_grad(p)
                for name, p in trainer.model.named_parameters()
                if p.requires_grad
            }
        )
        engine.step()
    del kept
    return found


def main() -> None:
    """Both stages, full and LoRA."""
    from tests.trl_training import save_model

    homes = Path(tempfile.mkdtemp())
    for name in ("qwen2", "tied"):
        (homes / name).mkdir()
        save_model(homes / name, name)
    context = multiprocessing.get_context("spawn")
    for stage, lora in itertools.product((2, 3), (False, True)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = [(rank, port, homes, stage, lora) for rank in (0, 1)]
        ranks = [context.Process(target=on_rank, args=arguments) for arguments in given]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        assert [process.exitcode for process in ranks] == [0, 0]


if __name__ == "__main__":
    main()
