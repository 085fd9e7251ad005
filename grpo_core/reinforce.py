"""Reinforcement learning of your model: `python -m grpo_core.reinforce`."""

from grpo_core.runs.reinforce import main

if __name__ == "__main__":
    raise SystemExit(main())
