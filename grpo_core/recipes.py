"""The table of methods: `python -m grpo_core.recipes`."""

from grpo_core.runs.recipes import main

if __name__ == "__main__":
    raise SystemExit(main())
