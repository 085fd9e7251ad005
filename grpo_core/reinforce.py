"""Reinforcement learning of your model: `python -m grpo_core.reinforce`."""

from grpo_core.cli.command import training_command
from grpo_core.runs.config import RunConfig

main = training_command("grpo_core.reinforce", RunConfig, "grpo_core.runs.run")

if __name__ == "__main__":
    raise SystemExit(main())
