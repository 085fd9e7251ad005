"""Files of prompts and conversations: what is read, how it is encoded, and in which order drawn."""

from __future__ import annotations

import json
import random
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from grpo_core.runs.demo.decimals import build_tokenizer
from grpo_core.trainer.data import (
    Epochs,
    fingerprint,
    problems_of,
    read_records,
)
from grpo_core.trainer.rollout import Problem

RECORDS = [
    {"prompt": "3.8 and 3.11", "answer": "3.8", "level": 1, "tag": ""},
    {"prompt": "9.9 and 9.11", "answer": "9.9", "level": 2, "tag": "trap"},
]
COLUMNS: dict[str, Any] = {
    "level": 1,
    "photo": b"\x00",
    "table": torch.tensor([1.0, 2.0]),
    "day": date(2026, 1, 1),
}
# a digit for each role, since the tokenizer knows few letters; the end token, then a blank
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 1, 'user': 2, 'assistant': 3}[m.role] }}={{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}3={% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path: Path, kind: str, records: list[dict[str, Any]] = RECORDS) -> Path:
    """The records in a file of that kind."""
    file = path / f"records.{kind}"
    if kind == "jsonl":
        file.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    elif kind == "json":
        file.write_text(json.dumps(records))
    else:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list(records)
        rows.to_parquet(str(file)) if kind == "parquet" else rows.save_to_disk(str(file))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same(kind: str, tmp_path: Path) -> None:
    read = read_records(write(tmp_path, kind))
    assert [{k: v for k, v in r.items() if v is not None} for r in read] == RECORDS


def test_without_datasets_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        read_records(tmp_path / "some.parquet")
    assert read_records(write(tmp_path, "jsonl")) == RECORDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": 1}\n{"prompt"', r"records\.jsonl:2: expected a record in JSON"),
        ("[1]", r"records\.jsonl:1: expected a record, got list"),
    ],
)
def test_a_line_that_is_no_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(file)


def test_problems_carry_their_columns(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = problems_of(RECORDS, tokenizer, template="{prompt}?")
    assert tokenizer.decode(list(problems[0].prompt)) == "3.8 and 3.11?"
    assert [p.answer for p in problems] == ["3.8", "9.9"]
    assert [p.tag for p in problems] == ["", "trap"]
    assert [p.columns for p in problems] == [{"level": 1}, {"level": 2}]


def test_messages_go_through_the_chat_template(chat: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "3.8 and 3.11"}]
    (problem,) = problems_of([{"prompt": messages}], chat)
    assert chat.decode(list(problem.prompt)) == "2=3.8 and 3.11 3="
    assert problem.source == messages
    (problem,) = problems_of([{"prompt": "3.8"}], chat, system="9.9")
    assert chat.decode(list(problem.prompt)) == "1=9.9 2=3.8 3="


ANSWERS = [
    (None, "got None"),
    ("", "got ''"),
    ("so\n#### ", "got 'so"),
    (["9.9", "9.90"], r"got \['9\.9', '9\.90'\]"),
    ({"value": 9}, r"got \{'value': 9\}"),
    (True, "got True"),
    (float("nan"), "got nan"),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
@pytest.mark.parametrize(("answer", "got"), ANSWERS)
def test_answers_that_nothing_compares_with_are_refused(
    kind: str, answer: Any, got: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """At load, of the third record; rewards that do not compare may have them."""
    good = "9.9" if isinstance(answer, str | None) else 9.5
    if isinstance(answer, list | dict | bool) and kind in ("parquet", "folder"):
        good = answer  # a column has one type
    records = [{"prompt": "3", "answer": each} for each in (good, good, answer)]
    read = read_records(write(tmp_path, kind, records))
    at = 0 if good is answer else 2
    with pytest.raises(ValueError, match=rf"^record {at}: answer: expected text or .*, {got}"):
        problems_of(read, tokenizer, compared=True)
    assert len(problems_of(read, tokenizer)) == 3


def test_a_missing_answer_shows_the_columns_there_are(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [RECORDS[0], {"prompt": "3", "solution": "3"}]
    got = r"got the columns \['prompt', 'solution'\]"
    with pytest.raises(ValueError, match=rf"^record 1: answer: expected text or a number, {got}"):
        problems_of(records, tokenizer, compared=True)
    # one that is too long to be asked is named as well
    with pytest.raises(ValueError, match=r"^record 1: answer"):
        problems_of([records[0], records[1] | {"prompt": "3" * 99}], tokenizer, compared=True)
    numbers = [{"prompt": "3", "answer": each} for each in (3, 3.5, "3", "is 3\n#### 3")]
    assert len(problems_of(numbers, tokenizer, compared=True)) == 4


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        ("{prompt}", "3.8", "3.8"),
        ("<think>{prompt}</think>", "3.8", "<think>3.8</think>"),
        (r"\boxed{} {0} {a.b} {{{prompt}}} {", "3.8", r"\boxed{} {0} {a.b} {{3.8}} {"),
        ("{prompt} {prompt}", "3.8", "3.8 3.8"),
        (
            r"{prompt} = \frac{a}{b}",
            r"{prompt} {1} \sqrt{2}",
            r"{prompt} {1} \sqrt{2} = \frac{a}{b}",
        ),
        ("%s {prompt} $x", "3.8", "%s 3.8 $x"),
    ],
)
def test_a_template_replaces_the_prompt_alone(template: str, prompt: str, expected: str) -> None:
    (problem,) = problems_of([{"prompt": prompt}], ByT5Tokenizer(), template=template)
    assert problem.source == expected
    assert ByT5Tokenizer().decode(list(problem.prompt), skip_special_tokens=True) == expected


@pytest.mark.parametrize(
    "template", ["", "Question:", "{}", "{0}", "{prompt!r}", "{ prompt }", "%s"]
)
def test_a_template_without_the_prompt_is_refused(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"^template: expected a text with \{prompt\} in it, got"):
        problems_of(RECORDS, tokenizer, template=template)


def test_templates_and_system_messages_have_their_prompts(chat: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "3.8"}]
    with pytest.raises(ValueError, match="record 1: expected a string for the template, got mess"):
        problems_of([{"prompt": "3"}, {"prompt": messages}], chat, template="{prompt}")
    system = {"role": "system", "content": "9.9"}
    with pytest.raises(ValueError, match="record 0: expected no system message beside the one giv"):
        problems_of([{"prompt": [system, *messages]}], chat, system="9.9")
    (problem,) = problems_of([{"prompt": [system, *messages]}], chat)
    assert chat.decode(list(problem.prompt)) == "1=9.9 2=3.8 3="
    (problem,) = problems_of([{"prompt": "3.8"}], chat, system="{prompt}")
    assert problem.source[0] == {"role": "system", "content": "{prompt}"}
    (problem,) = problems_of([{"prompt": "3.8"}], chat, system="9.9", template="3 {prompt}")
    assert chat.decode(list(problem.prompt)) == "1=9.9 2=3 3.8 3="


@pytest.mark.parametrize(
    "prompt",
    [None, "", [], 3, {}, {"role": "user"}, [3], ["3.8"], [{"role": "user"}], [{"content": "3"}]],
)
def test_prompts_that_are_none_are_named(prompt: Any, chat: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="record 1: expected a prompt, a string or messages, got"):
        problems_of([{"prompt": "3"}, {"prompt": prompt}], chat)


def test_a_prompt_without_tokens_is_named() -> None:
    silent: Any = lambda text: {"input_ids": [3] if text == "3" else []}  # noqa: E731
    with pytest.raises(ValueError, match="record 1: expected a prompt of one token or more"):
        problems_of([{"prompt": "3"}, {"prompt": " "}], silent)


def test_bad_records_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"record 1: expected a prompt, .* got None"):
        problems_of([RECORDS[0], {"answer": "x"}], tokenizer)
    with pytest.raises(ValueError, match="at least one prompt of at most 2 tokens, got none"):
        problems_of(RECORDS, tokenizer, longest_prompt=2)
    with pytest.raises(ValueError, match="has no chat template"):
        problems_of([{"prompt": [{"role": "user", "content": "3"}]}], tokenizer)


def test_epochs_draw_everything_once_and_remember_where_they_are() -> None:
    problems = [Problem((n,)) for n in range(5)]
    draw, rng = Epochs(problems, seed=1), random.Random(0)
    drawn = [p.prompt[0] for _ in range(5) for p in draw(3, rng)]
    epochs = [drawn[:5], drawn[5:10], drawn[10:]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = Epochs(problems, seed=1)
    again.position = 6
    assert [p.prompt[0] for p in again(9, rng)] == drawn[6:]
    assert rng.random() == random.Random(0).random()
    with pytest.raises(ValueError, match="problems: expected at least one"):
        Epochs([])


def test_the_fingerprint_tells_all_that_a_run_takes_from_its_data() -> None:
    """The same again for the same; another for any change, another order included."""

    def problems(**changes: Any) -> list[Problem]:
        given: dict[str, Any] = {"prompt": (3, 4), "answer": "7", "tag": "a", "columns": COLUMNS}
        return [Problem(**given | changes), Problem((5,), "8")]

    base = fingerprint(problems())
    assert base == fingerprint(problems()) == Epochs(problems()).fingerprint
    assert base.startswith("2 problems, sha256 ")
    others = [
        problems()[::-1],
        problems()[:1],
        problems() * 2,
        problems(prompt=(3, 5)),
        problems(answer="7.0"),
        problems(answer=7),
        problems(answer=Decimal("7.1")),
        problems(answer=Decimal("7.2")),
        problems(tag="b"),
        problems(columns={}),
        problems(columns=COLUMNS | {"level": 2}),
        problems(columns=COLUMNS | {"photo": b"\x01"}),
        problems(columns=COLUMNS | {"table": torch.tensor([1.0, 2.5])}),
        problems(columns=COLUMNS | {"day": date(2026, 1, 2)}),
    ]
    assert len({base, *map(fingerprint, others)}) == 1 + len(others)
    # a prompt's text is only shown, and an address in memory is no content
    assert fingerprint(problems(source="three, four")) == base
    alike = [fingerprint(problems(columns={"photo": object()})) for _ in range(2)]
    assert alike[0] == alike[1]
