"""A teacher in the trainer: on-policy distillation, over the vocabulary or in the advantages."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from grpo_core import RECIPES, with_fused_head
from grpo_core.reinforce import main
from grpo_core.runs.config import RunConfig
from grpo_core.runs.demo import decimals
from grpo_core.runs.demo.config import DemoConfig
from grpo_core.runs.model import check_positions, load_teacher
from grpo_core.trainer.batch import Batch
from grpo_core.trainer.rewards import no_reward
from grpo_core.trainer.rollout import Sampling
from grpo_core.trainer.trainer import Trainer, TrainerConfig
from tests.micro import MAX_NEW_TOKENS, VOCABULARY, draw_problems, micro_model
from tests.test_reinforce import files, options, records  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ran into max_new_tokens"),
    pytest.mark.filterwarnings("ignore:.*had equal rewards"),
]

OPD = RECIPES["opd"]
# a larger vocabulary than the student's 16, and another hidden size
PADDED = {"hidden_size": 48, "vocab_size": 20}


def distiller(model: Any = None, teacher: Any = None, **changes: Any) -> Trainer:
    """Eight prompts, four completions each, one update."""
    settings: dict[str, Any] = {
        "objective": OPD,
        "steps": 30,
        "prompts_per_step": 8,
        "group_size": 4,
        "minibatches": 1,
        "epochs": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "sampling": Sampling(MAX_NEW_TOKENS, temperature=0.7),
    }
    config = TrainerConfig(**settings | changes)
    return Trainer(model or micro_model(), draw_problems, no_reward, config, teacher=teacher)


def microbatch(trainer: Trainer) -> Batch:
    """A step's completions as one microbatch."""
    torch.manual_seed(0)
    problems = draw_problems(4, random.Random(0))
    drawn = trainer.draw([p.prompt for p in problems], trainer.config.sampling)
    ((part,),) = trainer.minibatches(drawn, torch.zeros(4), torch.arange(4))
    return part


def log_softmax64(model: Any, part: Batch, temperature: float) -> Tensor:
    """log π of every word [N, V] in float64, with gradient, by the model's own forward."""
    rows = part.rows
    logits = model(**rows.inputs).logits[rows.hidden_mask][:, :VOCABULARY]
    return torch.log_softmax(logits.double() / temperature, -1)


def plain(model: Any) -> Any:
    """The same weights in float64."""
    return copy.deepcopy(model).double()


def soft_capped() -> Any:
    torch.manual_seed(4)
    sizes = micro_model(**PADDED).config.to_dict() | {"head_dim": 16, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=3.0)).eval()


TEACHERS = {
    "the same sizes": lambda: micro_model(5),
    "another size, padded": lambda: micro_model(5, **PADDED),
    "bfloat16": lambda: micro_model(5, **PADDED).bfloat16(),
    "soft cap": soft_capped,
    "with a fused head": lambda: with_fused_head(micro_model(5, **PADDED)),
}


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *((name, "fused") for name in TEACHERS),
        ("another size, padded", "logits"),
        ("soft cap", "logits"),
        ("another size, padded", "naive"),
    ],
)
def test_the_gradient_is_that_of_the_kl_over_the_vocabulary(name: str, loss: str) -> None:
    """L = (1/N) Σ_n Σ_v p_v (log p_v − log q_v) (arXiv 2306.13649, reverse KL), in float64."""
    teacher = TEACHERS[name]()
    trainer = distiller(teacher=teacher, loss=loss)
    part, T = microbatch(trainer), 0.7
    out = trainer.loss(part, None)
    assert out.loss is not None
    out.loss.backward()

    student = plain(trainer.model)
    with torch.no_grad():
        q = log_softmax64(plain(teacher), part, T)
        if name == "bfloat16":
            # its own hidden states, and logits that are not rounded
            logits = part.rows.hidden(teacher).double() @ teacher.lm_head.weight.double().T
            q = torch.log_softmax(logits[:, :VOCABULARY] / T, -1)
    p = log_softmax64(student, part, T)
    kl = (p.exp() * (p - q)).sum(-1)
    kl.mean().backward()
    torch.testing.assert_close(out.kl.double(), kl.detach(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(trainer.model.parameters(), student.parameters(), strict=True):
        scale = theirs.grad.abs().amax()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2e-5 * scale)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_reference_without_a_teacher_is_the_start_with_the_exact_kl_too() -> None:
    """With an adapter it is the model beneath; the adapter of its head is off as well."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(micro_model(), settings)
    for policy, start in ((model, micro_model()), (micro_model(), micro_model())):
        trainer = distiller(policy)
        if policy is not model:
            with torch.no_grad():
                policy.lm_head.weight.mul_(1.5)
        part = microbatch(trainer)
        p, q = (log_softmax64(each, part, 0.7) for each in (policy, start))
        expected = (p.exp() * (p - q)).sum(-1)
        assert expected.mean() > 0.05
        torch.testing.assert_close(
            trainer.loss(part, None).kl.double(), expected, rtol=1e-4, atol=1e-5
        )


def test_the_adapter_of_a_teacher_stays_on() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    teacher = peft.get_peft_model(micro_model(5), settings)
    trainer = distiller(teacher=teacher, objective=RECIPES["dapo"].replace(kl="k3", beta=0.1))
    part = microbatch(trainer)
    expected = log_softmax64(teacher, part, 0.7).gather(1, part.rows.target[:, None]).squeeze(1)
    torch.testing.assert_close(part.ref_logp.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interpolation", [1.0, 0.0, 0.5])
def test_a_student_approaches_its_teacher(interpolation: float) -> None:
    """From its own completions; the teacher does not move."""
    teacher = micro_model(5, initializer_range=0.05, **PADDED)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    objective = OPD.replace(interpolation=interpolation)
    changes = {"group_size": 1, "prompts_per_step": 32, "learning_rate": 2e-2}
    trainer = distiller(teacher=teacher, objective=objective, **changes)
    kls = [trainer.step()["kl"] for _ in range(30)]
    assert kls[-1] < kls[0] / 8
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert not teacher.training and not any(w.requires_grad for w in teacher.parameters())


def test_microbatches_and_padding_do_not_change_a_step() -> None:
    """The teacher reads the same rows as the student, in whatever layout."""
    kls = []
    for changes in ({}, {"tokens_per_microbatch": 40}, {"padding_free": "always"}):
        trainer = distiller(teacher=micro_model(5, **PADDED), **changes)
        kls.append([trainer.step()["kl"] for _ in range(3)])
    for other in kls[1:]:
        assert other == pytest.approx(kls[0], rel=1e-4)


class Products(TorchDispatchMode):
    """Counts matrix products with a vocabulary among their sizes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = [size for x in args if isinstance(x, Tensor) for size in x.shape]
        if "mm" in func.overloadpacket.__name__ and self.vocabulary in sizes:
            self.count += 1
        return func(*args, **kwargs or {})


def test_the_head_of_the_student_takes_three_products_and_that_of_the_teacher_one() -> None:
    """In one chunk; no others, so that nothing of a teacher is computed twice."""
    trainer = distiller(micro_model(vocab_size=19), micro_model(5, vocab_size=19, hidden_size=48))
    part = microbatch(trainer)
    with Products(19) as products:
        loss = trainer.loss(part, None).loss
        assert loss is not None
        loss.backward()
    assert products.count == 4
    # nor is there a forward for ratios that nothing reads
    assert part.old_logp is None and part.ref_logp is None


def test_the_advantage_of_a_token_falls_by_its_log_ratio_to_the_teacher() -> None:
    """A − c·(log π_old − log π_teacher), with the group's A; the KL is measured beside it."""
    teacher = micro_model(5, **PADDED)
    c, dapo = 0.3, RECIPES["dapo"]
    trainer = distiller(teacher=teacher, objective=dapo, teacher_coef=c)
    torch.manual_seed(0)
    drawn = trainer.draw([[3, 4, 5]] * 8, trainer.config.sampling)
    rewards = torch.arange(8.0)
    ((part,),) = trainer.minibatches(drawn, rewards, torch.arange(8))
    groups = rewards.view(2, 4)
    by_group = (groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)
    old, ref = (
        log_softmax64(each, part, 0.7).gather(1, part.rows.target[:, None]).squeeze(1)
        for each in (trainer.model, teacher)
    )
    expected = by_group.flatten()[part.rows.sequence] - c * (old - ref)
    torch.testing.assert_close(part.advantage.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    gap = (ref - old).detach()
    out = trainer.loss(part, None)
    torch.testing.assert_close(out.kl.double(), gap.expm1() - gap, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="teacher_coef: expected 0 unless ratios are of tokens"):
        distiller(teacher=teacher, objective=RECIPES["gspo"], teacher_coef=c)


def test_what_is_learnt_from_a_teacher_alone_needs_no_rewards() -> None:
    """By the sampled KL, in the advantages: the KL falls; nothing warns of equal rewards."""
    teacher = micro_model(5, initializer_range=0.05, **PADDED)
    trainer = distiller(
        teacher=teacher, objective=RECIPES["dapo"], teacher_coef=1.0, learning_rate=2e-2
    )
    history = [trainer.step() for _ in range(30)]
    kls = [metrics["kl"] for metrics in history]
    assert sum(kls[-5:]) < sum(kls[:5]) / 4
    assert all("zero_std" not in metrics for metrics in history)
    assert not any("equal rewards" in w for m in history for w in m.get("warnings", ()))


def test_a_teacher_with_a_smaller_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher: expected a head of V = 16 rows or more, got 12"):
        distiller(teacher=micro_model(5, vocab_size=12))


def test_groups_of_one_are_for_objectives_without_rewards() -> None:
    TrainerConfig(objective=OPD, group_size=1)
    with pytest.raises(ValueError, match="group_size: expected at least 2, got 1"):
        TrainerConfig(objective=RECIPES["dapo"], group_size=1)


# the command


@pytest.fixture(scope="module")
def teacher(files: Path) -> Path:  # noqa: F811
    """A larger model with the same tokens, in bfloat16, and one with others."""
    tokenizer = decimals.build_tokenizer()
    folder = files / "teacher"
    sizes = decimals.SIZES | {"hidden_size": 160}
    decimals.build_model(tokenizer, 3, sizes).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    decimals.build_model(tokenizer, 3).save_pretrained(files / "other")
    tokenizer.add_tokens(["<more>"])
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["0"], words["1"] = words["1"], words["0"]
    kind = type(tokenizer.backend_tokenizer)
    tokenizer._tokenizer = kind.from_str(json.dumps(vocabulary))
    tokenizer.save_pretrained(files / "other")
    return folder


def distil(files: Path, output: Path, teacher: Path, *more: str) -> list[str]:  # noqa: F811
    """The options of `test_reinforce` without its rewards."""
    return options(files, output, "--rewards", "none", "--teacher", str(teacher), *more)


def test_the_command_distils_without_rewards_and_goes_on(
    files: Path,  # noqa: F811
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One completion per prompt; the KL is shown; another teacher cannot go on with the run."""
    config = RunConfig(model="m", data="d", objective="opd", teacher=str(teacher))
    assert load_teacher(config, decimals.build_tokenizer()).dtype == torch.bfloat16
    opd = [
        "--objective",
        "opd",
        "--group_size",
        "1",
        "--interpolation",
        "0.9",
        "--console",
        "plain",
    ]
    words = distil(files, tmp_path / "run", teacher, *opd, "--minibatches", "1")
    assert main([*words, "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert " KL " in shown and "nothing is wrong" not in shown
    history = records(tmp_path / "run")
    assert all(record["kl"] > 0 and record["reward"] == 0 for record in history[1:])
    assert json.loads((tmp_path / "run/config.json").read_text())["rewards"] == []
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert trained.config.hidden_size == 128
    (tmp_path / "run/checkpoints/step-000003").rename(tmp_path / "last")
    assert main([*words, "--resume", "True"]) == 0
    assert records(tmp_path / "run") == history
    for changed in (["--teacher", str(files / "model")], ["--interpolation", "0.5"]):
        with pytest.raises(SystemExit):
            main([*words, "--resume", "True", *changed])
        assert f"{changed[0]}: expected " in capsys.readouterr().err


def test_a_teacher_with_other_tokens_is_refused(
    files: Path,  # noqa: F811
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(distil(files, tmp_path, files / "other", "--objective", "opd"))
    error = capsys.readouterr().err
    assert "--teacher: expected the tokens of" in error and "'0' is" in error


def test_a_teacher_with_too_few_positions_is_refused(files: Path, tmp_path: Path) -> None:  # noqa: F811
    """The student has 256, the teacher 64."""
    micro_model(5).save_pretrained(tmp_path)
    config = RunConfig(
        model=str(files / "model"),
        data="d",
        objective="opd",
        teacher=str(tmp_path),
        max_new_tokens=60,
    )
    check_positions(config, 4)
    with pytest.raises(ValueError, match="at most 59, since the teacher has 64 positions"):
        check_positions(config, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "opd"}, "teacher: expected a model for --objective opd, --beta or"),
        ({"teacher_coef": 0.1}, "teacher: expected a model for --objective opd, --beta or"),
        ({"teacher": "t"}, "teacher: expected none without --objective opd, --beta or"),
        ({"rewards": ["none"]}, "rewards: expected at least one, got none"),
        (
            {"objective": "opd", "teacher": "t", "dynamic_sampling": "filter"},
            "dynamic_sampling: expected off without rewards, got filter",
        ),
        ({"teacher": "t", "beta": 0.1, "group_size": 1}, "group_size: expected at least 2, got 1"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(model="m", data="d", **given)


def test_the_demo_has_no_teacher() -> None:
    with pytest.raises(ValueError, match="objective: expected one that learns from rewards"):
        DemoConfig(objective="opd")


def test_options_resolve() -> None:
    """Rewards by default, none for distillation; the divergence is a field of the objective."""
    assert RunConfig(model="m", data="d").rewards == ["math", "format"]
    config = RunConfig(model="m", data="d", objective="opd", teacher="t", group_size=1)
    assert config.rewards == [] and config.trainer(Sampling(4)).objective == OPD
    config = RunConfig(model="m", data="d", objective="opd", teacher="t", interpolation=0.5)
    assert config.trainer(Sampling(4)).objective == OPD.replace(interpolation=0.5)
    config = RunConfig(
        model="m", data="d", teacher="t", teacher_coef=0.5, rewards=["none"], group_size=1
    )
    assert config.trainer(Sampling(4)).teacher_coef == 0.5 and config.weights == []
    with pytest.raises(ValueError, match=r"interpolation: expected 1 for kl = None, got 0\.5"):
        RunConfig(model="m", data="d", interpolation=0.5).trainer(Sampling(4))
