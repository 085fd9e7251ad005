"""A vocabulary that is split over ranks: the loss and gradients of one, by four gloo processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import LossRequest, fused_loss, with_fused_head
from tests import oracles
from tests.conftest import HAS_GPU, HAS_TRITON
from tests.shards import (
    CASES,
    R_LORA,
    SLOW_CASES,
    B,
    Case,
    D,
    T,
    broken_rows,
    make,
    model_and_batch,
    options_of,
    run,
)
from tests.test_head import assert_close

pytestmark = pytest.mark.xdist_group("shards")
EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def megatron_logp(shards: list[Tensor], target: Tensor) -> Tensor:
    """Megatron-LM's vocab_parallel_cross_entropy, negated: three all-reduces over the shards.

    Source: megatron/core/tensor_parallel/cross_entropy.py, VocabParallelCrossEntropy.forward.
    """
    logits_max = torch.stack([shard.amax(-1) for shard in shards]).amax(0)
    predicted, sum_exp, start = 0.0, 0.0, 0
    for shard in shards:
        shard = shard - logits_max[..., None]
        stop = start + shard.shape[-1]
        outside = (target < start) | (target >= stop)
        local = (target - start).masked_fill(outside, 0)
        predicted += shard.gather(-1, local[..., None])[..., 0].masked_fill(outside, 0.0)
        sum_exp += shard.exp().sum(-1)
        start = stop
    return predicted - sum_exp.log()


def verl_entropy(shards: list[Tensor]) -> Tensor:
    """verl's vocab_parallel_entropy: log Z − Σ p·x, three all-reduces over the shards.

    Source: verl/utils/megatron/tensor_parallel.py, _VocabParallelEntropy.forward.
    """
    logits_max = torch.stack([shard.amax(-1) for shard in shards]).amax(0)
    powers = [(shard - logits_max[..., None]).exp() for shard in shards]
    total = sum(power.sum(-1) for power in powers)
    weighted = sum(
        torch.where(power > 0, power / total[..., None] * shard, 0.0).sum(-1)
        for power, shard in zip(powers, shards, strict=True)
    )
    return logits_max + total.log() - weighted


def whole_logits(case: Case, leaves: dict[str, Tensor], reference: bool = False) -> Tensor:
    """The logits of a case in float64, over the whole vocabulary."""
    if "logits" in leaves:
        logits = leaves["ref_logits" if reference else "logits"]
        # as unlikely as −inf, with a derivative that autograd can compute
        return logits.masked_fill(logits == -math.inf, -500.0)
    options = options_of(case)
    prefix = "ref_" if reference else ""
    logits = leaves[prefix + "hidden"] @ leaves[prefix + "weight"].T
    if not reference:
        if "lora_A" in leaves:
            low = leaves["hidden"] @ leaves["lora_A"].T @ leaves["lora_B"].T
            logits = logits + options.get("lora_scaling", 1.0) * low
        logits = logits + leaves.get("bias", 0.0)
    logits, cap = options.get("scale", 1.0) * logits, options.get("softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def expected_of(case: Case, old_logp: Tensor | None = None) -> dict[str, Any]:
    """Loss, vectors and gradients in float64, from formulas over the whole vocabulary."""
    made = make(case)
    leaves = {
        k: v.double().requires_grad_(not k.startswith("ref_"))
        for k, v in made.items()
        if k.removeprefix("ref_") in ("logits", "hidden", "weight", "bias", "lora_A", "lora_B")
    }
    target, A = made["target"], made["advantage"].double()[:, None]
    mask, temperature = target != -100, case.temperature
    logits = whole_logits(case, leaves)
    logp, _ = oracles.logp_and_entropy(logits, target.clamp(min=0), temperature)
    # relative to the largest, so that the entropy of a certain token has digits
    _, entropy = oracles.logp_and_entropy(logits, logits.detach().argmax(-1), temperature)
    if old_logp is None:
        return {"old_logp": (logp.detach() + made["noise"]).float()}
    old, kl, beta = old_logp.double(), torch.zeros_like(logp), 0.0
    if case.kind == "exact":
        kl, beta = oracles.exact_kl(logits, whole_logits(case, leaves, True), temperature), 0.3
    if case.logp:
        loss = (old * logp)[mask].sum() + (old.cos() * entropy)[mask].sum()
    elif case.kind == "sequence":
        ratio = oracles.sequence_ratio(logp, old, mask)
        loss = oracles.grpo(oracles.ppo_clip(ratio, A, 3e-4, 4e-4), kl, 0.0, mask)
    else:
        policy = oracles.ppo_clip((logp - old).exp(), A, 0.2, 0.28)
        loss = oracles.dapo(policy, kl, beta, mask)
        loss = loss - (0.1 * entropy[mask].mean() if case.kind == "bonus" else 0.0)
    loss.backward()
    vectors = {"logp": logp, "entropy": entropy, "kl": kl}
    if "logits" in leaves:
        # autograd's own, 1 − p, is 0 for a confident target
        gradient, at = leaves["logits"].grad, target.clamp(min=0)[..., None]
        gradient.scatter_(-1, at, -gradient.scatter(-1, at, 0.0).sum(-1, keepdim=True))
    return {
        "loss": loss.detach(),
        "logits": logits.detach(),
        "vectors": {k: torch.where(mask, v.detach(), 0.0) for k, v in vectors.items()},
        "gradients": {k: v.grad for k, v in leaves.items() if v.grad is not None},
    }


def old_logps(cases: dict[str, Case]) -> dict[str, Tensor]:
    return {name: expected_of(case)["old_logp"] for name, case in cases.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; they are started once."""
    return run(tmp_path_factory.mktemp("shards"), old_logps(CASES), slow=False)


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same with interpreted kernels, models and compiled graphs."""
    return run(tmp_path_factory.mktemp("slow_shards"), old_logps(SLOW_CASES), slow=True)


def check(case: Case, found: list[dict[str, Any]]) -> None:
    """The results of all ranks of a case against float64, and against each other."""
    expected = expected_of(case, expected_of(case)["old_logp"])
    target, eps = make(case)["target"], EPS[case.dtype]
    for each in found:
        assert torch.equal(each["loss"], found[0]["loss"])
        for name, vector in each["vectors"].items():
            assert torch.equal(vector, found[0]["vectors"][name])
        assert all(each["bits"]) and all(each.get("padding", []))
        assert torch.equal(each["ratio"], torch.ones(int((target != -100).sum())))
    # float32 statistics, of hidden states after a float32 product
    product = 2e-6 if case.hidden else 0.0
    assert torch.allclose(found[0]["loss"].double(), expected["loss"], rtol=2e-6, atol=1e-6)
    for name, vector in found[0]["vectors"].items():
        like = expected["vectors"][name]
        assert torch.allclose(vector.double(), like, rtol=6e-6, atol=1e-33 + product), name
    gradients = assembled(case, found)
    assert gradients.keys() == {
        k for k in expected["gradients"] if not case.frozen or k == "hidden"
    }
    for name, gradient in gradients.items():
        like = expected["gradients"][name]
        error = (gradient.double() - like).abs()
        # a sum over few rows, rounded once to the dtype
        bound = 1.01 * eps * like.abs() + 3e-6 * like.abs().amax()
        assert bool((error <= bound).all()), (name, float((error - bound).amax()))
    # (an exact KL there is a difference of float32 numbers, in one process also)
    if case.dtype == torch.float32 and "logits" in gradients and case.kind != "exact":
        # the confident target: every digit of a gradient of 1e-35
        row, like = gradients["logits"][0, 0].double(), expected["gradients"]["logits"][0, 0]
        assert torch.allclose(row, like, rtol=1e-4, atol=1e-42)


def assembled(case: Case, found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The gradients over the whole vocabulary, from the parts of all ranks."""
    gradients = {}
    for name in found[0]["gradients"]:
        parts = [each["gradients"][name] for each in found]
        if name == "hidden" and not case.reduced:
            assert not torch.equal(parts[0], parts[1])
            gradients[name] = torch.stack(parts).sum(0)
        elif name in ("hidden", "lora_A"):
            assert all(torch.equal(part, parts[0]) for part in parts)
            gradients[name] = parts[0]
        else:
            order = case.order or tuple(range(len(parts)))
            pieces = [parts[order.index(k)] for k in range(len(parts))]
            gradients[name] = torch.cat(pieces, -1 if name == "logits" else 0)
    return gradients


@pytest.mark.parametrize("name", CASES)
def test_shards_are_one(ranks: list[dict[str, Any]], name: str) -> None:
    check(CASES[name], [each[name] for each in ranks if name in each])


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="interprets the kernels")
@pytest.mark.parametrize("name", SLOW_CASES)
def test_shards_are_one_by_triton(slow_ranks: list[dict[str, Any]], name: str) -> None:
    check(SLOW_CASES[name], [each[name] for each in slow_ranks if name in each])


@pytest.mark.parametrize("name", ["token", "exact, four"])
def test_of_megatron_and_verl(ranks: list[dict[str, Any]], name: str) -> None:
    """The formulas that others use for shards, which lose the confident tokens' digits."""
    case = CASES[name]
    logits, target = make(case)["logits"].double() / case.temperature, make(case)["target"]
    shards, mask = list(logits.split(case.sizes, -1)), target != -100
    found = ranks[0][name] if name in ranks[0] else ranks[2][name]
    for vector, like in (
        ("logp", megatron_logp(shards, target.clamp(min=0))),
        ("entropy", verl_entropy(shards)),
    ):
        error = (found["vectors"][vector] - like)[mask]
        assert error.abs().amax() < 2e-6 * like[mask].abs().amax()


@pytest.mark.parametrize("name", CASES)
def test_bytes_on_the_wire(ranks: list[dict[str, Any]], name: str) -> None:
    """One small exchange; 4 float32 for each row, 8 with an exact KL; dhidden and dlora_A once."""
    case = CASES[name]
    for found in (each[name] for each in ranks if name in each):
        exchange, *gathered = found["bytes"]["gathered"]
        # the rows of a chunk are agreed on
        chunks = [count for count in gathered if count > 8]
        words = 8 if case.kind == "exact" else 4
        rows = B * T - (2 if case.hidden else 0)
        assert exchange <= 256
        assert sum(chunks) == 4 * words * rows
        reduced = found["bytes"].get("reduced", [])
        dhidden = [4 * rows * D] if case.hidden and case.reduced else []
        lora = case.head in ("lora", "all") and not case.frozen
        assert reduced == dhidden + ([4 * R_LORA * D] if lora else [])
        if not case.hidden:
            assert len(gathered) == 1 and not reduced
        elif case.dtype == torch.float32:
            assert len(chunks) > 1


def test_what_ranks_disagree_about(ranks: list[dict[str, Any]]) -> None:
    """A ValueError on every rank, by the argument's name, and no rank waits for another."""
    first, second = ranks[0]["refused"], ranks[1]["refused"]
    for name, expected in {
        "rows": "ValueError: group: expected as many rows on all ranks, got [B, T] = [(4, 10), ",
        "length": "ValueError: group: expected as many rows",
        "packed": "ValueError: group: expected as many rows",
        "temperature": "ValueError: temperature: expected the same on all ranks",
        "overlap": "ValueError: vocabulary_start: expected shards without gap or overlap",
        "gap": "ValueError: vocabulary_start: expected shards without gap or overlap",
        "some starts": "ValueError: vocabulary_start: expected shards without gap or overlap",
        "targets": "ValueError: target: expected the same on all ranks",
        "outside": "ValueError: target: expected -100 or an id in [0, V = 37)",
        "no group": "ValueError: group: expected a ProcessGroup",
        "start alone": "ValueError: vocabulary_start: expected None without a group, got 3",
        "advantage": "ValueError: advantage: expected the same on all ranks",
        "mask": "ValueError: mask: expected the same on all ranks",
        "width": "ValueError: hidden_size: expected the same on all ranks",
        "gradient": "ValueError: requires_grad: expected the same on all ranks",
        "objective": "ValueError: objective: expected the same on all ranks",
        "plan": "ValueError: plan: expected one of ('fast', 'lean') or None, got 'quick'",
        "lean": "NotImplementedError: plan: expected 'fast' or None with a group, got 'lean'",
    }.items():
        assert first[name].startswith(expected), (name, first[name])
        assert first[name] == second[name]


def test_what_one_rank_finds_wrong(ranks: list[dict[str, Any]]) -> None:
    """Its own error there, a ValueError on the other rank, and no rank waits for another."""
    first, second = ranks[0]["refused"], ranks[1]["refused"]
    for name, expected in {
        "its matrix": "ValueError: lm_head: expected [V, D = 8]",
        "its dtype": "ValueError: logits: expected one of",
        "its start": "ValueError: vocabulary_start: expected an int",
        "its strides": "ValueError: inplace: expected logits with a contiguous last axis",
        "its reference": "ValueError: ref_logits: expected shape [4, 10, 7]",
        "its recipe": "ValueError: objective: expected an Objective or one of",
        "its other recipe": "ValueError: objective: expected an Objective or one of",
    }.items():
        assert second[name].startswith(expected), (name, second[name])
        assert first[name].endswith("expected valid arguments on all ranks, got errors on [1]")
    for name in ("target", "objective", "plan", "kept", "backend"):
        found = first[f"its {name}"]
        assert found == f"ValueError: {name}: expected the same on all ranks of the group"
        assert found == second[f"its {name}"]


def test_rows_that_are_not_finite(ranks: list[dict[str, Any]]) -> None:
    """Wherever they are not, the row is left out on every rank, as by one."""
    case = Case("exact")
    logits, ref, arguments = broken_rows(case)
    leaf = logits.clone().requires_grad_()
    one = fused_loss(leaf, ref_logits=ref, **arguments)
    one.loss.backward()
    parts = [each["broken"] for each in ranks[2:]]
    for found in parts:
        assert torch.equal(found["dropped"], one._dropped)
        assert int(one._dropped.sum()) >= 8
        assert torch.allclose(found["loss"], one.loss, rtol=1e-6)
        assert torch.allclose(found["logp"], one.logp, rtol=1e-5, equal_nan=True)
    gradient = torch.cat([found["of"] for found in parts], -1)
    assert (gradient - leaf.grad).abs().amax() < 1e-6


def test_a_group_of_one_costs_nothing(ranks: list[dict[str, Any]]) -> None:
    for found in (each["alone"] for each in ranks[2:]):
        assert found["same"] and not found["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["", "FSDP2"])
@pytest.mark.parametrize("layout", ["shards", "whole", "DTensor"])
def test_a_model_with_a_parallel_head(
    slow_ranks: list[dict[str, Any]], layout: str, fsdp: str
) -> None:
    """ColwiseParallel, with every layout of its output; with FSDP2 on the other axis of a mesh."""
    model, ids, arguments = model_and_batch()
    one = with_fused_head(model)(input_ids=ids, request=LossRequest(**arguments))
    one.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for found in (each["models"][fsdp + layout] for each in slow_ranks):
        assert found["bits"]
        assert torch.allclose(found["logp"], one.logp[found["rows"]], rtol=0, atol=2e-6)
        assert_close(found["gradients"], gradients, tolerance=1e-5)


@pytest.mark.slow
def test_a_compiled_graph_gives_the_same_bits(slow_ranks: list[dict[str, Any]]) -> None:
    for found in slow_ranks:
        assert all(found["compiled"]["same"])


def test_confident_targets_are_in_the_cases() -> None:
    """What the tolerances above are about: a log-probability that float32 softmaxes round to 0."""
    logp = expected_of(Case(), torch.zeros(B, T))["vectors"]["logp"]
    assert -1e-30 < float(logp[0, 0]) < 0 and math.isfinite(float(logp.amin()))
