"""GRPO beside PPO and DPO: `python -m grpo_core.compare`."""

from grpo_core.runs.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
