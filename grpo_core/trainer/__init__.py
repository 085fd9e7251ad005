"""The trainer: rollout, score, advantage, pack, loss, backward, optimizer.

Read `trainer` first: `step` and `update` show these stages in order. `rollout` (with `decode`) and
`engine` sample completions, `environment` those of several turns, `ahead` and `worker` those of the
next step. `rewards` and `rules` score them, `groups` computes advantages, `batch` packs rows,
`forward` calls the model. `loop` repeats the step, `checkpoint` saves a run, `signals` stop it.
`distributed` and `sharding` are for several ranks; `monitor`, `samples`, `console` log.
"""

from typing import TYPE_CHECKING

from grpo_core.lazy import exports

if TYPE_CHECKING:
    from grpo_core.trainer.batch import Batch, pack
    from grpo_core.trainer.config import TrainerConfig
    from grpo_core.trainer.rollout import Problem, Rollout, Sampling
    from grpo_core.trainer.trainer import Trainer

__all__ = ["Batch", "Problem", "Rollout", "Sampling", "Trainer", "TrainerConfig", "pack"]

__getattr__ = exports(
    __name__,
    {
        "batch": "Batch pack",
        "config": "TrainerConfig",
        "rollout": "Problem Rollout Sampling",
        "trainer": "Trainer",
    },
)


def __dir__() -> list[str]:
    return __all__
