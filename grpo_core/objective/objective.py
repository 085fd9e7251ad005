"""A method is a value: five independent axes, and checks that they make sense together.

    L = Σ_n weight_n · (factor_n · surrogate(logp_n, log_ratio_n, A_n) + beta · kl_n)
        − entropy_coef · Σ_n entropy_weight_n · H_n

| axis         | field                      | where it is computed                  |
|--------------|----------------------------|---------------------------------------|
| advantage    | `advantage`                | advantages.py, estimators.py          |
| ratio level  | `ratio_level, token_clip`  | sequence_ratio.py                     |
| surrogate    | `surrogate`, `factor`      | kernels/surrogates.py, policy_factor.py |
| KL estimator | `kl, kl_times_ratio, beta` | kernels/kl.py, kernels/exact_kl.py    |
| aggregation  | `aggregation`, `entropy_*` | weights.py                            |
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import pkgutil
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, get_args

import torch

from grpo_core.backends.formula import as_torch
from grpo_core.backends.sequence_ratio import RatioLevel
from grpo_core.kernels import kl as kl_estimators
from grpo_core.objective.advantage import GroupNorm
from grpo_core.objective.aggregation import Aggregation
from grpo_core.objective.estimators import Estimator
from grpo_core.objective.policy_factor import PolicyFactor
from grpo_core.objective.validation import is_number

# an objective for each structure that is in use, by its key
_STRUCTURES: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()
# those that a compiled graph names
_IN_GRAPHS: dict[str, Objective] = {}

KL = Literal["k1", "absolute", "k2", "k3", "k1_plus", "absolute_plus", "k3_plus", "exact"]


@dataclass(frozen=True)
class Surrogate:
    """A function of kernels/surrogates.py and its parameters, floats all.

    `homogeneous` promises that it scales with the advantage: where that is 0, so are value and
    gradient, and the row need not be read. It is pickled by the name of its function.

    Attributes:
        plain: the function over tensors; bound here, since a graph cannot trace the binding.
    """

    function: Callable
    args: tuple[float, ...] = ()
    homogeneous: bool = False
    plain: Callable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain = getattr(self.function, "fn", self.function)
        if not isinstance(plain, FunctionType):
            raise ValueError(f"function: expected a function, got {self.function!r}")
        if not isinstance(self.args, (tuple, list)) or not all(map(is_number, self.args)):
            raise ValueError(f"args: expected a tuple of numbers, got {self.args!r}")
        if not isinstance(self.homogeneous, bool):
            raise ValueError(f"homogeneous: expected True or False, got {self.homogeneous!r}")
        # an int would become a constant of the kernel, and every new one a compilation
        object.__setattr__(self, "args", tuple(float(number) for number in self.args))
        object.__setattr__(self, "plain", as_torch(self.function))

    def __copy__(self) -> Surrogate:
        return self

    def __deepcopy__(self, memo: object) -> Surrogate:
        return self

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        name = _name(self.function)
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError):
            found = None
        if found is not self.function:
            raise pickle.PicklingError(f"surrogate: expected a function to be found as {name}")
        return _named_surrogate, (name, self.args, self.homogeneous)


@dataclass(frozen=True)
class Objective:
    """What is minimised. Immutable and hashable; `replace` makes a variant.

    Args:
        surrogate: the policy term, for example `clip(0.2, 0.28)`.
        kl: estimator of the KL to the reference policy from its log-probability of the token,
            "exact" for the KL over the whole vocabulary from its logits, or None.
        beta: weight of the KL term; with 0 a given `ref_logp` is only measured, by k3 if there is
            no `kl`.
        ratio_level: whose ratio the surrogate sees, see `sequence_ratio`.
        advantage: how `rewards` become advantages when the loss is given rewards.
        aggregation: how tokens are averaged, see `aggregation.token_weights`.
        kl_times_ratio: weight the KL by the ratio, and differentiate that too: unbiased off policy
            (DeepSeek-V3.2, arXiv 2512.02556; TRL's default).
        entropy_coef: weight of the entropy bonus.
        entropy_aggregation: how the entropies are averaged, over this call; None means with the
            weights of the policy term, `normalizer` included.
        factor: what scales the surrogate of a token, and nothing else; see `policy_factor`.
        token_clip: (low, high), bounds of a token's log-ratio before its sequence's mean (GMPO).

    Attributes:
        key: what stands for the objective, but for its `numbers`, in a compiled graph.

    Raises:
        ValueError: an unknown name, a negative or infinite beta, beta without a KL estimator, a
            ratio times the exact KL (which has no sampled token).
    """

    surrogate: Surrogate
    kl: KL | None = None
    beta: float = 0.0
    ratio_level: RatioLevel = "token"
    advantage: GroupNorm | Estimator = field(default_factory=GroupNorm)
    aggregation: Aggregation = "token_mean"
    kl_times_ratio: bool = False
    entropy_coef: float = 0.0
    entropy_aggregation: Aggregation | None = None
    factor: PolicyFactor = field(default_factory=PolicyFactor)
    token_clip: tuple[float, float] | None = None
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.surrogate, Surrogate):
            raise ValueError(f"surrogate: expected a Surrogate, got {self.surrogate!r}")
        if not isinstance(self.advantage, (GroupNorm, Estimator)):
            raise ValueError(
                f"advantage: expected a GroupNorm or an Estimator, got {self.advantage!r}"
            )
        _one_of("kl", self.kl, (*get_args(KL), None))
        _one_of("ratio_level", self.ratio_level, get_args(RatioLevel))
        if not isinstance(self.factor, PolicyFactor):
            raise ValueError(f"factor: expected a PolicyFactor, got {self.factor!r}")
        _one_of("aggregation", self.aggregation, get_args(Aggregation))
        _one_of("entropy_aggregation", self.entropy_aggregation, (*get_args(Aggregation), None))
        if not is_number(self.beta) or not 0 <= self.beta < math.inf:
            raise ValueError(f"beta: expected a finite number >= 0, got {self.beta!r}")
        if not is_number(self.entropy_coef) or not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef: expected a finite number, got {self.entropy_coef!r}")
        if self.beta and self.kl is None:
            raise ValueError(f"kl: expected an estimator for beta = {self.beta}, got None")
        if not isinstance(self.kl_times_ratio, bool):
            raise ValueError(f"kl_times_ratio: expected True or False, got {self.kl_times_ratio!r}")
        if self.kl == "exact" and self.kl_times_ratio:
            raise ValueError("kl_times_ratio: expected False for kl = 'exact', got True")
        if self.token_clip is not None:
            bounds = self.token_clip
            if not isinstance(bounds, (tuple, list)) or not (
                len(bounds) == 2 and all(is_number(b) and 0 <= b < math.inf for b in bounds)
            ):
                raise ValueError(f"token_clip: expected two numbers >= 0, got {bounds!r}")
            object.__setattr__(self, "token_clip", tuple(bounds))
        key, same = _register(self)
        object.__setattr__(self, "key", key)
        # held, so that the key stays known
        object.__setattr__(self, "_same", same)

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        # by the constructor, since a key is known where it was made
        fields = (each.name for each in dataclasses.fields(self) if each.init)
        return type(self), tuple(getattr(self, name) for name in fields)

    @property
    def numbers(self) -> tuple[float, ...]:
        """What may change from call to call: beta, entropy_coef, the surrogate's parameters."""
        return (self.beta, self.entropy_coef, *self.surrogate.args)

    @property
    def is_token_level(self) -> bool:
        """Whether a token's loss needs nothing of the other tokens of its sequence."""
        return self.ratio_level == "token" and self.token_clip is None

    @property
    def kl_function(self) -> Callable:
        """The estimator of kernels/kl.py for a given `ref_logp`; k3 where none is named."""
        assert self.kl != "exact"
        return getattr(kl_estimators, self.kl or "k3")

    def replace(self, **changes: Any) -> Objective:
        """The same objective with some fields changed."""
        return dataclasses.replace(self, **changes)


def objective_of(key: str, numbers: Sequence[float] | None = None) -> Objective:
    """The objective of a key that a graph names, with other numbers if they are given."""
    objective = _IN_GRAPHS.setdefault(key, _STRUCTURES[key])
    if numbers is None or tuple(numbers) == objective.numbers:
        return objective
    beta, entropy_coef, *args = numbers
    surrogate = dataclasses.replace(objective.surrogate, args=tuple(args))
    return objective.replace(surrogate=surrogate, beta=beta, entropy_coef=entropy_coef)


def _register(objective: Objective) -> tuple[str, Objective | None]:
    """The key of an objective's structure, and the other objective that is found by it, if any.

    The key is "" inside a graph, whose effects come too late.
    """
    if torch.compiler.is_compiling():
        return "", None
    values = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.init}
    surrogate = objective.surrogate
    name = _name(surrogate.function).replace(":", ".")
    values["surrogate"] = f"{name}, {len(surrogate.args)}, {surrogate.homogeneous}"
    values |= {"beta": objective.beta != 0, "entropy_coef": objective.entropy_coef != 0}
    key = ", ".join(f"{name}={value}" for name, value in values.items())
    with _LOCK:
        # a function may be defined anew under its name
        while (
            found := _STRUCTURES.setdefault(key, objective)
        ).surrogate.function is not surrogate.function:
            key += "'"
    return key, None if found is objective else found


def _name(function: Callable) -> str:
    """module:name of a function, or of what Triton made of one."""
    plain = getattr(function, "fn", function)
    return f"{plain.__module__}:{plain.__qualname__}"


def _named_surrogate(name: str, args: tuple[float, ...], homogeneous: bool) -> Surrogate:
    """What `Surrogate` is pickled as."""
    return Surrogate(pkgutil.resolve_name(name), args, homogeneous)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    # equality with what is no name, such as a tensor, may be anything
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
