"""Engines follow the trainer's weights, and what they write is learnt from as it was drawn."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core import RECIPES, PolicyFactor, SamplerCorrection
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.checkpoint import save_trainer
from grpo_core.trainer.engine import EngineSync
from grpo_core.trainer.evaluate import evaluate
from grpo_core.trainer.monitor import sampler_mismatch
from grpo_core.trainer.rollout import Sampling, concat_rollouts, make_rollout, rollout
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.engines import CopyEngine
from tests.micro import EOS, MAX_NEW_TOKENS, PAD, draw_problems, micro_model, share_of_sevens
from tests.test_trainer import without_times

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

ONE_UPDATE = {"minibatches": 1, "epochs": 1}
# enough completions for groups whose rewards differ
LARGER = {"prompts_per_step": 4, "group_size": 8}


def trainer(
    engine: Any = None, model: Any = None, checkpoints: Path | None = None, **changes: Any
) -> Trainer:
    """Two prompts of four completions, two updates twice."""
    settings: dict[str, Any] = {
        "objective": RECIPES["dapo"],
        "steps": 3,
        "prompts_per_step": 2,
        "group_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "checkpoint_every": 1,
        "sampling": Sampling(MAX_NEW_TOKENS),
    }
    return Trainer(
        model or micro_model(),
        draw_problems,
        share_of_sevens,
        TrainerConfig(**settings | changes),
        checkpoints=checkpoints,
        engine=engine,
    )


def same_weights(mine: Any, theirs: Any) -> bool:
    """Bit for bit."""
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_an_engine_that_follows_makes_the_run_of_the_model_itself() -> None:
    """It begins with other weights; one update more or less would be another run."""
    alone, engine = trainer(), CopyEngine(micro_model(seed=9))
    followed = trainer(engine)
    assert without_times(followed.train()) == without_times(alone.train())
    assert same_weights(followed.model, alone.model)
    assert engine.updates == [0, 1, 2]
    assert {s.temperature for s in engine.asked} == {1.0}


def test_other_weights_than_the_trainers_are_an_error() -> None:
    run = trainer(CopyEngine(micro_model(), version=0, deaf=True))
    run.step()
    with pytest.raises(RuntimeError, match=r"weights of step 1, got version 0; does another run"):
        run.step()
    meddled = CopyEngine(micro_model())
    run = trainer(meddled)
    run.step()
    run.sampler.version = 1  # somebody else has brought weights since
    meddled.version = 7
    with pytest.raises(RuntimeError, match="of step 1, got version 7"):
        run.step()


def test_an_engine_gets_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """Also one that claims to have that very version; what follows is the straight run."""
    straight = trainer(CopyEngine(micro_model()))
    expected = without_times(straight.train())
    first = trainer(CopyEngine(micro_model()))
    for _ in range(2):
        first.step()
    save_trainer(first, tmp_path)
    engine = CopyEngine(micro_model(seed=9), version=2)
    second = trainer(engine, micro_model(seed=3), checkpoints=tmp_path)
    for _ in range(2):
        second.step()
    # brings the weights of a step 2 of its own
    second.draw([[3]], Sampling(1))
    assert second.resume() == 2
    assert without_times(second.train()) == expected[3:]
    assert engine.updates == [0, 1, 2, 2]
    assert same_weights(second.model, straight.model)


def test_an_update_that_breaks_off_is_made_again() -> None:
    engine = CopyEngine(micro_model(seed=9))
    rollouts = EngineSync(micro_model(), engine)
    rollouts.draw([[3]], Sampling(1), 0)
    take, engine.update_weights = engine.update_weights, broken  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(OSError, match="half way"):
            rollouts.draw([[3]], Sampling(1), 1)
        assert rollouts.version is None
    engine.update_weights = take  # type: ignore[method-assign]
    # nor is the version of before taken for granted
    assert rollouts.draw([[3]], Sampling(1), 0).weight_version == 0
    assert engine.updates == [0, 0]


def broken(weights: Any, version: int) -> None:
    """Takes one weight."""
    next(weights)
    raise OSError("half way")


def test_evaluation_asks_the_engine() -> None:
    engine = CopyEngine(micro_model(seed=9))
    run = trainer(engine)
    problems = draw_problems(3, random.Random(0))
    greedy = Sampling(MAX_NEW_TOKENS, 0.0)
    found = evaluate(run.model, problems, share_of_sevens, greedy, draw=run.draw)
    assert found == evaluate(run.model, problems, share_of_sevens, greedy)
    assert engine.updates == [0] and engine.asked == [greedy]


@pytest.mark.parametrize("changes", [{}, ONE_UPDATE], ids=["several updates", "one update"])
def test_the_distance_of_an_engine_is_logged_every_step(changes: dict[str, Any]) -> None:
    run = trainer(CopyEngine(micro_model(), off=-0.4), **changes)
    for _ in range(2):
        metrics = run.step()
        assert metrics["sampler_mismatch"] == pytest.approx(0.4, abs=1e-5)
        assert metrics["sampler_mismatch_max"] == pytest.approx(0.4, abs=1e-4)
        kl = math.exp(0.4) - 1 - 0.4
        assert metrics["sampler_mismatch_kl"] == pytest.approx(kl, abs=1e-4)
        assert metrics["sampler_mismatch_ratio_max"] == pytest.approx(math.exp(0.4), abs=1e-3)


@pytest.mark.parametrize("changes", [{}, ONE_UPDATE], ids=["several updates", "one update"])
def test_an_engine_without_a_part_of_the_weights_is_refused_at_the_start(
    changes: dict[str, Any],
) -> None:
    """Its head stays behind, as that of tied embeddings may: nothing is trained on."""
    run = trainer(CopyEngine(micro_model(seed=9), skips="lm_head"), **changes)
    with pytest.raises(RuntimeError, match=r"sampler_mismatch: .* the head of tied embeddings"):
        run.step()
    assert same_weights(run.model, micro_model()) and run.steps_done == 0
    # filters that are not replayed make a distance of their own
    sampling = Sampling(MAX_NEW_TOKENS, top_k=2, replay=False)
    with pytest.warns(UserWarning, match="replay_sampling is off"):
        run = trainer(CopyEngine(micro_model(seed=9)), sampling=sampling, **changes)
    assert run.step()["sampler_mismatch"] > 0.5
    # later ones may have drifted
    run = trainer(engine := CopyEngine(micro_model(seed=9)), **changes)
    run.step()
    engine.off = -0.6
    assert run.step()["sampler_mismatch"] > 0.5


def test_a_distance_that_is_no_number_is_counted() -> None:
    nothing = torch.zeros(3, dtype=torch.int64)
    rows: Any = nothing
    part = Batch(
        rows,
        torch.zeros(3),
        sampler_logp=torch.tensor([-1.0, -math.inf, -2.0]),
        old_logp=torch.tensor([-1.5, -1.0, -1.0]),
    )
    found = sampler_mismatch([part])
    assert found["sampler_mismatch_unknown"] == 1
    assert found["sampler_mismatch"] == pytest.approx(0.75)
    assert found["sampler_mismatch_ratio_max"] == pytest.approx(math.e)


def moved(off: float, objective: Any, **changes: Any) -> tuple[list[torch.Tensor], Any]:
    """How far one update by SGD moves the weights, and the step's figures."""
    changes |= ONE_UPDATE | LARGER | {"learning_rate": 1.0}
    run = trainer(CopyEngine(micro_model(), off=off), objective=objective, **changes)
    # a distance that is refused at the start
    run.sampler.is_checked = True
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    metrics = run.step()
    starts = micro_model().parameters()
    return [p.detach() - q for p, q in zip(run.model.parameters(), starts, strict=True)], metrics


def test_a_correction_enters_the_loss() -> None:
    """An engine that is too modest by a nat: w = e, cut to 2; the gradient doubles."""
    correction = PolicyFactor(SamplerCorrection("token", "truncate", high=2.0))
    changes = {"max_grad_norm": 1e9}
    plain, _ = moved(-1.0, RECIPES["dapo"], **changes)
    corrected, metrics = moved(-1.0, RECIPES["dapo"].replace(factor=correction), **changes)
    mild, _ = moved(-0.5, RECIPES["dapo"].replace(factor=correction), **changes)
    assert metrics["factor_mean"] == pytest.approx(2)
    assert max(float(p.detach().abs().max()) for p in plain) > 1e-2
    for a, b, c in zip(plain, corrected, mild, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(c, math.exp(0.5) * a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_completions_and_loss_have_one_temperature(temperature: float) -> None:
    """Else the sampler's log-probabilities would be far from the trainer's."""
    for engine in (None, CopyEngine(micro_model())):
        run = trainer(engine, sampling=Sampling(MAX_NEW_TOKENS, temperature))
        metrics = run.step()
        assert metrics["sampler_mismatch_max"] < 1e-4
    # and so is the gradient's: the first update's ratio is 1 for the sampler's log-probabilities
    sampling = Sampling(MAX_NEW_TOKENS, temperature)
    run = trainer(sampling=sampling, old_logp="sampler", **ONE_UPDATE, **LARGER)
    metrics = run.step()
    assert metrics["ratio_min"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("limit", [0.0, 20.0, 30.0])
def test_an_update_with_an_absurd_ratio_is_not_made(limit: float) -> None:
    """The engine's log-probabilities are 25 nats too low; taken as old ones they make e²⁵."""
    changes = {"old_logp": "sampler", "max_log_ratio": limit} | ONE_UPDATE | LARGER
    run = trainer(CopyEngine(micro_model(), off=-25.0), **changes)
    run.sampler.is_checked = True  # else the first rollout's mismatch is refused
    if limit == 20:
        with pytest.warns(UserWarning, match=r"a ratio was above e\^max_log_ratio"):
            metrics = run.step()
    else:
        metrics = run.step()
    assert metrics["skipped_updates"] == (limit == 20)
    assert same_weights(run.model, micro_model()) == (limit == 20)
    assert metrics["ratio_max"] == pytest.approx(math.exp(25), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "sound"),
    [
        ("ratio_max", math.exp(19.9), True),
        ("ratio_max", math.exp(20.1), False),
        ("ratio_max", math.nan, True),  # of no token
        ("kl", math.exp(20.1) / 50, False),
        ("kl", math.exp(19.9) / 50, True),
        ("loss", math.nan, False),
        ("grad_norm", math.inf, False),
    ],
)
def test_what_makes_an_update_unsound(name: str, value: float, sound: bool) -> None:
    figures = {"loss": 0.0, "grad_norm": 1.0, "ratio_max": 1.0, "kl": 0.0, "tokens": 50.0}
    settings = trainer().config
    assert settings.is_update_safe(figures)
    assert settings.is_update_safe(figures | {name: value}) == sound


def test_ratios_below_the_limit_are_learnt_from_as_without_one() -> None:
    runs = [trainer(max_log_ratio=limit) for limit in (0.0, 20.0)]
    for run in runs:
        run.step()
    assert same_weights(runs[0].model, runs[1].model)


def test_what_another_program_wrote_is_the_rollout_of_the_model() -> None:
    model, prompts = micro_model(), [[5], [3, 9, 4], [8, 2], [12, 12, 12, 4]]
    torch.manual_seed(2)
    drawn = rollout(model, prompts * 4, Sampling(MAX_NEW_TOKENS))
    lengths = drawn.completion_mask.sum(1).tolist()
    logp = [row[:n] for row, n in zip(drawn.sampler_logp.tolist(), lengths, strict=True)]
    options = {"pad": PAD, "ends": [EOS], "device": model.device}
    again = make_rollout(prompts * 4, drawn.completions(), logp, **options)
    assert 0 < int(drawn.truncated.sum()) < 16
    for name, value in vars(drawn).items():
        if isinstance(value, torch.Tensor) and name != "completion":
            assert torch.equal(getattr(again, name), value), name
    assert again.completions() == drawn.completions()

    with pytest.raises(ValueError, match="a log-probability each, got 2 and 1"):
        make_rollout([[3]], [[4, 5]], [[-1.0]], **options)

    halves = [again.select(torch.tensor(part)) for part in ([3, 4, 5, 7], [0, 2])]
    short = make_rollout([[9]], [[EOS]], [[-0.5]], **options)
    whole = concat_rollouts([short, *halves], PAD)
    assert whole.completions() == [[EOS], *(again.completions()[n] for n in (3, 4, 5, 7, 0, 2))]
    assert whole.prompt[0].tolist() == [PAD, PAD, PAD, 9]
    assert whole.prompt_mask.sum(1).tolist() == [1, 4, 1, 3, 4, 1, 2]
    assert whole.sampler_logp[0].tolist()[:2] == [-0.5, 0.0]
