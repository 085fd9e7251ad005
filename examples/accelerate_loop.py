"""The loop on several ranks by accelerate, with the loss inside the wrapped module.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --cpu

The second line is for a machine without GPUs: `--multi_gpu` means several ranks, while
`accelerate launch --cpu --num_processes 2` starts only one (accelerate 1.15 needs mpirun for more).
The loss is computed in the forward of the module that DDP wraps, so that its hooks run. DDP
averages gradients over ranks, so the divisor is the global number of tokens divided by the number
of ranks. The script checks that the ranks together have the same losses and parameters as one
process that trains on the whole batch.
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
    """A model whose forward returns the loss, to be wrapped by DDP."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, rewards: Tensor, normalizer: Tensor) -> Tensor:
        """DAPO: the sum over this rank's tokens divided by `normalizer`."""
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
    """One step; returns the loss of this rank."""
    loss = module(*batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def main() -> None:
    """Trains on all ranks together, and on each rank alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
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
        # equal on all ranks; each rank trains on its part of the prompts
        digits = torch.randperm(10)[:PROMPTS].tolist()
        prompts = [f"{d}:" for d in digits for _ in range(G)]
        ids, mask, rewards = rollout(alone.model, tokenizer, prompts)
        own = torch.arange(PROMPTS * G, device=device).view(-1, G)[rank::ranks].flatten()
        # tokens of all ranks; DDP averages gradients
        tokens = accelerator.reduce(mask[own].sum(), "sum")
        loss = update(shared, optimizer, ids[own], mask[own], rewards[own], tokens / ranks)
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
