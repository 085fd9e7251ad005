"""Bad input: the error names the argument, what was expected and what came; nothing is touched."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from grpo_core import (
    RECIPES,
    Estimator,
    FutureKL,
    GroupNorm,
    LinearHead,
    Objective,
    PolicyFactor,
    Rejection,
    SamplerCorrection,
    SequenceWeight,
    Surrogate,
    clip,
    fused_linear_loss,
    fused_loss,
    group_advantages,
    linear_logp,
    linear_token_logp,
    logp_loss,
    merge_metrics,
    token_logp,
)
from grpo_core.integrations.trl_scores import linear_scores
from grpo_core.loss.dpo_loss import dpo_loss, sequence_logp
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.advantage import decoupled_advantages, relative_advantages
from grpo_core.objective.value import explained_variance, gae, rewards_with_kl, value_loss, whiten
from tests.conftest import HAS_GPU

B, T, V = 4, 3, 11
EXACT = RECIPES["dapo"].replace(kl="exact", beta=0.1)
SAMPLED = RECIPES["dapo"].replace(factor=PolicyFactor(SamplerCorrection()))
PACKED = {"logits": (12, V), "target": (12,), "sequence_id": torch.arange(12) // 3}
LONG = torch.int64


def good(**changes: Any) -> dict[str, Any]:
    """Arguments that work, with some changed; a tuple becomes a tensor of that shape."""
    shape = changes.get("logits", (B, T, V))
    rows = tuple(shape[:-1]) if isinstance(shape, tuple) else (B, T)
    arguments: dict[str, Any] = {
        "logits": shape,
        "target": torch.zeros(rows, dtype=LONG),
        "objective": "dapo",
        "advantage": rows,
    } | changes
    filled = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    filled["target"] = filled["target"].long() if "target" in changes else filled["target"]
    return {k: v for k, v in filled.items() if v is not None}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"logits": (V,)}, "logits: expected a tensor [B, T, V] or [N, V], got [11]"),
    ({"logits": torch.zeros(B, T, V, dtype=LONG)}, "logits: expected one of "),
    ({"logits": torch.zeros(B, T, 0)}, "logits: expected V >= 1, got shape [4, 3, 0]"),
    (
        {"target": (B, T + 1)},
        "target: expected shape [4, 3] for logits [4, 3, 11], got [4, 4]; position t predicts",
    ),
    ({"target": torch.full((B, T), V)}, "target: expected -100 or an id in [0, V = 11), got 11"),
    ({"target": torch.full((B, T), -1)}, "target: expected -100 or an id in [0, V = 11), got -1"),
    ({"mask": (B,)}, "mask: expected shape [4, 3], got [4]"),
    ({"mask": [1, 0]}, "mask: expected a tensor, got list"),
    ({"advantage": (T,)}, "advantage: expected shape [4, 3] or [4], got [3]"),
    ({"advantage": torch.zeros(B, dtype=LONG)}, "advantage: expected a floating-point tensor"),
    ({"advantage": None}, "advantage: expected exactly one of advantage and rewards, got neither"),
    ({"rewards": (B,)}, "advantage: expected exactly one of advantage and rewards, got both"),
    (
        {"advantage": None, "rewards": (B,)},
        "group_size: expected an int that divides B = 4, or group_id, got None",
    ),
    ({"group_id": torch.zeros(B, dtype=LONG)}, "group_id: expected None without rewards"),
    (
        {"advantage": None, "rewards": (B,), "group_size": 2, "group_id": torch.zeros(B).long()},
        "group_size: expected exactly one of it and group_id, got both",
    ),
    (
        {"advantage": None, "rewards": (B,), "group_id": torch.arange(B) + 1},
        "group_id: expected integers in [0, B = 4), got 4 at row 3",
    ),
    (
        {"advantage": None, "rewards": (B,), "group_size": 3},
        "group_size: expected an int that divides B = 4, or group_id, got 3",
    ),
    (
        {"advantage": None, "rewards": (8,), "group_size": 2},
        "rewards: expected shape [4], got [8]",
    ),
    (
        {"advantage": None, "rewards": torch.tensor([0, 0, torch.nan, 0]), "group_size": 2},
        "rewards: expected finite numbers, got nan at index 2",
    ),
    (
        {"advantage": None, "rewards": torch.tensor([0, -torch.inf, 0, 0]), "group_size": 2},
        "rewards: expected finite numbers, got -inf at index 1",
    ),
    ({"old_logp": (B,)}, "old_logp: expected shape [4, 3], got [4]"),
    ({"ref_logp": (B, T, V)}, "ref_logp: expected shape [4, 3], got [4, 3, 11]"),
    ({"objective": "grpo"}, "ref_logp: expected a tensor for beta = 0.04, got None"),
    (
        {"objective": EXACT, "ref_logits": None},
        "ref_logits: expected a tensor for beta = 0.1, got None",
    ),
    (
        {"objective": EXACT, "ref_logits": (B, T, V), "ref_logp": (B, T)},
        "ref_logp: expected None for kl = 'exact', got one (it takes ref_logits)",
    ),
    (
        {"objective": EXACT, "ref_logits": (B, T)},
        "ref_logits: expected shape [4, 3, 11], got [4, 3]",
    ),
    (
        {"objective": EXACT, "ref_logits": torch.zeros(B, T, V, dtype=LONG)},
        "ref_logits: expected a floating-point tensor, got torch.int64",
    ),
    (
        {"ref_logits": (B, T, V)},
        "ref_logits: expected None for kl = None, got one (use kl='exact', or give ref_logp=",
    ),
    ({"objective": SAMPLED}, "sampler_logp: expected a tensor for factor.sampler, got None"),
    (
        {"objective": SAMPLED, "sampler_logp": (B,)},
        "sampler_logp: expected shape [4, 3], got [4]",
    ),
    ({"objective": "gropo"}, "objective: expected an Objective or one of ['bnpo', 'cispo', "),
    ({"objective": Objective}, "objective: expected an Objective or one of"),
    ({"temperature": 0.0}, "temperature: expected a finite Python number >= 0.0001, got 0.0"),
    (
        {"temperature": float("nan")},
        "temperature: expected a finite Python number >= 0.0001, got nan",
    ),
    ({"normalizer": 0}, "normalizer: expected a finite number > 0, got 0"),
    ({"normalizer": (2,)}, "normalizer: expected shape [] or [4, 3], got [2]"),
    ({"normalizer": torch.tensor(0.0)}, "normalizer: expected a finite number > 0, got 0.0"),
    ({"normalizer": torch.tensor(-3)}, "normalizer: expected a finite number > 0, got -3"),
    ({"normalizer": torch.tensor(torch.nan)}, "normalizer: expected a finite number > 0, got nan"),
    (
        {"normalizer": torch.tensor(1j)},
        "normalizer: expected real numbers or bool, got torch.complex64",
    ),
    ({"normalizer": True}, "normalizer: expected a finite number > 0, got True"),
    ({"group_size": 2}, "group_size: expected None without rewards, got 2"),
    ({"objective": ["dapo"]}, "objective: expected an Objective or one of"),
    ({"normalizer": "8"}, "normalizer: expected a finite number > 0, got '8'"),
    ({"sequence_id": (B,)}, "sequence_id: expected None for logits [B, T, V], got a tensor"),
    (PACKED | {"sequence_id": None}, "sequence_id: expected [N] for packed logits [N, V]"),
    (PACKED | {"sequence_id": (12,)}, "sequence_id: expected an integer tensor, got torch.float32"),
    (
        PACKED | {"sequence_id": torch.arange(12) + 1},
        "sequence_id: expected integers in [0, N = 12), got 12 at row 11",
    ),
    (
        PACKED | {"advantage": None, "rewards": (12,), "group_size": 2},
        "rewards: expected one per sequence, got 12, one per token, for 4 sequences",
    ),
    (PACKED | {"advantage": (4,)}, "advantage: expected shape [12], got [4]"),
    (
        PACKED | {"advantage": None, "rewards": (2,), "group_size": 2},
        "sequence_id: expected ids below the 2 rewards, got 2 at row 6",
    ),
    (
        PACKED | {"advantage": None, "rewards": (0,), "group_size": 2},
        "rewards: expected one for every sequence, got [0]",
    ),
    (
        PACKED | {"objective": "dr_grpo"},
        "normalizer: expected sequences · length for constant_length over packed rows, got None",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
def test_bad_arguments_are_named(loss: Any, changes: dict[str, Any], message: str) -> None:
    """And even with inplace=True the logits are as they were."""
    arguments = good(**changes)
    logits = arguments["logits"].clone()
    if logits.is_floating_point():
        arguments["logits"].requires_grad_()
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(**arguments, inplace=True)
    assert torch.equal(arguments["logits"].detach(), logits)


# more words than uint8 holds; its 156 is -100 in int8
WORDS, WORD = 300, 156


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("word", [WORD, 99])
def test_narrow_targets_are_the_words_they_name(
    backend: str, dtype: torch.dtype, word: int
) -> None:
    """Of two rows with one word each, against log_softmax; -100 is masked where there is one."""
    if word > torch.iinfo(dtype).max:
        pytest.skip("no such word in this type")
    hidden, matrix = torch.randn(2, 8), torch.randn(WORDS, 8)
    wide = torch.tensor([word, -100 if dtype.is_signed else 7])
    logits, target = hidden @ matrix.T, wide.to(dtype)
    exact = torch.log_softmax(logits.double(), -1).gather(1, wide.clamp(min=0)[:, None])[:, 0]
    exact = torch.where(wide < 0, 0.0, exact).float()
    packed = {"advantage": torch.ones(2), "sequence_id": torch.arange(2).to(dtype)}
    scored = torch.where(wide < 0, 0, wide).to(dtype)
    found = {
        "fused_loss": fused_loss(logits, target, objective="dapo", backend=backend, **packed).logp,
        "fused_linear_loss": fused_linear_loss(
            hidden, matrix, target, objective="dapo", backend=backend, **packed
        ).logp,
        "token_logp": token_logp(logits, target, backend=backend).logp,
        "linear_token_logp": linear_token_logp(hidden, matrix, target, backend=backend).logp,
        "linear_logp": linear_logp(hidden, matrix, target, backend=backend).logp,
        "linear_scores": torch.where(
            wide < 0, 0.0, linear_scores(hidden, matrix, scored, backend=backend).logp
        ),
    }
    for name, logp in found.items():
        torch.testing.assert_close(logp, exact, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (torch.int8, -1),
        (torch.uint8, 200),
        (torch.int16, 300),
        (torch.uint16, 65436),
        (torch.uint32, 2**32 - 100),
        (torch.uint64, 2**64 - 100),
        (torch.int64, -1),
    ],
)
def test_narrow_targets_that_are_no_words_are_refused(dtype: torch.dtype, bad: int) -> None:
    """Some of them are -100 once the type is forgotten; V = 150 wraps to -106 in int8."""
    logits, matrix = torch.randn(1, 150), torch.randn(150, 8)
    target = torch.tensor([bad], dtype=dtype)
    for call in (
        lambda: fused_loss(
            logits,
            target,
            objective="dapo",
            advantage=torch.ones(1),
            sequence_id=torch.zeros(1).int(),
        ),
        lambda: token_logp(logits, target),
        lambda: linear_token_logp(torch.randn(1, 8), matrix, target),
        lambda: linear_logp(torch.randn(1, 8), matrix, target),
        lambda: linear_scores(torch.randn(1, 8), matrix, target),
    ):
        with pytest.raises(ValueError, match=r"target: expected -100 or an id in \[0, V = 150\)"):
            call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int64])
def test_narrow_ids_are_ids(dtype: torch.dtype) -> None:
    """300 rows, a number beyond uint8: of two sequences, of two prompts."""
    rows = torch.arange(300)
    ids, rewards = (rows % 2).to(dtype), (rows % 4 < 2).float()
    objective = RECIPES["gspo"].replace(aggregation="token_sum")
    given = {"logits": torch.zeros(300, 5), "target": rows % 5, "objective": objective}
    wide = fused_loss(**given, sequence_id=ids.long(), advantage=torch.ones(300))
    assert fused_loss(**given, sequence_id=ids, advantage=torch.ones(300)).loss == wide.loss == -300
    # each prompt has as many of reward 1 as of 0, 150 in all: the variance is 150·¼/149
    found = relative_advantages(rewards, ids, Estimator(epsilon=0.0))
    assert torch.allclose(found.abs(), torch.full((300,), 0.5 / (150 * 0.25 / 149) ** 0.5))
    assert torch.equal(found > 0, rewards > 0)
    below = (ids.long() - 1).to(torch.int8)
    sums = sequence_logp(torch.ones(300), torch.ones(300), ids, sequences=2)
    assert sums.tolist() == [150.0, 150.0]
    for call in (
        lambda: fused_loss(**given, sequence_id=below, advantage=torch.ones(300)),
        lambda: relative_advantages(rewards, below),
        lambda: sequence_logp(torch.ones(300), torch.ones(300), ids, sequences=1),
        lambda: fused_loss(**given, sequence_id=ids.bool(), advantage=torch.ones(300)),
    ):
        with pytest.raises(
            (ValueError, NotImplementedError), match=r"(sequence_id|groups): expected"
        ):
            call()


def test_no_rows_at_all_are_legal(backend: str) -> None:
    """A rank may have none: exact KL, in place, groups by id included."""
    none, ids = torch.zeros(0), torch.zeros(0, dtype=LONG)
    for inplace in (False, True):
        logits = torch.zeros(0, V, requires_grad=True)
        out = fused_loss(
            logits,
            ids,
            objective=EXACT,
            ref_logits=torch.zeros(0, V),
            rewards=none,
            group_id=ids,
            sequence_id=ids,
            inplace=inplace,
            backend=backend,
        )
        out.loss.backward()
        assert out.loss == 0
        assert logits.grad.shape == (0, V)
        assert out.metrics["tokens"] == 0
    same = torch.zeros(2, V)
    with pytest.raises(ValueError, match="ref_logits: expected memory of its own"):
        fused_loss(
            same,
            ids.new_zeros(2),
            objective=EXACT,
            ref_logits=same,
            advantage=torch.ones(2),
            sequence_id=torch.arange(2),
            inplace=True,
            backend=backend,
        )


def test_arguments_that_work_do_work() -> None:
    """The base of the table above is no error itself."""
    assert fused_loss(**good()).loss == 0
    assert fused_loss(**good(**PACKED)).loss == 0
    assert fused_loss(**good(advantage=(B,))).loss == 0
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        narrow = torch.full((B, T), 5).to(dtype)
        out = fused_loss(**good() | {"target": narrow})
        assert torch.equal(out.logp, fused_loss(**good() | {"target": narrow.long()}).logp)
    assert fused_loss(**good(mask=torch.ones(B, T), normalizer=torch.tensor(3))).loss == 0


def test_fused_loss_has_no_float64() -> None:
    with pytest.raises(ValueError, match=r"logits: expected one of .*got torch\.float64"):
        fused_loss(**good(logits=torch.zeros(B, T, V, dtype=torch.float64)))
    double = good(logits=torch.zeros(B, T, V, dtype=torch.float64))
    assert reference_loss(**double).loss.dtype == torch.float64


def test_inplace_needs_rows_of_its_own() -> None:
    """Strided words and overlapping rows have no place for a gradient of their own."""
    for logits in (
        torch.zeros(B, T, 2 * V)[..., ::2],
        torch.zeros(B, 1, V).expand(B, T, V),
        torch.zeros(60).as_strided((B, T, V), (9, 3, 1)),
    ):
        with pytest.raises(ValueError, match="inplace: expected logits with a contiguous last"):
            fused_loss(**good(logits=logits, inplace=True))
        leaf = logits.clone().requires_grad_()
        fused_loss(**good(logits=leaf, advantage=torch.ones(B))).loss.backward()
        expanded = fused_loss(**good(logits=logits, advantage=torch.ones(B)))
        assert torch.equal(expanded.loss, fused_loss(**good(advantage=torch.ones(B))).loss)


def test_token_logp_checks_too() -> None:
    logits = torch.zeros(B, T, V)
    with pytest.raises(ValueError, match=r"target: expected shape \[4, 3\], got \[4\]"):
        token_logp(logits, torch.zeros(B, dtype=LONG))
    with pytest.raises(ValueError, match=r"target: expected -100 or an id"):
        token_logp(logits, torch.full((B, T), V))
    with pytest.raises(ValueError, match="temperature: expected a finite Python number >="):
        token_logp(logits, torch.zeros(B, T, dtype=LONG), temperature=-1)
    out = token_logp(logits, torch.full((B, T), V), validate=False)
    assert torch.equal(out.logp, torch.zeros(B, T))


def test_backends_are_named() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'cuda'"):
        fused_loss(**good(backend="cuda"))


@pytest.mark.skipif(HAS_GPU, reason="there the triton backend runs")
def test_triton_without_gpu_or_interpreter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(NotImplementedError, match='backend: "triton" needs tensors on a GPU'):
        fused_loss(**good(backend="triton"))


def test_constants_get_no_gradient() -> None:
    """Only the logits are differentiated; advantages that require grad are taken as numbers."""
    advantage = torch.ones(B, requires_grad=True)
    logits = torch.randn(B, T, V, requires_grad=True)
    objective = Objective(clip(0.2))
    fused_loss(**good(logits=logits, advantage=advantage, objective=objective)).loss.backward()
    assert advantage.grad is None
    assert logits.grad.abs().sum() > 0


def test_unchecked_rows_of_a_sequence_without_a_reward_are_left_out() -> None:
    """Ids 2 and 3 of four sequences, for two rewards."""
    given = good(**PACKED, advantage=None, rewards=torch.tensor([0.0, 1.0]), group_size=2)
    out = fused_loss(**given, validate=False)
    assert int(out.metrics["tokens"]) == 6
    assert not out._valid[6:].any()


@pytest.mark.parametrize("record", [SamplerCorrection, FutureKL])
def test_the_bounds_of_a_ratio_are_not_negative(record: Any) -> None:
    with pytest.raises(ValueError, match="low: expected 0 <= low <= high, got -0"):
        record(low=-0.5, high=1.5)
    assert Rejection(low=-0.5, high=1.5).low == -0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    logits = torch.randn(B, T, V, requires_grad=True)
    arguments = good(logits=logits, advantage=torch.ones(B))
    expected = fused_loss(**arguments).loss
    try:
        torch.set_default_dtype(dtype)
        loss = fused_loss(**arguments).loss
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32


def as_vmapped(call: Any, name: str, given: dict[str, Any]) -> None:
    """The call for every one of a batch of two, by torch.func."""
    torch.func.vmap(lambda x: call(**given | {name: x}))(torch.stack([given[name]] * 2))


def as_differentiated(call: Any, name: str, given: dict[str, Any]) -> None:
    """The gradient of something, by torch.func."""

    def total(x: Tensor) -> Tensor:
        out = call(**given | {name: x})
        return out.loss if hasattr(out, "loss") else (out if isinstance(out, Tensor) else out[0])

    torch.func.grad(lambda x: total(x).sum())(given[name])


def as_pushed(call: Any, name: str, given: dict[str, Any]) -> None:
    """A directional derivative, by torch.func."""
    torch.func.jvp(lambda x: call(**given | {name: x}), (given[name],), (given[name],))


def as_dual(call: Any, name: str, given: dict[str, Any]) -> None:
    """The same by hand."""
    with forward_ad.dual_level():
        call(**given | {name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))})


TRANSFORMS = [as_vmapped, as_differentiated, as_pushed, as_dual]
# what no tensor of ours may be, made of one that works
TENSORS = {
    "text": lambda _: "x",
    "list": lambda good: good.tolist(),
    "numpy": lambda good: good.numpy(),
    "a number": lambda _: 1.0,
    "another shape": lambda good: torch.zeros(7, 7, 7, 7).to(good.dtype),
    "complex": lambda good: good.to(torch.complex64),
    "sparse": lambda good: good.to_sparse(),
    "nested": lambda good: torch.nested.nested_tensor([good, good]),
    "jagged": lambda good: torch.nested.nested_tensor([good, good], layout=torch.jagged),
}
NUMBERS = {
    "text": "x",
    "a list": [1.0],
    "complex": 1j,
    "a tensor": torch.ones(2),
    "True": True,
    "NaN": math.nan,
}
INTS = NUMBERS | {"a float": 1.5, "0": 0, "negative": -1}
RECORDS = {"text": "x", "3": 3, "a list": [1], "a class": Objective, "a tensor": torch.ones(2)}

N, D = 4, 6
vector, ids, mask = torch.zeros(N), torch.arange(N) // 2, torch.ones(N)
padded = torch.zeros(2, 3)
logits = torch.zeros(N, V)
hidden, matrix = torch.zeros(N, D), torch.ones(V, D)
LOSS: dict[str, Any] = {
    "objective": RECIPES["dapo"],
    "rewards": torch.zeros(2),
    "group_id": torch.zeros(2, dtype=LONG),
    "old_logp": vector,
    "ref_logp": vector,
    "sampler_logp": vector,
    "mask": mask,
    "sequence_id": ids,
    "normalizer": 1.0,
}
GROUPED = {"rewards": torch.zeros(4), "group_size": 2}
WEIGHED = {"values": padded, "old_values": padded, "returns": padded, "weight": padded}
# function -> what works, every argument of it being spoiled in turn
FUNCTIONS: dict[Any, dict[str, Any]] = {
    fused_loss: {"logits": logits, "target": ids, "temperature": 1.0} | LOSS,
    token_logp: {"logits": logits, "target": ids, "mask": mask, "temperature": 1.0},
    fused_linear_loss: {
        "hidden": hidden,
        "lm_head": matrix,
        "target": ids,
        "temperature": 1.0,
        "memory_budget": 2**20,
    }
    | LOSS,
    linear_token_logp: {
        "hidden": hidden,
        "lm_head": matrix,
        "target": ids,
        "mask": mask,
        "temperature": 1.0,
        "memory_budget": 2**20,
    },
    linear_logp: {
        "hidden": hidden,
        "lm_head": matrix,
        "target": ids,
        "mask": mask,
        "temperature": 1.0,
        "memory_budget": 2**20,
    },
    linear_scores: {"hidden": hidden, "lm_head": matrix, "target": ids, "temperature": 1.0},
    logp_loss: {"logp": vector, "entropy": vector, "factor": vector} | LOSS,
    reference_loss: {"logits": logits, "target": ids, "temperature": 1.0} | LOSS,
    group_advantages: GROUPED | {"epsilon": 0.0, "ddof": 1},
    relative_advantages: {"rewards": torch.zeros(4), "groups": ids, "tokens": mask, "mask": mask},
    decoupled_advantages: {
        "rewards": torch.zeros(4, 2),
        "groups": ids,
        "weights": torch.ones(2),
        "tokens": mask,
        "mask": mask,
    },
    dpo_loss: {
        "logp_chosen": vector,
        "logp_rejected": vector,
        "ref_chosen": vector,
        "ref_rejected": vector,
        "weight": vector,
        "beta": 0.5,
    },
    sequence_logp: {"logp": vector, "mask": mask, "sequence_id": ids, "sequences": 2},
    gae: {"rewards": padded, "values": padded, "mask": padded, "gamma": 0.5, "lam": 0.5},
    rewards_with_kl: {
        "rewards": torch.zeros(2),
        "logp": padded,
        "ref_logp": padded,
        "mask": padded,
        "beta": 0.5,
    },
    whiten: {"vector": padded, "mask": padded},
    value_loss: WEIGHED | {"eps": 0.5},
    explained_variance: {"values": padded, "returns": padded, "mask": padded},
    LinearHead: {
        "weight": matrix,
        "bias": torch.zeros(V),
        "lora_A": torch.zeros(2, D),
        "lora_B": torch.zeros(V, 2),
        "softcap": 1.5,
        "scale": 1.5,
        "lora_scaling": 1.5,
        "vocabulary": 3,
    },
    Objective: {
        "surrogate": clip(0.2),
        "kl": "k3",
        "beta": 0.5,
        "ratio_level": "token",
        "advantage": GroupNorm(),
        "aggregation": "token_mean",
        "kl_times_ratio": RECIPES,
        "entropy_coef": 0.5,
        "entropy_aggregation": "token_mean",
        "factor": PolicyFactor(),
        "token_clip": RECIPES,
    },
    Surrogate: {"function": clip(0.2).function, "args": RECIPES, "homogeneous": RECIPES},
    PolicyFactor: {
        "sampler": SamplerCorrection(),
        "off_policy_delta": 0.5,
        "top_entropy": 0.5,
        "sequence_weight": SequenceWeight(),
        "rejections": RECIPES,
        "current": RECIPES,
        "second_moment": 0.5,
        "future_kl": FutureKL(),
    },
    FutureKL: {"half_life": 0.5, "low": 0.5, "max_ratio": 0.5},
    GroupNorm: {"ddof": 1, "epsilon": 0.5, "scale": RECIPES},
    Estimator: {"baseline": "group", "scale": "group", "ddof": 1, "epsilon": 0.5},
    SamplerCorrection: {"level": "token", "action": "truncate", "low": 0.5},
    Rejection: {"measure": "k2", "over": "sum", "low": 0.5},
    SequenceWeight: {"k_pos": 0.5, "lambda_pos": 0.5, "k_neg": 0.5, "lambda_neg": 0.5},
    clip: {"eps_low": 0.5, "eps_high": 0.5},
}
KERNELS = [
    fused_loss,
    token_logp,
    fused_linear_loss,
    linear_token_logp,
    linear_logp,
    linear_scores,
    logp_loss,
    reference_loss,
    group_advantages,
]
MORE = {
    "token_clip": [0.2, (0.2,), (0.1, 0.2, 0.3), ("a", "b"), (0.1, -0.2), "ab", {}, True],
    "kl_times_ratio": ["x", 1, None],
    "args": ["x", 3, ("a",), (None,), (True,)],
    "homogeneous": [1, "x"],
    "rejections": [3, Rejection(), ("x",), [Rejection()]],
    "current": [1, "x"],
    "scale": [1, "x", None],
}


# of any shape: the others are said to differ from it
SHAPELESS = {(whiten, "vector"), (value_loss, "values"), (explained_variance, "values")}

FINE = {("ddof", "0"), ("sequences", "0")}


def spoilt(function: Any, name: str) -> list[tuple[str, Any]]:
    """What an argument is not, by name."""
    good = FUNCTIONS[function][name]
    if good is RECIPES:
        return [(repr(bad), bad) for bad in MORE[name]]
    if isinstance(good, Tensor):
        return [
            (kind, make(good))
            for kind, make in TENSORS.items()
            if not (kind == "another shape" and (function, name) in SHAPELESS)
            and not (kind == "a number" and name == "normalizer")
        ]
    pool = NUMBERS if isinstance(good, float) else INTS if isinstance(good, int) else RECORDS
    return [(kind, bad) for kind, bad in pool.items() if (name, kind) not in FINE]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_whatever_is_wrong_is_named(function: Any) -> None:
    """The argument, what was expected, what came; nothing of torch's own."""
    works = {name: x for name, x in FUNCTIONS[function].items() if x is not RECIPES}
    function(**works)
    unnamed = []
    for name in FUNCTIONS[function]:
        for kind, bad in spoilt(function, name):
            try:
                function(**works | {name: bad})
                unnamed.append(f"{name}, {kind}: accepted")
            except Exception as error:
                named = re.match(rf"{name}(\[.*\])?: expected .*, got .*", str(error), re.DOTALL)
                if not named or not isinstance(error, (ValueError, TypeError, NotImplementedError)):
                    unnamed.append(f"{name}, {kind}: {type(error).__name__}: {str(error)[:120]}")
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(function: Any, transform: Any) -> None:
    """Kernels read memory, which a transform hides; nothing but real numbers has a derivative."""
    works = {name: x for name, x in FUNCTIONS[function].items() if x is not RECIPES}
    for name, good in works.items():
        if isinstance(good, Tensor) and (good.is_floating_point() or transform is as_vmapped):
            with pytest.raises(NotImplementedError, match=f"^{name}: expected a tensor .*, got "):
                transform(function, name, works)


@pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)
def test_tensors_without_values_are_refused(function: Any) -> None:
    works = {name: x for name, x in FUNCTIONS[function].items() if x is not RECIPES}
    for name, good in works.items():
        if isinstance(good, Tensor):
            with pytest.raises(NotImplementedError, match=f"^{name}: expected .*, got one on meta"):
                function(**works | {name: good.to("meta")})


def test_plain_operations_go_through_transforms() -> None:
    """A batch by vmap is a loop over it."""
    rewards, values = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    mask = torch.ones(2, 5)
    for found, one in (
        (
            torch.func.vmap(lambda r, v: gae(r, v, mask)[0])(rewards, values),
            [gae(r, v, mask)[0] for r, v in zip(rewards, values, strict=True)],
        ),
        (
            torch.func.vmap(lambda r: relative_advantages(r, 5))(rewards.flatten(1)),
            [relative_advantages(r, 5) for r in rewards.flatten(1)],
        ),
        (
            torch.func.vmap(lambda r: dpo_loss(r, -r, r, r, beta=0.1).loss)(rewards.flatten(1)),
            [dpo_loss(r, -r, r, r, beta=0.1).loss for r in rewards.flatten(1)],
        ),
    ):
        assert torch.allclose(found, torch.stack(one))


def test_figures_that_are_not_ours_are_not_merged() -> None:
    parts = fused_loss(**good()).metrics
    assert merge_metrics([parts, parts])["tokens"] == 2 * parts["tokens"]
    for bad, message in (
        (3, "parts: expected a list of `LossOutput.metrics`, got 3"),
        ([3], "parts: expected a list of `LossOutput.metrics`, got [3]"),
        ([], "parts: expected figures of the same names, got []"),
        ([parts, {"loss": parts["loss"]}], "parts: expected figures of the same names, got "),
        ([parts | {"own": parts["loss"]}], "got ['own']"),
        ([{"loss": parts["loss"]}], "got none named ['ratio_mean', 'ratio_square']"),
        ([parts | {"loss": 1.0}], "'loss']: expected a tensor, got float"),
        ([parts | {"loss": torch.ones(2)}], "'loss']: expected shape [], got [2]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            merge_metrics(bad)  # type: ignore[arg-type]
