"""A model that learns to use a calculator: python examples/calculator.py

The task is "37.4+28.9?". Most texts that a model has learnt from guess ("=64.1"); a quarter of them
calls a calculator ("[37.4+28.9]") and copies its answer ("=66.3"). The calculator is an
environment: it reads a turn, answers a call, and rewards the right sum. GRPO makes the calls the
rule. On one CPU core this takes a minute. Read `main` first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from decimal import Decimal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_core import RECIPES
from grpo_core.runs.demo.decimals import SMALL, build_model
from grpo_core.trainer.baselines.supervised import Example, SupervisedConfig, train_supervised
from grpo_core.trainer.environment import Episodes
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.rewards import no_reward
from grpo_core.trainer.rollout import Problem, Sampling
from grpo_core.trainer.trainer import Trainer, TrainerConfig

TOKENS = ["<pad>", "<eos>", *"0123456789.+?[]="]
PAD, EOS = TOKENS[:2]
CALLING = 0.25  # share of the texts that use the calculator
# a call, its answer and the sum, with two end tokens, are 22 tokens
SAMPLING = Sampling(max_new_tokens=28)


class Calculator:
    """Answers "[37.4+28.9]"; anything else ends the episode, with reward 1 for "=" and the sum."""

    def reset(self, problem: Problem) -> None:
        self.answer = problem.answer

    def step(self, turn: str) -> tuple[str, float, bool]:
        if call := re.fullmatch(r"\[(\d+\.\d)\+(\d+\.\d)\]", turn):
            return str(Decimal(call[1]) + Decimal(call[2])), 0.0, False
        return "", float(turn == f"={self.answer}"), True


def main(base_steps: int = 600, steps: int = 20) -> None:
    """Pretrains, measures, reinforces, measures again."""
    tokenizer = build_tokenizer()
    episodes = Episodes(Calculator, tokenizer, max_turns=3)
    model = pretrain(tokenizer, base_steps)
    held_out = draw_problems(tokenizer, 256, random.Random("held out"))
    report("before", model, tokenizer, episodes, held_out)
    config = TrainerConfig(
        objective=RECIPES["dapo"],
        steps=steps,
        prompts_per_step=16,
        group_size=8,
        learning_rate=3e-4,
        sampling=SAMPLING,
    )
    trainer = Trainer(
        model,
        lambda count, rng: draw_problems(tokenizer, count, rng),
        no_reward,  # all rewards come from the environment
        config,
        environment=episodes,
    )
    trainer.train()
    report("after", model, tokenizer, episodes, held_out)


def report(
    when: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    episodes: Episodes,
    held_out: Sequence[Problem],
) -> None:
    """Prints how often the calculator is called, how often the sum is right, and a completion."""
    found = evaluate(model, held_out, no_reward, SAMPLING, environment=episodes)
    calls, right = found.metrics["turns"] - 1, found.metrics["reward"]
    text = tokenizer.decode(found.completions[0], skip_special_tokens=True)
    print(f"{when}: calls {calls:.2f} a question, right {right:.2f}; {held_out[0].source} {text}")


def draw_problems(
    tokenizer: PreTrainedTokenizerFast, count: int, rng: random.Random
) -> list[Problem]:
    """Sums such as "37.4+28.9?", each below 100."""
    pairs = [[f"{rng.randint(10, 49)}.{rng.randint(0, 9)}" for _ in "ab"] for _ in range(count)]
    return [
        Problem(
            prompt=tuple(tokenizer(f"{a}+{b}?")["input_ids"]),
            answer=str(Decimal(a) + Decimal(b)),
            source=f"{a}+{b}?",
        )
        for a, b in pairs
    ]


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A model of 0.1 M parameters that has learnt to guess, and sometimes to call."""
    rng, examples = random.Random(0), []
    for problem in draw_problems(tokenizer, 32 * steps, rng):
        a, b = problem.source[:-1].split("+")
        call, guess = (
            f"[{a}+{b}]",
            f"={Decimal(problem.answer) + Decimal(rng.randint(-50, 50)) / 10}",
        )
        texts = [("", guess)]
        if rng.random() < CALLING:
            texts = [("", call), (f"{call}{EOS}{problem.answer}", f"={problem.answer}")]
        for given, written in texts:
            prompt = tokenizer(problem.source + given)["input_ids"]
            examples.append(Example(prompt, tokenizer(written + EOS)["input_ids"]))
    model = build_model(tokenizer, seed=0, sizes=SMALL)
    config = SupervisedConfig(
        steps=steps, batch_size=32, learning_rate=4e-3, warmup_steps=20, prompt_loss=False
    )
    train_supervised(model, examples, config, seed=0, label="base")
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocabulary = {token: place for place, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
