"""Curves of runs: `python -m grpo_core.plot`."""

from grpo_core.runs.plots import main

if __name__ == "__main__":
    raise SystemExit(main())
