"""The loop on several processes, by accelerate, with the loss inside the wrapped module.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --cpu

The second line is for a machine without GPUs: `--multi_gpu` means several processes, while
`accelerate launch --cpu --num_processes 2` starts only one (accelerate 1.15 wants mpirun for more).
The forward of what DDP wraps ends in the loss, so its hooks fire; what it averages over processes
is put right by the global count. Checks that all processes together have the same losses and
parameters as one alone that trains on the whole batch.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from toy_task import build_model, build_tokenizer, rollout
from transformers import LlamaForCausalLM

from grpo_core import fused_linear_loss

G, PROMPTS, STEPS = 4, 8, 6
OPTIMIZER = {"lr": 6e-3, "eps": 1e-3}


class WithLoss(nn.Module):
    """A model whose forward ends in the loss, to be wrapped as a whole."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, rewards: Tensor, normalizer: Tensor) -> Tensor:
        """DAPO: the sum over this process's tokens, divided by `normalizer`."""
        out = fused_linear_loss(
            self.model.model(ids).last_hidden_state[:, :-1],
            self.model.lm_head.weight,
            ids[:, 1:],
            objective="dapo",
            rewards=rewards,
            group_size=G,
            mask=mask,
            normalizer=normalizer,
        )
        return out.loss


def update(module: nn.Module, optimizer: torch.optim.Optimizer, *batch: Tensor) -> Tensor:
    """One step; the loss of this process's share."""
    loss = module(*batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def main() -> None:
    """Trains on all processes, and once more on each alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    accelerator = Accelerator(cpu=parser.parse_args().cpu)
    ranks, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    tokenizer = build_tokenizer()
    shared, alone = WithLoss(build_model()), WithLoss(build_model()).to(device)
    shared, optimizer = accelerator.prepare(
        shared, torch.optim.AdamW(shared.parameters(), **OPTIMIZER)
    )
    optimizer_alone = torch.optim.AdamW(alone.parameters(), **OPTIMIZER)
    torch.manual_seed(0)
    for step in range(STEPS):
        # the same rollout everywhere, of which each process trains on the prompts that are its own
        digits = torch.randperm(10)[:PROMPTS].tolist()
        prompts = [f"{d}:" for d in digits for _ in range(G)]
        ids, mask, rewards = rollout(alone.model, tokenizer, prompts)
        mine = torch.arange(PROMPTS * G, device=device).view(-1, G)[rank::ranks].flatten()
        # all processes' tokens; DDP averages gradients, so each divides by its share of them
        tokens = accelerator.reduce(mask[mine].sum(), "sum")
        loss = update(shared, optimizer, ids[mine], mask[mine], rewards[mine], tokens / ranks)
        loss = accelerator.reduce(loss, "mean")
        loss_alone = update(alone, optimizer_alone, ids, mask, rewards, mask.sum())
        assert torch.isclose(loss, loss_alone, atol=1e-5), (loss, loss_alone)
        if accelerator.is_main_process:
            print(f"step {step + 1}  reward {rewards.mean():.2f}  loss {loss:+.4f}")
    pairs = zip(accelerator.unwrap_model(shared).parameters(), alone.parameters(), strict=True)
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert apart < 1e-4, f"the two are not the same training: {apart}"
    if accelerator.is_main_process:
        print(f"{ranks} processes ({accelerator.distributed_type.value}) and one alone: ", end="")
        print(f"parameters differ by at most {apart:.1e}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
