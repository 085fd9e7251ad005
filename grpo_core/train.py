"""The embedded run: `python -m grpo_core.train`."""

from grpo_core.runs.demo.main import main

if __name__ == "__main__":
    raise SystemExit(main())
