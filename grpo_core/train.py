"""The demo run: `python -m grpo_core.train`."""

from grpo_core.cli.command import training_command
from grpo_core.runs.demo.config import DemoConfig

main = training_command("grpo_core.train", DemoConfig, "grpo_core.runs.demo.demo")

if __name__ == "__main__":
    raise SystemExit(main())
