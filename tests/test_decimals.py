"""The demo task against exact decimal arithmetic and sentences written out by hand."""

from __future__ import annotations

import random
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_core.runs.demo import decimals
from grpo_core.runs.demo.decimals import Pair
from grpo_core.trainer.rules import accuracy, strict_format

TRAP = Pair("3.11", "3.8")


def pairs(count: int) -> list[Pair]:
    rng = random.Random(0)
    return [decimals.draw_pair(rng) for _ in range(count)]


def test_answers_and_traps() -> None:
    for pair in pairs(3000):
        left, right = Decimal(pair.left), Decimal(pair.right)
        assert Decimal(pair.answer) == max(left, right)
        # The fallacy compares the digits after the point as whole numbers.
        fractions = [int(pair.left.split(".")[1]), int(pair.right.split(".")[1])]
        same_integer = int(left) == int(right)
        assert pair.trap == (same_integer and (fractions[0] > fractions[1]) != (left > right))
    assert TRAP.question == "3.11 and 3.8, which is larger?"
    assert (TRAP.answer, TRAP.fallacy_answer, TRAP.trap) == ("3.8", "3.11", True)


def test_thoughts_as_written_out_by_hand() -> None:
    assert decimals.completion(TRAP, "fallacy") == "<think>3=3 11>8</think><answer>3.11</answer>"
    assert decimals.completion(TRAP, "plain") == " the larger one is 3.11"
    assert (
        decimals.completion(TRAP, "long")
        == "<think>3=3 align 11 80 1<8</think><answer>3.8</answer>"
    )
    assert (
        decimals.completion(TRAP, "wait")
        == "<think>3=3 11>8 wait align 11 80 1<8</think><answer>3.8</answer>"
    )
    same_tenths = Pair("7.1", "7.15")
    assert decimals.thought(same_tenths, "long") == "7=7 align 10 15 1=1 0<5"
    for style in ("fallacy", "long", "wait"):
        assert decimals.thought(Pair("4.6", "8.15"), style) == "4<8"


def test_long_chains_are_always_right_and_the_fallacy_fails_on_traps_alone() -> None:
    for pair in pairs(1000):
        for style in ("fallacy", "long", "wait"):
            text = decimals.completion(pair, style)
            assert strict_format(text, pair.answer) == 1
            assert accuracy(text, pair.answer) == (not (style == "fallacy" and pair.trap))
        assert accuracy(decimals.completion(pair, "plain"), pair.answer) == 0


def test_held_out_pairs_are_never_drawn_in_either_order() -> None:
    held_out = decimals.held_out_pairs(512)
    unordered = {frozenset((pair.left, pair.right)) for pair in held_out}
    assert len(unordered) == 512
    assert [(pair.left, pair.right) for pair in held_out[:4]] == list(decimals.SHOWCASE)

    drawn = decimals.draw_training_pairs(20_000, random.Random(1), decimals.with_swapped(held_out))
    assert not unordered & {frozenset((pair.left, pair.right)) for pair in drawn}
    # Without the exclusion hundreds of them would have come up.
    assert sum(frozenset((p.left, p.right)) in unordered for p in pairs(20_000)) > 100


def test_the_right_method_is_a_minority_of_the_corpus() -> None:
    texts = decimals.draw_texts(20_000, decimals.CORPUS, random.Random(2), set())
    styles = Counter(
        "plain" if "<think>" not in text else "right" if "align" in text else "fallacy or no need"
        for question, text in texts
    )
    # 25 % of the writers align, and 87 % of the pairs need it; the tolerance is four deviations.
    assert styles["right"] / 20_000 == pytest.approx(0.25 * (0.85 + 0.15 / 9), abs=0.012)
    assert styles["plain"] / 20_000 == pytest.approx(0.15, abs=0.01)


def test_tokenizer_round_trip_and_tags_that_survive_decoding() -> None:
    tokenizer = decimals.build_tokenizer()
    for pair in pairs(200):
        for style in decimals.CORPUS:
            text = pair.question + decimals.completion(pair, style)
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    ids = tokenizer("<think>3=3 align 11 80</think>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["<think>", "3", "=", "3", " align", " ", "1", "1", " ", "8", "0", "</think>"]
    )


def test_saved_and_loaded_again_everything_is_the_same(tmp_path: Path) -> None:
    tokenizer = decimals.build_tokenizer()
    state = torch.get_rng_state()
    model = decimals.build_model(tokenizer, seed=0).eval()
    assert torch.equal(torch.get_rng_state(), state)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)

    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    text = TRAP.question + decimals.completion(TRAP, "wait")
    ids = tokenizer(text)["input_ids"]
    assert loaded_tokenizer(text)["input_ids"] == ids
    assert loaded_tokenizer.padding_side == "left"
    with torch.no_grad():
        batch = torch.tensor([ids])
        assert torch.equal(model(batch).logits, loaded(batch).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
