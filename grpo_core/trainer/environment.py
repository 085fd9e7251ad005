"""Several turns: completions in which an environment answers, such as a tool, a game or a user.

The model writes a turn, up to an end token. The environment reads it and answers by an observation,
whose tokens are appended to the context as they are, and the model writes its next turn. Turns and
observations together are one completion of at most `max_new_tokens` tokens. Only tokens that the
model has sampled are trained on: the others have no log-probability and are no rows of a batch.

All open completions write at once, by any sampler or engine: a turn is one call of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_core.backends.kept import Kept
from grpo_core.cli.options import check_at_least, require
from grpo_core.objective.validation import is_int
from grpo_core.trainer.distributed import all_gather_object
from grpo_core.trainer.generation import special_tokens
from grpo_core.trainer.rewards import RewardError, is_finite, one_line, type_and_value
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, make_rollout

# completes prompts: the model itself, or an engine
Draw = Callable[[Sequence[Sequence[int]], Sampling], Rollout]


class Environment(Protocol):
    """What answers the turns of one completion.

    Random numbers come from torch's global generator, which the trainer has seeded.
    """

    def reset(self, problem: Problem) -> None:
        """Begins an episode; the prompt is its first observation."""
        ...

    def step(self, turn: Any) -> tuple[Any, float, bool]:
        """Answers a turn.

        Args:
            turn: what the model wrote since the last observation: text without special tokens, or
                token ids with the end token if `Episodes` has no tokenizer.

        Returns:
            The observation, its reward, and whether the episode is done. An observation is a text,
            with the markup of the model's chat format, or token ids; "" or None for none. That of
            the last turn is not used.
        """
        ...


def complete(
    model: PreTrainedModel,
    draw: Draw,
    problems: Sequence[Problem],
    sampling: Sampling,
    environment: Episodes | None,
    where: str,
) -> Rollout:
    """Completes problems, with an environment or without; arguments as in `Episodes.play`."""
    if environment is None:
        return draw([problem.prompt for problem in problems], sampling)
    return environment.play(model, draw, problems, sampling, where)


class EnvironmentFault(RewardError):
    """An environment raised an error (its `__cause__`), or returned something unexpected."""


@dataclass(frozen=True)
class Episodes:
    """Plays the episodes of completions, each with an environment of its own.

    Args:
        make: makes an environment, as a class without arguments does.
        tokenizer: decodes turns and encodes observations; None for environments of token ids.
        max_turns: turns of the model in a completion.

    Raises:
        ValueError: `make` cannot be called, or `max_turns` is below 1.
    """

    make: Callable[[], Environment]
    tokenizer: PreTrainedTokenizerBase | None = None
    max_turns: int = 8

    def __post_init__(self) -> None:
        expected = "a class or function that makes an environment"
        require(callable(self.make), "environment", expected, type_and_value(self.make))
        check_at_least(self, 1, "max_turns")

    def play(
        self,
        model: PreTrainedModel,
        draw: Draw,
        problems: Sequence[Problem],
        sampling: Sampling,
        where: str,
    ) -> Rollout:
        """One completion of each problem; all ranks call it together.

        Args:
            model: gives padding and end tokens.
            draw: samples the turns.
            sampling: `max_new_tokens` limits a completion with its observations.
            where: start of an error's message, such as "step 3".

        Raises:
            EnvironmentFault: names the environment and the problem.
        """
        pad, ends = special_tokens(model)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        limit = sampling.max_new_tokens
        episodes = [Episode(self, problem, limit, vocabulary, where) for problem in problems]
        prompts = [problem.prompt for problem in problems]
        longest = max(map(len, prompts)) + limit
        kept: list[Kept] = []
        count = 0
        while any(all_gather_object(any(each.is_open for each in episodes))):
            active = [each for each in episodes if each.is_open]
            # gathering sharded weights takes all ranks, also one with nothing left to write
            contexts = [[*each.problem.prompt, *each.ids] for each in active] or [[*prompts[0]]]
            room = max((each.room for each in active), default=1)
            # no context gets longer than in a single turn; a turn may take several calls
            room = min(room, longest - max(map(len, contexts)))
            drawn = draw(contexts, replace(sampling, max_new_tokens=room))
            if not active:
                continue
            kept += [drawn.kept] if drawn.kept is not None else []
            columns = drawn.completions(), drawn.sampler_logp.tolist(), drawn.truncated.tolist()
            for episode, ids, logp, is_cut in zip(active, *columns, strict=True):
                episode.write(ids, logp[: len(ids)], is_cut, count)
                count += len(ids)
        device = drawn.completion.device
        written = make_rollout(
            prompts,
            [each.ids for each in episodes],
            [each.logp for each in episodes],
            pad=pad,
            ends=ends,
            device=device,
            weight_version=drawn.weight_version,
        )
        numbers = torch.tensor([n for each in episodes for n in each.numbers], device=device)
        sampled = written.completion_mask.clone()
        sampled[written.completion_mask] = numbers >= 0
        return replace(
            written,
            truncated=torch.tensor([each.truncated for each in episodes], device=device),
            kept=Kept.cat(kept).select(numbers[numbers >= 0]) if kept else None,
            sampled=sampled,
            turns=torch.tensor([each.turns for each in episodes], device=device),
            earned=torch.tensor([each.earned for each in episodes], device=device),
        )


@dataclass
class Episode:
    """A completion being written.

    Attributes:
        rules: tokenizer and limit of turns.
        limit: tokens of the completion, observations included.
        vocabulary: token ids are below it.
        numbers: of each token its number among all that were drawn; -1 in observations.
        turns: of the model, begun so far.
        turn_start: tokens before the current turn.
        earned: the sum of the rewards so far.
    """

    rules: Episodes
    problem: Problem
    limit: int
    vocabulary: int
    where: str
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    turns: int = 1
    turn_start: int = 0
    earned: float = 0.0
    is_open: bool = True
    truncated: bool = False

    def __post_init__(self) -> None:
        self.environment: Environment = self._call(self.rules, "make")
        self._call(self.environment, "reset", self.problem)

    @property
    def room(self) -> int:
        """Tokens that are left."""
        return self.limit - len(self.ids)

    def write(self, ids: Sequence[int], logp: Sequence[float], is_cut: bool, first: int) -> None:
        """Appends tokens of the model, as many as there is room for; a whole turn is answered.

        Args:
            is_cut: whether these tokens do not end the turn.
            first: number of the first of them.
        """
        fits = slice(self.room)
        is_cut = is_cut or len(ids) > self.room
        self.ids += ids[fits]
        self.logp += logp[fits]
        self.numbers += range(first, first + len(ids))[fits]
        if not is_cut:
            self._answer()
        elif not self.room:
            self._close(truncated=True)

    def _answer(self) -> None:
        """The environment's step, and its observation unless the completion ends here."""
        tokenizer, turn = self.rules.tokenizer, self.ids[self.turn_start :]
        text = tokenizer.decode(turn, skip_special_tokens=True) if tokenizer else turn
        answer = self._call(self.environment, "step", text)
        is_triple = isinstance(answer, tuple) and len(answer) == 3
        self._check(is_triple, "step", "observation, reward, done", answer)
        observation, reward, done = answer
        self._check(is_finite(reward), "reward", "a finite number", reward)
        self._check(isinstance(done, bool), "done", "True or False", done)
        self.earned += float(reward)
        if done:
            return self._close()
        ids = self._encode(observation)
        if self.turns == self.rules.max_turns or len(ids) >= self.room:
            return self._close(truncated=True)
        self.ids += ids
        self.logp += [0.0] * len(ids)
        self.numbers += [-1] * len(ids)
        self.turns += 1
        self.turn_start = len(self.ids)

    def _encode(self, observation: Any) -> list[int]:
        """The token ids of an observation."""
        tokenizer = self.rules.tokenizer
        if tokenizer and isinstance(observation, str):
            return list(tokenizer(observation, add_special_tokens=False)["input_ids"])
        ids = [] if observation is None else observation
        is_list = isinstance(ids, Sequence) and not isinstance(ids, str)
        is_right = is_list and all(is_int(i) and 0 <= i < self.vocabulary for i in ids)
        expected = f"{'a text or ' if tokenizer else ''}token ids below {self.vocabulary}"
        self._check(is_right, "observation", expected, observation)
        return list(ids)

    def _close(self, truncated: bool = False) -> None:
        self.is_open, self.truncated = False, truncated

    def _call(self, owner: Any, name: str, *arguments: Any) -> Any:
        """Calls the user's code; an error names environment and problem."""
        try:
            return getattr(owner, name)(*arguments)
        except Exception as error:
            raise EnvironmentFault(f"{self._name(name)} raised {one_line(error)}") from error

    def _check(self, is_right: bool, name: str, expected: str, got: Any) -> None:
        if not is_right:
            got = type_and_value(got)
            raise EnvironmentFault(f"{self._name(name)}: expected {expected}, got {got}")

    def _name(self, part: str) -> str:
        """Where an error occurred: step, environment, part, turn and problem."""
        make, problem = self.rules.make, self.problem
        name = getattr(make, "__name__", type(make).__name__)
        asked = " ".join(repr(problem.source or list(problem.prompt)).split())
        return f"{self.where}: environment {name!r}, turn {self.turns} of {asked:.100}: {part}"
