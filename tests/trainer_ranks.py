"""What each of two processes does in test_trainer_ranks: runs of the trainer, written to a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_core import RECIPES, Estimator, Kept, PolicyFactor
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.checkpoint import checkpoints, save_trainer
from grpo_core.trainer.distributed import (
    all_gather_object,
    in_group,
    is_main,
    rank,
    rank_slice,
    world,
)
from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.environment import Episodes
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.rewards import Scores, no_reward
from grpo_core.trainer.rollout import Problem, Rollout, Sampling, rollout
from grpo_core.trainer.sharding import export, shard_model
from grpo_core.trainer.signals import Interrupted
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from grpo_core.trainer.vllm.engine import VllmEngine
from grpo_core.trainer.weights import ModelWeights
from tests.engines import BegunEngine, CopyEngine
from tests.micro import (
    EOS,
    MAX_NEW_TOKENS,
    SEVEN,
    VOCABULARY,
    draw_problems,
    micro_model,
    share_of_sevens,
)
from tests.test_checkpoint import at_step, records
from tests.test_checkpoint import trainer as short_run
from tests.test_rollouts import broken

RANKS = 2
PROMPTS, GROUP = 4, 4
LENGTHS = (8, 3, 5, 8, 2, 7, 1, 4, 6, 8, 2, 2, 3, 8, 5, 1)
# those of the second process are short: in parts of 40 places it needs fewer
UNEQUAL = (8, 8, 7, 8, 8, 6, 8, 8, 1, 2, 1, 2, 1, 1, 2, 1)
# the whole second share runs into the limit
HALF_CUT = (*LENGTHS[:8], *[-MAX_NEW_TOKENS] * 8)
PARTS = {"tokens_per_microbatch": 40}
# one minibatch, since what is left of several is dealt out within a process
LEAVES = {"dynamic_sampling": "filter", "minibatches": 1}
DAPO = RECIPES["dapo"]

# name -> (changes of the configuration, lengths of the completions, options of the run)
CASES: dict[str, tuple[dict[str, Any], Sequence[int], dict[str, Any]]] = {
    "sequence mean, KL": ({"objective": RECIPES["grpo"]}, LENGTHS, {}),
    "token mean": ({}, LENGTHS, {}),
    "token sum": ({"objective": DAPO.replace(aggregation="token_sum")}, LENGTHS, {"rate": 1e-3}),
    "constant length": ({"objective": RECIPES["dr_grpo"]}, LENGTHS, {}),
    "sequences": ({"objective": RECIPES["gspo"]}, LENGTHS, {}),
    "prompts": ({"objective": RECIPES["scalerl"]}, LENGTHS, {}),
    "unequal, prompts": (PARTS | {"objective": RECIPES["scalerl"]}, UNEQUAL, {}),
    "batch statistics": ({"objective": RECIPES["reinforce_plus_plus"]}, LENGTHS, {}),
    "leave one out": (
        {"objective": DAPO.replace(advantage=Estimator("leave_one_out", None))},
        LENGTHS,
        {},
    ),
    "entropy": ({"objective": DAPO.replace(entropy_coef=0.1)}, LENGTHS, {}),
    "unequal microbatches": (PARTS | {"objective": RECIPES["grpo"]}, UNEQUAL, {}),
    "unequal, constant length": (PARTS | {"objective": RECIPES["dr_grpo"]}, UNEQUAL, {}),
    "unequal, tied": (PARTS, UNEQUAL, {"tied": True}),
    "a rank without rows": ({"mask_truncated": True}, HALF_CUT, {}),
    "a rank without rows, tied": ({"mask_truncated": True} | PARTS, HALF_CUT, {"tied": True}),
    "clipped gradients, AdamW": ({"max_grad_norm": 0.05}, LENGTHS, {"rate": None}),
    "a teacher": ({"objective": RECIPES["opd"]} | PARTS, UNEQUAL, {"teacher": True}),
    "an adapter": ({"objective": RECIPES["grpo"]} | PARTS, UNEQUAL, {"adapter": True}),
    "gradient checkpointing": (PARTS, UNEQUAL, {"checkpointed": True}),
    "kept ids": (PARTS | {"objective": RECIPES["grpo"]}, UNEQUAL, {"kept": True}),
    "a gradient that is not finite": ({}, LENGTHS, {"poisoned": True}),
    "groups leave": (LEAVES, LENGTHS, {"equal": (1,)}),
    "groups leave, sequence mean, KL": (
        LEAVES | {"objective": RECIPES["grpo"]} | PARTS,
        UNEQUAL,
        {"equal": (0, 2)},
    ),
    "all groups of a rank leave": (
        LEAVES | {"objective": RECIPES["dr_grpo"]},
        LENGTHS,
        {"equal": (2, 3)},
    ),
}

SHARDS = ("ddp", "fsdp")
# no wrapper has a part in these: each is run under one of the two
UNWRAPPED = (
    "sequence mean, KL",
    "token mean",
    "token sum",
    "constant length",
    "sequences",
    "prompts",
    "unequal, prompts",
    "batch statistics",
    "leave one out",
    "entropy",
    "kept ids",
    "unequal, constant length",
    "groups leave",
    "groups leave, sequence mean, KL",
    "all groups of a rank leave",
)


def shards_of(name: str) -> tuple[str, ...]:
    """How a case is spread over the processes."""
    return (SHARDS[UNWRAPPED.index(name) % 2],) if name in UNWRAPPED else SHARDS


def sum_of_ids(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
    """A reward that differs from completion to completion, and a part that some do not have."""
    total = torch.tensor([sum(ids) % 7 / 7 for ids in map(list, completions)])
    part = torch.tensor([ids[0] / 8 if len(ids) > 4 else torch.nan for ids in completions])
    return Scores(total, {"first": part})


def partly_equal(groups: Sequence[int]) -> Any:
    """The same without the part; these groups, counted over all processes, have equal rewards."""

    def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        total = sum_of_ids(problems, completions).total
        for group in groups:
            mine = group - rank() * PROMPTS // world()
            if 0 <= mine < PROMPTS // world():
                total[mine * GROUP : (mine + 1) * GROUP] = 0.25
        return Scores(total, {})

    return reward


def given(step: int, lengths: Sequence[int], is_filtered: bool = False) -> Rollout:
    """Completions of the given lengths; a negative one has no end token."""
    generator = torch.Generator().manual_seed(step)
    S = len(lengths)
    prompts = torch.randint(2, VOCABULARY, (PROMPTS, 4), generator=generator)
    completion = torch.randint(2, VOCABULARY, (S, MAX_NEW_TOKENS), generator=generator)
    length = torch.tensor(lengths)
    places = torch.arange(MAX_NEW_TOKENS)
    mask = places < length.abs()[:, None]
    completion[(places == length[:, None] - 1)] = EOS
    kept = None
    if is_filtered:
        is_kept = torch.rand(S, MAX_NEW_TOKENS, VOCABULARY, generator=generator) < 0.4
        kept = Kept.from_mask(is_kept.scatter(2, completion[..., None], True)[mask])
    return Rollout(
        prompt=prompts.repeat_interleave(GROUP, 0),
        prompt_mask=torch.ones(S, 4, dtype=torch.bool),
        completion=completion,
        completion_mask=mask,
        sampler_logp=torch.zeros(S, MAX_NEW_TOKENS),
        truncated=length < 0,
        kept=kept,
    )


class Fixed(Trainer):
    """Does not draw; a minibatch of one process is that of two together."""

    lengths: Sequence[int] = ()
    poisoned = is_filtered = False

    def step(self) -> dict[str, Any]:
        everything = given(self.steps_done, self.lengths, self.is_filtered)
        drawn = everything.select(rank_slice(len(self.lengths)))
        with mock.patch.object(self.sampler, "draw", lambda *_: drawn):
            return super().step()

    def minibatches(self, drawn: Rollout, rewards: Tensor, order: Tensor) -> list[list[Batch]]:
        shares = torch.arange(len(order)).view(RANKS // world(), self.config.minibatches, -1)
        found = super().minibatches(drawn, rewards, shares.transpose(0, 1).reshape(-1))
        self.counts = [[len(parts), sum(p.is_filler for p in parts)] for parts in found]
        return found

    def loss(self, part: Batch, divisor: float | None) -> Any:
        out: Any = super().loss(part, divisor)
        if self.poisoned and rank() == world() - 1:
            return out._replace(loss=out.loss * torch.nan)
        return out


def model_of(options: dict[str, Any]) -> Any:
    """The same on every process."""
    model: Any = micro_model(num_hidden_layers=2, tie_word_embeddings=options.get("tied", False))
    if options.get("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if options.get("adapter"):
        import peft

        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])
        model = peft.get_peft_model(model, settings)
    return model


def fixed_run(name: str, shard: str) -> dict[str, Any]:
    """Two steps of four updates each, or one: their metrics, and the weights afterwards."""
    changes, lengths, options = CASES[name]
    settings: dict[str, Any] = {
        "objective": DAPO,
        "steps": 4,
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "warmup_steps": 0,
        "sampling": Sampling(MAX_NEW_TOKENS),
        "max_grad_norm": 1e9,
        "learning_rate": options.get("rate", 0.02) or 1e-3,
        "shard": shard if in_group() else "ddp",
    }
    config = TrainerConfig(**settings | changes)
    reward = partly_equal(options["equal"]) if "equal" in options else sum_of_ids
    teacher = micro_model(9, hidden_size=48, vocab_size=20) if options.get("teacher") else None
    run = Fixed(model_of(options), draw_problems, reward, config, teacher=teacher)
    run.lengths, run.poisoned = lengths, options.get("poisoned", False)
    run.is_filtered = options.get("kept", False)
    if options.get("rate", True):
        # AdamW would not show a gradient that is too large by a factor
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=config.learning_rate)
    # a second step sees what the first has left in wrapper and optimizer
    history = [run.step() for _ in range(1 if name in UNWRAPPED else 2)]
    for metrics in history:
        for name in MACHINE:
            metrics.pop(name, None)
    return {"history": history, "weights": weights(run.model), "counts": run.counts}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All of every parameter."""
    found = {}
    for name, weight in model.named_parameters():
        value = weight.detach()
        found[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return found


def moments(run: Trainer) -> list[Tensor]:
    """The optimizer's state, this process's part."""
    states = run.optimizer.state_dict()["state"].values()
    values = [value for state in states for value in state.values()]
    return [v.to_local() if isinstance(v, DTensor) else v for v in values]


def interrupted(shard: str, folder: Path, model: Callable[[], Any]) -> dict[str, Any]:
    """A straight run, and one that a signal to the second process stops; really drawn."""
    straight = short_run(folder / "straight", model(), shard=shard, checkpoint_every=100)
    straight.train()
    reward: Any = share_of_sevens
    if rank() == 1:
        reward = at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = "no"
    try:
        short_run(folder / "parts", model(), reward, shard=shard, checkpoint_every=100).train()
    except Interrupted as stop:
        stopped = str(stop)
    run = short_run(folder / "parts", model(), shard=shard)
    before = run.resume()
    run.train()
    export(run.model, folder / "model")
    return {
        "stopped": stopped,
        "before": before,
        "weights": [weights(straight.model), weights(run.model)],
        "moments": [moments(straight), moments(run)],
        "records": [records(folder / name) for name in ("straight", "parts")],
        "refused": refused(lambda: other_way(shard, folder).resume()),
        "folders": [path.name for path in checkpoints(folder / "parts/checkpoints")],
    }


def other_way(shard: str, folder: Path) -> Trainer:
    """The same run, spread otherwise."""
    other = {"ddp": "fsdp", "fsdp": "ddp"}[shard]
    return short_run(folder / "parts", dropping(), shard=other)


def dropping() -> Any:
    """A model with dropout, which draws numbers of every process's own."""
    return micro_model(attention_dropout=0.1)


def adapted() -> Any:
    """Beneath an adapter."""
    import peft

    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return peft.get_peft_model(micro_model(), settings)


def poisoned_save(folder: Path) -> str:
    """A weight of the second process's shard is NaN."""
    run = short_run(folder, micro_model(), shard="fsdp")
    if rank() == 1:
        with torch.no_grad():
            run.model.lm_head.weight.to_local()[-1, -1] = torch.nan  # type: ignore[operator]
    return refused(lambda: save_trainer(run, folder))


def refused(act: Callable[[], Any]) -> str:
    """The message of its error."""
    try:
        act()
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return "not refused"


def drawn_apart() -> list[list[int]]:
    """What this process answers when all are asked the same."""
    asked: list[list[list[int]]] = []

    def same(count: int, rng: Any) -> list[Problem]:
        return [Problem((3, 4, 5))] * count

    def noted(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        asked.append([list(ids) for ids in completions])
        return share_of_sevens(problems, completions)

    run = short_run(None, micro_model(), noted)
    run.draw_problems = same
    run.step()
    return asked[0]


def evaluated(shard: str) -> dict[str, Any]:
    """Five problems, greedy, shared by two processes."""
    run = short_run(None, micro_model(), shard=shard)
    return held_out(run.model)


def held_out(model: Any) -> dict[str, Any]:
    """What the model answers to five problems."""
    problems = [Problem(tuple(range(2, 4 + n)), tag="ab"[n % 2]) for n in range(5)]
    found = evaluate(model, problems, sum_of_ids, Sampling(MAX_NEW_TOKENS, 0.0))
    return {"completions": found.completions, "metrics": found.metrics}


def shards_write() -> tuple[list[list[int]], list[bool]]:
    """What a sharded model draws from prompts of this process, and what is whole afterwards."""
    run = short_run(None, micro_model(), shard="fsdp")
    prompts = [[5, 6, 7][: 1 + rank()]] * (2 + rank())
    torch.manual_seed(rank())
    drawn = rollout(run.model, prompts, Sampling(2 + 4 * rank()))
    return drawn.completions(), [isinstance(p, DTensor) for p in run.model.parameters()]


class OneForAll(CopyEngine):
    """Every process has a part of it that writes; weights come from the main process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(micro_model(seed=9), **options)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        for weight in self.model.parameters():
            dist.broadcast(weight.data, 0)
        self.version = all_gather_object(self.version)[0]
        return super().generate(prompts, sampling)


def with_engine(shard: str, engine: Any) -> dict[str, Any]:
    """A run whose completions an engine writes, and which draws again; all processes alike."""
    changes = {
        "dynamic_sampling": "resample",
        "max_resamples": 2,
        "prompts_per_step": 4,
        "steps": 3,
    }
    run = short_run(None, micro_model(), shard=shard, **changes)
    run.sampler = EngineSync(run.model, engine)
    history = run.train()
    for metrics in history:
        for name in MACHINE:
            metrics.pop(name, None)
    return {"history": history, "weights": weights(run.model), "calls": run.sampler.version}


class Lasting:
    """Done after one turn on the first process, after many on the second."""

    def reset(self, problem: Problem) -> None:
        self.turns = 0

    def step(self, turn: list[int]) -> tuple[list[int], float, bool]:
        self.turns += 1
        return [5], turn.count(SEVEN) / 8, self.turns > 3 * rank()


def with_environment(shard: str, engine: Any) -> dict[str, Any]:
    """Two steps in which the second process writes more turns than the first; held-out figures."""
    run = short_run(None, micro_model(), no_reward, shard=shard, steps=2, sampling=Sampling(30))
    run.sampler = EngineSync(run.model, engine)
    run.environment = Episodes(Lasting, max_turns=3)
    history = run.train()
    for metrics in history:
        for name in MACHINE:
            metrics.pop(name, None)
    turns = [sum(id is not int for id in map(type, ids)) for ids in run.drawn[1]]
    problems = [Problem((2, 3 + n)) for n in range(5)]
    found = evaluate(
        run.model,
        problems,
        no_reward,
        Sampling(30),
        draw=run.draw,
        environment=run.environment,
    )
    return {
        "history": history,
        "weights": weights(run.model),
        "observed": turns,
        "held out": found.metrics,
    }


class OneAhead(BegunEngine, OneForAll):
    """The same for rollouts one step ahead."""

    def __init__(self) -> None:
        OneForAll.__init__(self)
        self.hold = int


def run_ahead(shard: str, folder: Path) -> dict[str, Any]:
    """An asynchronous run, and one that is saved after two steps and resumed."""

    def made(name: str) -> Trainer:
        config = TrainerConfig(
            steps=4,
            prompts_per_step=4,
            group_size=4,
            sampling=Sampling(MAX_NEW_TOKENS),
            learning_rate=1e-2,
            asynchronous=1,
            shard=shard,
            dynamic_sampling="resample",
            max_resamples=1,
        )
        parts = (draw_problems, share_of_sevens, config)
        return Trainer(micro_model(), *parts, checkpoints=folder / name, engine=OneAhead())

    straight, first, second = made("straight"), made("parts"), made("parts")
    history = straight.train()
    for _ in range(2):
        first.step()
    save_trainer(first, folder / "parts")
    second.resume()
    found = {"history": history[1:], "resumed": second.train()}
    for metrics in found["history"] + found["resumed"]:
        for name in MACHINE:
            metrics.pop(name, None)
    return found | {"weights": weights(straight.model), "again": weights(second.model)}


def failed_update() -> str:
    """The main process's engine takes one weight of a sharded model and then fails."""
    run = short_run(None, micro_model(), shard="fsdp")
    engine = OneForAll()
    engine.update_weights = broken  # type: ignore[method-assign]
    run.sampler = EngineSync(run.model, engine)
    try:
        run.step()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def merged() -> dict[str, Tensor]:
    """An adapter on a sharded model, merged weight by weight."""
    model = adapted()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    return dict(ModelWeights(shard_model(model)))


def work(number: int, folder: str) -> None:
    """A rank: everything, results to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place, meeting = Path(folder), f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=RANKS)
    found: dict[str, Any] = {}
    for shard in SHARDS:
        for name in CASES:
            if shard in shards_of(name):
                found[f"{shard}: {name}"] = fixed_run(name, shard)
        found[f"{shard}: resumed"] = interrupted(shard, place / shard, dropping)
        found[f"{shard}: evaluated"] = evaluated(shard)
        found[f"{shard}: own model"] = with_engine(shard, None)
        found[f"{shard}: engine"] = with_engine(shard, OneForAll())
        found[f"{shard}: turns"] = with_environment(shard, None)
        found[f"{shard}: turns, engine"] = with_environment(shard, OneForAll())
        found[f"{shard}: ahead"] = run_ahead(shard, place / f"{shard}-ahead")
    found["failed"] = failed_update()
    found["merged"] = merged()
    found["alone"] = refused(lambda: VllmEngine("", micro_model()))
    found["fsdp: resumed, adapter"] = interrupted("fsdp", place / "fsdp-lora", adapted)
    found["poisoned"] = poisoned_save(place / "poisoned")
    found["drawn"] = drawn_apart()
    found["written"] = shards_write()
    narrow = DAPO.replace(entropy_coef=0.1, entropy_aggregation="token_mean")
    deciding = DAPO.replace(factor=PolicyFactor(top_entropy=0.2))
    found["refused"] = [
        refused(lambda: short_run(None, micro_model(), prompts_per_step=3)),
        refused(lambda: short_run(None, micro_model(), minibatches=5)),
        refused(lambda: short_run(None, micro_model(), loss="logits")),
        refused(lambda: short_run(None, micro_model(), objective=narrow)),
        refused(lambda: short_run(None, micro_model(), objective=deciding)),
        refused(lambda: short_run(None, micro_model(), asynchronous=1)),
    ]
    torch.save(found, place / f"{number}.pt")
    assert is_main() == (number == 0)
    dist.destroy_process_group()


def run(folder: Path) -> list[dict[str, Any]]:
    """What every rank found."""
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(RANKS)]
