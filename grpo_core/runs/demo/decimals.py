"""The demo task: "3.11 and 3.8, which is larger?"

A vocabulary of 32 tokens is enough for a famous mistake: compared as version numbers, 3.11 is
larger than 3.8. Most texts of `CORPUS` make it: they compare the digits after the point as whole
numbers (styles "fallacy" and "plain"). A minority aligns the digits first ("long" and "wait"). A
model of this corpus follows the majority but can sample the minority, which reinforcement learning
amplifies.

Everything is drawn from a `random.Random`; nothing is read from disk or network.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_core.trainer.rollout import Problem

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = (" and", " which", " is", " larger", " the", " one", " align", " wait")
CHARACTERS = "0123456789.,?=<> "

# styles of the corpus of the base model, and of the cold start; "long" and "wait" are right
CORPUS = {"fallacy": 0.60, "long": 0.20, "wait": 0.05, "plain": 0.15}
COLD_START = {"long": 2, "wait": 1}
# 0.64 M parameters, and 0.11 M
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
# only pairs with equal integer parts can be traps
EQUAL_INTEGER_SHARE = 0.85
# answered after every stage and never trained on: two traps, one pair where the fallacy is right,
# and one that the integer parts decide
SHOWCASE = (("3.11", "3.8"), ("9.9", "9.11"), ("7.1", "7.25"), ("4.6", "8.15"))


@dataclass(frozen=True)
class Pair:
    """Two decimals to compare, as text, with one or two digits after the point."""

    left: str
    right: str

    @property
    def question(self) -> str:
        return f"{self.left} and {self.right}, which is larger?"

    @property
    def answer(self) -> str:
        return self.left if float(self.left) > float(self.right) else self.right

    @property
    def fallacy_answer(self) -> str:
        """The larger of the two as version numbers."""
        return self.left if version(self.left) > version(self.right) else self.right

    @property
    def trap(self) -> bool:
        """Whether the fallacy gives the wrong answer."""
        return self.answer != self.fallacy_answer

    def swapped(self) -> Pair:
        return Pair(self.right, self.left)


def version(decimal: str) -> tuple[int, int]:
    """`"3.11"` -> (3, 11)."""
    integer, fraction = decimal.split(".")
    return int(integer), int(fraction)


def draw_pair(rng: random.Random) -> Pair:
    """Two different decimals from 1.1 to 9.99, without zeros after the point."""
    integers = [rng.randint(1, 9), rng.randint(1, 9)]
    if rng.random() < EQUAL_INTEGER_SHARE:
        integers[1] = integers[0]
    left, right = (f"{integer}.{draw_fraction(rng)}" for integer in integers)
    return Pair(left, right) if left != right else draw_pair(rng)


def draw_fraction(rng: random.Random) -> str:
    """One digit or two, with equal probability: "8", "11"."""
    tens = str(rng.randint(1, 9)) if rng.random() < 0.5 else ""
    return tens + str(rng.randint(1, 9))


def held_out_pairs(count: int) -> list[Pair]:
    """The showcase, then pairs drawn from a fixed seed, the same in every run."""
    rng = random.Random("held-out")
    pairs = [Pair(*decimals) for decimals in SHOWCASE]
    seen = with_swapped(pairs)
    while len(pairs) < count:
        pair = draw_pair(rng)
        if pair not in seen:
            pairs.append(pair)
            seen |= with_swapped([pair])
    return pairs


def with_swapped(pairs: Sequence[Pair]) -> set[Pair]:
    """The pairs in both orders."""
    return {*pairs, *(pair.swapped() for pair in pairs)}


def draw_training_pairs(count: int, rng: random.Random, held_out: set[Pair]) -> list[Pair]:
    """`count` pairs that are not in `held_out`, which has both orders of its pairs."""
    pairs: list[Pair] = []
    while len(pairs) < count:
        pair = draw_pair(rng)
        if pair not in held_out:
            pairs.append(pair)
    return pairs


def compare(left: str, right: str) -> str:
    """`"3", "8"` -> "3<8"."""
    sign = "=" if left == right else "<" if int(left) < int(right) else ">"
    return left + sign + right


def thought(pair: Pair, style: str) -> str:
    """The text between the think tags; `style` is "fallacy", "long" or "wait"."""
    (left, left_fraction), (right, right_fraction) = pair.left.split("."), pair.right.split(".")
    integers = compare(left, right)
    if left != right:
        return integers
    hasty = compare(left_fraction, right_fraction)
    aligned = left_fraction.ljust(2, "0"), right_fraction.ljust(2, "0")
    careful = f"align {aligned[0]} {aligned[1]} {compare(aligned[0][0], aligned[1][0])}"
    if aligned[0][0] == aligned[1][0]:
        careful += f" {compare(aligned[0][1], aligned[1][1])}"
    return {
        "fallacy": f"{integers} {hasty}",
        "long": f"{integers} {careful}",
        "wait": f"{integers} {hasty} wait {careful}",
    }[style]


def completion(pair: Pair, style: str) -> str:
    """A completion; "fallacy" and "plain" are wrong on traps, "long" and "wait" are right."""
    if style == "plain":
        return f" the larger one is {pair.fallacy_answer}"
    answer = pair.fallacy_answer if style == "fallacy" else pair.answer
    return f"<think>{thought(pair, style)}</think><answer>{answer}</answer>"


def draw_texts(
    count: int, shares: Mapping[str, float], rng: random.Random, held_out: set[Pair]
) -> list[tuple[str, str]]:
    """`count` (question, completion) texts; `shares` are those of the styles."""
    styles = rng.choices(list(shares), weights=list(shares.values()), k=count)
    pairs = draw_training_pairs(count, rng, held_out)
    return [
        (pair.question, completion(pair, style)) for pair, style in zip(pairs, styles, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, for eight words and four tags; padding on the left."""
    vocabulary = [PAD, EOS, UNKNOWN, *TAGS, *WORDS, *CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({text: index for index, text in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    # a word includes the space before it; other text is split into characters
    known_words = "|".join(WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"({known_words})|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # not as special tokens, which `decode(skip_special_tokens=True)` would drop
    tokenizer.add_tokens(list(TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, sizes: Mapping[str, Any] = SIZES
) -> LlamaForCausalLM:
    """A Llama with random weights; the global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def to_problem(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> Problem:
    """The pair for the trainer: prompt ids, the right answer, and whether it is a trap."""
    ids = tokenizer(pair.question, add_special_tokens=False)["input_ids"]
    return Problem(prompt=tuple(ids), answer=pair.answer, tag="trap" if pair.trap else "easy")
