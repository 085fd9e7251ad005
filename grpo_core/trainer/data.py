"""Training data from files: prompts for reinforcement learning, conversations for SFT.

A record is a dict. `prompt` is a string or a list of chat messages, `answer` what a right
completion says, and every further column goes to the reward functions under its own name. For
supervised training it has `prompt` and `completion`, or `messages` of which the last is learnt. The
names are those of TRL, so its data sets can be read as they are.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from grpo_core.trainer.baselines.supervised import Example
from grpo_core.trainer.extras import extra
from grpo_core.trainer.rewards import answer_text
from grpo_core.trainer.rollout import Problem

Record = Mapping[str, Any]
Messages = Sequence[Mapping[str, str]]


def read_records(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """All records of a file, or of a data set of the `datasets` library.

    Args:
        source: a file of JSON lines (.jsonl), a JSON list (.json), or what only `datasets` reads: a
            .parquet file, a folder written by `save_to_disk`, or a data set's name.
        split: of a data set with several.

    Raises:
        FileNotFoundError, ValueError: there is no such file; a line is no record.
        ModuleNotFoundError: `datasets` is needed and not there.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        return [_record(line, f"{path}:{n}") for n, line in _lines(path)]
    if path.suffix == ".json":
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, list):
            raise ValueError(f"{path}: expected a list of records, got {type(found).__name__}")
        return [_checked(record, f"{path}[{n}]") for n, record in enumerate(found)]
    why = f"{source}: only .jsonl and .json are read without it"
    datasets = extra("datasets", why, "datasets")
    if path.suffix == ".parquet":
        read = datasets.load_dataset("parquet", data_files=str(path), split="train")
    elif path.is_dir():
        read = datasets.load_from_disk(str(path))
        read = read[split] if isinstance(read, datasets.DatasetDict) else read
    else:
        read = datasets.load_dataset(str(source), split=split)
    return [dict(record) for record in read]


def problems_of(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    template: str | None = None,
    longest_prompt: int | None = None,
    compared: bool = False,
) -> list[Problem]:
    """Records as problems.

    Args:
        records: with a `prompt`, a string or chat messages; an `answer` and a `tag` if they like.
        tokenizer: encodes strings as they are, and messages by its chat template with the opening
            of the assistant's turn.
        system: a system message to put before messages, or before a prompt made into one.
        template: what a string stands in, such as "Question: {prompt}\\nAnswer:"; other braces
            are left as they are.
        longest_prompt: in tokens; longer ones are left out.
        compared: completions are compared with the answers, so each has to be text or a number.

    Raises:
        ValueError: a template without {prompt}, a record without a usable prompt or answer,
            messages without a chat template or beside a template, or nothing is left.
    """
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"template: expected a text with {{prompt}} in it, got {template!r:.60}")
    problems = []
    for n, record in enumerate(records):
        prompt = record.get("prompt")
        if not is_prompt(prompt):
            raise ValueError(
                f"record {n}: expected a prompt, a string or messages, got {prompt!r:.60}"
            )
        if compared:
            check_answer(record, n)
        source: str | Messages = prompt
        if template is not None:
            if not isinstance(prompt, str):
                raise ValueError(f"record {n}: expected a string for the template, got messages")
            source = prompt = template.replace("{prompt}", prompt)
        if system is not None:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if asked[0]["role"] == "system":
                raise ValueError(f"record {n}: expected no system message beside the one given")
            source = prompt = [{"role": "system", "content": system}, *asked]
        ids = encode_prompt(prompt, tokenizer)
        if not ids:
            raise ValueError(f"record {n}: expected a prompt of one token or more, got none")
        if longest_prompt is None or len(ids) <= longest_prompt:
            named = ("prompt", "answer", "tag")
            problems.append(
                Problem(
                    prompt=tuple(ids),
                    answer=record.get("answer"),
                    tag=str(record.get("tag") or ""),
                    columns={k: v for k, v in record.items() if k not in named},
                    source=source,
                )
            )
    if not problems:
        limit = "" if longest_prompt is None else f" of at most {longest_prompt} tokens"
        raise ValueError(f"records: expected at least one prompt{limit}, got none")
    return problems


def is_prompt(prompt: Any) -> TypeGuard[str | Messages]:
    """Whether it is a string or a list of messages, and not empty."""
    if isinstance(prompt, list):
        known = (isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in prompt)
        return bool(prompt) and all(known)
    return isinstance(prompt, str) and bool(prompt)


def check_answer(record: Record, n: int) -> None:
    """Raises ValueError unless the answer of the nth record is text or a number."""
    if "answer" not in record:
        got = f"got the columns {sorted(record)}"
        raise ValueError(f"record {n}: answer: expected text or a number, {got}")
    try:
        answer_text(record["answer"])
    except ValueError as error:
        raise ValueError(f"record {n}: {error}") from error


def examples_of(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Records as supervised examples; what is learnt ends with the end token.

    Args:
        records: with `prompt` and `completion`, each a string or messages, or with `messages`, of
            which the last, the assistant's, is learnt.
        tokenizer: as in `problems_of`.

    Raises:
        ValueError: a record has neither, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer.eos_token_id: expected a token id, got None")
    examples = []
    for n, record in enumerate(records):
        if "messages" in record:
            *asked, answer = record["messages"]
            prompt, completion = asked, [answer]
        elif "prompt" in record and "completion" in record:
            prompt, completion = record["prompt"], record["completion"]
        else:
            raise ValueError(
                f"record {n}: expected prompt and completion, or messages, got {sorted(record)}"
            )
        ids = encode_prompt(prompt, tokenizer)
        if isinstance(completion, str):
            learnt = tokenizer(completion, add_special_tokens=False)["input_ids"]
        else:
            whole = _templated([*prompt, *completion], tokenizer, opens_turn=False)
            if whole[: len(ids)] != ids:
                raise ValueError(
                    f"record {n}: expected the chat template to leave the prompt alone when the "
                    "answer follows it; this one rewrites it"
                )
            learnt = whole[len(ids) :]
        # a template may have written it, and a line break after it
        if tokenizer.eos_token_id not in learnt[-2:]:
            learnt = [*learnt, tokenizer.eos_token_id]
        examples.append(Example(ids, learnt))
    return examples


def encode_prompt(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a string, or of messages up to the opening of the assistant's turn."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return _templated(prompt, tokenizer, opens_turn=True)


def fingerprint(problems: Sequence[Problem]) -> str:
    """How many problems, and a hash of all that a run takes from them, in their order.

    Values that JSON has no form for count by their content where that is plain (arrays, dates,
    bytes, numbers), and else by their type alone.
    """
    digest = hashlib.sha256()
    for problem in problems:
        parts = [problem.prompt, problem.answer, problem.tag, dict(problem.columns)]
        digest.update(json.dumps(parts, default=_plain, skipkeys=True).encode() + b"\n")
    return f"{len(problems)} problems, sha256 {digest.hexdigest()[:16]}"


class Epochs:
    """Draws problems without repetition, in a new order every epoch.

    Attributes:
        position: how many have been drawn; with the seed, all there is to its state.
        fingerprint: of the problems, see `fingerprint`; a run that goes on has to have the same.
    """

    def __init__(self, problems: Sequence[Problem], seed: int = 0) -> None:
        if not problems:
            raise ValueError("problems: expected at least one, got none")
        self.problems, self.seed, self.position = list(problems), seed, 0
        self._order: tuple[int, list[int]] = (-1, [])
        self.fingerprint = fingerprint(problems)

    def __call__(self, count: int, rng: random.Random) -> list[Problem]:
        """The next `count`; of `rng` nothing is needed."""
        drawn = range(self.position, self.position + count)
        self.position += count
        return [self._at(place) for place in drawn]

    def _at(self, place: int) -> Problem:
        epoch, index = divmod(place, len(self.problems))
        if self._order[0] != epoch:
            shuffled = list(range(len(self.problems)))
            random.Random(f"{self.seed}/{epoch}").shuffle(shuffled)
            self._order = epoch, shuffled
        return self.problems[self._order[1][index]]


def _plain(value: Any) -> Any:
    """A form in JSON of what has none, without the addresses that a repr may hold."""
    if isinstance(value, bytes):
        return value.hex()
    for name in ("tolist", "isoformat"):
        if hasattr(value, name):
            return getattr(value, name)()
    return str(value) if isinstance(value, Number) else type(value).__name__


def _templated(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, opens_turn: bool
) -> list[int]:
    """Messages by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "prompt: expected a string, got chat messages, and the tokenizer has no chat template"
        )
    ids: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=opens_turn,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    """(number, text) of every line that is not blank."""
    with path.open(encoding="utf-8") as file:
        yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())


def _record(line: str, where: str) -> dict[str, Any]:
    """A line of JSON as a record."""
    try:
        return _checked(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a record in JSON, got {line!r:.60}") from error


def _checked(record: Any, where: str) -> dict[str, Any]:
    """Raises ValueError unless it is a dict."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a record, got {type(record).__name__}")
    return record
