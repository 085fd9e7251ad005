"""GRPO beside PPO and DPO: `python -m grpo_core.compare`."""

from grpo_core.cli.command import training_command
from grpo_core.runs.demo.config import CompareConfig

main = training_command("grpo_core.compare", CompareConfig, "grpo_core.runs.compare")

if __name__ == "__main__":
    raise SystemExit(main())
