"""Problems from files, and the order in which a run draws them.

A record is a dict. `prompt` is a string or a list of chat messages, `answer` the correct answer,
and further columns go to the reward functions under their names, as in TRL.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_core.cli.options import check_package
from grpo_core.trainer.rollout import Problem
from grpo_core.trainer.rules import answer_text

Record = Mapping[str, Any]
Messages = Sequence[Mapping[str, str]]


def read_records(source: str | Path) -> list[dict[str, Any]]:
    """Reads all records of a file, or of a data set of the `datasets` library.

    Args:
        source: JSON lines (.jsonl) or a JSON list (.json); with `datasets` also a .parquet file, a
            folder written by `save_to_disk`, or the name of a data set. Of a data set with several
            splits, "train" is read.

    Raises:
        FileNotFoundError, ValueError: there is no such file; a line is not a record.
        ModuleNotFoundError: `datasets` is needed and not installed.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        return list(_read_json(path))
    check_package(str(source), "datasets")
    import datasets

    if path.suffix == ".parquet":
        data: Any = datasets.load_dataset("parquet", data_files=str(path), split="train")
    elif path.is_dir():
        data = datasets.load_from_disk(str(path))
        data = data["train"] if isinstance(data, datasets.DatasetDict) else data
    else:
        data = datasets.load_dataset(str(source), split="train")
    return [dict(record) for record in data]


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON list, or one from every line that is not blank."""
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".json":
            content = json.load(file)
            if not isinstance(content, list):
                got = type(content).__name__
                raise ValueError(f"{path}: expected a list of records, got {got}")
            records = {f"{path}[{n}]": record for n, record in enumerate(content)}
        else:
            lines = ((f"{path}:{n}", line) for n, line in enumerate(file, 1))
            records = {where: _parse(line, where) for where, line in lines if line.strip()}
    for where, record in records.items():
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a record, got {type(record).__name__}")
        yield record


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a record in JSON, got {line!r:.60}") from error


def problems_of(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    template: str | None = None,
    longest_prompt: int | None = None,
    compared: bool = False,
) -> list[Problem]:
    """Converts records to problems.

    Args:
        records: with a `prompt`, a string or chat messages; optionally `answer` and `tag`.
        tokenizer: encodes strings directly, and messages by its chat template up to the opening of
            the assistant's turn.
        system: a system message to prepend; strings then become user messages.
        template: for string prompts, such as "Question: {prompt}\\nAnswer:"; other braces stay.
        longest_prompt: in tokens; longer prompts are dropped.
        compared: whether rewards need every answer to be text or a number.

    Raises:
        ValueError: a template without {prompt}, a record without a usable prompt or answer,
            messages without a chat template or beside a template, or no prompt is left.
    """
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"template: expected a text with {{prompt}} in it, got {template!r:.60}")
    problems = []
    for n, record in enumerate(records):
        try:
            if compared:
                _check_answer(record)
            source = _full_prompt(record.get("prompt"), system, template)
        except ValueError as error:
            raise ValueError(f"record {n}: {error}") from error
        ids = _encode(source, tokenizer)
        if not ids:
            raise ValueError(f"record {n}: expected a prompt of one token or more, got none")
        if longest_prompt is None or len(ids) <= longest_prompt:
            columns = {k: v for k, v in record.items() if k not in ("prompt", "answer", "tag")}
            tag = str(record.get("tag") or "")
            problems.append(Problem(tuple(ids), record.get("answer"), tag, columns, source))
    if not problems:
        limit = "" if longest_prompt is None else f" of at most {longest_prompt} tokens"
        raise ValueError(f"records: expected at least one prompt{limit}, got none")
    return problems


def _check_answer(record: Record) -> None:
    """Raises ValueError unless the record's answer is text or a number."""
    if "answer" not in record:
        got = f"got the columns {sorted(record)}"
        raise ValueError(f"answer: expected text or a number, {got}")
    answer_text(record["answer"])


def _full_prompt(prompt: Any, system: str | None, template: str | None) -> str | Messages:
    """A prompt in the template, or as messages with the system message."""
    is_text = isinstance(prompt, str)
    is_messages = isinstance(prompt, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not (is_text or is_messages) or not prompt:
        raise ValueError(f"expected a prompt, a string or messages, got {prompt!r:.60}")
    if template is not None:
        if not is_text:
            raise ValueError("expected a string for the template, got messages")
        prompt = template.replace("{prompt}", prompt)
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if is_text else prompt
    if messages[0]["role"] == "system":
        raise ValueError("expected no system message beside the one given")
    return [{"role": "system", "content": system}, *messages]


def _encode(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a string, or of messages up to the opening of the assistant's turn."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            "prompt: expected a string, got chat messages; the tokenizer has no chat template"
        )
    messages = [dict(message) for message in prompt]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


class Epochs:
    """Draws problems without repetition, in a new order every epoch.

    Attributes:
        position: problems drawn so far, the only state besides the seed.
        fingerprint: of the problems, see `fingerprint`; it must be equal when a run is resumed.
    """

    def __init__(self, problems: Sequence[Problem], seed: int = 0) -> None:
        if not problems:
            raise ValueError("problems: expected at least one, got none")
        self.problems, self.seed, self.position = list(problems), seed, 0
        self._order: tuple[int, list[int]] = (-1, [])
        self.fingerprint = fingerprint(problems)

    def __call__(self, count: int, rng: random.Random) -> list[Problem]:
        """The next `count` problems; `rng` is not used."""
        drawn = range(self.position, self.position + count)
        self.position += count
        return [self._problem(position) for position in drawn]

    def _problem(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self.problems))
        if self._order[0] != epoch:
            shuffled = list(range(len(self.problems)))
            random.Random(f"{self.seed}/{epoch}").shuffle(shuffled)
            self._order = epoch, shuffled
        return self.problems[self._order[1][index]]


def fingerprint(problems: Sequence[Problem]) -> str:
    """The number of problems and a hash of their prompts, answers, tags and columns, in order.

    Arrays, dates, bytes and numbers are hashed by content, other values that JSON cannot hold by
    type.
    """
    digest = hashlib.sha256()
    for problem in problems:
        parts = [problem.prompt, problem.answer, problem.tag, dict(problem.columns)]
        digest.update(json.dumps(parts, default=_jsonable, skipkeys=True).encode() + b"\n")
    return f"{len(problems)} problems, sha256 {digest.hexdigest()[:16]}"


def _jsonable(value: Any) -> Any:
    """A JSON value for one that has none; no repr, which may contain addresses."""
    if isinstance(value, bytes):
        return value.hex()
    for name in ("tolist", "isoformat"):
        if hasattr(value, name):
            return getattr(value, name)()
    return str(value) if isinstance(value, Number) else type(value).__name__
