"""preset("trl", ...) against TRL itself: loss, gradient by the logits, metrics, advantages.

The same logits go to both: to TRL as log-probabilities and entropies, whose gradients are taken
back through the float64 log_softmax; to us as they are. Ours is the float64 reference over the
whole grid of options, and the kernels over part of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOConfig

from grpo_core import fused_loss
from grpo_core.integrations.presets import TrlPreset, preset
from grpo_core.integrations.presets.trl import AGGREGATIONS, TrlOptions
from grpo_core.loss.reference import reference_loss
from tests.combinations import pairwise
from tests.conftest import is_interpreted
from tests.trl_harness import TrlCase, TrlResult, trl_advantages, trl_loss, trl_sampler_ratio

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.xdist_group("trl"),
    pytest.mark.slow,
]

B, T, V = 6, 6, 7
# one row of every width, one of a single token, one of none
LENGTHS = [6, 4, 1, 6, 0, 5]
ADVANTAGES = [1.0, -1.0, 0.5, -2.0, 1.0, -0.3]
TOKENS = 61
# drops the second and the last sequence, but not the fourth
THRESHOLD = 0.1
MODES = {
    "none": {},
    "token_truncate": {"vllm_importance_sampling_clip_max": 1.2},
    "token_mask": {
        "vllm_importance_sampling_clip_max": 1.5,
        "vllm_importance_sampling_clip_min": 0.7,
    },
    "sequence_mask": {"vllm_importance_sampling_clip_max": 1.4},
    "sequence_truncate": {"vllm_importance_sampling_clip_min": 0.9},
}
# what TRL holds in float32: the sampler's ratios, and SAPO's temperatures
EXACT, SINGLE = 1e-11, 3e-7


@dataclasses.dataclass(frozen=True)
class Problem:
    """Logits, and everything that TRL and we are given beside them; [B, T] each."""

    logits: Tensor  # [B, T, V] float64, a leaf
    target: Tensor
    completion_mask: Tensor
    tool_mask: Tensor
    logp: Tensor  # with a graph to the logits
    entropy: Tensor  # too
    old_logp: Tensor
    ref_logp: Tensor
    sampling_logp: Tensor

    @property
    def mask(self) -> Tensor:
        """The tokens of the loss."""
        return self.completion_mask & self.tool_mask

    def case(self, **changes: Any) -> TrlCase:
        """What TRL is given."""
        case = TrlCase(
            logp=self.logp.detach(),
            entropy=self.entropy.detach(),
            advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
            completion_mask=self.completion_mask,
            tool_mask=self.tool_mask,
            old_logp=self.old_logp,
            ref_logp=self.ref_logp,
            num_items_in_batch=TOKENS,
        )
        return dataclasses.replace(case, **changes)

    def pulled_back(self, result: TrlResult) -> Tensor:
        """TRL's gradient by the logits."""
        (gradient,) = torch.autograd.grad(
            (self.logp, self.entropy),
            self.logits,
            (result.dlogp, result.dentropy),
            retain_graph=True,
        )
        return gradient

    def arguments(self, ours: TrlPreset, case: TrlCase, **count: Any) -> dict[str, Any]:
        """The arguments that the preset asks for."""
        given = {
            "advantage": case.advantages,
            "mask": self.mask,
            "old_logp": case.old_logp,
            "ref_logp": case.ref_logp,
            "sampler_logp": case.sampling_logp,
            "normalizer": ours.normalizer(self.mask, num_items_in_batch=TOKENS, **count),
            "temperature": float(ours.arguments["temperature"]),
        }
        assert given.keys() >= ours.arguments.keys()
        asked = {name: given[name] for name in ours.arguments}
        return asked | {"objective": ours.objective, "target": self.target}


def problem(seed: int = 0) -> Problem:
    """Ratios on both sides of every bound, holes left by tools, and sequences far off policy."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logits = (1.5 * normal(B, T, V)).float().double().requires_grad_()
    target = torch.randint(0, V, (B, T), generator=g)
    tool_mask = torch.rand(B, T, generator=g) < 0.85
    log_softmax = logits.log_softmax(-1)
    logp = log_softmax.gather(-1, target[..., None]).squeeze(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    # small enough for ratios of sequences to stay within the clip, too
    old_logp = logp.detach() + 0.4 * normal(B, T) + 0.2 * normal(B, 1)
    # beyond delta, where the advantage is below 0
    far = 3, int(tool_mask[3].nonzero()[1])
    old_logp[far] = logp[far].detach() - 1.3
    return Problem(
        logits=logits,
        target=target,
        completion_mask=torch.arange(T) < torch.tensor(LENGTHS)[:, None],
        tool_mask=tool_mask,
        logp=logp,
        entropy=entropy,
        old_logp=old_logp,
        ref_logp=old_logp + 0.3 * normal(B, T),
        # vLLM's are float32
        sampling_logp=(old_logp + 0.25 * normal(B, T)).float().double(),
    )


def sampler_ratio(given: Problem, options: dict[str, Any]) -> Tensor:
    """What TRL makes of vLLM's log-probabilities under these options."""
    asked = {name: value for name, value in options.items() if name.startswith("vllm_")}
    found = trl_sampler_ratio(
        given.old_logp, given.sampling_logp, given.completion_mask, given.tool_mask, **asked
    )
    return found.ratio


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest of theirs."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


class Worst:
    """The largest deviations of a grid, and how many cases went into them."""

    def __init__(self) -> None:
        self.cases, self.loss, self.gradient, self.metric = 0, 0.0, 0.0, 0.0

    def compare(self, given: Problem, out: Any, gradient: Tensor, theirs: TrlResult) -> None:
        """Takes up one more case; `out` and the gradient are ours."""
        wanted = given.pulled_back(theirs)
        self.cases += 1
        # a loss may be a difference of large terms: relative to the gradient, if that is larger
        size = max(abs(theirs.loss), float(wanted.abs().max()), 1e-30)
        self.loss = max(self.loss, abs(float(out.loss.detach()) - theirs.loss) / size)
        self.gradient = max(self.gradient, deviation(gradient.double(), wanted))
        assert (gradient[~given.mask] == 0).all()

    def compare_metrics(self, ours: dict[str, Tensor], theirs: dict[str, float]) -> None:
        """Takes up what both logged: the same names, the same numbers."""
        assert ours.keys() == theirs.keys()
        assert all(value.ndim == 0 for value in ours.values())
        for name, value in theirs.items():
            gap = abs(float(ours[name]) - value)
            self.metric = max(self.metric, gap / max(1.0, abs(value)))

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, worst deviations: loss {self.loss:.1e}, "
            f"gradient {self.gradient:.1e}, metrics {self.metric:.1e}"
        )


# options that change a formula, and micro-batches of an update
CHOICES: dict[str, list[Any]] = {
    "importance_sampling_level": ["token", "sequence"],
    "beta": [0.0, 0.04],
    "use_bias_correction_kl": [True, False],
    "delta": [None, 3.0],
    "off_policy_mask_threshold": [None, THRESHOLD],
    "top_entropy_quantile": [1.0, 0.5],
    "vllm_importance_sampling_mode": ["none", "token_truncate", "sequence_mask"],
    "entropy_coef": [0.0, 0.01],
    "gradient_accumulation_steps": [4, 1],
}


def options_of(loss_type: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The options of TRL for some of `CHOICES`."""
    options = chosen | {
        "loss_type": loss_type,
        "epsilon_high": 0.28,
        # a number that float32 holds, as TRL does
        "sapo_temperature_neg": 1.0625,
        "max_completion_length": 9,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
    }
    mode = options.pop("vllm_importance_sampling_mode")
    if mode == "none":
        return options
    if loss_type == "vespo" and mode == "sequence_mask":
        # TRL has vespo's ratios per token only
        mode = "token_mask"
    return options | {"use_vllm": True, "vllm_importance_sampling_mode": mode} | MODES[mode]


def every_choice() -> list[dict[str, Any]]:
    """All combinations of `CHOICES`."""
    return [dict(zip(CHOICES, row, strict=True)) for row in itertools.product(*CHOICES.values())]


def trl_case(given: Problem, options: dict[str, Any], ratios: dict[str, Tensor]) -> TrlCase:
    """The inputs that TRL's trainer makes for these options."""
    entropy = given.entropy.detach()
    if options["top_entropy_quantile"] < 1:
        # TRL compares entropies with a quantile of their float32
        entropy = entropy.float().double()
    if not options.get("use_vllm"):
        return given.case(entropy=entropy)
    ratio = ratios[options["vllm_importance_sampling_mode"]]
    return given.case(
        entropy=entropy, importance_sampling_ratio=ratio, sampling_logp=given.sampling_logp
    )


def sampler_ratios(given: Problem) -> dict[str, Tensor]:
    """Of every mode of the grid, each asked of TRL once."""
    return {
        mode: sampler_ratio(given, bounds | {"vllm_importance_sampling_mode": mode})
        for mode, bounds in MODES.items()
        if mode != "none"
    }


def tolerance(options: dict[str, Any]) -> float:
    """Exact but for what either side holds in float32."""
    rounded = options["top_entropy_quantile"] < 1 and options["entropy_coef"] != 0
    single = rounded or options.get("use_vllm")
    return SINGLE if single else EXACT


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.rare)])
def test_the_grid(loss_type: str, every: bool) -> None:
    """Any two choices meet in some case; every combination of them is rare."""
    given = problem()
    ratios = sampler_ratios(given)
    worst = {EXACT: Worst(), SINGLE: Worst()}
    cases = every_choice() if every else pairwise(CHOICES)
    for chosen in cases:
        options, G = options_of(loss_type, chosen), chosen["gradient_accumulation_steps"]
        case = dataclasses.replace(trl_case(given, options, ratios), gradient_accumulation_steps=G)
        theirs = trl_loss(case, **options)
        ours = preset("trl", **options).accumulating(G)
        out = reference_loss(given.logits, **given.arguments(ours, case))
        (gradient,) = torch.autograd.grad(out.loss, given.logits)
        found = worst[tolerance(options)]
        found.compare(given, out, gradient, theirs)
        found.compare_metrics(ours.metrics(out), theirs.metrics)
    for allowed, found in worst.items():
        print(f"{loss_type}, allowed {allowed:g}: {found}")
        assert max(found.loss, found.gradient) <= allowed, str(found)
        # shares are counted in float32
        assert found.metric <= SINGLE, str(found)
    assert sum(found.cases for found in worst.values()) == len(cases)


def test_the_grid_reaches_what_it_is_about() -> None:
    """Each option changes TRL's gradient; sequences are dropped, tokens masked, ratios clipped."""
    given = problem()
    ratios = sampler_ratios(given)
    plain = options_of("grpo", every_choice()[0])
    before = trl_loss(trl_case(given, plain, ratios), **plain)
    for change in (
        {"importance_sampling_level": "sequence"},
        {"beta": 0.04},
        {"beta": 0.04, "use_bias_correction_kl": False},
        {"delta": 3.0},
        {"off_policy_mask_threshold": THRESHOLD},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        *(
            {"use_vllm": True, "vllm_importance_sampling_mode": m} | MODES[m]
            for m in list(MODES)[1:]
        ),
    ):
        options = plain | change
        after = trl_loss(trl_case(given, options, ratios), **options)
        assert deviation(given.pulled_back(after), given.pulled_back(before)) > 1e-3, change
    dropped = trl_loss(given.case(), **plain | {"off_policy_mask_threshold": THRESHOLD})
    idle = (dropped.dlogp == 0).all(1)
    assert 1 < idle.sum() < len(LENGTHS) - 1
    assert (ratios["token_mask"] == 0).any() and (ratios["sequence_mask"] == 0).any()
    assert before.metrics["clip_ratio/low_mean"] > 0 < before.metrics["clip_ratio/high_mean"]
    of_sequence = trl_loss(given.case(), **plain | {"importance_sampling_level": "sequence"})
    assert 0 < of_sequence.metrics["clip_ratio/region_mean"] < 1


def pairs_with(loss_type: str) -> list[dict[str, Any]]:
    """The cases of a loss type among those in which any two choices of any loss types meet."""
    cases = pairwise({"loss_type": list(AGGREGATIONS)} | CHOICES)
    return [case for case in cases if case["loss_type"] == loss_type]


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_the_kernels(backend: str, device: str, loss_type: str) -> None:
    """In float32: any two choices meet; where Triton is interpreted, two cases of a loss type.

    `test_fused_loss` has the kernels compute every objective.
    """
    given = problem(1)
    ratios = sampler_ratios(given)
    worst = Worst()
    cases = pairs_with(loss_type)[:2] if is_interpreted(backend) else pairwise(CHOICES)
    for options in (options_of(loss_type, chosen) for chosen in cases):
        case = trl_case(given, options, ratios)
        theirs = trl_loss(case, **options)
        ours = preset("trl", **options).accumulating(1)
        leaf = given.logits.detach().float().to(device).requires_grad_()
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in given.arguments(ours, case).items()
        }
        out = fused_loss(leaf, backend=backend, **arguments)
        out.loss.backward()
        worst.compare(given, out, leaf.grad.cpu(), theirs)
        worst.compare_metrics(ours.metrics(out), theirs.metrics)
    print(f"{loss_type}, {backend}: {worst}")
    assert worst.cases == len(cases) > 1
    # VESPO's weight is the exponential of a sum of many logarithms
    allowed = 2e-5 if loss_type == "vespo" else 5e-6
    assert max(worst.loss, worst.gradient, worst.metric) < allowed, str(worst)


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_on_policy_steps_have_no_old_logp(loss_type: str, beta: float) -> None:
    """TRL leaves it out; the ratio is 1 and has a gradient."""
    given, worst = problem(2), Worst()
    for level, G in itertools.product(("token", "sequence"), (1, 3)):
        options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
        case = given.case(old_logp=None, gradient_accumulation_steps=G)
        theirs = trl_loss(case, **options)
        ours = preset("trl", gradient_accumulation_steps=G, **options)
        out = reference_loss(given.logits, **given.arguments(ours, case))
        (gradient,) = torch.autograd.grad(out.loss, given.logits)
        worst.compare(given, out, gradient, theirs)
        worst.compare_metrics(ours.metrics(out), theirs.metrics)
    allowed = SINGLE if loss_type == "sapo" else EXACT
    assert max(worst.loss, worst.gradient) <= allowed and worst.metric <= SINGLE, str(worst)


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_evaluation_is_not_accumulated(loss_type: str) -> None:
    given, worst = problem(3), Worst()
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "entropy_coef": 0.1,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
    }
    case = given.case(training=False)
    theirs = trl_loss(case, **options)
    ours = preset("trl", **options).in_evaluation()
    out = reference_loss(given.logits, **given.arguments(ours, case))
    (gradient,) = torch.autograd.grad(out.loss, given.logits)
    worst.compare(given, out, gradient, theirs)
    worst.compare_metrics(ours.metrics(out), theirs.metrics)
    assert "entropy_coef" not in theirs.metrics
    allowed = SINGLE if loss_type == "sapo" else EXACT
    assert max(worst.loss, worst.gradient) <= allowed and worst.metric <= SINGLE, str(worst)


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_ranks_share_the_count_of_tokens(loss_type: str) -> None:
    """TRL divides num_items_in_batch, and nothing else, by the number of its processes."""
    given, worst = problem(4), Worst()
    options: dict[str, Any] = {"loss_type": loss_type}
    trl_loss(given.case(), **options)
    with mock.patch("accelerate.Accelerator.num_processes", mock.PropertyMock(return_value=4)):
        theirs = trl_loss(given.case(), **options)
    ours = preset("trl", **options)
    out = reference_loss(given.logits, **given.arguments(ours, given.case(), num_processes=4))
    (gradient,) = torch.autograd.grad(out.loss, given.logits)
    worst.compare(given, out, gradient, theirs)
    assert max(worst.loss, worst.gradient) <= (SINGLE if loss_type == "sapo" else EXACT)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "cispo", "vespo"])
def test_every_number_reaches_the_formula(loss_type: str) -> None:
    """Bounds and temperatures other than the defaults, drawn at random."""
    given, worst, draw = problem(5), Worst(), random.Random(5)
    for _ in range(12):
        options: dict[str, Any] = {
            "loss_type": loss_type,
            "epsilon": draw.uniform(0.05, 0.4),
            "epsilon_high": draw.choice([None, draw.uniform(0.05, 1.5)]),
            "delta": 2.5 + draw.random() if loss_type == "grpo" else None,
            "beta": draw.uniform(0.01, 1),
            "sapo_temperature_pos": draw.uniform(0.5, 2),
            "sapo_temperature_neg": draw.uniform(0.5, 2),
            # multiples of 1/8, which float32 holds
            **{f"vespo_{name}": draw.randint(0, 24) / 8 for name in ("k_pos", "k_neg")},
            **{f"vespo_lambda_{name}": draw.randint(1, 24) / 8 for name in ("pos", "neg")},
            "entropy_coef": draw.uniform(-0.1, 0.1),
            "top_entropy_quantile": draw.choice([0.0, 0.2, 0.8]),
            "off_policy_mask_threshold": draw.uniform(-0.2, 0.2),
            "gradient_accumulation_steps": draw.randint(1, 5),
        }
        case = dataclasses.replace(
            trl_case(given, options, {}),
            gradient_accumulation_steps=options["gradient_accumulation_steps"],
        )
        theirs = trl_loss(case, **options)
        ours = preset("trl", **options)
        # without vLLM TRL's off-policy mask looks at the old policy
        case = given.case(sampling_logp=given.old_logp)
        out = reference_loss(given.logits, **given.arguments(ours, case))
        (gradient,) = torch.autograd.grad(out.loss, given.logits)
        worst.compare(given, out, gradient, theirs)
        worst.compare_metrics(ours.metrics(out), theirs.metrics)
    assert worst.gradient <= (SINGLE if loss_type == "sapo" else EXACT), str(worst)
    # entropies are rounded for TRL's quantile
    assert max(worst.loss, worst.metric) <= SINGLE, str(worst)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_row_without_tokens_is_not_clipped(level: str) -> None:
    """All others are: of sequences it is then TRL's smallest, and has a part in its mean."""
    given = problem(7)
    given = dataclasses.replace(given, old_logp=given.logp.detach() + 1)
    options: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": level}
    case = given.case(advantages=torch.full((B,), -1.0, dtype=torch.float64))
    theirs = trl_loss(case, **options).metrics
    ours = preset("trl", **options)
    metrics = ours.metrics(reference_loss(given.logits, **given.arguments(ours, case)))
    assert theirs["clip_ratio/low_min"] == (0 if level == "sequence" else 1)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(theirs, rel=SINGLE)


NONE = math.nan
REWARDS = {
    "plain": [[1.0, 0.5], [0.0, 0.25], [3.0, 1.0], [0.25, -1.0], [2.0, 1.0], [2.5, 0.0]],
    "equal": [[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [0.25, -1.0], [2.0, 1.0], [2.5, 0.0]],
    "some None": [[1.0, 0.5], [0.0, NONE], [3.0, 1.0], [NONE, -1.0], [NONE, 1.0], [2.5, 0.0]],
    "rows of None": [[1.0, 0.5], [NONE, NONE], [3.0, 1.0], [NONE, NONE], [2.0, 1.0], [2.5, NONE]],
    "one in a group": [[1.0, 0.5], [0.0, NONE], [3.0, 1.0], [NONE, NONE], [NONE, NONE], [2.5, 0.0]],
    "one of a function": [
        [1.0, 0.5],
        [0.0, NONE],
        [3.0, NONE],
        [0.5, NONE],
        [2.0, NONE],
        [2.5, 0.0],
    ],
}


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none", True, False])
def test_advantages(rewards: list[list[float]], aggregation: str, scale: str | bool) -> None:
    """TRL's are float32; a group of equal rewards is exactly 0 here, within its rounding there."""
    given = torch.tensor(rewards)
    for weights in (None, [1.0, 0.5]):
        options: dict[str, Any] = {
            "multi_objective_aggregation": aggregation,
            "scale_rewards": scale,
            "reward_weights": weights,
            "num_generations": 3,
        }
        theirs = trl_advantages(given, **options).advantages
        ours = preset("trl", **options)
        found = ours.advantages(given)
        assert torch.allclose(found, theirs, rtol=2e-6, atol=2e-6)
        by_id = ours.advantages(given, torch.tensor([0, 0, 0, 4, 4, 4]))
        assert torch.equal(found, by_id)
        if aggregation == "sum_then_normalize" and not given.isnan().any():
            total = given @ torch.tensor(weights or [1.0, 1.0])
            out = reference_loss(
                torch.zeros(6, 1, 2),
                torch.zeros(6, 1, dtype=torch.int64),
                objective=ours.objective.replace(beta=0.0, aggregation="token_sum"),
                rewards=total,
                group_size=3,
            )
            assert torch.allclose(out._tokens.advantage, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", list(MODES)[1:])
@pytest.mark.parametrize("low", [None, 0.8])
@pytest.mark.parametrize("high", [1.2, 3.0])
def test_the_samplers_ratio(mode: str, low: float | None, high: float) -> None:
    """The factor that `fused_loss` finds is the ratio that TRL's trainer puts into its inputs."""
    given = problem(6)
    options: dict[str, Any] = {
        "loss_type": "grpo",
        "use_vllm": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }
    theirs = sampler_ratio(given, options).expand(B, T)
    ours = preset("trl", **options)
    case = given.case(sampling_logp=given.sampling_logp)
    out = reference_loss(given.logits, **given.arguments(ours, case))
    assert torch.allclose(out.factor[given.mask], theirs[given.mask], rtol=2e-7)
    assert len(theirs[given.mask].unique()) > 1


def test_a_token_that_vllm_could_not_score() -> None:
    """TRL gives it the ratio 1; here it leaves the mask, unless it is given old_logp instead."""
    given = problem(6)
    sampling = given.sampling_logp.clone()
    sampling[0, 1] = NONE
    assert given.mask[0, 1]
    options = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
    ratio = sampler_ratio(dataclasses.replace(given, sampling_logp=sampling), options)
    assert ratio[0, 1] == 1
    ours = preset("trl", **options)
    case = given.case(importance_sampling_ratio=ratio, sampling_logp=sampling)
    theirs = given.pulled_back(trl_loss(case, **options))
    gradients = []
    for scored in (sampling, torch.where(sampling.isnan(), given.old_logp, sampling)):
        case = given.case(sampling_logp=scored)
        out = reference_loss(given.logits, **given.arguments(ours, case))
        gradients += torch.autograd.grad(out.loss, given.logits)
    assert (gradients[0][0, 1] == 0).all() and (theirs[0, 1] != 0).all()
    assert deviation(gradients[1], theirs) < SINGLE


@pytest.mark.parametrize("holes", [False, True])
def test_vespo_counts_masked_positions_only_if_one_is_out_of_bounds(holes: bool) -> None:
    """TRL adds up log w over masked positions, too, where w = 1: cut to 0.9 it is not 0 there."""
    given = problem(6)
    every = torch.ones_like(given.tool_mask)
    given = dataclasses.replace(
        given, completion_mask=every, tool_mask=given.tool_mask if holes else every
    )
    options: dict[str, Any] = {
        "loss_type": "vespo",
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_truncate",
    }
    gaps = []
    for high in (1.1, 0.9):
        options["vllm_importance_sampling_clip_max"] = high
        ratio = sampler_ratio(given, options)
        case = given.case(importance_sampling_ratio=ratio, sampling_logp=given.sampling_logp)
        theirs = given.pulled_back(trl_loss(case, **options))
        out = reference_loss(given.logits, **given.arguments(preset("trl", **options), case))
        gaps.append(deviation(*torch.autograd.grad(out.loss, given.logits), theirs))
    assert gaps[0] < SINGLE
    assert gaps[1] > 1e-2 if holes else gaps[1] < SINGLE


def test_defaults_are_trls() -> None:
    """Every option of the preset is one of `GRPOConfig`, and has its default."""
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for field in dataclasses.fields(TrlOptions):
        assert field.default == theirs[field.name], field.name


def test_what_trl_refuses_is_refused() -> None:
    """Both say ValueError for the same options."""
    for options in (
        {"loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_mode": "sequence_mask"},
        {"vllm_importance_sampling_clip_min": 3.0, "vllm_importance_sampling_clip_max": 3.0},
        {
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": None,
        },
        {"loss_type": "gspo"},
        {"importance_sampling_level": "word"},
    ):
        with pytest.raises(ValueError):
            trl_loss(problem().case(), **options)
        with pytest.raises(ValueError):
            preset("trl", **options)
