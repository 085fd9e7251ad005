"""The trainer: rollout -> score -> advantage -> pack -> loss -> backward -> optimizer.

GRPO needs no value model. Each prompt is answered G times, and an answer is as good as it is better
than its group's mean. Several updates are made of every rollout, so that from the second on the
ratio leaves 1 and the clip has something to do.

Randomness has no state: what step k draws depends on the seed, on k and on the weights alone.

In a process group every process answers its share of the prompts, and all make the same updates:
those of one process with the whole batch. See `shares` and `parallel`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_core import HeadOutput, LossOutput, with_fused_head
from grpo_core.cli.options import warmup
from grpo_core.linear.model import has_fused_head
from grpo_core.loss.metrics import merge_metrics
from grpo_core.trainer import loop as training_loop
from grpo_core.trainer import state as trainer_state
from grpo_core.trainer.baselines.supervised import learning_rate_share
from grpo_core.trainer.batch import Batch, check_output_matrix, pack
from grpo_core.trainer.clock import Clock
from grpo_core.trainer.config import TrainerConfig as TrainerConfig
from grpo_core.trainer.console import Bar, Console
from grpo_core.trainer.distributed import joined
from grpo_core.trainer.engine import Engine, Rollouts
from grpo_core.trainer.forward import packed_logp, packed_loss, reference_logp
from grpo_core.trainer.monitor import Logger, Metrics, Watch, sampler_mismatch, update_metrics
from grpo_core.trainer.padding import is_padding_free
from grpo_core.trainer.reference_model import reference_of
from grpo_core.trainer.resampling import Answered, batch_advantages, collect, dealt_out
from grpo_core.trainer.rewards import Reward, Scores
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, check_context
from grpo_core.trainer.samples import Samples
from grpo_core.trainer.sharding import accumulating, policy_of, whole
from grpo_core.trainer.shares import alike, check_shares, divisor, figures_of_all, own_share

DrawProblems = Callable[[int, random.Random], Sequence[Problem]]


class Trainer:
    """Trains a causal language model in place.

    Args:
        model: the policy; any causal language model of `transformers`. It gets a fused head, see
            `with_fused_head`; for the other losses its logits have to be the plain product. In a
            process group it is the same on every one of them; FSDP2 puts it on its device.
        draw_problems: `draw_problems(count, rng)` -> training problems.
        reward: scores completions; see `grpo_core.trainer.rewards.Reward`.
        config: the run.
        metrics_path: JSON-lines file to append each step's record to.
        checkpoints: folder for checkpoints, of this run alone. With it, SIGINT (Ctrl-C) and SIGTERM
            end a run after the step it is in, saved; `resume` goes on.
        label: the run's name in records and on the progress bar.
        loggers: take each step's record as well, see `loggers`.
        samples: keeps what the model writes.
        console: shows the run as it goes; None is a progress bar.
        engine: writes the completions, see `rollouts`; None for the model itself.

    In a process group only the main process writes and logs.

    Attributes:
        policy: what is called for the loss, `model` with DDP or FSDP2 around it if need be.
        drawn: this process's part of the last rollout, and what it earned.

    Raises:
        ValueError: the model or the options cannot do what is asked for.
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
    ) -> None:
        check_shares(config)
        if problems := getattr(draw_problems, "problems", None):
            longest = max(len(problem.prompt) for problem in problems)
            check_context(model.config, longest, config.sampling.max_new_tokens)
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
        wants_reference = config.objective.beta > 0
        self.reference = reference_of(model, config.shard) if wants_reference else None
        self.policy = policy_of(model, config.shard)
        self.end_to_end = is_padding_free(model, config.padding_free, config.autocast)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.rollouts = Rollouts(model, engine)
        self.steps_done = 0
        self.skipped_updates = 0
        self.skipped_in_a_row = 0
        self.watch = Watch()
        self.drawn: Answered = [], [], Scores(torch.empty(0), {})

    def train(self, evaluation: Callable[[], Metrics] | None = None) -> list[Metrics]:
        """The steps that are left, with a progress bar, and a record of each.

        Args:
            evaluation: called before the first step, now and then, and at the end.

        Raises:
            ValueError: the folder for checkpoints has some that were not resumed from.
            Interrupted: after a signal, once the step is done and saved.
            FloatingPointError: too many updates in a row were not finite, see `update`.
        """
        return training_loop.train(self, evaluation)

    def resume(self) -> int:
        """Goes on from the last checkpoint, if there is one; returns the steps that are done.

        The trainer must be made as it was for the run's start, from the model it started from: that
        is the reference of the KL. On a CPU what follows is then what a straight run gives, bit for
        bit. Records of later steps are taken out of the metrics file.

        Raises:
            ValueError: the checkpoint is of a run with other settings.
        """
        return trainer_state.resume(self)

    def step(self) -> Metrics:
        """One rollout and the updates made of it."""
        config, clock = self.config, Clock(self.model.device)
        found = collect(self, clock)
        with clock.phase("reference"):
            minibatches = self.minibatches(found.drawn, found.rewards, found.order)

        rate = self.set_learning_rate()
        updates = [self.update(parts, clock) for _ in range(config.epochs) for parts in minibatches]
        self.steps_done += 1
        metrics = {
            "step": self.steps_done,
            **found.figures,
            **sampler_mismatch([part for parts in minibatches for part in parts]),
            **update_metrics(updates),
            "learning_rate": rate,
            "skipped_updates": self.skipped_updates,
            "seconds": clock.seconds,
            **clock.memory(),
        }
        self.watch(metrics)
        self.drawn = found.answered
        return metrics

    def draw(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """Completions by whoever writes them, with the weights of now; see `rollouts`."""
        return self.rollouts.draw(prompts, sampling, self.steps_done)

    def minibatches(self, drawn: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        """What the updates are made of: each a list of parts that share an optimizer step.

        Args:
            drawn: S completions, those of a group side by side.
            rewards: [S] float32.
            order: [S] int64, in which they are dealt out.
        """
        config = self.config
        # of all processes, since some estimators look at the whole batch
        everyone = joined(rewards)
        advantage = batch_advantages(everyone, config)[own_share(len(everyone))]
        split = dealt_out(self.packed(drawn, advantage), rewards, order, config)
        minibatches = alike([each.microbatches(config.tokens_per_microbatch) for each in split])
        return [[self.with_logp(part) for part in parts] for parts in minibatches]

    def packed(self, drawn: Rollout, advantage: Tensor) -> Batch:
        """Completions and their advantages [S] float32 as the model will get them."""
        masks = self.config.mask_truncated
        return pack(drawn, advantage, mask_truncated=masks, end_to_end=self.end_to_end)

    def with_logp(self, part: Batch) -> Batch:
        """The microbatch with the log-probabilities its ratio and KL are measured against."""
        config, rows = self.config, part.rows
        old_logp = ref_logp = None
        if config.old_logp == "sampler":
            old_logp = part.sampler_logp
        elif not config.on_policy or self.rollouts.engine.separate:
            # of an engine the distance is wanted, too
            old_logp = packed_logp(self.model, rows, config)
        if self.reference is not None:
            ref_logp = reference_logp(self.reference, rows, config)
        return replace(part, old_logp=old_logp, ref_logp=ref_logp)

    def update(self, parts: Sequence[Batch], clock: Clock) -> Metrics:
        """One optimizer step; skipped and counted if it is not `TrainerConfig.sound`.

        Raises:
            FloatingPointError: that happened too often in a row; names the file of the inputs.
        """
        found = []
        with clock.phase("loss"):
            objective, longest = self.config.objective, self.config.sampling.max_new_tokens
            divided_by = divisor(parts, objective, longest)
            for number, part in enumerate(parts, 1):
                with accumulating(self.policy, last=number == len(parts)):
                    out = self.loss(part, divided_by)
                    assert out.loss is not None
                    out.loss.backward()
                found.append(out.metrics)
        with clock.phase("optimizer"):
            grad_norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.max_grad_norm
            )
            figures = {**figures_of_all(merge_metrics(found)), "grad_norm": whole(grad_norm)}
            # The one place where the host waits for the device.
            values = torch.stack([figure.float() for figure in figures.values()]).tolist()
            metrics = dict(zip(figures, values, strict=True))
            if self.config.sound(metrics):
                self.optimizer.step()
                self.skipped_in_a_row = 0
            else:
                self.skipped_updates += 1
                self.skipped_in_a_row += 1
            self.optimizer.zero_grad()
        if self.skipped_in_a_row > self.config.max_skipped_updates:
            trainer_state.give_up(self, parts, metrics)
        return metrics

    def loss(self, part: Batch, divisor: float | None) -> HeadOutput | LossOutput:
        """The objective on packed rows."""
        return packed_loss(self.policy, part, divisor, self.config)

    def set_learning_rate(self) -> float:
        """Warm-up, then linear decay to 0 after the last step; returns the rate in force."""
        config = self.config
        share = learning_rate_share(self.steps_done, config.steps, warmup(config), final=0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        return config.learning_rate * share
