"""What convinces of a trainer: controls that must stay flat, identities that hold to the last bit.

Which test holds which claim stands in docs/testing.md, "The trainer".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer

from grpo_core import RECIPES, fused_linear_loss, fused_loss
from grpo_core.cli.options import Parser, add_options, read_yaml
from grpo_core.objective.advantage import estimate_advantages
from grpo_core.reinforce import main as reinforce
from grpo_core.runs.config import RunConfig
from grpo_core.runs.run import Run
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.measure import Clock
from grpo_core.trainer.rewards import FunctionReward, Scores
from grpo_core.trainer.rollout import Problem, Rollout, Sampling
from grpo_core.trainer.trainer import Trainer
from tests.combinations import slow
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens
from tests.test_trainer import WITH_KL, config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

TESTS = Path(__file__).parent
HELD_OUT = [Problem((2 + n, 3 + n % 4, 9)) for n in range(8)]
LOSSES = ("naive", "logits", "fused")


def made(model: Any = None, reward: Any = share_of_sevens, **changes: Any) -> Trainer:
    """A trainer of the micro task."""
    return Trainer(model or micro_model(), draw_problems, reward, config(**changes))


class Recorded(Trainer):
    """Keeps what each update's loss returned."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[Any] = []

    def loss(self, part: Any, divisor: Any) -> Any:
        self.seen.append(super().loss(part, divisor))
        return self.seen[-1]


def looks(model: nn.Module) -> dict[str, Any]:
    """Held-out answers and figures, greedy and sampled."""
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = Sampling(MAX_NEW_TOKENS, temperature)
        one = evaluate(model, HELD_OUT, share_of_sevens, sampling)
        found[name] = (one.completions, one.metrics)
    return found


@pytest.mark.parametrize("loss", [*slow("naive", "logits"), "fused"])
def test_at_a_learning_rate_of_zero_nothing_moves(loss: Any) -> None:
    """The control: weights and answers keep every bit, ratio and KL stay where they start."""
    start = {name: value.clone() for name, value in micro_model().state_dict().items()}
    flat = made(objective=WITH_KL, loss=loss, steps=4, learning_rate=0.0, evaluate_every=1)
    history = flat.train(lambda: looks(flat.model))
    for name, value in flat.model.state_dict().items():
        assert torch.equal(value, start[name])
    assert all(record["held_out"] == history[0]["held_out"] for record in history)
    # plain PyTorch's log_softmax is not to the last bit the one that old_logp is made by
    rounding = 1e-6 if loss == "naive" else 0.0
    for record in history[1:]:
        assert 1 - rounding <= record["ratio_min"] <= record["ratio_max"] <= 1 + rounding
        assert 0 <= record["kl"] <= rounding**2
        assert record["clip_fraction"] == 0 and record["grad_norm"] > 0.1

    # with a rate the same looks see a difference
    moving = made(objective=WITH_KL, loss=loss, steps=4)
    moving.train()
    for name in ("greedy", "sampled"):
        assert looks(moving.model)[name][0] != history[0]["held_out"][name][0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.rare) for n in (1, 2))])
def test_permuted_rewards_stay_far_below_true_ones(seed: int) -> None:
    """Everything the same but which completion gets which reward."""
    reached = {}
    for shuffle in (False, True):
        run = made(micro_model(seed), seed=seed, steps=20, shuffle_rewards=shuffle)
        history = run.train()
        assert history[1]["reward"] < 0.15
        reached[shuffle] = sum(record["reward"] for record in history[-3:]) / 3
    # measured: 0.90 to 1.00 and 0.05 to 0.08
    assert reached[False] > 0.8
    assert reached[True] < 0.25


def test_advantages_of_a_group_sum_to_zero() -> None:
    """As the losses get them; a group of equal rewards has exactly none."""
    settings = {"prompts_per_step": 6, "group_size": 4, "minibatches": 1}
    run = made(**settings)
    rewards = torch.rand(24)
    rewards[8:12] = 0.7
    drawn = completions_of(torch.full((24,), 3))
    ((part,),) = run.minibatches(drawn, rewards, torch.arange(24))
    of_sequence = part.advantage.view(24, 3)
    assert (of_sequence == of_sequence[:, :1]).all()
    groups = of_sequence[:, 0].view(6, 4)
    torch.testing.assert_close(groups.sum(1), torch.zeros(6), rtol=0, atol=1e-5)
    assert (groups[2] == 0).all() and (groups[[0, 1, 3, 4, 5]] != 0).all()
    shifted = estimate_advantages(rewards + 3, run.config.objective.advantage, 4, None)
    torch.testing.assert_close(shifted, of_sequence[:, 0], rtol=1e-4, atol=1e-4)


def completions_of(lengths: Tensor, truncated: Sequence[int] = ()) -> Rollout:
    """Completions of the given lengths, written by nobody."""
    S, longest = len(lengths), int(lengths.max())
    generator = torch.Generator().manual_seed(1)
    ended = torch.ones(S, dtype=torch.bool)
    ended[list(truncated)] = False
    return Rollout(
        prompt=torch.randint(2, 16, (S, 4), generator=generator),
        prompt_mask=torch.ones(S, 4, dtype=torch.bool),
        completion=torch.randint(2, 16, (S, longest), generator=generator),
        completion_mask=torch.arange(longest) < lengths[:, None],
        sampler_logp=torch.zeros(S, longest),
        truncated=~ended,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_on_policy_the_gradient_is_that_of_reinforce(name: str, loss: Any) -> None:
    """Of −Σ A·log π, by a loop over completions that are neither padded nor packed."""
    objective = RECIPES[name].replace(beta=0.0, kl=None)
    lengths = torch.tensor([3, 5, 1, 7, 2, 2, 6, 4])
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 0.3])
    run = made(objective=objective, loss=loss, prompts_per_step=2, group_size=4, minibatches=1)
    drawn = completions_of(lengths)
    ((part,),) = run.minibatches(drawn, rewards, torch.arange(8))
    out = run.loss(part, None if name != "dr_grpo" else 8.0 * MAX_NEW_TOKENS)
    out.loss.backward()

    plain, objected = micro_model(), torch.zeros(())
    for row, ids in enumerate(drawn.completions()):
        group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
        advantage = rewards[row] - group.mean()
        if name != "dr_grpo":
            advantage = advantage / (group.std() + 1e-4)
        prompt = drawn.prompt[row].tolist()
        logits = plain(input_ids=torch.tensor([prompt + ids])).logits[0, 3:-1]
        logp = logits.log_softmax(-1)[range(len(ids)), ids]
        counted = {"grpo": 8 * len(ids), "dapo": lengths.sum(), "dr_grpo": 8 * MAX_NEW_TOKENS}
        objected = objected - advantage * logp.sum() / counted[name]
    objected.backward()
    assert max(float(w.grad.abs().max()) for w in plain.parameters()) > 0.05
    for mine, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_is_zero_on_policy_and_its_gradient_is_not() -> None:
    """Whole groups, mean over sequences: advantages cancel. Watch the reward."""
    objective = RECIPES["grpo"].replace(beta=0.0, kl=None)
    metrics = made(objective=objective, minibatches=1, epochs=1).step()
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["grad_norm"] > 0.1


@pytest.mark.parametrize("where", ["logits", "hidden states"])
def test_clipped_tokens_have_no_gradient(where: str, backend: str, device: str) -> None:
    """Both signs, both sides: where the minimum takes the clipped branch it is exactly 0."""
    # (ratio, advantage, whether it learns)
    cases = [
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (0.6, 1.0, True),
        (0.6, -1.0, False),
        (1.0, 1.0, True),
        (1.0, -1.0, True),
    ]
    torch.manual_seed(0)
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    head = torch.randn(40, 8, device=device)
    target = torch.randint(0, 40, (6,), device=device)
    logits = (hidden @ head.T).detach().requires_grad_()
    logp = logits.detach().log_softmax(-1).gather(1, target[:, None])[:, 0]
    arguments: dict[str, Any] = {
        "objective": "ppo",
        "advantage": torch.tensor([sign for _, sign, _ in cases], device=device),
        "old_logp": logp - torch.tensor([ratio for ratio, *_ in cases], device=device).log(),
        "sequence_id": torch.arange(6, device=device),
        "backend": backend,
    }
    if where == "hidden states":
        out, leaf = fused_linear_loss(hidden, head, target, **arguments), hidden
    else:
        out, leaf = fused_loss(logits, target, **arguments), logits
    out.loss.backward()
    for gradient, (_, _, learns) in zip(leaf.grad, cases, strict=True):
        assert bool((gradient != 0).any()) == learns
    assert out.metrics["clip_fraction"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["linear", "head"])
def test_beneath_an_adapter_the_kl_starts_at_exactly_zero(targets: Any) -> None:
    """Policy with its adapter on, reference with it off: the same bits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(micro_model(), settings)
    run = Recorded(model, draw_problems, share_of_sevens, config(objective=WITH_KL, steps=3))
    run.step()
    assert (run.seen[0].kl == 0).all() and (run.seen[0].ratio == 1).all()
    assert (run.seen[3].kl > 0).any() and (run.seen[3].kl >= 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_temperature_of_the_rollout_is_that_of_the_loss(loss: Any) -> None:
    """Else the ratio would be one of two distributions, and every update off policy."""
    settings = config(objective=WITH_KL, loss=loss, sampling=Sampling(MAX_NEW_TOKENS, 0.7))
    run = Recorded(micro_model(), draw_problems, share_of_sevens, settings)
    metrics = run.step()
    assert metrics["sampler_mismatch_max"] < 1e-5
    rounding = 1e-6 if loss == "naive" else 0.0
    assert float((run.seen[0].ratio - 1).abs().max()) <= rounding
    assert float(run.seen[0].kl.max()) <= rounding**2


def test_what_was_cut_off_is_not_learnt_from_when_asked() -> None:
    """The rows of two completions of four are gone, and the divisor counts the others."""
    lengths = torch.tensor([8, 3, 8, 5])
    rewards = torch.tensor([0.0, 1.0, 0.25, 0.5])
    grads = []
    for masked in (True, False):
        run = made(mask_truncated=masked, prompts_per_step=1, group_size=4, minibatches=1, epochs=1)
        drawn = completions_of(lengths, truncated=[0, 2])
        ((part,),) = run.minibatches(drawn, rewards, torch.arange(4))
        assert len(part.rows.sequence) == (3 + 5 if masked else 24)
        kept = {1, 3} if masked else {0, 1, 2, 3}
        assert set(part.rows.sequence.tolist()) == kept
        run.update([part], Clock())
        grads.append(run.model.lm_head.weight.detach().clone())
    assert not torch.equal(*grads)


def test_every_loss_draws_the_same_curve() -> None:
    """From logits and from hidden states: the same rewards, step by step.

    The naive loss rounds its logits' gradient otherwise, and sooner or later a token that is drawn
    near an edge is another: the first steps agree, and the curves stay close.
    """
    curves = {
        loss: [record["reward"] for record in made(loss=loss, steps=12).train()[1:]]
        for loss in LOSSES
    }
    assert curves["logits"] == curves["fused"]
    assert curves["naive"][:4] == curves["fused"][:4]
    assert curves["naive"] == pytest.approx(curves["fused"], abs=0.2)
    for curve in curves.values():
        assert curve[-1] > curve[0] + 0.4


def test_a_reward_is_scored_once_and_its_mean_is_the_record() -> None:
    """What metrics.jsonl says of a step is what the reward said of all its completions."""
    told: list[Tensor] = []

    def noted(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        told.append(share_of_sevens(problems, completions).total)
        return Scores(told[-1], {"sevens": told[-1]})

    metrics = made(reward=noted).step()
    (total,) = told
    assert metrics["reward"] == metrics["sevens"] == pytest.approx(float(total.mean()))
    spread = total.view(8, 8).amax(1) - total.view(8, 8).amin(1)
    assert metrics["zero_std"] == float((spread == 0).float().mean())


def test_every_test_that_the_document_names_exists() -> None:
    """The claims in docs/testing.md."""
    text = (TESTS.parent / "docs/testing.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (TESTS / file).read_text("utf-8"), f"{file}::{name}"


def test_every_option_that_the_document_names_exists(tmp_path: Path) -> None:
    """On the command lines of a run, and in a YAML file, which is read."""
    pages = [TESTS.parent / "docs" / name for name in ("training.md", "rollouts.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    lines = re.findall(r"grpo_core\.reinforce (.*)", blocks.replace("\\\n", " "))
    named = {name for line in lines for name in re.findall(r"--(\w+)", line)}
    assert named >= {"model", "data", "shard", "rollout", "environment"}
    assert named <= RunConfig.__dataclass_fields__.keys()
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(yaml)
    parser = Parser("grpo_core.reinforce")
    add_options(parser, RunConfig)
    config = parser.parse_args(read_yaml(tmp_path / "run.yaml"))
    assert (config.prompts, config.rewards, config.learning_rate) == (32, ["math", "format"], 1e-6)


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers that reads bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    micro_model(vocab_size=384, max_position_embeddings=1024).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def gym_run(model: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """The command of the document's first run, shorter; what it recorded."""
    pytest.importorskip("reasoning_gym")
    words = "--data reasoning_gym:chain_sum --held_out 2 --max_new_tokens 4 --autocast True"
    words += " --tokens_per_microbatch 1024 --gradient_checkpointing True"
    words += " --steps 1 --warmup_steps 0 --prompts 2 --group_size 2"
    folders = ["--model", str(model), "--output", str(output)]
    assert reinforce([*folders, *words.split(), *more]) == 0
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_first_run_of_the_document(bytes_model: Path, tmp_path: Path) -> None:
    start, step = gym_run(bytes_model, tmp_path)
    assert {"accuracy", "format"} <= start["held_out"].keys()
    assert step["accuracy"] == 0 and step["tokens"] == 0 and step["zero_std"] == 1
    assert step["length"] <= 4


def test_the_score_of_reasoning_gym_takes_the_weight_of_what_it_replaces(
    bytes_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own scoring stands in the place of `math`."""
    made = []
    monkeypatch.setattr(
        "grpo_core.runs.run.FunctionReward",
        lambda *given: made.append(FunctionReward(*given)) or made[-1],
    )
    gym_run(bytes_model, tmp_path, "--reward_weights", "3", "0.5")
    assert made[-1].weights == {"accuracy": 3.0, "format": 0.5}


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([], {"accuracy": 1.0, "format": 0.2}),
        (["format"], {"format": 1.0}),
        (["format", "math"], {"format": 1.0, "accuracy": 1.0}),
        (["math", "accuracy"], "rewards: expected names that differ"),
    ],
)
def test_reasoning_gym_is_scored_by_the_rewards_that_are_named(
    rewards: list[str], expected: Any
) -> None:
    pytest.importorskip("reasoning_gym")
    named = {"rewards": rewards} if rewards else {}
    run = Run.__new__(Run)
    data = "reasoning_gym:chain_sum"
    run.config = RunConfig(model="m", data=data, steps=1, warmup_steps=0, **named)
    run.tokenizer = ByT5Tokenizer()
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            run.task()
        return
    problems, reward = run.task()
    assert reward.weights == expected and list(reward.functions) == list(expected)
    texts = [f"<think>a</think><answer>{problem.answer}</answer>" for problem in problems]
    parts = reward(problems, ByT5Tokenizer()(texts).input_ids).parts
    assert all(part.all() for part in parts.values()) and parts.keys() == expected.keys()


def test_tags_that_a_tokenizer_drops_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "3", "answer": "3"}')
    run = Run.__new__(Run)
    run.config = RunConfig(model="m", data=str(data), rewards=["format"])
    run.tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<think>"])
    with pytest.raises(ValueError, match=r"rewards: expected a tokenizer .* \['<think>'\] among"):
        run.task()
