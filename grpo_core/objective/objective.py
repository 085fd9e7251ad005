"""An objective: five independent choices, and the check that they fit together.

    L = Σ_n weight_n · (factor_n · surrogate(logp_n, log_ratio_n, A_n) + beta · kl_n)
        − entropy_coef · Σ_n entropy_weight_n · H_n

| choice       | field                      | where it is computed                       |
|--------------|----------------------------|--------------------------------------------|
| advantage    | `advantage`                | advantage.py                               |
| ratio level  | `ratio_level, token_clip`  | backends/sequence_ratio.py                 |
| surrogate    | `surrogate`, `factor`      | kernels/surrogates.py, policy_factor.py    |
| KL estimator | `kl, kl_times_ratio, beta` | kernels/kl.py, kernels/exact_kl.py         |
| aggregation  | `aggregation`, `entropy_*` | aggregation.py                             |
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import pkgutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, get_args

import torch

from grpo_core.backends.formula import as_torch
from grpo_core.backends.sequence_ratio import RatioLevel
from grpo_core.kernels import kl as kl_estimators
from grpo_core.kernels import surrogates
from grpo_core.objective.advantage import Estimator
from grpo_core.objective.aggregation import Aggregation
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.validation import check_choice, check_number, check_type, is_number

# the functions of surrogates by the names that compiled graphs call them by
_FUNCTIONS: weakref.WeakValueDictionary[str, Callable] = weakref.WeakValueDictionary()
# those that a compiled graph has called
_IN_GRAPHS: dict[str, Callable] = {}

SampledKL = Literal["k1", "absolute", "k2", "k3", "k1_plus", "absolute_plus", "k3_plus", "gated"]
RowKL = Literal["exact", "topk", "topk_tail"]
KL = Literal[SampledKL, RowKL]


@dataclass(frozen=True)
class Surrogate:
    """The policy term: a function of kernels/surrogates.py, or your own, and its parameters.

    It is pickled by the name of its function.

    Args:
        function: of a token's logp, log_ratio, advantage and `args`.
        args: its parameters, floats.
        homogeneous: promises that the value scales with the advantage: where that is 0, so are
            value and gradient, and the row need not be read.

    Attributes:
        plain: the function over tensors; made here, because torch.compile cannot trace that.
        name: of the function in a compiled graph; no other function has it.
    """

    function: Callable
    args: tuple[float, ...] = ()
    homogeneous: bool = False
    plain: Callable = field(init=False, repr=False, compare=False)
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            raise ValueError("surrogate: expected one made outside of the compiled function")
        plain = getattr(self.function, "fn", self.function)
        if not isinstance(plain, FunctionType):
            raise ValueError(f"function: expected a function, got {self.function!r}")
        if not isinstance(self.args, (tuple, list)) or not all(map(is_number, self.args)):
            raise ValueError(f"args: expected a tuple of numbers, got {self.args!r}")
        check_type("homogeneous", self.homogeneous, bool)
        # an int would become a constant of the kernel, and every new value compile it again
        object.__setattr__(self, "args", tuple(float(number) for number in self.args))
        object.__setattr__(self, "plain", as_torch(self.function))
        object.__setattr__(self, "name", _register(self.function))

    def __copy__(self) -> Surrogate:
        return self

    def __deepcopy__(self, memo: object) -> Surrogate:
        return self

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        name = _name(self.function)
        try:
            named = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError):
            named = None
        if named is not self.function:
            raise pickle.PicklingError(f"surrogate: expected a function importable as {name}")
        return _named_surrogate, (name, self.args, self.homogeneous)


@dataclass(frozen=True)
class Objective:
    """A loss as an immutable, hashable value; `replace` makes a variant.

    Args:
        surrogate: the policy term, for example `clip(0.2, 0.28)`.
        kl: estimator of the KL to the reference policy from the token's log-probabilities, "exact"
            for the KL over the whole vocabulary from logits, "topk" or "topk_tail" for that to the
            likeliest tokens of a teacher (see `backends/topk.py`), or None.
        beta: weight of the KL term; with 0 a given `ref_logp` only enters the metrics, by k3 if
            `kl` is None.
        interpolation: of the exact or top-k KL, in [0, 1]: 1 for the reverse KL(π ‖ π_ref), 0 for
            the forward KL(π_ref ‖ π), between them the generalised Jensen-Shannon divergence; TRL's
            `beta` of distillation.
        ratio_level: the ratio that the surrogate sees: the token's, the sequence's (GSPO), or the
            sequence's with the gradient of the token's.
        advantage: how `rewards` become advantages when the loss is given rewards.
        aggregation: how tokens are averaged, see `aggregation`.
        kl_times_ratio: multiply the KL by the ratio and differentiate both: unbiased off policy
            (DeepSeek-V3.2, arXiv 2512.02556; TRL's default).
        entropy_coef: weight of the entropy bonus.
        entropy_aggregation: how the entropies are averaged, over this call; None means with the
            weights of the policy term, `normalizer` included.
        factor: scales the surrogate of a token, and nothing else; see `policy_factor`.
        token_clip: (low, high), bounds of a token's log-ratio before its sequence's mean (GMPO).

    Raises:
        ValueError: a wrong type, name or range; beta without a KL estimator; the exact KL times a
            ratio (it has no sampled token); `interpolation` of an estimator.
    """

    surrogate: Surrogate
    kl: KL | None = None
    beta: float = 0.0
    interpolation: float = field(default=1.0, kw_only=True)
    ratio_level: RatioLevel = "token"
    advantage: Estimator = field(default_factory=Estimator)
    aggregation: Aggregation = "token_mean"
    kl_times_ratio: bool = False
    entropy_coef: float = 0.0
    entropy_aggregation: Aggregation | None = None
    factor: PolicyFactor = field(default_factory=PolicyFactor)
    token_clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_type("surrogate", self.surrogate, Surrogate)
        check_type("advantage", self.advantage, Estimator)
        check_type("factor", self.factor, PolicyFactor)
        check_type("kl_times_ratio", self.kl_times_ratio, bool)
        averages = get_args(Aggregation)
        check_choice("kl", self.kl, (*get_args(KL), None))
        check_choice("ratio_level", self.ratio_level, get_args(RatioLevel))
        check_choice("aggregation", self.aggregation, averages)
        check_choice("entropy_aggregation", self.entropy_aggregation, (*averages, None))
        check_number("a finite number >= 0", beta=self.beta)
        check_number("a number in [0, 1]", interpolation=self.interpolation)
        if self.interpolation != 1 and not self.has_row_kl:
            raise ValueError(
                f"interpolation: expected 1 for kl = {self.kl!r}, got {self.interpolation!r}"
            )
        check_number("a finite number", entropy_coef=self.entropy_coef)
        if self.beta and self.kl is None:
            raise ValueError(f"kl: expected an estimator for beta = {self.beta}, got None")
        if self.has_row_kl and self.kl_times_ratio:
            raise ValueError(f"kl_times_ratio: expected False for kl = {self.kl!r}, got True")
        if self.token_clip is not None:
            bounds = self.token_clip
            if not isinstance(bounds, (tuple, list)) or not (
                len(bounds) == 2 and all(is_number(b) and 0 <= b < math.inf for b in bounds)
            ):
                raise ValueError(f"token_clip: expected two numbers >= 0, got {bounds!r}")
            object.__setattr__(self, "token_clip", tuple(bounds))

    @property
    def key(self) -> str:
        """Everything but `numbers` as text, the same in every process."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        surrogate, name = self.surrogate, _name(self.surrogate.function).replace(":", ".")
        values["surrogate"] = f"{name}, {len(surrogate.args)}, {surrogate.homogeneous}"
        values |= {"beta": self.beta != 0, "entropy_coef": self.entropy_coef != 0}
        return ", ".join(f"{name}={value}" for name, value in values.items())

    @property
    def numbers(self) -> tuple[float, ...]:
        """beta, entropy_coef and the parameters of the surrogate."""
        return (self.beta, self.entropy_coef, *self.surrogate.args)

    @property
    def has_policy_term(self) -> bool:
        """Whether the loss has a surrogate, and so needs advantages."""
        return self.surrogate.function is not surrogates.zero

    @property
    def is_token_level(self) -> bool:
        """Whether a token's ratio is independent of the other tokens of its sequence."""
        return self.ratio_level == "token" and self.token_clip is None

    @property
    def has_row_kl(self) -> bool:
        """Whether the KL is of whole rows, not an estimate from the sampled token."""
        return self.kl in get_args(RowKL)

    @property
    def reference(self) -> str:
        """The argument of a loss that the KL compares with."""
        if not self.has_row_kl:
            return "ref_logp"
        return "ref_logits" if self.kl == "exact" else "ref_topk"

    @property
    def averages_prompts(self) -> bool:
        """Whether a weight depends on the prompt of a sequence."""
        return "prompt_mean" in (self.aggregation, self.entropy_aggregation)

    @property
    def kl_function(self) -> Callable:
        """The estimator of kernels/kl.py for a given `ref_logp`; k3 where `kl` is None."""
        assert not self.has_row_kl
        return getattr(kl_estimators, self.kl or "k3")

    def replace(self, **changes: Any) -> Objective:
        """The same objective with some fields changed."""
        return dataclasses.replace(self, **changes)


def function_of(name: str) -> Callable:
    """The function that a graph calls by this name; it is kept from now on."""
    return _IN_GRAPHS.setdefault(name, _FUNCTIONS[name])


def _register(function: Callable) -> str:
    """A name that no other living function has."""
    name = _name(function)
    # another function may have the same name, as when a notebook cell is run again
    while _FUNCTIONS.setdefault(name, function) is not function:
        name += "'"
    return name


def _name(function: Callable) -> str:
    """module:name of a function, also of one that Triton has wrapped."""
    plain = getattr(function, "fn", function)
    return f"{plain.__module__}:{plain.__qualname__}"


def _named_surrogate(name: str, args: tuple[float, ...], homogeneous: bool) -> Surrogate:
    """Unpickles a `Surrogate`."""
    return Surrogate(pkgutil.resolve_name(name), args, homogeneous)
