"""preset("verl", ...) against what the real verl 0.9.1 answered: tests/golden/verl.json.

Every case of the file is used, and every difference that stays is asserted as what it is. Losses
go through logits of two words whose first has the log-probability that verl was given.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core import fused_loss
from grpo_core.backends.formula import as_torch
from grpo_core.integrations.presets import VerlPreset, preset
from grpo_core.integrations.presets.verl_options import AGGREGATIONS, KLS
from grpo_core.kernels import kl as kl_estimators
from grpo_core.loss.reference import reference_loss
from grpo_core.objective.advantage import Estimator, relative_advantages
from grpo_core.objective.aggregation import token_weights
from grpo_core.objective.value import gae, whiten
from tests.conftest import is_interpreted

Case = dict[str, Any]
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden/verl.json").read_text())
# verl adds 1e-8 to counts; weights of a sampler are float32 here
EXACT, SINGLE = 2e-8, 3e-7


@cache
def batch(name: str) -> dict[str, Tensor]:
    """The inputs of that name; all float64 but for masks and indices."""
    kinds = {"response_mask": torch.bool, "index": torch.int64}
    rows = GOLDEN["batches"][name]
    return {key: torch.tensor(v, dtype=kinds.get(key, torch.float64)) for key, v in rows.items()}


def tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest of theirs."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def logits_of(log_prob: Tensor) -> Tensor:
    """Logits [..., 2] of which the first word has that log-probability."""
    return torch.stack([log_prob, torch.log1p(-log_prob.exp())], -1)


def by_log_prob(gradient: Tensor, log_prob: Tensor) -> Tensor:
    """dL/dlog_prob from the gradient by the logits: dlogp/dx = (1 − p, p − 1)."""
    assert torch.allclose(gradient.sum(-1), torch.zeros_like(log_prob), atol=1e-7)
    return gradient[..., 0] / (1 - log_prob.exp())


def asked_of_verl(case: Case) -> dict[str, Any]:
    """The options of a policy loss without what is not an option of the loss function."""
    return {
        name: value
        for name, value in case["options"].items()
        # the loss functions do not read loss_scale_factor, only verl's ppo_loss does
        if name not in ("global_batch_info", "loss_scale_factor")
    }


def given(case: Case, ours: VerlPreset) -> dict[str, Any]:
    """The arguments of our loss, as the preset asks for them."""
    b = batch(case["batch"])
    arguments = {
        "target": torch.zeros_like(b["response_mask"], dtype=torch.int64),
        "objective": ours.objective,
        "advantage": b["advantages"],
        "mask": b["response_mask"],
        "old_logp": b["old_log_prob"],
        "normalizer": ours.normalizer(
            b["response_mask"], **case["options"].get("global_batch_info", {})
        ),
    }
    if case["rollout_is_weights"]:
        arguments["sampler_logp"] = ours.sampler_logp(b["old_log_prob"], b["rollout_is_weights"])
    elif "sampler_logp" in ours.arguments:
        # in bypass mode the old policy is the sampler
        arguments["sampler_logp"] = b["old_log_prob"]
    assert ours.arguments.keys() <= {*arguments, "temperature"}
    return arguments


def preset_of(case: Case) -> VerlPreset:
    """The preset of a case's options."""
    ours = preset("verl", **asked_of_verl(case))
    return ours.weighted() if case["rollout_is_weights"] else ours


def is_known_to_differ(case: Case) -> bool:
    """GMPO with an advantage of exactly 0 inside a sequence, see the next test but one."""
    return case["options"]["loss_mode"] == "geo_mean" and case["batch"] == "token_advantages"


def test_policy_losses() -> None:
    """Loss, gradient and metrics of 204 of 205 cases; the last one is in the next test."""
    worst: dict[str, list[float]] = {}
    used = Counter()
    for case in GOLDEN["policy_losses"]:
        if is_known_to_differ(case):
            continue
        used[case["options"]["loss_mode"]] += 1
        ours, theirs = preset_of(case), case["outputs"]
        log_prob = batch(case["batch"])["log_prob"]
        logits = logits_of(log_prob).requires_grad_()
        out = reference_loss(logits, **given(case, ours))
        (gradient,) = torch.autograd.grad(out.loss, logits)
        gradient = by_log_prob(gradient, log_prob)
        size = max(abs(theirs["loss"]), float(tensor(theirs["grad"]).abs().max()))
        metrics = ours.metrics(out)
        logged = {k: v for k, v in theirs["metrics"].items() if not k.startswith("rollout_corr/")}
        assert metrics.keys() == logged.keys(), case["options"]
        figures = [abs(float(metrics[k]) - v) for k, v in logged.items()]
        found = [
            abs(float(out.loss.detach()) - theirs["loss"]) / size,
            deviation(gradient, tensor(theirs["grad"])),
            max(figures, default=0.0),
        ]
        allowed = SINGLE if "sampler_logp" in ours.arguments else EXACT
        assert max(found) <= allowed, (found, case["batch"], case["options"])
        seen = worst.setdefault(f"{allowed:g}", [0.0, 0.0, 0.0])
        worst[f"{allowed:g}"] = [max(a, b) for a, b in zip(seen, found, strict=True)]
    print(f"{used.total()} cases; worst loss, gradient, metrics: {worst}")
    expected = {"vanilla": 25, "gpg": 21, "geo_mean": 21, "bypass_mode": 5}
    assert (
        used == dict.fromkeys(("dppo_tv", "dppo_kl", "gspo", "sapo", "dro", "cispo"), 22) | expected
    )


def gmpo(log_prob: Tensor, b: dict[str, Tensor], options: dict[str, Any], sign: Tensor) -> Tensor:
    """verl's geo_mean, with the sign that a token's clip goes by given apart."""
    mask = b["response_mask"].double()
    d = log_prob - b["old_log_prob"]
    bounded = d.clamp(-options["clip_ratio_low"], options["clip_ratio_high"])
    d = sign * torch.minimum(sign * d, sign * bounded)
    n = mask.sum(1)
    ratio = ((d * mask).sum(1) / n).exp()
    return -(ratio * (b["advantages"] * mask).sum(1) / n).mean()


def test_gmpo_of_a_token_without_advantage() -> None:
    """Where A = 0 verl's sign is 0, and the token's log-ratio vanishes; here it is −1."""
    (case,) = (case for case in GOLDEN["policy_losses"] if is_known_to_differ(case))
    b, options, theirs = batch(case["batch"]), case["options"], case["outputs"]
    A = b["advantages"]
    assert ((A == 0) & b["response_mask"]).any()
    log_prob = b["log_prob"].clone().requires_grad_()
    of_verl = gmpo(log_prob, b, options, A.sign())
    (slope,) = torch.autograd.grad(of_verl, log_prob)
    assert math.isclose(of_verl.detach(), theirs["loss"], rel_tol=EXACT)
    assert deviation(slope, tensor(theirs["grad"])) < EXACT
    of_ours = gmpo(log_prob, b, options, torch.where(A > 0, 1.0, -1.0))
    (slope,) = torch.autograd.grad(of_ours, log_prob)
    ours = preset_of(case)
    logits = logits_of(b["log_prob"]).requires_grad_()
    out = reference_loss(logits, **given(case, ours))
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert math.isclose(out.loss.detach(), of_ours.detach(), rel_tol=EXACT)
    assert deviation(by_log_prob(gradient, b["log_prob"]), slope) < EXACT
    assert not math.isclose(out.loss.detach(), theirs["loss"], rel_tol=1e-3)
    for name, value in ours.metrics(out).items():
        assert math.isclose(float(value), theirs["metrics"][name], abs_tol=EXACT), name


def test_the_scale_factor_acts_where_verl_reads_it() -> None:
    """Not in the loss functions, which go by the width of the mask; in `ppo_loss` it does."""
    (case,) = (c for c in GOLDEN["policy_losses"] if "loss_scale_factor" in c["options"])
    b = batch(case["batch"])
    width = b["response_mask"].shape[1]
    logits = logits_of(b["log_prob"])
    ours = preset("verl", **{k: v for k, v in case["options"].items() if k != "global_batch_info"})
    loss = reference_loss(logits, **given(case, ours)).loss
    assert math.isclose(loss, case["outputs"]["loss"] * width / 8, rel_tol=EXACT)


def test_the_kernels(backend: str, device: str) -> None:
    """In float32, every loss mode with and without weights: thin where Triton is interpreted."""
    cases = [case for case in GOLDEN["policy_losses"] if not is_known_to_differ(case)]
    of_modes = {case["options"]["loss_mode"]: case for case in cases}
    chosen = of_modes.values() if is_interpreted(backend) else cases[::3]
    assert {case["options"]["loss_mode"] for case in chosen} == of_modes.keys()
    for case in chosen:
        ours, theirs = preset_of(case), case["outputs"]
        log_prob = batch(case["batch"])["log_prob"]
        leaf = logits_of(log_prob).float().to(device).requires_grad_()
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in given(case, ours).items()
        }
        out = fused_loss(leaf, backend=backend, **arguments)  # type: ignore[arg-type]
        out.loss.backward()
        gradient = by_log_prob(leaf.grad.cpu().double(), log_prob)
        assert deviation(gradient, tensor(theirs["grad"])) < 2e-5, case["options"]
        size = max(abs(theirs["loss"]), float(tensor(theirs["grad"]).abs().max()))
        assert abs(out.loss.item() - theirs["loss"]) < 1e-5 * size, case["options"]
        for name, value in ours.metrics(out).items():
            assert abs(float(value) - theirs["metrics"][name]) < 1e-5, (name, case["options"])


def test_agg_loss() -> None:
    """Σ weight · loss_mat with the preset's divisor, and the weights as its gradient."""
    for case in GOLDEN["agg_loss"]:
        options = dict(case["options"])
        mode = options.pop("loss_agg_mode")
        b, theirs = batch(case["batch"]), case["outputs"]
        mask = b["response_mask"]
        rows, width = mask.shape
        weight = token_weights(
            mask.reshape(-1),
            torch.arange(rows).repeat_interleave(width),
            AGGREGATIONS[mode],
            sequences=rows,
            width=width,
            normalizer=preset("verl", loss_agg_mode=mode).normalizer(mask, **options),
            dtype=torch.float64,
        ).view(rows, width)
        assert math.isclose((weight * b["loss_mat"]).sum(), theirs["loss"], rel_tol=EXACT)
        assert deviation(weight, tensor(theirs["grad"])) < EXACT
    assert len(GOLDEN["agg_loss"]) == 30


def test_kl_penalty() -> None:
    """Value and gradient of all fourteen names; k3 as far as verl's clamps let it."""
    clamped = Counter()
    for case in GOLDEN["kl_penalty"]:
        name, b = case["options"]["kl_penalty"], batch(case["batch"])
        value, slope = as_torch(getattr(kl_estimators, KLS[name]))(b["log_prob"], b["ref_log_prob"])
        kl, grad = (tensor(case["outputs"][key]) for key in ("kl", "grad"))
        # verl's k3 holds its log-ratio within ±20 and then its value below 10
        far = torch.zeros_like(kl, dtype=torch.bool)
        if name.startswith(("low_var_kl", "k3")):
            far = (value > 10) | ((b["ref_log_prob"] - b["log_prob"]).abs() > 20)
        assert torch.allclose(value[~far], kl[~far], rtol=1e-12)
        through = name.endswith("+")
        near = torch.ones_like(far) if through else ~far
        assert torch.allclose(slope[near], grad[near], rtol=1e-12)
        if far.any():
            clamped[name] += int(far.sum())
            assert (kl[far] == 10).all() and (value[far] > 10).all()
            assert through or ((grad[far] == 0).all() and (slope[far] != 0).all())
    assert len(GOLDEN["kl_penalty"]) == 28
    assert clamped == dict.fromkeys(("low_var_kl", "k3", "low_var_kl+", "k3+"), 5)


@pytest.mark.parametrize("kl_loss_type", KLS)
def test_kl_and_entropy_are_added_as_in_ppo_loss(kl_loss_type: str) -> None:
    """pg_loss − c·agg_loss(H) + k·agg_loss(kl), of verl's own parts, for every aggregation."""
    b = batch("ragged")
    log_prob, p = b["log_prob"], b["log_prob"].exp()
    (of_kl,) = (
        case["outputs"]
        for case in GOLDEN["kl_penalty"]
        if case["batch"] == "ragged" and case["options"]["kl_penalty"] == kl_loss_type
    )
    entropy = -p * log_prob - (1 - p) * torch.log1p(-p)
    # by log_prob: p·dH/dp
    dentropy = p * (torch.log1p(-p) - log_prob)
    weights = {
        json.dumps(case["options"]): tensor(case["outputs"]["grad"])
        for case in GOLDEN["agg_loss"]
        if case["batch"] == "ragged"
    }
    used = 0
    for case in GOLDEN["policy_losses"]:
        options = asked_of_verl(case)
        if case["batch"] != "ragged" or options["loss_mode"] not in ("gspo", "dppo_kl"):
            continue
        used += 1
        counts = case["options"].get("global_batch_info", {})
        weight = weights[json.dumps({"loss_agg_mode": options["loss_agg_mode"], **counts})]
        terms = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": kl_loss_type}
        ours = preset("verl", **options, **terms, entropy_coeff=0.2)
        ours = ours.weighted() if case["rollout_is_weights"] else ours
        assert "ref_logp" in ours.arguments
        logits = logits_of(log_prob).requires_grad_()
        arguments = given(case, preset_of(case)) | {"objective": ours.objective}
        out = reference_loss(logits, ref_logp=b["ref_log_prob"], **arguments)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        added = 0.3 * tensor(of_kl["kl"]) - 0.2 * entropy
        loss = case["outputs"]["loss"] + float((weight * added).sum())
        slope = weight * (0.3 * tensor(of_kl["grad"]) - 0.2 * dentropy)
        wanted = tensor(case["outputs"]["grad"]) + slope
        allowed = SINGLE if case["rollout_is_weights"] else EXACT
        assert deviation(by_log_prob(gradient, log_prob), wanted) < allowed, options
        assert abs(float(out.loss.detach()) - loss) < allowed * max(1.0, abs(loss)), options
    assert used == 22


def alone(index: Tensor) -> Tensor:
    """[B] bool: the only completion of its prompt."""
    return torch.bincount(index)[index] == 1


def raw_where_alone(total: Tensor, raw: Tensor, index: Tensor) -> Tensor:
    """verl's difference: the advantage of a group of one is its reward."""
    return torch.where(alone(index), raw, total)


OUT_OF_SCOPE = {"grpo_passk": 2, "opo": 1}
KEEPS_REWARD = ("grpo", "grpo_vectorized", "rloo", "gpg")


def advantages(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(ours, verl's, the batch) of a case."""
    b, options = batch(case["batch"]), case["options"]
    ours = preset("verl", **options)
    rewards = b["token_level_rewards"]
    if options["adv_estimator"] == "gdpo":
        keys = options.get("gdpo_reward_keys")
        rewards = torch.stack([b[key] for key in keys], 1) if keys else rewards.sum(1)[:, None]
    needs = {"gae": {"values": b["values"]}, "remax": {"reward_baselines": b["reward_baselines"]}}
    found = ours.advantages(
        rewards, b["response_mask"], b["index"], **needs.get(options["adv_estimator"], {})
    )
    return found, tensor(case["outputs"]["advantages"]), b


def test_advantages() -> None:
    """Every estimator on the tokens; a group of one apart, where verl keeps the reward."""
    used = Counter()
    for case in GOLDEN["advantages"]:
        name = case["options"]["adv_estimator"]
        used[name] += 1
        if name in OUT_OF_SCOPE:
            with pytest.raises(NotImplementedError, match=f"adv_estimator='{name}'.*advantage="):
                preset("verl", **case["options"])
            continue
        ours, theirs, b = advantages(case)
        mask, lonely = b["response_mask"], alone(b["index"])
        assert (ours[~mask] == 0).all()
        rest = mask
        if name in KEEPS_REWARD:
            rest = mask & ~lonely[:, None]
            R = b["token_level_rewards"].sum(1)[lonely]
            kept = theirs[lonely][mask[lonely]]
            assert (ours[lonely] == 0).all() and lonely.sum() == 1
            # gpg scales by B over the rewards that are not 0, of which there is one in the batch
            scale = 8 / 7 if name == "gpg" else 1.0
            assert torch.allclose(kept, R * scale, rtol=2e-6)
        if name in ("gdpo", "reinforce_plus_plus_baseline"):
            # whitened over the batch, so that a group of one moves everything; see below
            continue
        # verl computes part of the vectorized ones, and gpg's scale, in float32
        single = "vectorized" in name or name == "gpg"
        assert deviation(ours[rest], theirs[rest]) < (1e-6 if single else EXACT), name
    assert used.total() == 20 and all(used[name] == n for name, n in OUT_OF_SCOPE.items())


def test_advantages_whitened_over_the_batch() -> None:
    """Equal to verl's once the group of one has its reward before the whitening."""
    used = 0
    for case in GOLDEN["advantages"]:
        name, options = case["options"]["adv_estimator"], case["options"]
        if name not in ("gdpo", "reinforce_plus_plus_baseline"):
            continue
        used += 1
        ours, theirs, b = advantages(case)
        index, mask = b["index"], b["response_mask"]
        scale = "group" if name == "gdpo" else None
        estimator = Estimator("group", scale, 1, 1e-6)  # type: ignore[arg-type]
        keys = options.get("gdpo_reward_keys")
        columns = [b[key] for key in keys] if keys else [b["token_level_rewards"].sum(1)]
        weights = options.get("gdpo_reward_weights") or [1.0] * len(columns)
        of_verl = of_ours = torch.zeros_like(columns[0])
        for weight, rewards in zip(weights, columns, strict=True):
            A = relative_advantages(rewards, index, estimator)
            of_ours = of_ours + weight * A
            kept = rewards / (1 + 1e-6) if name == "gdpo" else rewards
            of_verl = of_verl + weight * raw_where_alone(A, kept, index)
        whitened = [
            whiten(total[:, None].expand_as(mask) * mask, mask) for total in (of_verl, of_ours)
        ]
        # verl computes the parts of gdpo in float32
        assert deviation(whitened[0], theirs) < (1e-6 if name == "gdpo" else EXACT)
        assert torch.equal(whitened[1], ours)
        assert deviation(ours, theirs) > 0.01
    assert used == 4


def test_returns() -> None:
    """Of the estimators that have some of their own: those of `value.gae`."""
    used = 0
    for case in GOLDEN["advantages"]:
        name, options = case["options"]["adv_estimator"], case["options"]
        if name not in ("gae", "reinforce_plus_plus", "remax"):
            continue
        used += 1
        b = batch(case["batch"])
        values = b["values"] if name == "gae" else torch.zeros_like(b["values"])
        gamma, lam = options.get("gamma", 1.0), options.get("lam", 1.0)
        args = (b["token_level_rewards"], values, b["response_mask"])
        _, ours = gae(*args, gamma=gamma, lam=lam)
        theirs, mask = tensor(case["outputs"]["returns"]), b["response_mask"]
        assert torch.allclose(ours[mask], theirs[mask], rtol=1e-12, atol=1e-14)
    assert used == 6


def test_rollout_correction() -> None:
    """Weights and the mask that is left: of the helper for a batch, and inside the loss."""
    used = Counter()
    for case in GOLDEN["rollout_correction"]:
        b, options, theirs = batch(case["batch"]), dict(case["options"]), case["outputs"]
        # the function that was asked has no weights by default, verl's configuration has
        ours = preset("verl", rollout_correction={"rollout_is": None} | options)
        old, rollout, mask = b["old_log_prob"], b["rollout_log_prob"], b["response_mask"]
        arguments = {"sampler_logp": rollout}
        kept = tensor(theirs["response_mask"]) != 0
        weights = theirs["rollout_is_weights"]
        found, left = ours.rollout_correction(old, rollout, mask)
        assert torch.equal(left, kept), options
        assert (found is None) == (weights is None)
        if found is not None:
            used["weights"] += 1
            weights = tensor(weights)
            assert deviation(found, weights) < SINGLE, options
            if options.get("rollout_is_batch_normalize"):
                used["normalised"] += 1
                assert ours.is_weighted
                arguments["sampler_logp"] = ours.sampler_logp(old, found)
        out = reference_loss(
            logits_of(b["log_prob"]),
            torch.zeros_like(mask, dtype=torch.int64),
            objective=ours.objective,
            advantage=b["advantages"],
            old_logp=old,
            mask=mask,
            **arguments,
        )
        assert torch.equal(out._valid.view_as(mask), kept), options
        if "rollout_rs" in options:
            used["rejections"] += 1
            assert not torch.equal(kept, mask)
        expected = torch.ones_like(old) if weights is None else weights
        assert torch.allclose(out.factor[kept], expected[kept], rtol=SINGLE, atol=1e-30), options
    assert len(GOLDEN["rollout_correction"]) == 32
    assert used == {"weights": 17, "normalised": 8, "rejections": 16}


def test_nothing_of_the_file_is_left_out() -> None:
    """The sections and their numbers of cases, each of which a test above runs through."""
    sizes = {name: len(cases) for name, cases in GOLDEN.items() if isinstance(cases, list)}
    assert sizes == {
        "policy_losses": 205,
        "agg_loss": 30,
        "kl_penalty": 28,
        "advantages": 20,
        "rollout_correction": 32,
    }
    assert GOLDEN["versions"]["verl"] == "0.9.1"
