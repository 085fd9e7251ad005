"""The trainer on a tiny model: does it learn, repeat itself, and say when something is wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from grpo_core import RECIPES, PolicyFactor, SamplerCorrection, token_logp
from grpo_core.trainer.batch import pack
from grpo_core.trainer.data import Epochs
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.measure import MACHINE
from grpo_core.trainer.rewards import Scores
from grpo_core.trainer.rollout import Problem, Sampling, rollout
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.combinations import slow
from tests.micro import MAX_NEW_TOKENS, draw_problems, micro_model, share_of_sevens

# The micro model fills its eight tokens and solves its task; tests of these warnings catch them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

SHORT = Sampling(MAX_NEW_TOKENS)
WITH_KL = RECIPES["dapo"].replace(beta=0.04, kl="k3")


def config(**changes: Any) -> TrainerConfig:
    """Eight prompts, eight answers each, two updates twice."""
    settings = {
        "objective": RECIPES["dapo"],
        "steps": 30,
        "prompts_per_step": 8,
        "group_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "sampling": Sampling(MAX_NEW_TOKENS),
    }
    return TrainerConfig(**{**settings, **changes})


def without_times(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in m.items() if key not in MACHINE} for m in history]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.rare) for n in (1, 2))])
def test_it_learns(seed: int) -> None:
    model = micro_model(seed)
    history = Trainer(model, draw_problems, share_of_sevens, config(seed=seed)).train()
    assert history[1]["reward"] < 0.15
    assert history[-1]["reward"] > 0.95


# one of each level of the ratio
FEW = ("dapo", "gspo")


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(WITH_KL, id="kl"),
        *(
            pytest.param(recipe, id=name, marks=() if name in FEW else pytest.mark.slow)
            for name, recipe in RECIPES.items()
        ),
    ],
)
def test_every_loss_trains_the_same_model(objective: Any) -> None:
    models, rewards = [], []
    for loss in ("naive", "logits", "fused"):
        model = micro_model()
        settings = config(objective=objective, loss=loss, steps=5, learning_rate=1e-3)
        teacher = None if objective.has_policy_term else micro_model(5)
        trainer = Trainer(model, draw_problems, share_of_sevens, settings, teacher=teacher)
        # in the third, one of 161 ratios is so near to a bound that rounding decides
        rewards.append([trainer.step()["reward"] for _ in range(2)])
        models.append(model)

    assert rewards[0] == rewards[1] == rewards[2]
    for naive, *others in zip(*(model.parameters() for model in models), strict=True):
        for other in others:
            # 8 AdamW updates of up to 1e-3 each; float32 rounding moves them by a thirtieth of one
            torch.testing.assert_close(other, naive, rtol=0, atol=3e-5)


def test_a_model_that_caps_its_logits_trains_from_hidden_states_only() -> None:
    def capped() -> Gemma2ForCausalLM:
        torch.manual_seed(0)
        sizes = micro_model().config.to_dict() | {"head_dim": 16, "num_key_value_heads": 2}
        return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=3.0)).eval()

    with pytest.raises(ValueError, match="scaled or capped afterwards"):
        Trainer(capped(), draw_problems, share_of_sevens, config(loss="logits"))
    trainer = Trainer(capped(), draw_problems, share_of_sevens, config(objective=WITH_KL))
    metrics = [trainer.step() for _ in range(15)]
    assert metrics[0]["sampler_mismatch_max"] < 1e-5
    assert metrics[0]["reward"] < 0.15 and metrics[-1]["reward"] > 0.4


def test_the_same_seed_gives_the_same_metrics_and_weights(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        model = micro_model()
        path = tmp_path / f"{name}.jsonl"
        settings = config(objective=WITH_KL, steps=4)
        Trainer(model, draw_problems, share_of_sevens, settings, metrics_path=path).train()
        records = [json.loads(line) for line in path.read_text().splitlines()]
        runs.append((without_times(records), model.state_dict()))
        torch.rand(7)  # the global generator plays no part

    assert runs[0][0] == runs[1][0]
    assert [record["step"] for record in runs[0][0]] == [0, 1, 2, 3, 4]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name])
    other = Trainer(micro_model(), draw_problems, share_of_sevens, config(steps=4, seed=1))
    assert other.step()["length"] != runs[0][0][1]["length"]


def test_the_first_update_is_on_policy_and_later_ones_are_not() -> None:
    seen = []

    class Watched(Trainer):
        def loss(self, part: Any, divisor: Any) -> Any:
            out = super().loss(part, divisor)
            seen.append(out)
            return out

    trainer = Watched(micro_model(), draw_problems, share_of_sevens, config(objective=WITH_KL))
    metrics = trainer.step()
    trainer.step()

    assert (seen[0].ratio == 1).all()
    assert (seen[0].kl == 0).all()
    assert len(seen) == 8
    assert metrics["ratio_max"] > 1.001
    # The rate is too high on purpose: by now some ratios have left [0.8, 1.28].
    assert seen[7].metrics["clip_fraction"] > 0
    assert seen[7].metrics["kl"] > 0
    # float32, key-value cache against full forward
    assert metrics["sampler_mismatch_max"] < 1e-5


def test_old_logp_from_the_sampler_is_the_same_to_rounding() -> None:
    models = []
    for old_logp in ("trainer", "sampler"):
        model = micro_model()
        settings = config(old_logp=old_logp, learning_rate=1e-3)
        Trainer(model, draw_problems, share_of_sevens, settings).step()
        models.append(model)
    # AdamW turns the rounding of a gradient near 0 into a visible part of a 1e-3 step.
    for trainers, samplers in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(trainers, samplers, rtol=0, atol=1e-4)


def test_equal_rewards_leave_the_weights_alone() -> None:
    def constant(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        return Scores(torch.full((len(completions),), 0.7), {})

    model, untouched = micro_model(), micro_model()
    trainer = Trainer(model, draw_problems, constant, config(warmup_steps=0))
    with pytest.warns(UserWarning, match=r"more than 90% of the groups had equal rewards \(0\.700"):
        metrics = [trainer.step() for _ in range(5)][-1]

    assert metrics["zero_std"] == 1 and metrics["grad_norm"] == 0
    for after, before in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(after, before)


def test_groups_share_a_prompt_and_rewards_meet_their_completions() -> None:
    calls = []

    def recorded(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Scores:
        calls.append((list(problems), list(completions)))
        return share_of_sevens(problems, completions)

    settings = config(prompts_per_step=3, group_size=4)
    Trainer(micro_model(), draw_problems, recorded, settings).step()

    problems, completions = calls[0]
    assert len(problems) == len(completions) == 12
    for start in (0, 4, 8):
        assert len(set(problems[start : start + 4])) == 1
    assert len(set(problems)) == 3


def test_a_gradient_that_is_not_finite_skips_the_update_and_is_counted() -> None:
    model, untouched = micro_model(), micro_model()
    trainer = Trainer(model, draw_problems, share_of_sevens, config(warmup_steps=0))
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.warns(UserWarning, match="an update was skipped"):
        metrics = trainer.step()

    assert metrics["skipped_updates"] == 4
    for after, before in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(after, before)


def test_truncation_is_logged_and_warned_of() -> None:
    model = micro_model()
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # the end token becomes rare
    trainer = Trainer(model, draw_problems, share_of_sevens, config())
    with pytest.warns(UserWarning, match=r"\d\d% of the completions ran into max"):
        metrics = trainer.step()
    assert metrics["truncated"] > 0.2


def test_no_value_model_and_a_reference_only_with_kl() -> None:
    model = micro_model()
    trainer = Trainer(model, draw_problems, share_of_sevens, config())
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in model.parameters()}
    assert trainer.reference is None

    with_kl = Trainer(model, draw_problems, share_of_sevens, config(objective=WITH_KL))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with_kl.step()
    for name, tensor in with_kl.reference.state_dict().items():
        assert torch.equal(tensor, start[name])
    assert not torch.equal(model.lm_head.weight, start["lm_head.weight"])


def test_evaluation_is_called_on_time_and_recorded(tmp_path: Path) -> None:
    figures = iter(range(10))
    settings = config(steps=5, evaluate_every=2)
    path = tmp_path / "metrics.jsonl"
    trainer = Trainer(micro_model(), draw_problems, share_of_sevens, settings, metrics_path=path)
    trainer.train(lambda: {"figure": next(figures)})

    records = [json.loads(line) for line in path.read_text().splitlines()]
    taken = {r["step"]: r["held_out"]["figure"] for r in records if "held_out" in r}
    assert taken == {0: 0, 2: 1, 4: 2, 5: 3}
    assert set(records[-1]["seconds"]) == {"rollout", "reference", "loss", "optimizer", "rest"}


def test_learning_rate_warms_up_and_decays() -> None:
    settings = config(steps=6, warmup_steps=2, learning_rate=0.3)
    trainer = Trainer(micro_model(), draw_problems, share_of_sevens, settings)
    rates = [trainer.step()["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.225, 0.15, 0.075])


def test_problems_depend_on_seed_and_step_alone() -> None:
    drawn: list[list[Problem]] = []

    def recorded(count: int, rng: random.Random) -> list[Problem]:
        drawn.append(draw_problems(count, rng))
        return drawn[-1]

    for seed in (0, 1):
        trainer = Trainer(micro_model(seed), recorded, share_of_sevens, config(seed=7))
        trainer.step()
        trainer.step()
    assert drawn[0] == drawn[2] and drawn[1] == drawn[3] and drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size: expected at least 2, got 1"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"warmup_steps": 30}, "warmup_steps: expected 0 to 29, got 30"),
        ({"minibatches": 65}, "minibatches: expected at most 64, .* got 65"),
        ({"sampling": Sampling(8, 0.0)}, r"sampling\.temperature: expected more than 0"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_prompts_that_do_not_fit_are_refused_at_the_start() -> None:
    """Of 64 positions a completion takes 8; problems that are made as they are drawn, at a step."""
    fitting, long = Problem((3,) * 56), Problem((3,) * 57)
    Trainer(micro_model(), Epochs([fitting]), share_of_sevens, config()).draw([[3] * 56], SHORT)
    expected = r"longest_prompt \+ max_new_tokens: expected at most 64 tokens.* 57 \+ 8 = 65"
    with pytest.raises(ValueError, match=expected):
        Trainer(micro_model(), Epochs([fitting, long]), share_of_sevens, config())
    drawn = Trainer(micro_model(), lambda count, rng: [long] * count, share_of_sevens, config())
    with pytest.raises(ValueError, match=expected):
        drawn.step()
    with pytest.raises(ValueError, match=expected):
        evaluate(micro_model(), [long], share_of_sevens, SHORT)


def test_an_adapter_switched_off_is_the_reference() -> None:
    """No copy of the model; the KL starts at exactly 0 and is measured to the model beneath."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    model = peft.get_peft_model(micro_model(), settings)
    trainer = Trainer(model, draw_problems, share_of_sevens, config(objective=WITH_KL, steps=3))
    assert trainer.reference is model
    kls = [trainer.step()["kl"] for _ in range(3)]
    assert kls[-1] > kls[0] > 0
    drawn = rollout(model, [[3, 4, 5]] * 4, Sampling(MAX_NEW_TOKENS))
    minibatch = trainer.with_logp(pack(drawn, torch.zeros(4)))
    beneath = micro_model()
    rows = minibatch.rows
    expected = token_logp(rows.logits(beneath), rows.target).logp
    torch.testing.assert_close(minibatch.ref_logp, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(minibatch.old_logp, expected, atol=1e-3)


@pytest.mark.parametrize("loss", ["fused", pytest.param("logits", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["dapo", "gspo", *slow("grpo", "dr_grpo", "luspo", "scalerl", "vespo", "rloo")]
)
def test_parts_of_a_minibatch_make_the_same_update(name: str, loss: str) -> None:
    """Divisors are those of the whole; a part has at most so many places, and whole sequences."""
    grads, metrics = [], []
    for tokens in (0, 40):
        trainer = Trainer(
            micro_model(),
            draw_problems,
            share_of_sevens,
            config(
                objective=RECIPES[name],
                loss=loss,
                steps=3,
                tokens_per_microbatch=tokens,
                max_grad_norm=1e9,
                learning_rate=1e-3,
            ),
        )
        parts: list[int] = []
        update = trainer.update

        def counted(batches: Any, clock: Any, update: Any = update, parts: Any = parts) -> Any:
            parts.extend(batch.rows.ids.numel() for batch in batches)
            return update(batches, clock)

        trainer.update = counted  # type: ignore[method-assign]
        found = trainer.step()
        metrics.append([found[key] for key in ("loss", "tokens", "ratio_max", "entropy")])
        grads.append([weight.detach() for weight in trainer.model.parameters()])
        assert tokens == 0 or (max(parts) <= tokens and len(parts) > 4)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-6)
    for whole, summed in zip(*grads, strict=True):
        # four AdamW updates of up to 1e-3; rounding moves them by a hundredth of one
        torch.testing.assert_close(whole, summed, rtol=0, atol=4e-5)


def test_in_parts_the_first_update_is_on_policy_too() -> None:
    settings = config(steps=3, minibatches=1, epochs=2, tokens_per_microbatch=50)
    trainer = Trainer(micro_model(), draw_problems, share_of_sevens, settings)
    ratios = []
    update = trainer.update
    trainer.update = lambda *a: ratios.append(update(*a)) or ratios[-1]  # type: ignore[method-assign]
    trainer.step()
    assert (ratios[0]["ratio_min"], ratios[0]["ratio_max"]) == (1, 1)
    assert ratios[1]["ratio_max"] > 1


def test_one_update_to_a_rollout_needs_no_old_log_probabilities() -> None:
    """The same gradient without the forward pass that would have made them."""
    weights = []
    for old_logp in ("trainer", "sampler"):
        settings = config(steps=3, minibatches=1, epochs=1, old_logp=old_logp, learning_rate=1e-3)
        trainer = Trainer(micro_model(), draw_problems, share_of_sevens, settings)
        metrics = trainer.step()
        # the trainer has none of its own to compare
        assert "sampler_mismatch" not in metrics
        weights.append(list(trainer.model.parameters()))
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_truncated_completions_can_be_left_out() -> None:
    """The micro model always runs into its limit: then there is nothing to learn from."""
    model = micro_model()
    with torch.no_grad():
        model.lm_head.weight[1] = 0
        model.lm_head.weight[1, :] = -100 * model.lm_head.weight.abs().amax()
    settings = config(steps=3, mask_truncated=True)
    trainer = Trainer(model, draw_problems, share_of_sevens, settings)
    before = [weight.clone() for weight in model.parameters()]
    metrics = trainer.step()
    share = metrics["truncated"]
    assert metrics["tokens"] <= (1 - share) * 64 * MAX_NEW_TOKENS * 2
    if share == 1:
        for mine, theirs in zip(model.parameters(), before, strict=True):
            assert torch.equal(mine, theirs)


def test_autocast_computes_in_bfloat16_and_learns_in_float32() -> None:
    settings = config(steps=3, autocast=True, objective=WITH_KL)
    trainer = Trainer(micro_model(), draw_problems, share_of_sevens, settings)
    seen = []
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    trainer.step()
    assert torch.bfloat16 in seen
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())


def test_the_sampler_correction_gets_its_log_probabilities() -> None:
    """The sampler's are the trainer's to rounding, so truncating at 2 changes nothing."""
    correction = PolicyFactor(SamplerCorrection("token", "truncate", high=2.0))
    settings = config(steps=3, objective=RECIPES["dapo"].replace(factor=correction))
    trainer = Trainer(micro_model(), draw_problems, share_of_sevens, settings)
    metrics = trainer.step()
    assert metrics["factor_mean"] == pytest.approx(1, abs=1e-5)
    assert 0 <= metrics["sampler_gap_max"] < 1e-4
