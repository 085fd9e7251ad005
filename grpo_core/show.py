"""A run's console, replayed: `python -m grpo_core.show`."""

from grpo_core.runs.show import main

if __name__ == "__main__":
    raise SystemExit(main())
