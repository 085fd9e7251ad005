"""The trainer: rollout, score, advantage, pack, loss, backward, optimizer.

GRPO needs no value model. Each prompt is completed G times, and a completion's advantage is its
reward minus the group mean. Several updates are made from each rollout. Ratios are 1 in the first
one; clipping acts from the second.

The random numbers of step k depend on the seed and on k only, so a checkpoint saves no generator.
With `TrainerConfig.asynchronous` a step's rollout is made during the step before, see `ahead`.

In a process group every rank completes its part of the prompts, and the ranks together make the
updates of one process with the whole batch, see `distributed` and `sharding`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_core import HeadOutput, LossOutput, with_fused_head
from grpo_core.linear.model import has_fused_head
from grpo_core.loss.metrics import merge_metrics
from grpo_core.trainer import loop
from grpo_core.trainer.ahead import Ahead
from grpo_core.trainer.batch import Batch, check_output_matrix, is_padding_free, pack
from grpo_core.trainer.checkpoint import give_up, resume_trainer
from grpo_core.trainer.config import TrainerConfig as TrainerConfig
from grpo_core.trainer.console import Bar, Console
from grpo_core.trainer.distributed import (
    all_gather_cat,
    check_ranks,
    loss_divisor,
    pad_microbatches,
    rank,
    rank_slice,
    reduce_metrics,
)
from grpo_core.trainer.engine import Engine, EngineSync
from grpo_core.trainer.environment import Episodes, complete
from grpo_core.trainer.forward import packed_logp, packed_loss, reference_logp, reference_of
from grpo_core.trainer.generation import check_context, evaluation_mode, special_tokens
from grpo_core.trainer.groups import (
    Round,
    group_advantages,
    merge_rounds,
    needs_more,
    randomness,
    split_minibatches,
    staleness,
)
from grpo_core.trainer.measure import Clock
from grpo_core.trainer.monitor import (
    NOT_REPLAYED,
    Logger,
    Metrics,
    Watch,
    sampler_mismatch,
    update_metrics,
    warn,
)
from grpo_core.trainer.optimizer import adamw, set_learning_rate
from grpo_core.trainer.rewards import Reward, Scores, score
from grpo_core.trainer.rollout import Problem, Rollout, Sampling
from grpo_core.trainer.samples import Samples
from grpo_core.trainer.sharding import full_tensor, gradient_sync, wrap_policy

DrawProblems = Callable[[int, random.Random], Sequence[Problem]]


class Trainer:
    """Trains a causal language model in place.

    Args:
        model: the policy; any causal language model of `transformers`. It gets a fused head, see
            `with_fused_head`; the other losses need logits that are a plain product. All ranks of a
            process group start with the same model; FSDP2 moves it to its device.
        draw_problems: `draw_problems(count, rng)` returns training problems.
        reward: scores completions; see `grpo_core.trainer.rewards.Reward`.
        config: options of the run.
        metrics_path: JSON-lines file to append each step's record to.
        checkpoints: folder for the checkpoints of this run. With it, SIGINT (Ctrl-C) and SIGTERM
            stop the run after the current step, saved; `resume` continues it.
        label: name of the run in records and on the progress bar.
        loggers: called with each step's record, on rank 0.
        samples: keeps samples of the completions.
        console: shows the progress; None is a progress bar.
        engine: samples the completions, see `engine`; None for the model itself.
        teacher: the reference policy of the objective, with the same tokens, frozen in place; None
            for the model as it starts. Its logits are never made with the fused loss.
        environment: answers the turns of completions, see `environment`; None for single turns.

    Attributes:
        policy: the module to call for the loss: the model, wrapped by DDP or sharded by FSDP2.
        reference: what the KL compares with: the teacher, or the model as it started; or None.
        drawn: problems, completions and scores of the last rollout on this rank.

    Raises:
        ValueError: the options do not fit the model or the ranks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draw_problems: DrawProblems,
        reward: Reward,
        config: TrainerConfig,
        *,
        metrics_path: Path | None = None,
        checkpoints: Path | None = None,
        label: str = "grpo",
        loggers: Sequence[Logger] = (),
        samples: Samples | None = None,
        console: Console | None = None,
        engine: Engine | None = None,
        teacher: PreTrainedModel | None = None,
        environment: Episodes | None = None,
    ) -> None:
        check_ranks(config)
        if config.objective.entropy_aggregation == "prompt_mean":
            got = "'prompt_mean', whose groups microbatches would split"
            raise ValueError(
                f"objective.entropy_aggregation: expected one of tokens or sequences, got {got}"
            )
        if environment is not None and config.asynchronous:
            expected = "0 with an environment, whose turns are sampled one after the other"
            raise ValueError(f"asynchronous: expected {expected}, got {config.asynchronous}")
        if problems := getattr(draw_problems, "problems", None):
            longest = max(len(problem.prompt) for problem in problems)
            check_context(model.config, longest, config.sampling.max_new_tokens)
        if config.sampling.is_filtered and not config.sampling.replay:
            warn(NOT_REPLAYED)
        if config.loss != "fused":
            check_output_matrix(model)
        elif not has_fused_head(model):
            with_fused_head(model)
        self.model = model
        self.draw_problems = draw_problems
        self.reward = reward
        self.config = config
        self.metrics_path = metrics_path
        self.checkpoints = checkpoints
        self.label = label
        self.loggers = loggers
        self.samples = samples
        self.console = console or Bar()
        wants_reference = teacher is not None or config.objective.beta > 0
        exact = config.objective.kl == "exact"
        self.reference = (
            reference_of(model, config.shard, teacher, exact) if wants_reference else None
        )
        self.policy = wrap_policy(model, config.shard)
        self.padding_free = is_padding_free(model, config.padding_free, config.autocast)
        self.optimizer = adamw(model.parameters(), config.learning_rate)
        self.environment = environment
        self.sampler = EngineSync(model, engine, bool(config.asynchronous))
        self.ahead = Ahead(self)
        self.steps_done = 0
        self.skipped_updates = 0
        self.skipped_in_a_row = 0
        self.watch = Watch()
        self.drawn: tuple[list[Problem], list[list[int]], Scores]
        self.drawn = [], [], Scores(torch.empty(0), {})

    def train(self, evaluation: Callable[[], Metrics] | None = None) -> list[Metrics]:
        """Makes the remaining steps; returns a record of each.

        Args:
            evaluation: called before the first step, every `evaluate_every` steps and at the end.

        Raises:
            ValueError: the folder has checkpoints from which the run was not resumed.
            Interrupted: after a signal, once the step is done and saved.
            FloatingPointError: too many updates in a row were skipped, see `update`.
        """
        return loop.train(self, evaluation)

    def resume(self) -> int:
        """Loads the last checkpoint, if there is one; returns the number of steps done.

        Construct the trainer as for the start of the run, with the model it started from, which is
        the reference of the KL. On a CPU a resumed run is bitwise equal to an uninterrupted one.
        Records of later steps are removed from the metrics file.

        Raises:
            ValueError: the checkpoint is of a run with other settings.
        """
        return resume_trainer(self)

    def step(self) -> Metrics:
        """One rollout and the updates made from it."""
        config, clock, device = self.config, Clock(self.model.device), self.model.device

        # rollout, score; dynamic sampling may need several rounds
        rounds = [self.draw_round(clock)]
        while needs_more(rounds, config):
            rounds.append(self.draw_round(clock, again=len(rounds)))
        drawn, rollout_metrics = merge_rounds(rounds, config, special_tokens(self.model)[0])
        if config.asynchronous:
            rollout_metrics["staleness"] = staleness(rounds, self.steps_done)
            if self.steps_done + 1 < config.steps:
                with clock.phase("rollout"):
                    self.ahead.begin(self.steps_done + 1)

        # dropout draws random numbers
        with randomness(config.seed, self.steps_done, device, rank(), "updates"):
            # advantage, pack
            with clock.phase("reference"):
                rewards = drawn.rewards.to(device)
                minibatches = self.minibatches(drawn.rollout, rewards, drawn.order)
                mismatch = sampler_mismatch([part for parts in minibatches for part in parts])
                if drawn.rollout.weight_version == self.steps_done:
                    self.check_engine(minibatches, mismatch)

            # loss, backward, optimizer
            learning_rate = set_learning_rate(self.optimizer, config, self.steps_done)
            updates = [
                self.update(parts, clock) for _ in range(config.epochs) for parts in minibatches
            ]

        self.steps_done += 1
        metrics = {
            "step": self.steps_done,
            **rollout_metrics,
            **mismatch,
            **update_metrics(updates),
            "learning_rate": learning_rate,
            "skipped_updates": self.skipped_updates,
            "seconds": clock.seconds,
            **clock.memory(),
        }
        self.watch(metrics)
        first = rounds[0]
        self.drawn = first.problems, first.rollout.completions(), first.scores
        return metrics

    def draw_round(self, clock: Clock, again: int = 0) -> Round:
        """Rollout and score: completions of this rank's prompts, and their rewards."""
        with clock.phase("rollout"):
            if self.config.asynchronous and not again:
                return self.ahead.take()
            finish = self.begin_round(self.steps_done, again)
        return finish()

    def begin_round(
        self, step: int, again: int = 0, sample: Callable[..., Callable[[], Rollout]] | None = None
    ) -> Callable[[], Round]:
        """Draws the numbers of a round for after `step` steps; the result scores completions.

        `sample` returns what waits for the completions of prompts; None samples them here.
        """
        config, device = self.config, self.model.device
        part = f"again {again}" if again else ""
        with randomness(config.seed, step, device, rank(), part) as rng:
            problems = self.draw_problems(config.prompts_per_step, rng)
            problems = problems[rank_slice(len(problems))]
            repeated = [problem for problem in problems for _ in range(config.group_size)]
            where = f"step {step + 1}"
            if sample is None:
                drawn = complete(
                    self.model, self.draw, repeated, config.sampling, self.environment, where
                )
                order = torch.randperm(len(repeated))
            else:
                # before, since completions of a checkpoint draw no numbers
                order = torch.randperm(len(repeated))
                prompts = [problem.prompt for problem in repeated]
                receive = sample(prompts, config.sampling)

        def finish() -> Round:
            rollout = receive() if sample else drawn
            scores = score(self.reward, repeated, rollout.completions(), where, rollout.earned)
            rewards = scores.total
            if config.shuffle_rewards:
                rewards = rewards[rng.sample(range(len(rewards)), len(rewards))]
            return Round(repeated, rollout, scores, rewards, order.to(device))

        return finish

    def draw(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """Completions sampled with the current weights."""
        self.ahead.settle()
        return self.sampler.draw(prompts, sampling, self.steps_done)

    def minibatches(self, rollout: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        """Advantage and pack: minibatches as lists of microbatches, which share an update.

        Args:
            rollout: S completions, group by group.
            rewards: [S] float32.
            order: [S] int64, the order in which minibatches take sequences.
        """
        config = self.config
        packed = pack(
            rollout,
            self.advantages(rewards),
            mask_truncated=config.mask_truncated,
            padding_free=self.padding_free,
        )
        split = split_minibatches(packed, rewards, order, config)
        tokens = config.tokens_per_microbatch
        minibatches = pad_microbatches([each.microbatches(tokens) for each in split])
        return [[self.with_logp(part) for part in parts] for parts in minibatches]

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [S] float32 from the rewards of this rank's completions."""
        # of all ranks, since some estimators use the whole batch
        of_all = all_gather_cat(rewards)
        return group_advantages(of_all, self.config)[rank_slice(len(of_all))]

    def with_logp(self, part: Batch) -> Batch:
        """Adds the log-probabilities that the ratio and the KL compare with."""
        config, rows = self.config, part.rows
        old_logp = ref_logp = None
        if config.old_logp == "sampler":
            old_logp = part.sampler_logp
        elif config.needs_old_logp or self.sampler.engine is not None:
            # for an engine also to measure the mismatch
            old_logp = packed_logp(self.model, rows, config)
        exact, advantage = config.objective.kl == "exact", part.advantage
        if self.reference is not None and (not exact or config.teacher_coef):
            ref_logp = reference_logp(self.reference, rows, config)
        if config.teacher_coef and ref_logp is not None and old_logp is not None:
            advantage = advantage - config.teacher_coef * (old_logp - ref_logp)
        # the exact KL compares whole distributions, when the loss of a microbatch is computed
        ref_logp = None if exact else ref_logp
        return replace(part, advantage=advantage, old_logp=old_logp, ref_logp=ref_logp)

    def check_engine(self, minibatches: list[list[Batch]], mismatch: Metrics) -> None:
        """Refuses an engine by its first completions with these weights, see `EngineSync.check`."""
        if self.sampler.is_checked:
            return
        if self.config.old_logp == "sampler":
            # computed for this alone; dropout would draw random numbers
            with evaluation_mode(self.model):
                mismatch = sampler_mismatch(
                    [
                        replace(part, old_logp=packed_logp(self.model, part.rows, self.config))
                        for parts in minibatches
                        for part in parts
                    ]
                )
        self.sampler.check(mismatch.get("sampler_mismatch"), self.config.sampling)

    def update(self, parts: Sequence[Batch], clock: Clock) -> Metrics:
        """Loss, backward and optimizer step of a minibatch.

        The optimizer step is skipped and counted unless `TrainerConfig.is_update_safe`.

        Raises:
            FloatingPointError: too many updates in a row were skipped; names the file with the
                inputs of the last one.
        """
        config, of_parts = self.config, []
        with clock.phase("loss"):
            divisor = loss_divisor(parts, config.objective, config.sampling.max_new_tokens)
            for number, part in enumerate(parts, 1):
                with gradient_sync(self.policy, last=number == len(parts)):
                    out = self.loss(part, divisor)
                    assert out.loss is not None
                    out.loss.backward()
                of_parts.append(out.metrics)
        with clock.phase("optimizer"):
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            tensors = reduce_metrics(merge_metrics(of_parts))
            tensors["grad_norm"] = full_tensor(grad_norm)
            # the only point where the host waits for the device
            values = torch.stack([tensor.float() for tensor in tensors.values()]).tolist()
            metrics = dict(zip(tensors, values, strict=True))
            if config.is_update_safe(metrics):
                self.optimizer.step()
                self.skipped_in_a_row = 0
            else:
                self.skipped_updates += 1
                self.skipped_in_a_row += 1
            self.optimizer.zero_grad()
        if self.skipped_in_a_row > config.max_skipped_updates:
            give_up(self, parts, metrics)
        return metrics

    def loss(self, part: Batch, divisor: float | None) -> HeadOutput | LossOutput:
        """The objective on packed rows."""
        return packed_loss(self.policy, part, divisor, self.config, self.reference)
